"""A trained model: what goes in, what comes out, and figures that agree with each other."""
import dataclasses
import json

import jax
import numpy as np
import pytest
from experiments import generate_clearly, random_lm, random_state, write

import mtp_jax
from mtp_jax.config import BadInput, MeshConfig
from mtp_jax.decode.detokenizer import Detokenizer
from mtp_jax.decode.requests import Criterion
from mtp_jax.lm import language_model as lm_module

PROMPTS = ['a', 'the 12 é', '.']


@pytest.fixture(scope='module')
def lm(tmp_path_factory):
  """Three futures, random weights with a large embedding, so that tokens differ in their argmax."""
  return random_model_of(tmp_path_factory.mktemp('lm'), futures=3)


def random_model_of(folder, seed: int = 5, **model) -> mtp_jax.LanguageModel:
  return random_lm(folder, seed, model={'layers': 4} | model, objective={'weights': (1.0,)}, data={'length': 128})


@pytest.fixture(scope='module')
def plain(lm):
  """Without a near tie, so that every program that continues these prompts must give this text."""
  return generate_clearly(lm, PROMPTS, max_tokens=20, draft=0)


def test_the_record_travels_with_the_model(lm):
  assert (lm.step, lm.record['step']) == (3, 3)
  assert (lm.config.model.futures, lm.tokenizer.size) == (3, 259)


@pytest.mark.parametrize('draft', [1, 2, None])
def test_the_output_does_not_depend_on_the_draft(lm, plain, draft):
  drafted = lm.generate(PROMPTS, max_tokens=20, draft=draft)
  assert drafted.ids == plain.ids and drafted.text == plain.text
  assert drafted.forwards <= plain.forwards
  assert len(drafted.acceptance) == (2 if draft is None else draft)


def test_a_batch_generates_what_its_prompts_generate_alone(lm, plain):
  alone = [lm.generate(prompt, max_tokens=20, draft=0).text[0] for prompt in PROMPTS]
  assert alone == plain.text


def test_text_bytes_and_ids_are_the_same_prompt(lm, plain):
  as_bytes = [prompt.encode() for prompt in PROMPTS]
  ids = [list(prompt) for prompt in as_bytes]
  for prompts in (as_bytes, ids, [np.array(row, np.int32) for row in ids]):
    assert lm.generate(prompts, max_tokens=20, draft=0).ids == plain.ids


def test_plain_autoregression_generates_one_token_a_forward(plain):
  assert plain.tokens == plain.forwards == sum(map(len, plain.ids))
  assert plain.tokens_per_forward == 1.0 and plain.mean_draft == 0
  assert plain.acceptance == [] and all(depth == 0 for row in plain.depths for depth in row)
  assert [len(row) for row in plain.ids] == [20, 20, 20] or any(row[-1] == 257 for row in plain.ids)


def test_max_tokens_and_the_end_of_a_document_end_a_row(lm):
  """At temperature 3 every id is likely, so that rows of 60 tokens often reach an end."""
  ids, tokens = lm.generate(['a'] * 24, max_tokens=60, temperature=3.0).ids, lm.tokenizer
  ended = [row[-1] == tokens.eos for row in ids]
  assert any(ended) and not all(ended)
  for row, end in zip(ids, ended):
    assert len(row) == 60 or end
    assert tokens.eos not in row[:-1] and not {tokens.bos, tokens.pad} & {*row}
    assert max(row) < tokens.size


def test_ids_text_and_depths_belong_together(lm):
  generation = lm.generate(PROMPTS, max_tokens=20)
  assert generation.text == [lm.tokenizer.text(row) for row in generation.ids]
  lengths = [len(row) for row in generation.ids]
  assert [len(row) for row in generation.depths] == lengths and generation.tokens == sum(lengths)


@pytest.fixture(scope='module')
def agreeing(lm):
  """A model whose futures all predict the same token, so that every draft is accepted.

  Its blocks add nothing, and its tokens have the same embedding.
  """
  def change(path, x):
    name = jax.tree_util.keystr(path)
    if 'wo_HKD' in name or 'down_FD' in name:
      return x * 0
    return np.repeat(np.asarray(x)[:1], len(x), 0) if '.embed_VD' in name else x

  return dataclasses.replace(lm, model=jax.tree_util.tree_map_with_path(change, lm.model))


