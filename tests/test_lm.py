"""The face of a trained model: what goes in, what comes out, and figures that agree with each other."""
import dataclasses

import jax
import numpy as np
import pytest
from experiments import experiment, random_state, write

import mtp_jax
from mtp_jax.config import BadInput
from mtp_jax.decode.engine import Text
from mtp_jax.decode.requests import Criterion

PROMPTS = ['a', 'the 12 é', '.']


@pytest.fixture(scope='module')
def lm(tmp_path_factory):
  """Three futures, random weights with a large embedding, so that the argmax of one token differs from that of another."""
  folder = tmp_path_factory.mktemp('lm')
  config = experiment(folder, model={'layers': 4, 'futures': 3}, objective={'weights': (1.0,)}, data={'length': 128})
  write(folder / 'run', config, random_state(config, seed=5))
  return mtp_jax.load(folder / 'run')


@pytest.fixture(scope='module')
def plain(lm):
  return lm.generate(PROMPTS, max_tokens=20, draft=0)


def test_the_record_travels_with_the_model(lm):
  assert (lm.step, lm.record['step'], lm.config.model.futures, lm.tokenizer.size) == (3, 3, 3, 259)


@pytest.mark.parametrize('draft', [1, 2, None])
def test_the_output_does_not_depend_on_the_draft(lm, plain, draft):
  found = lm.generate(PROMPTS, max_tokens=20, draft=draft)
  assert found.ids == plain.ids and found.text == plain.text
  assert found.forwards <= plain.forwards and len(found.acceptance) == (2 if draft is None else draft)


def test_a_batch_says_what_its_prompts_say_alone(lm, plain):
  assert [lm.generate(prompt, max_tokens=20, draft=0).text[0] for prompt in PROMPTS] == plain.text


def test_text_bytes_and_ids_are_the_same_prompt(lm, plain):
  ids = [np.frombuffer(prompt.encode(), np.uint8).tolist() for prompt in PROMPTS]
  for prompts in ([prompt.encode() for prompt in PROMPTS], ids, [np.array(row, np.int32) for row in ids]):
    assert lm.generate(prompts, max_tokens=20, draft=0).ids == plain.ids


def test_plain_autoregression_speaks_one_token_a_forward(plain):
  assert plain.tokens == plain.forwards == sum(map(len, plain.ids)) and plain.tokens_per_forward == 1.0
  assert plain.acceptance == [] and all(depth == 0 for row in plain.depths for depth in row)
  assert [len(row) for row in plain.ids] == [20, 20, 20] or any(row[-1] == 257 for row in plain.ids)


def test_max_tokens_and_the_end_of_a_document_end_a_row(lm):
  """At temperature 3 every id is likely, so that rows of 60 tokens often meet their end."""
  found = lm.generate(['a'] * 24, max_tokens=60, temperature=3.0)
  ended = [row[-1] == lm.tokenizer.eos for row in found.ids]
  assert any(ended) and not all(ended)
  for row, end in zip(found.ids, ended):
    assert len(row) == 60 or end
    assert lm.tokenizer.eos not in row[:-1] and not {lm.tokenizer.bos, lm.tokenizer.pad} & {*row} and max(row) < lm.tokenizer.size


def test_ids_text_and_depths_belong_together(lm):
  found = lm.generate(PROMPTS, max_tokens=20)
  assert found.text == [lm.tokenizer.text(row) for row in found.ids]
  assert [len(row) for row in found.depths] == [len(row) for row in found.ids] and found.tokens == sum(map(len, found.ids))


@pytest.fixture(scope='module')
def agreeing(lm):
  """Its blocks add nothing and its tokens embed alike, so that every future says the same: each draft is accepted, but for those before the first."""
  def change(path, x):
    name = jax.tree_util.keystr(path)
    return x * 0 if 'wo_HKD' in name or 'down_FD' in name else np.repeat(np.asarray(x)[:1], len(x), 0) if '.embed_VD' in name else x
  return dataclasses.replace(lm, model=jax.tree_util.tree_map_with_path(change, lm.model))


@pytest.mark.parametrize('max_tokens', [1, 13, 14, 15])
@pytest.mark.parametrize('name', ['lm', 'agreeing'])
def test_tokens_are_forwards_and_accepted_drafts(request, name, max_tokens):
  """Depths count the accepted drafts; the pass over the prompt has none.

  A row that is cut off lacks its last forward's own token; a draft that has no room is not offered.
  """
  found = request.getfixturevalue(name).generate('ab', max_tokens=max_tokens)
  depths = np.bincount(found.depths[0], minlength=3)
  assert found.tokens == depths.sum() and found.forwards - depths[0] in (0, 1)
  assert found.accepted == depths[1:].tolist() and sum(found.passes) == found.forwards
  assert found.offered[0] <= found.forwards - 1 and found.offered[1] <= found.accepted[0]
  assert found.tokens_per_forward == found.tokens / found.forwards


