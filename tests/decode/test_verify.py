"""Verification by enumeration: the exact distribution of the tokens of a pass."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import BadInput
from mtp_jax.decode.requests import Criterion
from mtp_jax.decode.verify import (
    Sampler,
    accepted_in_a_row,
    accepts,
    correction,
    distribution,
    lossy_accepts,
)

V = 3
GRID = [(temperature, top_k, top_p)
        for temperature in (0.0, 0.6, 1.0, 2.5) for top_k in (0, 1, 2) for top_p in (1.0, 0.7, 0.3)]


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def distributions_by_prefix(rng, depth: int, temperature, top_k, top_p) -> dict:
  """{(): float[V], (0,): float[V], ...}: from random logits for every prefix of up to `depth` tokens.

  One id is never allowed.
  """
  lengths = range(depth + 1)
  prefixes = [prefix for n in lengths for prefix in itertools.product(range(V + 1), repeat=n)]
  logits = rng.standard_normal((len(prefixes), V + 1)) * 2
  logits[:, 1] = -np.inf
  return dict(zip(prefixes, np.asarray(distribution(jnp.asarray(logits), temperature, top_k, top_p))))


def chance(distributions: dict, block, start: int = 0) -> float:
  """Probability of the tokens of a block from `start` on, given those before."""
  return np.prod([distributions[block[:i]][block[i]] for i in range(start, len(block))])


def draft_cases(p: dict, q: dict, depth: int) -> list[tuple]:
  """(drafts, uniform numbers, probability): all drafts, each number just below or just above p / q."""
  cases = []
  for drafts in itertools.product(range(V + 1), repeat=depth):
    if chance(q, drafts) == 0:
      continue
    ratios = [min(1.0, p[drafts[:i]][drafts[i]] / q[drafts[:i]][drafts[i]]) for i in range(depth)]
    for below in itertools.product((True, False), repeat=depth):
      probability = np.prod([r if b else 1 - r for r, b in zip(ratios, below)])
      if probability > 1e-12:
        uniform = [r * (1 - 1e-9) if b else r * (1 + 1e-9) + 1e-300 for r, b in zip(ratios, below)]
        cases.append((drafts, uniform, chance(q, drafts) * probability))
  return cases


@pytest.mark.parametrize('depth', [1, 2, 3])
@pytest.mark.parametrize('drafts_see_each_other', [False, True], ids=['parallel', 'sequential'])
def test_the_distribution_of_a_block_is_that_of_autoregression(depth, drafts_see_each_other):
  """Over all drafts, all ways to accept them and all corrections.

  parallel drafts: q at a depth is the same whatever the drafts before; sequential: q depends on
  them. A block is depth + 1 tokens; a shorter one is completed with tokens drawn from p, as the
  next passes would.
  """
  rng = np.random.default_rng(depth)
  accepted_drafts = jax.jit(lambda p_iV, q_kV, drafts_k, uniform_k: accepted_in_a_row(
      accepts(p_iV[..., :-1, :], q_kV, drafts_k, uniform_k)))
  corrected = jax.jit(correction)
  blocks = list(itertools.product(range(V + 1), repeat=depth + 1))
  for temperature, top_k, top_p in GRID:
    p = distributions_by_prefix(rng, depth, temperature, top_k, top_p)
    q = distributions_by_prefix(rng, depth - 1, temperature, top_k, top_p)
    if not drafts_see_each_other:
      q = {prefix: q[(0,) * len(prefix)] for prefix in q}
    cases = draft_cases(p, q, depth)
    drafts, uniform, weights = zip(*cases)
    assert np.sum(weights) == pytest.approx(1, abs=1e-12)
    p_iV = np.array([[p[x[:i]] for i in range(depth + 1)] for x in drafts])
    q_kV = np.array([[q[x[:i]] for i in range(depth)] for x in drafts])
    accepted = accepted_drafts(p_iV, q_kV, np.array(drafts), np.array(uniform))
    next_V = corrected(p_iV, q_kV, accepted)

    generated = np.zeros((V + 1,) * (depth + 1))
    for x, weight, n, token_V in zip(drafts, weights, np.asarray(accepted), np.asarray(next_V)):
      for token in np.flatnonzero(token_V):
        for rest in itertools.product(range(V + 1), repeat=depth - n):
          block = (*x[:n], token, *rest)
          generated[block] += weight * token_V[token] * chance(p, block, start=n + 1)
    autoregression = np.array([chance(p, block) for block in blocks])
    # uniform numbers are 1e-9 beside p / q
    np.testing.assert_allclose(generated.ravel(), autoregression, rtol=0, atol=1e-7)

    if temperature == 0 or top_k == 1:  # greedy: a draft is accepted iff it is the model's token
      assert np.count_nonzero(autoregression) == 1
      agreeing = [next((i for i in range(depth) if p[x[:i]][x[i]] < 0.5), depth) for x in drafts]
      np.testing.assert_array_equal(accepted, agreeing)


def distribution_numpy(logits, temperature, top_k, top_p):
  """By the words: rank, restrict, normalize, restrict, normalize."""
  order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
  if temperature == 0:
    return np.eye(len(logits))[order[0]]
  p = np.exp((logits - logits.max()) / temperature)
  likeliest = order[:top_k] if top_k else order
  mass, kept = 0.0, []
  for i in likeliest:
    if mass < top_p * p[likeliest].sum() or top_p == 1:
      kept.append(i)
    mass += p[i]
  result = np.zeros(len(logits))
  result[kept] = p[kept] / p[kept].sum()
  return result


def test_a_distribution_is_truncated_and_normalized_as_its_words_say():
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((60, 7)) * 3
  logits[::3, 2] = -np.inf  # not allowed
  logits[1::3, 4] = logits[1::3, 5]  # equal
  logits[2::3, 0] = logits[2::3].max(-1)  # equal at the top
  grid = list(itertools.product((0.0, 0.5, 1.0, 3.0), (0, 1, 3, 9), (1.0, 0.9, 0.5, 1e-6)))
  for row in logits:
    p = distribution(jnp.tile(row, (len(grid), 1)), *(jnp.asarray(x) for x in np.array(grid).T))
    np.testing.assert_allclose(p, [distribution_numpy(row, *options) for options in grid], atol=1e-12)
  untruncated = [distribution_numpy(row, 0.5, 0, 1.0) for row in logits]
  np.testing.assert_allclose(distribution(jnp.asarray(logits), 0.5), untruncated, atol=1e-12)


def test_a_distribution_is_one_at_any_temperature_compiled_or_not():
  logits = jnp.asarray([3.0, 1.0, -np.inf, -4.0], jnp.float32)
  for temperature in (1e-38, 1e-30, 1e-15, 1e-10, 1e-3, 1e30):
    expected = [1, 0, 0, 0] if temperature < 1 else [1 / 3, 1 / 3, 0, 1 / 3]
    for run in (distribution, jax.jit(distribution)):
      p = run(logits, jnp.float32(temperature), jnp.int32(0), jnp.float32(1e-30))
      np.testing.assert_array_equal(p, [1, 0, 0, 0])
      np.testing.assert_allclose(run(logits, jnp.float32(temperature)), expected, atol=1e-6)


def test_the_likeliest_token_is_never_cut():
  """The least top_p there is, times a mass below 1, is no float32 above 0."""
  tiny = jnp.float32(np.finfo(np.float32).tiny)
  p = jax.jit(distribution)(jnp.zeros(4, jnp.float32), jnp.float32(1), jnp.int32(1), tiny)
  np.testing.assert_array_equal(p, [1, 0, 0, 0])


def test_equal_distributions_leave_nothing_to_correct():
  p_V = jnp.array([0.25, 0.75, 0.0])
  p_iV, q_kV = p_V[None].repeat(2, 0), p_V[None]
  for accepted in (0, 1):  # 0 is never drawn from, but is a distribution
    np.testing.assert_array_equal(correction(p_iV, q_kV, jnp.int32(accepted)), p_V)


def test_a_draft_is_accepted_with_probability_p_over_q_exactly():
  p, q = jnp.array([[0.2, 0.8]]), jnp.array([[0.6, 0.4]])
  for draft, uniform, expected in ((0, 0.33, True), (0, 0.34, False), (1, 0.999, True), (0, 0.0, True)):
    assert bool(accepts(p, q, jnp.array([draft]), jnp.array([uniform]))[0]) is expected
  never = jnp.array([[0.0, 1.0]])  # a draft of probability 0 is never accepted
  assert not accepts(never, q, jnp.array([0]), jnp.array([0.0]))[0]


# draft, criterion, threshold, whether it passes, for p = (.5, .3, .15, .05) of entropy 1.142 nats
LOSSY = [
    (0, 'lossy_top_k', 1, True), (1, 'lossy_top_k', 1, False), (1, 'lossy_top_k', 2, True),
    (3, 'lossy_top_k', 3, False), (3, 'lossy_top_k', 4, True),
    (1, 'lossy_distance', 0, False), (0, 'lossy_distance', 0, True),
    (2, 'lossy_distance', 1, False), (2, 'lossy_distance', 2, True),
    # the bound is min(.09, .3 * exp(-1.142) = .0958), then min(.5, .707 * .319 = .2257)
    (2, 'lossy_typical', 0.09, True), (3, 'lossy_typical', 0.09, False),
    (2, 'lossy_typical', 0.5, False), (1, 'lossy_typical', 0.5, True)]


@pytest.mark.parametrize('draft, name, threshold, expected', LOSSY)
def test_a_lossy_criterion_is_its_inequality(draft, name, threshold, expected):
  p_V = jnp.array([[0.5, 0.3, 0.15, 0.05]])
  passes_k = lossy_accepts(Criterion(name, threshold), p_V, jnp.array([draft]))
  assert bool(passes_k[0]) is expected


def batch(rows, **options):
  """A sampler of so many rows; plain sampling at temperature 1 unless options differ."""
  defaults = {
      'seed_B2': np.stack([np.zeros(rows), np.arange(rows)], 1).astype(np.uint32),
      'temperature_B': np.ones(rows, np.float32),
      'top_k_B': np.zeros(rows, np.int32),
      'top_p_B': np.ones(rows, np.float32),
      'allowed_V': np.ones(4, bool),
      'greedy': False}
  return Sampler(**defaults | options)


def test_a_block_is_never_shorter_than_its_least():
  logits = jnp.zeros((2, 4, 4)).at[..., 2].set(9.0)
  drafts = jnp.array([[1, 2, 2], [2, 1, 1]])
  positions, cold = jnp.arange(4)[None].repeat(2, 0), np.zeros(2, np.float32)
  for min_block, expected in ((1, [0, 1]), (2, [1, 1]), (3, [2, 2]), (9, [3, 3])):
    sampler = batch(2, greedy=True, temperature_B=cold, criterion=Criterion(min_block=min_block))
    accepted, token = sampler.verify(logits, drafts, None, positions)
    assert accepted.tolist() == expected and token.tolist() == [2, 2]


def test_a_lossy_criterion_judges_at_the_rows_temperature_and_the_next_token_follows_p():
  """p(draft) is .15 at temperature 1 and .05 at .5; the bounds are .0958 and .09.

  A rejected draft is replaced by a draw from p, which may be that draft again, not from the excess
  of p over q.
  """
  n, p = 20_000, np.array([0.5, 0.3, 0.15, 0.05])
  logits, positions = jnp.tile(jnp.log(p), (n, 2, 1)), jnp.tile(jnp.arange(2), (n, 1))
  drafts = jnp.full((n, 1), 2)
  for temperature, expected in ((1.0, 1), (0.5, 0), (0.0, 1)):
    temperature_B = np.full(n, temperature, np.float32)
    sampler = batch(n, temperature_B=temperature_B, criterion=Criterion('lossy_typical', 0.09))
    accepted, token = sampler.verify(logits, drafts, sampler.one_hot(drafts), positions)
    assert set(np.asarray(accepted).tolist()) == {expected}
    p_V = np.eye(4)[0]
    if temperature:
      p_V = p**(1 / temperature) / (p**(1 / temperature)).sum()
    assert_frequencies(np.bincount(token, minlength=4) / n, p_V, n)


def assert_frequencies(frequencies, expected, n: int):
  """Within 4.5 standard errors of n draws."""
  bound = 4.5 * np.sqrt(expected * (1 - expected) / n) + 1e-12
  np.testing.assert_array_less(np.abs(frequencies - expected), bound)


def test_a_batch_of_temperature_0_is_the_greedy_batch():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.standard_normal((50, 3, 4)))
  drafts = jnp.asarray(rng.integers(0, 4, (50, 2)))
  positions, cold = jnp.arange(3)[None].repeat(50, 0), np.zeros(50, np.float32)
  greedy = batch(50, temperature_B=cold, greedy=True).verify(logits, drafts, None, positions)
  for options in ({}, {'same_seed': True}, {'truncated': True}):
    sampler = batch(50, temperature_B=cold, **options)
    sampled = sampler.verify(logits, drafts, sampler.one_hot(drafts), positions)
    np.testing.assert_array_equal(sampled, greedy)
  assert len(set(np.asarray(greedy[0]).tolist())) == 3


def test_random_numbers_differ_by_row_position_and_stream():
  """20,000 rows with two drafts: drafts, the first token and acceptance have their frequencies."""
  n, rng = 20_000, np.random.default_rng(1)
  q_logits, p_logits = rng.standard_normal((2, 4)), rng.standard_normal((3, 4))
  in_every_row = lambda x: jnp.asarray(x)[None].repeat(n, 0)
  sampler, positions = batch(n), in_every_row(np.arange(5, 8))
  drafts, q = sampler.draft(in_every_row(q_logits), positions[:, :2])
  accepted, token = sampler.verify(in_every_row(p_logits), drafts, q, positions)
  drafts, accepted, token, q = (np.asarray(x) for x in (drafts, accepted, token, q[0]))
  p = np.asarray(distribution(jnp.asarray(p_logits), 1.0))
  np.testing.assert_allclose(q, distribution(jnp.asarray(q_logits), 1.0), rtol=1e-6)

  pairs = np.histogram2d(*drafts.T, bins=(range(5), range(5)))[0] / n
  assert_frequencies(pairs, np.outer(q[0], q[1]), n)  # each follows its distribution, independently
  first = np.where(accepted > 0, drafts[:, 0], token)
  assert_frequencies(np.bincount(first, minlength=4) / n, p[0], n)
  overlap = np.minimum(p[:2], q).sum(1)
  at_least = np.array([(accepted >= 1).mean(), (accepted == 2).mean()])
  assert_frequencies(at_least, np.array([overlap[0], overlap.prod()]), n)
  last = token[accepted == 2]
  assert_frequencies(np.bincount(last, minlength=4) / len(last), p[2], len(last))


@pytest.mark.parametrize('arguments, message', [
    (('exakt',), "criterion=exakt: no such criterion; did you mean 'exact'"),
    (('exact', 1), 'threshold=1: for exact it must be 0'),
    (('lossy_top_k', 0), 'threshold=0: for lossy_top_k it must be at least 1'),
    (('lossy_distance', -1), 'threshold=-1: for lossy_distance'),
    (('lossy_typical', 1), 'threshold=1: for lossy_typical it must be between 0 and 1'),
    (('exact', 0, 0), 'min_block=0: must be at least 1'),
])
def test_a_criterion_out_of_range_is_bad_input(arguments, message):
  with pytest.raises(BadInput, match=message):
    Criterion(*arguments)


def test_only_the_exact_criterion_is_lossless():
  assert Criterion().lossless and not Criterion(min_block=2).lossless
  lossy = ('lossy_top_k', 1), ('lossy_distance', 1), ('lossy_typical', 0.5)
  assert not any(Criterion(*arguments).lossless for arguments in lossy)