@pytest.mark.parametrize('max_tokens', [1, 13, 14, 15])
@pytest.mark.parametrize('name', ['lm', 'agreeing'])
def test_tokens_are_forwards_and_accepted_drafts(request, name, max_tokens):
  """Depths count the accepted drafts; the pass over the prompt has none.

  A row that reaches its limit may lack its last forward's own token; a draft beyond the limit is
  not offered.
  """
  generation = request.getfixturevalue(name).generate('ab', max_tokens=max_tokens)
  depths = np.bincount(generation.depths[0], minlength=3)
  tokens, forwards = generation.tokens, generation.forwards
  assert tokens == depths.sum() <= max_tokens and forwards - depths[0] in (0, 1)
  assert generation.accepted == depths[1:].tolist() and sum(generation.passes) == forwards
  assert generation.offered[0] <= forwards - 1 and generation.offered[1] <= generation.accepted[0]
  assert generation.tokens_per_forward == tokens / forwards


def test_drafts_are_accepted_when_the_futures_agree(agreeing):
  generation = agreeing.generate('ab', max_tokens=1 + 3 * 4)
  assert (generation.tokens, generation.forwards, generation.tokens_per_forward) == (13, 5, 13 / 5)
  assert generation.depths[0] == [0] + [1, 2, 0] * 4
  assert generation.acceptance == [1.0, 1.0] and generation.offered == [4, 4]
  assert generation.passes == [1, 0, 4] and generation.mean_draft == 2


def test_a_sample_depends_on_its_seed_alone(lm):
  def sample(prompts, **options):
    return generate_clearly(lm, prompts, max_tokens=12, temperature=1.0, **options).ids

  assert sample(['a', 'b'], seed=3) != sample(['a', 'b'], seed=4)
  assert sample(['a', 'b'], seed=3, same_seed=True) == sample(['a', 'b'], seed=3, draft=0)
  assert sample(['a', 'b'], seed=3)[0] == sample('a', seed=3)[0]
  assert sample('b', seed=4)[0] == sample(['b', 'a'], seed=[4, 9])[0] == sample(['a', 'b'], seed=[7, 4])[1]


def test_no_two_rows_of_calls_with_different_seeds_are_one_sample(lm):
  """Neighbouring seeds share none, as rows of one call share none."""
  for options in ({}, {'same_seed': True}, {'draft': 0}):
    samples = [tuple(ids) for seed in range(4) for ids in lm.generate(
        ['a'] * 4, max_tokens=12, temperature=1.0, seed=seed, **options).ids]
    assert len(set(samples)) == 16


def test_each_row_has_its_own_numbers(lm):
  """Against the same rows one at a time."""
  numbers = {'max_tokens': [5, 9, 12], 'temperature': [0.0, 1.0, 0.5], 'top_k': [0, 3, 0],
             'top_p': [1.0, 0.8, 0.9], 'seed': [7, 8, 7]}
  together = generate_clearly(lm, PROMPTS, **numbers)
  for i, prompt in enumerate(PROMPTS):
    alone = lm.generate(prompt, **{name: values[i] for name, values in numbers.items()})
    assert alone.ids[0] == together.ids[i] and len(alone.ids[0]) <= numbers['max_tokens'][i]


def test_what_streams_is_the_text(lm, plain):
  """Multi-byte characters come whole; what may be the beginning of a stop string is held back."""
  stop = ascii_pair(lm.tokenizer.decode(plain.ids[0]))
  for options in ({}, {'stop': [stop]}, {'draft': 0, 'stop': ['never', plain.text[1][5:8]]}):
    parts = [[], [], []]
    generation = lm.generate(PROMPTS, max_tokens=20, stream=recorder(parts), **options)
    for row in range(3):
      assert ''.join(text for _, text in parts[row]) == generation.text[row]
      assert [token for ids, _ in parts[row] for token in ids] == generation.ids[row]
    assert max(map(len, parts)) > 1