def test_drafts_are_accepted_when_the_futures_agree(agreeing):
  found = agreeing.generate('ab', max_tokens=1 + 3 * 4)
  assert (found.tokens, found.forwards, found.tokens_per_forward) == (13, 5, 13 / 5)
  assert found.depths[0] == [0] + [1, 2, 0] * 4
  assert found.acceptance == [1.0, 1.0] and found.offered == [4, 4] and found.passes == [1, 0, 4]


def test_a_sample_depends_on_its_seed_alone(lm):
  sample = lambda prompts, **options: lm.generate(prompts, max_tokens=12, temperature=1.0, **options).ids
  assert sample(['a', 'b'], seed=3) != sample(['a', 'b'], seed=4)
  assert sample(['a', 'b'], seed=3, same_seed=True) == sample(['a', 'b'], seed=3, draft=0)
  assert sample(['a', 'b'], seed=3)[1] == sample('b', seed=4)[0] == sample(['b', 'a'], seed=[4, 9])[0]  # row i samples with seed + i


def test_each_row_has_its_own_numbers(lm):
  """Against the same rows one at a time."""
  own = {'max_tokens': [5, 9, 12], 'temperature': [0.0, 1.0, 0.5], 'top_k': [0, 3, 0], 'top_p': [1.0, 0.8, 0.9], 'seed': [7, 8, 7]}
  found = lm.generate(PROMPTS, **own)
  for i, prompt in enumerate(PROMPTS):
    alone = lm.generate(prompt, **{name: values[i] for name, values in own.items()})
    assert alone.ids[0] == found.ids[i] and len(alone.ids[0]) <= own['max_tokens'][i]


def test_what_streams_is_the_text(lm, plain):
  """Multi-byte characters come whole; with a stop string, what may be its beginning is held back."""
  for options in ({}, {'stop': [plain.text[0][7:9]]}, {'draft': 0, 'stop': ['never', plain.text[1][5:8]]}):
    parts = {row: [] for row in range(3)}
    found = lm.generate(PROMPTS, max_tokens=20, stream=lambda row, ids, text, parts=parts: parts[row].append((ids, text)), **options)
    for row in range(3):
      assert ''.join(text for _, text in parts[row]) == found.text[row]
      assert [token for ids, _ in parts[row] for token in ids] == found.ids[row]
    assert max(map(len, parts.values())) > 1


@pytest.mark.parametrize('pieces', [1, 2, 5])
def test_what_may_begin_a_stop_string_or_a_character_is_held_back(lm, pieces):
  """A text in pieces of some bytes: nothing that is heard is ever taken back, and all of it is heard in the end."""
  for whole, stop, wanted, ended in (('é, then the end; more', ['ends', 'end;', 'e end'], 'é, then th', True), ('is it the en', ['end'], 'is it the en', False)):
    text, heard, kept, raw = Text(lm.tokenizer, stop), '', [], whole.encode()
    for at in range(0, len(raw), pieces):
      ids, said = text.grow(list(raw[at:at + pieces]), last=at + pieces >= len(raw))
      heard, kept = heard + said, kept + ids
      assert wanted.startswith(heard)
    assert (heard, text.whole, text.stopped) == (wanted, wanted, ended)
    assert bytes(kept) == (raw[:raw.index(b'e end') + 5] if ended else raw)


@pytest.mark.parametrize('draft', [0, 2])
def test_a_stop_string_ends_the_row_before_it_and_only_that_row(lm, plain, draft):
  raw = [lm.tokenizer.decode(row) for row in plain.ids]
  stop = raw[0][6:8].decode('latin-1') if raw[0][6:8].isascii() else plain.text[0][4:6]
  found = lm.generate(PROMPTS, max_tokens=20, draft=draft, stop=stop)
  for row in range(3):
    before, met, _ = raw[row].partition(stop.encode())
    assert found.text[row] == before.decode(errors='replace')
    assert lm.tokenizer.decode(found.ids[row]) == before + met  # the ids end with the token that completes it
    assert len(found.ids[row]) == len(found.depths[row])
  assert len(found.ids[0]) < 20


