"""Verification by enumeration: the exact law of what a pass emits, for every draft and every way the dice can fall."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import BadInput
from mtp_jax.decode.requests import Criterion
from mtp_jax.decode.verify import Sampler, accepts, correction, in_a_row, law, lossy_accepts

V = 3
GRID = [(temperature, top_k, top_p) for temperature in (0.0, 0.6, 1.0, 2.5) for top_k in (0, 1, 2) for top_p in (1.0, 0.7, 0.3)]


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def laws_by_prefix(rng, depth: int, temperature, top_k, top_p) -> dict:
  """A law for every prefix of up to `depth` tokens, from random logits, one id never allowed: {(): float[V], (0,): float[V], ...}."""
  prefixes = [prefix for n in range(depth + 1) for prefix in itertools.product(range(V + 1), repeat=n)]
  logits = rng.standard_normal((len(prefixes), V + 1)) * 2
  logits[:, 1] = -np.inf
  found = np.asarray(law(jnp.asarray(logits), temperature, top_k, top_p))
  return dict(zip(prefixes, found))


@pytest.mark.parametrize('depth', [1, 2, 3])
@pytest.mark.parametrize('drafts_see_each_other', [False, True], ids=['parallel', 'sequential'])
def test_the_law_of_an_emitted_block_is_that_of_autoregression(depth, drafts_see_each_other):
  """Over all drafts x, all accepts (each die just below or just above p/q) and all corrections; the rest of the block drawn from p.

  parallel drafts: q at depth k is one law whatever the drafts before; sequential: a law for every prefix of drafts. A block is depth+1
  tokens; a shorter emission is completed by the model itself, as the next passes would.
  """
  rng = np.random.default_rng(depth)
  run = jax.jit(lambda p_iV, q_kV, drafts_k, uniform_k: (in_a_row(accepts(p_iV[..., :-1, :], q_kV, drafts_k, uniform_k)),))
  right = jax.jit(correction)
  everywhere = list(itertools.product(range(V + 1), repeat=depth + 1))
  for temperature, top_k, top_p in GRID:
    p = laws_by_prefix(rng, depth, temperature, top_k, top_p)
    q = laws_by_prefix(rng, depth - 1, temperature, top_k, top_p)
    if not drafts_see_each_other:
      q = {prefix: q[(0,) * len(prefix)] for prefix in q}
    wanted = np.array([np.prod([p[block[:i]][block[i]] for i in range(depth + 1)]) for block in everywhere])

    drafts = [x for x in itertools.product(range(V + 1), repeat=depth) if all(q[x[:i]][x[i]] > 0 for i in range(depth))]
    cases, weight = [], []
    for x in drafts:
      ratios = [min(1.0, p[x[:i]][x[i]] / q[x[:i]][x[i]]) for i in range(depth)]
      for below in itertools.product((True, False), repeat=depth):
        chance = np.prod([r if b else 1 - r for r, b in zip(ratios, below)])
        if chance > 1e-12:
          cases.append((x, [r * (1 - 1e-9) if b else r * (1 + 1e-9) + 1e-300 for r, b in zip(ratios, below)]))
          weight.append(np.prod([q[x[:i]][x[i]] for i in range(depth)]) * chance)
    assert np.sum(weight) == pytest.approx(1, abs=1e-12)
    p_iV, q_kV = np.array([[p[x[:i]] for i in range(depth + 1)] for x, _ in cases]), np.array([[q[x[:i]] for i in range(depth)] for x, _ in cases])
    accepted, = run(p_iV, q_kV, np.array([x for x, _ in cases]), np.array([u for _, u in cases]))
    own = right(p_iV, q_kV, accepted)

    found = np.zeros((V + 1,) * (depth + 1))
    for (x, _), w, n, own_V in zip(cases, weight, np.asarray(accepted), np.asarray(own)):
      for token in np.flatnonzero(own_V):
        said = (*x[:n], token)
        for rest in itertools.product(range(V + 1), repeat=depth - n):
          block = said + rest
          found[block] += w * own_V[token] * np.prod([p[block[:i]][block[i]] for i in range(n + 1, depth + 1)])
    np.testing.assert_allclose(found.ravel(), wanted, rtol=0, atol=1e-7)  # the dice stand 1e-9 beside p/q
    if temperature == 0 or top_k == 1:  # greedy: one block, and a draft is accepted iff it is what the model says
      assert np.count_nonzero(wanted) == 1
      says = [next((i for i in range(depth) if p[x[:i]][x[i]] < 0.5), depth) for x, _ in cases]
      np.testing.assert_array_equal(accepted, says)


def law_numpy(logits, temperature, top_k, top_p):
  """By the words: rank, cut, norm, cut, norm."""
  order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
  if temperature == 0:
    return np.eye(len(logits))[order[0]]
  p = np.exp((logits - logits.max()) / temperature)
  kept = order[:top_k] if top_k else order
  held, last = 0.0, []
  for i in kept:
    if held < top_p * p[kept].sum() or top_p == 1:
      last.append(i)
    held += p[i]
  found = np.zeros(len(logits))
  found[last] = p[last] / p[last].sum()
  return found


def test_a_law_is_cut_and_normed_as_its_words_say():
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((60, 7)) * 3
  logits[::3, 2], logits[1::3, 4], logits[2::3, 0] = -np.inf, logits[1::3, 5], logits[2::3].max(-1)  # forbidden, equal, and equal at the top
  grid = [(t, k, p) for t in (0.0, 0.5, 1.0, 3.0) for k in (0, 1, 3, 9) for p in (1.0, 0.9, 0.5, 1e-6)]
  for row in logits:
    found = law(jnp.tile(row, (len(grid), 1)), *(jnp.asarray(x) for x in np.array(grid).T))
    np.testing.assert_allclose(found, [law_numpy(row, t, k, p) for t, k, p in grid], atol=1e-12)
  np.testing.assert_allclose(law(jnp.asarray(logits), 0.5), [law_numpy(row, 0.5, 0, 1.0) for row in logits], atol=1e-12)


def test_a_law_is_a_law_at_any_temperature_compiled_or_not():
  logits = jnp.asarray([3.0, 1.0, -np.inf, -4.0], jnp.float32)
  for temperature in (1e-38, 1e-30, 1e-15, 1e-10, 1e-3, 1e30):
    for run in (law, jax.jit(law)):
      p = run(logits, jnp.float32(temperature), jnp.int32(0), jnp.float32(1e-30))
      np.testing.assert_array_equal(p, [1, 0, 0, 0])
      np.testing.assert_allclose(run(logits, jnp.float32(temperature)), [1, 0, 0, 0] if temperature < 1 else [1 / 3, 1 / 3, 0, 1 / 3], atol=1e-6)


def test_the_likeliest_token_is_never_cut():
  """The least top_p there is, times a mass below 1, is no float32 above 0."""
  found = jax.jit(law)(jnp.zeros(4, jnp.float32), jnp.float32(1), jnp.int32(1), jnp.float32(np.finfo(np.float32).tiny))
  np.testing.assert_array_equal(found, [1, 0, 0, 0])


def test_equal_laws_leave_nothing_to_correct():
  p_V = jnp.array([0.25, 0.75, 0.0])
  np.testing.assert_array_equal(correction(p_V[None].repeat(2, 0), p_V[None], jnp.int32(0)), p_V)  # never drawn from, but a law
  np.testing.assert_array_equal(correction(p_V[None].repeat(2, 0), p_V[None], jnp.int32(1)), p_V)


def test_a_draft_is_accepted_with_probability_p_over_q_exactly():
  p, q = jnp.array([[0.2, 0.8]]), jnp.array([[0.6, 0.4]])
  for draft, uniform, wanted in ((0, 0.33, True), (0, 0.34, False), (1, 0.999, True), (0, 0.0, True)):
    assert bool(accepts(p, q, jnp.array([draft]), jnp.array([uniform]))[0]) is wanted
  assert not accepts(jnp.array([[0.0, 1.0]]), q, jnp.array([0]), jnp.array([0.0]))[0]  # what the model never says is never accepted


# draft, criterion, threshold, whether it passes, for p = (.5, .3, .15, .05), whose entropy is 1.142 nats
LOSSY = [(0, 'lossy_top_k', 1, True), (1, 'lossy_top_k', 1, False), (1, 'lossy_top_k', 2, True), (3, 'lossy_top_k', 3, False), (3, 'lossy_top_k', 4, True),
         (1, 'lossy_distance', 0, False), (0, 'lossy_distance', 0, True), (2, 'lossy_distance', 1, False), (2, 'lossy_distance', 2, True),
         (2, 'lossy_typical', 0.09, True), (3, 'lossy_typical', 0.09, False),  # the bound is min(.09, .3 * exp(-1.142) = .0958)
         (2, 'lossy_typical', 0.5, False), (1, 'lossy_typical', 0.5, True)]  # min(.5, .707 * .319 = .2257)


@pytest.mark.parametrize('draft, name, threshold, wanted', LOSSY)
def test_a_lossy_criterion_is_its_inequality(draft, name, threshold, wanted):
  p_V = jnp.array([[0.5, 0.3, 0.15, 0.05]])
  assert bool(lossy_accepts(Criterion(name, threshold), p_V, jnp.array([draft]))[0]) is wanted


def batch(rows, **options):
  full = {'seed_B': np.arange(rows, dtype=np.uint32), 'temperature_B': np.ones(rows, np.float32), 'top_k_B': np.zeros(rows, np.int32), 'top_p_B': np.ones(rows, np.float32),
          'allowed_V': np.ones(4, bool), 'greedy': False} | options
  return Sampler(**full)


def test_a_block_is_never_shorter_than_its_least():
  logits = jnp.zeros((2, 4, 4)).at[..., 2].set(9.0)
  drafts = jnp.array([[1, 2, 2], [2, 1, 1]])
  for min_block, wanted in ((1, [0, 1]), (2, [1, 1]), (3, [2, 2]), (9, [3, 3])):
    sampler = batch(2, greedy=True, temperature_B=np.zeros(2, np.float32), criterion=Criterion(min_block=min_block))
    accepted, own = sampler.verify(logits, drafts, None, jnp.arange(4)[None].repeat(2, 0))
    assert accepted.tolist() == wanted and own.tolist() == [2, 2]


def test_a_lossy_criterion_judges_at_the_rows_temperature_and_the_model_then_speaks_its_own_law():
  """p(draft) is .15 at temperature 1 and .05 at .5, the bound of typical acceptance .0958 and .09; what is rejected is replaced by a draw from p,
  the draft among it, not from what p has more than q."""
  n, p = 20_000, np.array([0.5, 0.3, 0.15, 0.05])
  logits, positions, drafts = jnp.tile(jnp.log(p), (n, 2, 1)), jnp.tile(jnp.arange(2), (n, 1)), jnp.full((n, 1), 2)
  for temperature, wanted in ((1.0, 1), (0.5, 0), (0.0, 1)):
    sampler = batch(n, temperature_B=np.full(n, temperature, np.float32), criterion=Criterion('lossy_typical', 0.09))
    accepted, own = sampler.verify(logits, drafts, sampler.certain(drafts), positions)
    assert set(np.asarray(accepted).tolist()) == {wanted}
    law_V = np.eye(4)[0] if temperature == 0 else p**(1 / temperature) / (p**(1 / temperature)).sum()
    np.testing.assert_array_less(np.abs(np.bincount(own, minlength=4) / n - law_V), 4.5 * np.sqrt(law_V * (1 - law_V) / n) + 1e-12)


def test_a_batch_of_temperature_0_is_the_greedy_batch():
  rng = np.random.default_rng(0)
  logits, drafts = jnp.asarray(rng.standard_normal((50, 3, 4))), jnp.asarray(rng.integers(0, 4, (50, 2)))
  positions, cold = jnp.arange(3)[None].repeat(50, 0), np.zeros(50, np.float32)
  wanted = batch(50, temperature_B=cold, greedy=True).verify(logits, drafts, None, positions)
  for options in ({}, {'same_seed': True}, {'truncated': True}):
    sampler = batch(50, temperature_B=cold, **options)
    found = sampler.verify(logits, drafts, sampler.certain(drafts), positions)
    np.testing.assert_array_equal(found, wanted)
  assert len(set(np.asarray(wanted[0]).tolist())) == 3


def test_drafts_and_tokens_follow_their_laws_and_dice_differ_by_row_position_and_stream():
  """20,000 rows with two drafts: the frequencies of drafts, of the emitted pair and of acceptance lie within 4.5 standard errors."""
  n, rng = 20_000, np.random.default_rng(1)
  q_logits, p_logits = rng.standard_normal((2, 4)), rng.standard_normal((3, 4))
  sampler, positions = batch(n), jnp.arange(5, 8)[None].repeat(n, 0)
  drafts, q = sampler.draft(jnp.asarray(q_logits)[None].repeat(n, 0), positions[:, :2])
  accepted, own = sampler.verify(jnp.asarray(p_logits)[None].repeat(n, 0), drafts, q, positions)
  p, q = np.asarray(law(jnp.asarray(p_logits), 1.0)), np.asarray(q[0])
  np.testing.assert_allclose(q, law(jnp.asarray(q_logits), 1.0), rtol=1e-6)
  near = lambda found, wanted: np.testing.assert_array_less(np.abs(found - wanted), 4.5 * np.sqrt(wanted * (1 - wanted) / n) + 1e-12)
  drafts, accepted, own = (np.asarray(x) for x in (drafts, accepted, own))
  near(np.histogram2d(*drafts.T, bins=(range(5), range(5)))[0] / n, np.outer(q[0], q[1]))  # each its law, and independent
  first = np.where(accepted > 0, drafts[:, 0], own)
  near(np.bincount(first, minlength=4) / n, p[0])
  overlap = np.minimum(p[:2], q).sum(1)
  near(np.array([(accepted >= 1).mean(), (accepted == 2).mean()]), np.array([overlap[0], overlap.prod()]))
  last = own[accepted == 2]
  assert (np.abs(np.bincount(last, minlength=4) / len(last) - p[2]) < 4.5 * np.sqrt(p[2] * (1 - p[2]) / len(last))).all()


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
  assert not any(Criterion(name, 0.5 if name == 'lossy_typical' else 1).lossless for name in ('lossy_top_k', 'lossy_distance', 'lossy_typical'))
