"""The face of a trained model: what goes in, what comes out, and figures that agree with each other."""
import dataclasses

import jax
import numpy as np
import pytest
from test_checkpoint import experiment, random_state, write

import mtp_jax
from mtp_jax.config import BadInput

PROMPTS = ['a', 'the 12 é', '']


@pytest.fixture(scope='module')
def lm(tmp_path_factory):
  """Three futures, random weights with a large embedding, so that the argmax of one token differs from that of another."""
  folder = tmp_path_factory.mktemp('lm')
  config = experiment(folder, model={'layers': 4, 'futures': 3}, objective={'weights': (1.0,)})
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
  """Depths count the accepted drafts; all forwards but the first had drafts.

  A row that is cut off lacks its last forward's own token.
  """
  found = request.getfixturevalue(name).generate('ab', max_tokens=max_tokens)
  depths = np.bincount(found.depths[0], minlength=3)
  assert found.tokens == depths.sum() and found.forwards - depths[0] in (0, 1)
  assert found.accepted == depths[1:].tolist() and found.offered == [found.forwards - 1, *found.accepted[:-1]]
  assert found.tokens_per_forward == found.tokens / found.forwards


def test_drafts_are_accepted_when_the_futures_agree(agreeing):
  found = agreeing.generate('ab', max_tokens=1 + 3 * 4)
  assert (found.tokens, found.forwards, found.tokens_per_forward) == (13, 5, 13 / 5)
  assert found.depths[0] == [0] + [1, 2, 0] * 4
  assert found.acceptance == [1.0, 1.0]  # the first forward had no drafts


def test_a_sample_depends_on_its_seed_alone(lm):
  sample = lambda prompts, **options: lm.generate(prompts, max_tokens=12, temperature=1.0, **options).ids
  assert sample(['a', 'b'], seed=3) == sample(['a', 'b'], seed=3, draft=0) != sample(['a', 'b'], seed=4)
  assert sample(['a', 'b'], seed=3)[1] == sample('b', seed=4)[0]  # row i samples with seed + i


@pytest.mark.parametrize('prompts, options, message', [
    ('a', {'draft': 3}, 'draft=3: this model has 3 futures, so 0 to 2 can draft'),
    ('a', {'draft': -1}, 'draft=-1: '),
    ('a', {'max_tokens': 0}, 'max_tokens=0: must be at least 1'),
    ('a', {'temperature': -0.5}, 'temperature=-0.5: must be 0'),
    ('a', {'temperature': float('nan')}, 'temperature=nan: must be 0'),
    ('a', {'seed': -1}, 'seed=-1: must lie between'),
    ([], {}, r'prompts=\[\]: pass at least one'),
    ([[1, 300]], {}, r'prompts: \[1, 300\] is neither text nor a sequence of ids from 0 to 258'),
    ([[-1]], {}, r'prompts: \[-1\] is neither'),
    ([1, 2], {}, 'prompts: 1 is neither'),
    ([[0.5]], {}, r'prompts: \[0.5\] is neither'),
], ids=str)
def test_bad_arguments_are_bad_input(lm, prompts, options, message):
  with pytest.raises(BadInput, match=message):
    lm.generate(prompts, **options)


def test_evaluate_counts_every_target_once(lm):
  found = lm.evaluate()
  documents = lm.prepared.validation
  assert found['count'][0] == len(documents.tokens) - documents.documents  # no document's bos is predicted
  assert found['bits_per_byte'] == pytest.approx(found['nats'][0] * found['count'][0] / np.log(2) / documents.bytes, rel=1e-12)
  assert len(found['nats']) == len(found['accuracy']) == len(found['count']) == 3


def test_evaluate_takes_as_many_rows_as_asked(lm):
  assert lm.evaluate(2)['count'][0] < lm.evaluate(4)['count'][0] <= 4 * lm.config.data.length


def test_held_out_prompts_are_beginnings_of_documents(lm):
  prompt, = lm.held_out_prompts(1, 10)
  assert len(prompt) == 10 and (prompt == lm.prepared.validation.document(0)[:10]).all()
  with pytest.raises(BadInput, match='held-out documents have 2000000 tokens or more, but 1 prompts are wanted'):
    lm.held_out_prompts(1, 1000000)