def test_a_stop_string_met_early_ends_its_row_while_others_run_on(lm):
  """The others go on for many passes of the host; the ended row gains nothing, neither ids nor stream."""
  for seed in range(0, 60, 3):
    options = {'max_tokens': 60, 'temperature': 2.0, 'seed': seed}
    free = lm.generate(PROMPTS, draft=0, **options)
    raw = [lm.tokenizer.decode(row) for row in free.ids]
    places = [(b, at) for b in range(3) for at in range(12) if raw[b][at:at + 2].isascii() and all(raw[b][at:at + 2] not in raw[other] for other in {0, 1, 2} - {b})]
    if places and min(map(len, free.ids)) > 40:
      break
  b, at = places[0]
  stop, heard = raw[b][at:at + 2].decode(), {row: [] for row in range(3)}
  found = lm.generate(PROMPTS, draft=1, same_seed=True, stop=[stop], stream=lambda row, ids, text: heard[row].extend(ids), **options)
  end = raw[b].index(stop.encode()) + 2
  assert found.ids == [ids[:end] if row == b else ids for row, ids in enumerate(free.ids)] == [heard[row] for row in range(3)]
  assert found.tokens == sum(map(len, found.ids)) and found.text[b] == raw[b][:end - 2].decode(errors='replace')


@pytest.mark.parametrize('kind', ['causal', 'anticausal'])
def test_a_chain_of_heads_takes_any_drafter(tmp_path, kind):
  config = experiment(tmp_path, model={'layers': 4, 'futures': 3, 'kind': kind}, objective={'weights': (1.0,)}, data={'length': 128})
  write(tmp_path / 'run', config, random_state(config, seed=5))
  chain = mtp_jax.load(tmp_path / 'run')
  wanted = chain.generate(PROMPTS, max_tokens=12, draft=0).ids
  for options in ({'drafter': 'lookup'}, {'drafter': chain, 'draft': 3}, {}):
    assert chain.generate(PROMPTS, max_tokens=12, **options).ids == wanted


def test_adaptive_samples_are_those_of_the_same_seed(lm):
  """Draft lengths depend on timings, the text does not."""
  options = {'max_tokens': 20, 'temperature': 0.8, 'seed': 3}
  assert lm.generate(PROMPTS, adaptive=True, **options).ids == lm.generate(PROMPTS, draft=0, **options).ids


def test_another_model_drafts_and_the_text_is_the_models_own(lm, plain, tmp_path):
  """Itself, which is right always; and another, which seldom is."""
  found = lm.generate(PROMPTS, max_tokens=20, draft=3, drafter=lm)
  assert found.ids == plain.ids and found.acceptance == [1.0] * 3
  config = experiment(tmp_path, model={'layers': 2, 'futures': 1}, objective={'weights': (1.0,)})
  write(tmp_path / 'run', config, random_state(config, seed=9))
  other = mtp_jax.load(tmp_path / 'run')
  for options in ({}, {'adaptive': True}):
    assert lm.generate(PROMPTS, max_tokens=20, draft=2, drafter=other, **options).ids == plain.ids
  assert lm.generate(PROMPTS, max_tokens=20, draft=2, drafter=other, temperature=1.0, same_seed=True).ids == lm.generate(PROMPTS, max_tokens=20, draft=0, temperature=1.0).ids


def test_lookup_drafts_what_followed_before(agreeing, lm, plain):
  """A model that says one token for ever is guessed right as soon as it has said it twice."""
  assert lm.generate(PROMPTS, max_tokens=20, draft=4, drafter='lookup').ids == plain.ids
  found = agreeing.generate('ab', max_tokens=1 + 5 * 4, draft=4, drafter='lookup')
  assert found.forwards <= 6 and found.accepted[-1] >= 3


def test_adaptive_lengths_change_the_passes_but_not_the_text(lm, plain, agreeing):
  found = lm.generate(PROMPTS, max_tokens=20, adaptive=True)
  assert found.ids == plain.ids and sum(found.passes[1:]) > 0 and found.passes[0] == 1
  found = agreeing.generate('ab', max_tokens=31, adaptive=True)  # which lengths it takes depends on timings, that all drafts are right does not
  assert found.accepted == found.offered and found.accepted[0] > 0


def test_lossy_criteria_say_that_they_are(lm, plain):
  assert plain.lossless
  found = lm.generate(PROMPTS, max_tokens=20, criterion=Criterion('lossy_top_k', 250))
  assert not found.lossless and found.forwards < plain.forwards
  assert lm.generate(PROMPTS, max_tokens=20, criterion=Criterion('lossy_top_k', 1)).ids == plain.ids  # the likeliest alone is greedy


