"""Decoding against an uncached forward on the true prefix, drafting against plain autoregression."""
import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import (
  ALLOWED_V,
  LENGTHS_B,
  LIMITS_B,
  NEVER,
  M,
  PROMPTS_Bp,
  S,
  V,
  chi_squared_bound,
  choices_MBS,
  clear_MBS,
  decode_passes,
  drafts_of,
  equal_where_settled,
  generate,
  half_trained_models,
  logits_MBSV,
  rows,
  settled_lengths,
  start,
  tallies,
  uncached,
)

from mtp_jax.decode.loop import best_length
from mtp_jax.evaluation import acceptance


@pytest.fixture(scope='module')
def trained(tiny, random_model):
  return half_trained_models(tiny, random_model)


def test_every_draft_length_generates_what_an_uncached_forward_generates(trained, variant):
  model = trained(variant)
  free = uncached(model, PROMPTS_Bp, LENGTHS_B, LIMITS_B, NEVER)
  settled = settled_lengths(model, lambda m: uncached(m, PROMPTS_Bp, LENGTHS_B, LIMITS_B, NEVER))
  assert [len(row) for row in free] == LIMITS_B.tolist()
  new_ids = sorted({token for row, n in zip(free, LENGTHS_B) for token in row[n:]})
  stopped = {eos: [up_to(eos, row, n) for row, n in zip(free, LENGTHS_B)] for eos in new_ids}
  ended_in_draft, forwards = 0, []
  for draft in range(M):
    state = generate(model, PROMPTS_Bp, draft=draft)
    assert equal_where_settled(rows(state), free, settled) and state.done_B.all()
    check_counts(state, draft)
    forwards.append(int(tallies(state)[0].sum()))
    for eos, expected in stopped.items():
      state = generate(model, PROMPTS_Bp, draft=draft, eos=eos)
      assert equal_where_settled(rows(state), expected, settled)
      last_depths = [np.asarray(state.depth_BS)[b, len(row) - 1] for b, row in enumerate(expected)]
      ended_in_draft += sum(depth > 0 and row[-1] == eos for depth, row in zip(last_depths, expected))
  assert forwards[0] == (LIMITS_B - LENGTHS_B).sum() and forwards[3] < 0.8 * forwards[0]
  assert ended_in_draft > 0  # some row ended within an accepted draft


def up_to(eos: int, row: list[int], start: int) -> list[int]:
  """The row up to its first eos from `start` on."""
  return row[:next((i + 1 for i in range(start, len(row)) if row[i] == eos), None)]


def check_counts(state, draft: int):
  """Depths belong to new tokens only; counts of drafts and forwards agree with them."""
  slots, depth_BS = np.arange(S + 8), np.asarray(state.depth_BS)
  new_BS = (slots >= LENGTHS_B[:, None]) & (slots < LIMITS_B[:, None])
  assert not depth_BS[~new_BS].any() and depth_BS.max() <= draft
  passes, offered_Bk, accepted_Bk = tallies(state)
  np.testing.assert_array_equal(accepted_Bk.sum(0), [(depth_BS == k + 1).sum() for k in range(draft)])
  assert (accepted_Bk.sum(1) + passes.sum(1) >= LIMITS_B - LENGTHS_B).all()
  assert (accepted_Bk <= offered_Bk).all() and (np.diff(offered_Bk, axis=1) <= 0).all()


@pytest.mark.parametrize('lengths', [(0,), (2,), (1, 2, M - 1)], ids=str)
def test_the_tokens_of_a_row_tell_what_its_passes_did(trained, family, lengths):
  """Against counts that are kept while the loop makes one pass at a time, after every pass."""
  parts, state = start(trained(family), PROMPTS_Bp, draft=max(lengths))
  costs = np.array([1.0, 1.3, 1.6], np.float32) if len(lengths) > 1 else None
  B, k = len(LENGTHS_B), max(lengths)
  passes, offered_Bk, accepted_Bk = (np.zeros((B, n), int) for n in (k + 1, k, k))
  passes[LIMITS_B > LENGTHS_B, 0] = 1  # the pass over the prompts
  while not state.done_B.all():
    draft = lengths[int(best_length(state.recent_2k, costs, lengths)) if costs is not None else 0]
    active, length_B = np.flatnonzero(~np.asarray(state.done_B)), np.asarray(state.length_B)
    state = decode_passes(*parts, state, NEVER, np.int32(1), costs, lengths=lengths)
    for b in active:
      depths = np.asarray(state.depth_BS)[b, length_B[b]:int(state.length_B[b])]
      passes[b, draft] += 1
      offered_Bk[b, :min(len(depths), draft)] += 1
      accepted_Bk[b, :np.count_nonzero(depths)] += 1
    for counts, expected in zip(tallies(state), (passes, offered_Bk, accepted_Bk), strict=True):
      np.testing.assert_array_equal(counts, expected)