def ascii_pair(raw: bytes) -> str:
  """The first two ASCII bytes beside each other, from the fifth byte on."""
  return next(raw[i:i + 2].decode() for i in range(4, len(raw)) if raw[i:i + 2].isascii())


def recorder(parts: list[list]):
  """A stream that appends (ids, text) to parts[row]."""
  return lambda row, ids, text: parts[row].append((ids, text))


@pytest.mark.parametrize('pieces', [1, 2, 5])
def test_what_may_begin_a_stop_string_or_a_character_is_held_back(lm, pieces):
  """A text in pieces of some bytes: what was streamed stays true, and in the end it is all there."""
  for whole, stop, expected, stopped in (
      ('é, then the end; more', ['ends', 'end;', 'e end'], 'é, then th', True),
      ('is it the en', ['end'], 'is it the en', False)):
    detokenizer, raw = Detokenizer(lm.tokenizer, stop), whole.encode()
    streamed, kept = '', []
    for start in range(0, len(raw), pieces):
      piece, last = list(raw[start:start + pieces]), start + pieces >= len(raw)
      ids, text = detokenizer.add(piece, last)
      streamed, kept = streamed + text, kept + ids
      assert expected.startswith(streamed)
    assert (streamed, detokenizer.text, detokenizer.stopped) == (expected, expected, stopped)
    assert bytes(kept) == (raw[:raw.index(b'e end') + 5] if stopped else raw)


@pytest.mark.parametrize('draft', [0, 2])
def test_a_stop_string_ends_the_row_before_it_and_only_that_row(lm, plain, draft):
  raw = [lm.tokenizer.decode(row) for row in plain.ids]
  stop = ascii_pair(raw[0])
  generation = lm.generate(PROMPTS, max_tokens=20, draft=draft, stop=stop)
  for row in range(3):
    before, match, _ = raw[row].partition(stop.encode())
    assert generation.text[row] == before.decode(errors='replace')
    # the ids end with the token that completes the stop string
    assert lm.tokenizer.decode(generation.ids[row]) == before + match
    assert len(generation.ids[row]) == len(generation.depths[row])
  assert len(generation.ids[0]) < 20


def test_a_stop_string_met_early_ends_its_row_while_others_run_on(lm):
  """The others run for many more passes; the ended row gains nothing, neither ids nor stream."""
  for seed in range(0, 60, 3):
    options = {'max_tokens': 60, 'temperature': 2.0, 'seed': seed}
    free = lm.generate(PROMPTS, draft=0, **options)
    raw = [lm.tokenizer.decode(row) for row in free.ids]
    unique = [(b, raw[b][i:i + 2]) for b in range(3) for i in range(12)
              if raw[b][i:i + 2].isascii() and sum(raw[b][i:i + 2] in row for row in raw) == 1]
    if unique and min(map(len, free.ids)) > 40:
      break
  generate_clearly(lm, PROMPTS, draft=0, **options)
  b, stop = unique[0]
  end, parts = raw[b].index(stop) + 2, [[], [], []]
  generation = lm.generate(PROMPTS, draft=1, same_seed=True, stop=[stop.decode()],
                           stream=recorder(parts), **options)
  expected = [ids[:end] if row == b else ids for row, ids in enumerate(free.ids)]
  streamed = [[token for ids, _ in parts[row] for token in ids] for row in range(3)]
  assert generation.ids == expected == streamed
  assert generation.tokens == sum(map(len, expected))
  assert generation.text[b] == raw[b][:end - 2].decode(errors='replace')


@pytest.mark.parametrize('kind', ['causal', 'anticausal'])
def test_a_chain_of_heads_takes_any_drafter(tmp_path, kind):
  chain = random_model_of(tmp_path, futures=3, kind=kind)
  expected = generate_clearly(chain, PROMPTS, max_tokens=12, draft=0).ids
  for options in ({'drafter': 'lookup'}, {'drafter': chain, 'draft': 3}, {}):
    assert chain.generate(PROMPTS, max_tokens=12, **options).ids == expected


def test_adaptive_samples_are_those_of_the_same_seed(lm):
  """Draft lengths depend on timings, the text does not."""
  options = {'max_tokens': 20, 'temperature': 0.8, 'seed': 3}
  plain = generate_clearly(lm, PROMPTS, draft=0, **options)
  assert lm.generate(PROMPTS, adaptive=True, **options).ids == plain.ids


