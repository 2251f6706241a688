"""Scores against a NumPy forward in float64, window by window."""
import dataclasses
import math

import numpy as np
import numpy_forward
import pytest
from experiments import LATENT, experiment, generate_clearly, random_state, write

import mtp_jax
from mtp_jax.config import BadInput, MeshConfig
from mtp_jax.evaluation.scoring import windows
from mtp_jax.tokenizer import decodable

TEXTS = ['', 'a', 'the 12 é', b'\xff 3 ab', 'def f(x):\n  return x']  # none longer than a row


@pytest.fixture(scope='module')
def make(tmp_path_factory):
  """A LanguageModel of random weights: make(mesh={}, length=32, **model)."""
  folder = tmp_path_factory.mktemp('scoring')

  def make(mesh=None, length: int = 32, **model) -> mtp_jax.LanguageModel:
    sizes = {'layers': 5, 'futures': 3, 'heads': 4, 'kv_heads': 2}
    config = experiment(folder, model=sizes | model, data={'length': length})
    number = sum(1 for _ in folder.glob('run*'))
    write(folder / f'run{number}', dataclasses.replace(config, mesh=MeshConfig(**mesh or {})),
          random_state(config, seed=5))
    return mtp_jax.load(folder / f'run{number}')
  return make


@pytest.fixture(scope='module')
def lm(make):
  return make()


def by_hand(lm, text, overlap: int):
  """float64[M, n, V]: what each future says of each token, read in the first window that holds the position."""
  M, L = lm.config.model.futures, lm.config.data.length
  ids = np.concatenate([[lm.tokenizer.bos], lm.tokenizer.encode(text)])
  n = len(ids) - 1
  found = np.full((M, n, lm.config.model.vocab), np.nan)
  for t in range(n):
    start = 0
    while t >= start + L:
      start += L - overlap
    logprobs = numpy_forward.logprobs(lm.model, ids[start:start + L + M])
    for m in range(M):
      if t + m < n:
        found[m, t + m] = logprobs[m, t - start]
  return found


def check(lm, text, overlap: int, score) -> None:
  expected_MnV = by_hand(lm, text, overlap)
  ids = lm.tokenizer.encode(text)
  of_ids = np.take_along_axis(expected_MnV, ids[None, :, None], -1)[..., 0]
  np.testing.assert_array_equal(score.ids, ids)
  np.testing.assert_allclose(score.logprobs, of_ids[:len(score.logprobs)], rtol=0, atol=1e-5)
  for m, row in enumerate(score.logprobs):
    assert np.isnan(row[:m]).all() and not np.isnan(row[m:]).any()


def test_scores_are_those_of_a_float64_forward(make, variant):
  """Of every kind of model, under every future, whatever texts stand beside each other."""
  one = make(**variant)
  for text, score in zip(TEXTS, one.score(TEXTS, futures=3)):
    check(one, text, 0, score)
    assert score.bytes == len(text.encode() if isinstance(text, str) else text)
    if score.bytes:
      assert score.logprob == pytest.approx(float(score.logprobs[0].astype(float).sum()))
      assert score.bits_per_byte == pytest.approx(-score.logprob / math.log(2) / score.bytes)
      assert score.nats[0] == pytest.approx(-score.logprob / len(score.ids))


@pytest.mark.parametrize('fields', [{}, {'query_rank': 0, 'kind': 'sequential', 'module_input': 'trunk'}], ids=str)
def test_scores_of_latent_attention_are_those_of_a_float64_forward(make, fields):
  one = make(**LATENT | fields)
  for text, score in zip(TEXTS, one.score(TEXTS, futures=3)):
    check(one, text, 0, score)