def test_prompts_of_one_bucket_share_their_programs(lm):
  from mtp_jax.decode.loop import advance, prefill
  options = {'max_tokens': 7, 'draft': 1}
  lm.generate(['abc', 'de'], **options)
  counts = prefill._cache_size(), advance._cache_size()
  lm.generate(['x' * 20, 'yz'], seed=5, **options)
  lm.generate(['x', 'y' * 15], max_tokens=9, draft=1)
  assert (prefill._cache_size(), advance._cache_size()) == counts


@pytest.mark.parametrize('prompts, options, message', [
    ('a', {'draft': 3}, 'draft=3: this model has 3 futures, so 0 to 2 can draft'),
    ('a', {'draft': -1}, 'draft=-1: '),
    ('', {}, 'prompt: empty'),
    (['a', []], {}, 'prompt: empty'),
    ('a' * 127, {}, 'prompt: 128 tokens with the one that begins it, but max_length=128'),
    ('a' * 100, {'max_tokens': 40}, 'max_tokens=40: a prompt of 101 tokens leaves room for 27 within max_length=128'),
    ('a', {'top_p': 0.0}, 'top_p=0: must be above 0 and at most 1'),
    ('a', {'top_p': 1.5}, 'top_p=1.5: must be'),
    ('a', {'top_k': -1}, 'top_k=-1: must be at least 1, or 0'),
    ('a', {'top_k': 2**31}, 'top_k=2147483648: must be'),
    ('a', {'top_k': 0.5}, 'top_k=0.5: must be at least 1, or 0 for all, a whole number'),
    ('a', {'top_p': 1e-50}, 'top_p=1e-50: must be above 0'),
    ('a', {'temperature': 1e39}, r'temperature=1e\+39: must be'),
    ('a', {'max_tokens': 2**32 + 3}, 'max_tokens=4294967299: must be between'),
    ('a', {'draft': 1.5}, 'draft=1.5: must be'),
    ('a', {'seed': 'x'}, "seed='x': must be a number"),
    (['a', 'b'], {'temperature': [1.0]}, r'temperature=\[1.0\]: must be a number, or 2 of them'),
    ('a', {'stop': ['']}, 'stop='),
    ('a', {'drafter': 'futurs', 'draft': 1}, "drafter='futurs': must be 'futures', 'lookup', or another model"),
    ('a', {'max_tokens': 0}, 'max_tokens=0: must be between 1 and'),
    ('a', {'temperature': -0.5}, 'temperature=-0.5: must be 0'),
    ('a', {'temperature': float('nan')}, 'temperature=nan: must be 0'),
    ('a', {'seed': -1}, 'seed=-1: must be between'),
    ([], {}, r'prompts=\[\]: pass at least one'),
    ([[1, 300]], {}, r'prompts: \[1, 300\] is neither text nor a sequence of ids from 0 to 258'),
    ([[-1]], {}, r'prompts: \[-1\] is neither'),
    ([1, 2], {}, 'prompts: 1 is neither'),
    ([[0.5]], {}, r'prompts: \[0.5\] is neither'),
], ids=str)
def test_bad_arguments_are_bad_input(lm, prompts, options, message):
  with pytest.raises(BadInput, match=message):
    lm.generate(prompts, **options)


def test_a_draft_model_must_share_the_tokenizer(lm):
  foreign = dataclasses.replace(lm, tokenizer=dataclasses.replace(lm.tokenizer, digest='other'))
  with pytest.raises(BadInput, match='drafter: its tokenizer, .*, is not that of this model'):
    lm.generate('a', draft=1, drafter=foreign)


def test_evaluate_counts_every_target_once(lm):
  found = lm.evaluate()
  documents = lm.corpus.sources[0].validation
  assert found['count'][0] == documents.tokens - documents.documents  # no document's bos is predicted
  assert found['bits_per_byte'] == pytest.approx(found['nats'][0] * found['count'][0] / np.log(2) / documents.bytes, rel=1e-12)
  assert len(found['nats']) == len(found['accuracy']) == len(found['count']) == 3


def test_evaluate_takes_as_many_rows_as_asked(lm):
  assert lm.evaluate(2)['count'][0] < lm.evaluate(4)['count'][0] <= 4 * lm.config.data.length


def test_held_out_prompts_are_beginnings_of_documents(lm):
  prompt, = lm.held_out_prompts(1, 10)
  assert len(prompt) == 10 and (prompt == lm.corpus.sources[0].validation.document(0)[:10]).all()
  with pytest.raises(BadInput, match='held-out documents have 2000000 tokens or more, but 1 prompts are wanted'):
    lm.held_out_prompts(1, 1000000)