def test_another_model_drafts_and_the_text_is_the_models_own(lm, plain, tmp_path):
  """Itself, which is always right; and another, which rarely is."""
  by_itself = lm.generate(PROMPTS, max_tokens=20, draft=3, drafter=lm)
  assert by_itself.ids == plain.ids and by_itself.acceptance == [1.0] * 3
  another = random_model_of(tmp_path, seed=9, layers=2, futures=1)
  for options in ({}, {'adaptive': True}):
    drafted = lm.generate(PROMPTS, max_tokens=20, draft=2, drafter=another, **options)
    assert drafted.ids == plain.ids
  sampled = lm.generate(PROMPTS, max_tokens=20, draft=2, drafter=another, temperature=1.0, same_seed=True)
  plain = generate_clearly(lm, PROMPTS, max_tokens=20, draft=0, temperature=1.0)
  assert sampled.ids == plain.ids


def test_lookup_drafts_what_followed_before(agreeing, lm, plain):
  """A model that repeats one token is drafted right once it has generated it twice."""
  assert lm.generate(PROMPTS, max_tokens=20, draft=4, drafter='lookup').ids == plain.ids
  repeated = agreeing.generate('ab', max_tokens=1 + 5 * 4, draft=4, drafter='lookup')
  assert repeated.forwards <= 6 and repeated.accepted[-1] >= 3


def test_adaptive_lengths_change_the_passes_but_not_the_text(lm, plain, monkeypatch):
  monkeypatch.setattr('mtp_jax.lm.language_model.measure_pass_seconds', lambda *_: np.array([1, 1.1, 1.2], np.float32))
  monkeypatch.setitem(lm.__dict__, '_pass_costs', {})
  adaptive = lm.generate(PROMPTS, max_tokens=20, adaptive=True)
  assert adaptive.ids == plain.ids and sum(adaptive.passes[1:]) > 0


@pytest.mark.parametrize('costs, drafts', [((1, 9, 9), False), ((1, 1.1, 1.2), True)])
def test_adaptive_passes_are_those_of_plain_decoding_where_drafts_cost_too_much(agreeing, monkeypatch, costs, drafts):
  monkeypatch.setattr('mtp_jax.lm.language_model.measure_pass_seconds', lambda *_: np.array(costs, np.float32))
  monkeypatch.setitem(agreeing.__dict__, '_pass_costs', {})
  found = agreeing.generate('ab', max_tokens=31, adaptive=True)
  assert (sum(found.passes[1:]) > 0) == drafts and (found.passes[0] == 31) == (not drafts)
  assert found.accepted == found.offered  # all drafts are right


def test_lossy_criteria_report_that_they_are(lm, plain):
  assert plain.lossless
  lossy = lm.generate(PROMPTS, max_tokens=20, criterion=Criterion('lossy_top_k', 250))
  assert not lossy.lossless and lossy.forwards < plain.forwards
  greedy = lm.generate(PROMPTS, max_tokens=20, criterion=Criterion('lossy_top_k', 1))
  assert greedy.ids == plain.ids  # the likeliest token alone