@pytest.mark.parametrize('kind', ['parallel', 'anticausal', 'sequential'])
def test_future_0_alone_is_that_of_all_futures(make, kind):
  one = make(kind=kind)
  alone, every = one.score(TEXTS[3]), one.score(TEXTS[3], futures=3)
  assert alone[0].logprobs.shape == (1, len(alone[0].ids))
  np.testing.assert_allclose(alone[0].logprobs[0], every[0].logprobs[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize('overlap', [0, 5, 8, 15])
def test_a_long_text_is_read_in_windows(make, overlap):
  """Of 16 inputs; beside texts that fill their windows to the last token, and one more."""
  one = make(length=16, kind='sequential')
  texts = ['0123456789' * 5 + 'abc', 'x' * 16, 'ab' * 8 + 'c', 'z']
  for text, score in zip(texts, one.score(texts, futures=3, overlap=overlap)):
    check(one, text, overlap, score)


@pytest.mark.parametrize('tokens', [0, 1, 15, 16, 17, 40, 41])
def test_every_position_is_read_once_and_from_enough_context(tokens):
  for overlap in (0, 1, 8, 15):
    read = [t for window in windows(0, tokens, 16, overlap) for t in range(window.start + window.repeated, window.stop)]
    assert read == list(range(tokens))
    for window in windows(0, tokens, 16, overlap):
      assert window.stop - window.start <= 16 and (window.start == 0 or window.repeated == overlap)


def test_half_a_row_overlaps_unless_asked_otherwise(make):
  one = make(length=16)
  by_default, asked = one.score('0123456789' * 4), one.score('0123456789' * 4, overlap=8)
  np.testing.assert_array_equal(by_default[0].logprobs, asked[0].logprobs)
  assert not np.array_equal(asked[0].logprobs, one.score('0123456789' * 4, overlap=0)[0].logprobs)


def test_alternatives_are_the_likeliest_ids_that_can_be_generated(lm):
  allowed_V = decodable(lm.config, lm.tokenizer)
  score, = lm.score('the 12', futures=3, top=4)
  expected_MnV = np.where(allowed_V, by_hand(lm, 'the 12', 0), -np.inf)
  for m in range(3):
    for j in range(m, 6):
      order = np.argsort(-expected_MnV[m, j])
      sorted_logprobs = expected_MnV[m, j][order]
      assert (np.diff(-sorted_logprobs[:5]) > 2e-5).all()  # no rounding changes the order
      assert score.top_ids[m, j].tolist() == order[:4].tolist()
      np.testing.assert_allclose(score.top_logprobs[m, j], sorted_logprobs[:4], rtol=0, atol=1e-5)
      assert score.likeliest[m, j] == (order[0] == score.ids[j])
    assert (score.top_ids[m, :m] == -1).all() and np.isnan(score.top_logprobs[m, :m]).all()
  every, = lm.score('a', top=int(allowed_V.sum()))
  assert {*every.top_ids[0, 0].tolist()} == {*np.flatnonzero(allowed_V).tolist()}


def test_what_is_generated_greedily_is_the_likeliest(lm):
  generation = generate_clearly(lm, 'the', max_tokens=20)
  score, = lm.score([[*b'the', *generation.ids[0]]])
  assert score.likeliest[0, 3:].all() and not score.likeliest[0, :3].all()


def test_all_tokens_together_have_probability_one(lm):
  """Those that can be generated, and those that cannot, scored as one-token texts."""
  scores = lm.score([[i] for i in range(lm.tokenizer.size)])
  total = sum(math.exp(score.logprob) for score in scores)
  rest = np.exp(by_hand(lm, 'a', 0)[0, 0, lm.tokenizer.size:]).sum()
  assert total + rest == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize('mesh', [{'fsdp': 2, 'tensor': 2}, {'data': 2, 'context': 2}], ids=str)
def test_scores_on_a_mesh_are_those_on_one_device(make, mesh):
  texts = [*TEXTS, '0123456789' * 7]
  one, several = make(), make(mesh)
  assert several.mesh.size == 4
  for a, b in zip(one.score(texts, futures=3, top=3), several.score(texts, futures=3, top=3)):
    for name in ('logprobs', 'top_logprobs'):
      np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(a.likeliest, b.likeliest)


@pytest.mark.parametrize('texts, options, message', [
    ([], {}, 'texts='), (3, {}, 'texts=3: must be'), ([[1, 300]], {}, r'texts: \[1, 300\] is neither text nor'),
    ('a', {'futures': 0}, 'futures=0: must be between 1 and 3'), ('a', {'futures': 4}, 'futures=4: must be'),
    ('a', {'top': 10**6}, 'top=1000000: must be between 0 and 257'), ('a', {'overlap': 32}, 'overlap=32: must be'),
], ids=str)
def test_what_cannot_be_scored_is_bad_input(lm, texts, options, message):
  with pytest.raises(BadInput, match=message):
    lm.score(texts, **options)


def test_a_score_is_shown_in_two_lines(lm):
  assert len(repr(lm.score('abc')[0]).splitlines()) == 2