def test_nothing_is_accepted_before_anything_was_drafted(trained, family):
  only_0_V = np.arange(V) == 0  # every draft is right
  state = generate(trained(family), PROMPTS_Bp, draft=M - 1, allowed_V=only_0_V)
  active = LIMITS_B > LENGTHS_B
  assert not np.asarray(state.depth_BS)[active, LENGTHS_B[active]].any()
  passes_B = 1 + -(-(LIMITS_B - LENGTHS_B - 1) // M)
  np.testing.assert_array_equal(tallies(state)[0].sum(1), np.where(active, passes_B, 0))


def test_a_row_does_not_depend_on_its_neighbours(trained, family):
  model, rng, B = trained(family), np.random.default_rng(5), len(LENGTHS_B)
  alone = rows(generate(model, PROMPTS_Bp, draft=M - 1))
  for b in (0, 3):
    prompts_Bp = rng.integers(0, V, PROMPTS_Bp.shape).astype(np.int32)
    length_B = rng.integers(1, 9, B).astype(np.int32)
    prompts_Bp[b, :LENGTHS_B[b]] = PROMPTS_Bp[b, :LENGTHS_B[b]]  # the padding of the prompt changes too
    length_B[b] = LENGTHS_B[b]
    limit_B = length_B + rng.integers(0, 20, B).astype(np.int32)
    limit_B[b] = LIMITS_B[b]
    assert rows(generate(model, prompts_Bp, length_B, limit_B, draft=M - 1))[b] == alone[b]


def passes(model, limit_B, draft: int):
  """The states before and after each pass of a greedy generation, with the drafts as memory; in turn three passes
  draft, and three do not.
  """
  parts, state = start(model, PROMPTS_Bp, LENGTHS_B, limit_B, draft=draft)
  drafts_Bk = drafts_of(parts, draft)
  to_host = lambda state: jax.device_get(
      dataclasses.replace(state, memory=drafts_Bk(state), caches=None))
  states = [to_host(state)]
  while not state.done_B.all():
    state = decode_passes(*parts, state, NEVER, np.int32(1), lengths=(draft if len(states) % 6 in (1, 2, 3) else 0,))
    states.append(to_host(state))
  return list(zip(states, states[1:]))


def test_the_cache_is_that_of_the_true_prefix_after_every_accepted_length(trained, variant):
  model, limit_B = trained(variant), np.full(len(LENGTHS_B), S - M, np.int32)
  accepted, clear = set(), []
  for before, after in passes(model, limit_B, M - 1):
    tokens_BS = after.tokens_BS.copy()
    choice_BS, clear_BS = (np.asarray(f(model, tokens_BS)[0]) for f in (choices_MBS, clear_MBS))
    for b in np.flatnonzero(~before.done_B):
      new = np.arange(before.length_B[b], after.length_B[b])
      is_choice = tokens_BS[b, new] == choice_BS[b, new - 1]
      assert np.all(is_choice | ~clear_BS[b, new - 1])
      clear.extend(clear_BS[b, new - 1])
      accepted.add(len(new) - 1)
    active = np.flatnonzero(~after.done_B)
    last = after.length_B[active] - 1
    for k in range(M - 1):  # a sequential future reads the drafts before its own
      choices, is_clear = (np.asarray(f(model, tokens_BS))[k + 1, active, last - 1]
                           for f in (choices_MBS, clear_MBS))
      drafts = after.memory[active, k]
      assert np.all((drafts == choices) | ~is_clear)
      clear.extend(is_clear)
      tokens_BS[active, last + 1 + k] = drafts
  assert accepted == set(range(M)) and np.mean(clear) > 0.98


TEMPERATURES_B = np.array([0.7, 1.0, 0.0, 1.3, 0.7, 1.0])


def test_at_the_same_seed_samples_are_those_of_plain_sampling_whatever_drafts(trained, family):
  """Every draft length, truncated distributions, adaptive lengths, any neighbours."""
  model = trained(family)
  options = {'temperature': TEMPERATURES_B, 'top_k': np.array([0, 5, 0, 0, 9, 0]),
             'top_p': np.array([1, 1, 1, .8, .9, 1]), 'same_seed': True}
  plain = rows(generate(model, PROMPTS_Bp, draft=0, **options))
  settled = settled_lengths(model, lambda m: rows(generate(m, PROMPTS_Bp, draft=0, **options)))
  greedy = rows(generate(model, PROMPTS_Bp, draft=0))
  assert plain != greedy
  for draft in range(1, M):
    state = generate(model, PROMPTS_Bp, draft=draft, **options)
    assert equal_where_settled(rows(state), plain, settled)
    assert tallies(state)[2].any()

  adaptive = {'lengths': (0, 1, 2, 3), 'pass_costs': np.array([1, 1.4, 1.6, 1.8], np.float32)}
  state = generate(model, PROMPTS_Bp, draft=M - 1, **adaptive, **options)
  assert equal_where_settled(rows(state), plain, settled)

  order = np.array([4, 3, 1])
  some = {name: value[order] if np.ndim(value) else value for name, value in options.items()}
  state = generate(model, PROMPTS_Bp[order], LENGTHS_B[order], LIMITS_B[order], draft=M - 1,
                   number=order, **some)
  assert equal_where_settled(rows(state), [plain[b] for b in order], [settled[b] for b in order])

  other_seed = rows(generate(model, PROMPTS_Bp, draft=0, seed=100, **options))
  long_B = (LIMITS_B - LENGTHS_B > 10) & (TEMPERATURES_B > 0)
  assert all(plain[b] != other_seed[b] for b in np.flatnonzero(long_B))
  for generated in (other_seed, greedy):
    assert equal_where_settled(generated[2:3], plain[2:3], settled[2:3])  # at temperature 0


def test_a_sampled_row_does_not_depend_on_its_neighbours(trained, family):
  """By speculative sampling, whose text depends on the drafts, but not on the neighbours."""
  model = trained(family)
  all_rows = lambda m: rows(generate(m, PROMPTS_Bp, draft=2, temperature=TEMPERATURES_B))
  together, settled = all_rows(model), settled_lengths(model, all_rows)
  for order in ([3, 0], [4, 2, 1, 3]):
    order = np.array(order)
    state = generate(model, PROMPTS_Bp[order], LENGTHS_B[order], LIMITS_B[order], draft=2,
                     number=order, temperature=TEMPERATURES_B[order])
    assert equal_where_settled(rows(state), [together[b] for b in order], [settled[b] for b in order])


def test_samples_follow_the_softmax_of_capped_logits_over_temperature(trained):
  temperature, cap, samples = 1.7, 3.0, 4096
  model, prompt_1p = trained({'kind': 'parallel', 'logit_cap': cap}), PROMPTS_Bp[3:4]
  state = generate(model, np.tile(prompt_1p, (samples, 1)), np.full(samples, 8),
                   np.full(samples, 9), draft=0, temperature=temperature)
  count_V = np.bincount(np.asarray(state.tokens_BS)[:, 8], minlength=V)

  logits_V = np.float64(logits_MBSV(model, prompt_1p)[0, 0, -1])
  assert np.abs(logits_V).max() > cap
  p_V = np.exp(cap * np.tanh(logits_V / cap) / temperature) * ALLOWED_V
  p_V /= p_V.sum()
  assert count_V[11] == 0
  order = np.argsort(p_V)[::-1]
  often = order[samples * p_V[order] >= 5][:V - 2]  # so that something is left to be the rest
  observed = np.append(count_V[often], samples - count_V[often].sum())
  expected = np.append(p_V[often], 1 - p_V[often].sum()) * samples
  assert len(often) >= 5
  assert ((observed - expected)**2 / expected).sum() < chi_squared_bound(len(often))


@pytest.mark.parametrize('lengths', [(0,), (1,), (M - 1,), (1, 2, M - 1)], ids=str)
def test_no_pass_copies_a_cache_and_the_whole_state_is_donated(tiny, random_model, family, lengths):
  """In the compiled loop, of one row and of several, with two key heads; and a single key of a single row.

  No array as large as a cache is copied, and every array of the state is updated in place.
  """
  for n, kv_heads in ((1, 2), (3, 2), *[(1, 1)] * (lengths == (0,))):
    model = random_model(tiny(futures=M, kv_heads=kv_heads, **family))
    parts, state = start(model, PROMPTS_Bp[:n], LENGTHS_B[:n], LIMITS_B[:n], draft=max(lengths))
    pass_costs = np.ones(len(lengths), np.float32) if len(lengths) > 1 else None
    lowered = decode_passes.lower(*parts, state, NEVER, np.int32(5), pass_costs, lengths=lengths)
    text = lowered.compile().as_text()
    for cache in (state.caches[0].k_RKS, state.caches[0].v_RSK):
      shape = ','.join(map(str, cache.shape))
      assert shape in text and not re.findall(rf'= f32\[{shape}\]\S* copy\(', text)
    aliases = text.split('entry_computation_layout')[0].count('-alias')
    assert aliases == len(jax.tree.leaves(state))


def test_the_draft_length_chosen_is_the_one_that_promises_most():
  """The device's choice against the planner's formula, on many counts and costs.

  A length that was never tried is tried when it is cheap.
  """
  rng = np.random.default_rng(0)
  for _ in range(50):
    offered_k, share_k = rng.integers(1000, 5000, 6), rng.random(6)
    costs = 1 + np.cumsum(rng.random(6))
    recent_2k = np.stack([offered_k, offered_k * share_k]).astype(np.float32)
    acceptance_k = (recent_2k[1] + 0.8) / (recent_2k[0] + 1)
    expected = acceptance.best_draft(acceptance_k, [np.inf, *costs]) - 1
    chosen = best_length(jnp.asarray(recent_2k), jnp.asarray(costs, jnp.float32), (1, 2, 3, 4, 5, 6))
    assert int(chosen) == expected
  assert int(best_length(jnp.zeros((2, 3)), jnp.array([1.0, 1.01, 1.02]), (1, 2, 3))) == 2


def test_speculative_sampling_keeps_the_distribution_over_many_passes(trained, family):
  """4,096 samples of three tokens with three drafts against the exact distribution of the triple.

  Tokens at different positions use different random numbers.
  """
  model, samples = trained(family), 4096
  prompts_Bp, allowed_V = np.full((samples, 4), 3, np.int32), np.arange(V) < 3
  state = generate(model, prompts_Bp, np.full(samples, 4), np.full(samples, 7), draft=3,
                   temperature=1.5, allowed_V=allowed_V)
  passes, _, accepted_Bk = tallies(state, np.full(samples, 4))
  assert accepted_Bk.any() and (passes.sum(1) > 1).any()

  triples = np.array(list(itertools.product(range(3), repeat=3)), np.int32)
  tokens_BS = np.concatenate([np.full((27, 4), 3, np.int32), triples], 1)
  logits_BSV = jnp.where(allowed_V, logits_MBSV(model, tokens_BS)[0], -jnp.inf)
  p_BSV = np.float64(jax.nn.softmax(logits_BSV / 1.5))
  p_B = np.prod([p_BSV[np.arange(27), 3 + i, triples[:, i]] for i in range(3)], 0)
  assert p_B.sum() == pytest.approx(1, abs=1e-5)
  observed = np.bincount(np.asarray(state.tokens_BS)[:, 4:7] @ [9, 3, 1], minlength=27)
  expected, often = p_B * samples, p_B * samples >= 5
  statistic = ((observed - expected)**2 / expected)[often].sum()
  statistic += (observed - expected)[~often].sum()**2 / max(1, expected[~often].sum())
  assert statistic < chi_squared_bound(int(often.sum()))


@pytest.mark.parametrize('accepted', [0, 2, 8])
def test_drafts_that_cost_more_than_they_give_are_seldom_tried_again(trained, accepted):
  """From 20 drafts of which so many were accepted: after more than 100 passes without drafts, but not never."""
  parts, state = start(trained({'kind': 'parallel'}), PROMPTS_Bp[:1], LENGTHS_B[:1], np.array([10**6]), draft=1)
  state = dataclasses.replace(state, recent_2k=jnp.array([[20.0], [accepted]]))
  costs, passes = np.array([1, 1.7], np.float32), 0
  while not int(best_length(state.recent_2k, costs, (0, 1))):
    state = decode_passes(*parts, state, NEVER, np.int32(10), lengths=(0,))
    passes += 10
    assert passes < 1000
  assert passes > 100
