"""Samples of a prompt, documents from their beginning, why a row ended, and how a result is shown."""
import pytest
from experiments import generate_clearly, random_lm

from mtp_jax.config import BadInput

SAMPLED = {'max_tokens': 12, 'temperature': 1.0}


@pytest.fixture(scope='module')
def lm(tmp_path_factory):
  return random_lm(tmp_path_factory.mktemp('generation'), model={'layers': 4, 'futures': 3}, data={'length': 128})


def test_n_samples_are_those_of_the_prompt_written_n_times(lm):
  """With one seed, whose rows are numbered."""
  together = generate_clearly(lm, ['a', 'b'], n=3, seed=4, **SAMPLED)
  written = lm.generate(['a', 'a', 'a', 'b', 'b', 'b'], seed=4, **SAMPLED)
  assert together.ids == written.ids and len(set(map(tuple, together.ids))) == 6
  assert lm.generate('a', n=2, max_tokens=5).text[0] == lm.generate('a', n=2, max_tokens=5).text[1]  # greedy


def test_the_samples_of_a_prompt_with_a_seed_of_its_own_are_those_that_it_has_alone(lm):
  together = generate_clearly(lm, ['a', 'b'], n=2, seed=[4, 9], **SAMPLED)
  alone = [lm.generate('a', n=2, seed=4, **SAMPLED).ids, lm.generate('b', n=2, seed=[9], **SAMPLED).ids]
  assert together.ids == [*alone[0], *alone[1]]
  assert together.ids[0] == lm.generate('a', seed=4, **SAMPLED).ids[0] != together.ids[1]


def test_numbers_of_a_prompt_hold_for_each_of_its_samples(lm):
  several = lm.generate(['a', 'b'], n=2, max_tokens=[3, 7], temperature=[0.0, 2.0], seed=1)
  greedy = lm.generate('a', max_tokens=3)
  assert several.ids[0] == several.ids[1] == greedy.ids[0]
  assert [len(row) for row in several.ids[2:]] == [7, 7] and several.ids[2] != several.ids[3]


def test_without_a_prompt_a_document_is_generated_from_its_beginning(lm):
  """What follows bos, then what follows the first two tokens, is one text."""
  whole = generate_clearly(lm, None, max_tokens=9)
  rest = lm.generate([whole.ids[0][:2]], max_tokens=7)
  assert lm.generate(max_tokens=9).ids == whole.ids and whole.ids[0][2:] == rest.ids[0]
  assert len(lm.generate(n=3, **SAMPLED).ids) == 3


def test_why_a_row_ended_is_told_by_its_last_token(lm):
  """At temperature 3 every id is likely, so that rows of 60 tokens often reach an end."""
  free = lm.generate(['a'] * 24, max_tokens=60, temperature=3.0)
  for ids, reason in zip(free.ids, free.finish_reason):
    assert reason == ('eos' if ids[-1] == lm.tokenizer.eos else 'length') and (reason == 'eos' or len(ids) == 60)
  assert {*free.finish_reason} == {'eos', 'length'}
  stopped = lm.generate(['a'] * 24, max_tokens=60, temperature=3.0, stop=['t', 'e'])
  for text, ids, reason in zip(stopped.text, stopped.ids, stopped.finish_reason):
    assert (reason == 'stop') == (ids[-1] in {*b'te'}) and not {*text} & {*'te'}
  assert 'stop' in stopped.finish_reason


def test_a_model_and_a_generation_are_shown_in_two_lines(lm):
  """Not with all their arrays."""
  generation = lm.generate('a', max_tokens=60)
  for shown, facts in ((repr(lm), ('step 3', 'futures 3 (parallel)', 'tokenizer bytes of 259 ids', 'float32')),
                       (repr(generation), ('rows 1', 'tokens per forward', 'Generation'))):
    assert len(shown.splitlines()) == 2 and max(map(len, shown.splitlines())) < 160
    assert all(fact in shown for fact in facts)


@pytest.mark.parametrize('n', [0, -1, 1.5, None, [1, 2]], ids=str)
def test_a_wrong_number_of_samples_is_bad_input(lm, n):
  with pytest.raises(BadInput, match='n='):
    lm.generate('a', n=n)