@pytest.mark.parametrize('prompts, options, message', [
    ('a', {'draft': 3}, 'draft=3: this model has 3 futures, so 0 to 2 can draft'),
    ('a', {'draft': -1}, 'draft=-1: '),
    ('', {}, 'prompt: empty'),
    (['a', []], {}, 'prompt: empty'),
    ('a' * 127, {}, 'prompt: 128 tokens with the one that begins it, but max_length=128'),
    ('a' * 100, {'max_tokens': 40},
     'max_tokens=40: a prompt of 101 tokens leaves room for 27 within max_length=128'),
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
    ('a', {'drafter': 'futurs', 'draft': 1},
     "drafter='futurs': must be 'futures', 'lookup', or another model"),
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
  tokens = dataclasses.replace(lm.tokenizer, digest='other')
  foreign = dataclasses.replace(lm, tokenizer=tokens)
  with pytest.raises(BadInput, match='drafter: its tokenizer, .*, is not that of this model'):
    lm.generate('a', draft=1, drafter=foreign)


def test_evaluate_counts_every_target_once(lm):
  results, documents = lm.evaluate(), lm.corpus.sources[0].validation
  count = documents.tokens - documents.documents  # no document's bos is predicted
  assert results['count'][0] == count
  bits = results['nats'][0] * count / np.log(2)
  assert results['bits_per_byte'] == pytest.approx(bits / documents.bytes, rel=1e-12)
  assert len(results['nats']) == len(results['accuracy']) == len(results['count']) == 3


def test_an_expected_speed_up_is_tokens_per_forward_over_the_cost_of_a_forward(lm):
  results = lm.evaluate(rows=2)
  speed_up = lm.expected_speed_up(results)
  seconds = speed_up['seconds_per_forward']
  assert len(seconds) == 3 and min(seconds) > 0
  for choice in ('greedy', 'sampled'):
    costs, tokens = np.array(seconds) / seconds[0], results[f'tokens_per_forward_{choice}']
    np.testing.assert_allclose(speed_up[f'speed_up_{choice}'], tokens / costs, rtol=1e-12)
    assert speed_up[f'speed_up_{choice}'][0] == 1


def test_evaluate_takes_as_many_rows_as_asked(lm):
  assert lm.evaluate(rows=2)['count'][0] < lm.evaluate(rows=4)['count'][0] <= 4 * lm.config.data.length


@pytest.mark.parametrize('mesh', [{}, {'data': 2, 'fsdp': 2}], ids=str)
def test_evaluate_computes_few_more_rows_than_asked(lm, tmp_path, monkeypatch, mesh):
  """And the same figures as in one batch of config.train.evaluate_rows, 16."""
  write(tmp_path, dataclasses.replace(lm.config, mesh=MeshConfig(**mesh)), random_state(lm.config, seed=5))
  one, computed, figures = mtp_jax.load(tmp_path), [], lm_module.evaluate

  def recorded(config, model, batches, *rest):
    batches = list(batches)
    computed.append([len(batch['tokens']) for batch in batches])
    return figures(config, model, batches, *rest)

  monkeypatch.setattr(lm_module, 'evaluate', recorded)
  every = len(one.corpus.held_out(3))
  for rows in (1, 2, 3, 5, 9, None):
    found, asked = one.evaluate(rows=rows), every if rows is None else min(rows, every)
    assert asked <= sum(computed[-1]) <= max(1.5 * asked + one.mesh.size, 16 * -(-asked // 16))
    assert all(n % one.mesh.size == 0 for n in computed[-1])
    with monkeypatch.context() as patch:
      patch.setattr(type(lm), '_evaluation_batch', lambda self, rows: 16)
      expected = one.evaluate(rows=rows)
    assert found['count'] == expected['count']
    np.testing.assert_allclose(found['nats'], expected['nats'], rtol=1e-6)  # sums in another order


@pytest.mark.parametrize('use', [lambda lm: lm.evaluate(rows=1), lambda lm: lm.held_out_prompts(1, 4),
                                 lambda lm: lm.corpus], ids=['evaluate', 'prompts', 'corpus'])
def test_documents_other_than_those_of_training_are_noted_once_wherever_they_are_opened(lm, capsys, use):
  same = {'identity': json.loads(json.dumps({'sources': lm.corpus.identity['sources']}))}
  for record, notes in ((same, 0), ({'identity': {'sources': []}}, 1), ({'identity': {}}, 1)):
    capsys.readouterr()
    opened = dataclasses.replace(lm, record=lm.record | record)
    for _ in range(2):
      use(opened)
    assert capsys.readouterr().err.count('the documents here differ from those of the training run') == notes


def test_held_out_prompts_are_beginnings_of_documents(lm):
  prompt, = lm.held_out_prompts(1, 10)
  document = lm.corpus.sources[0].validation.document(0)
  assert len(prompt) == 10 and (prompt == document[:10]).all()
  message = 'held-out documents have 2000000 tokens or more, but 1 prompts are wanted'
  with pytest.raises(BadInput, match=message):
    lm.held_out_prompts(1, 1000000)
