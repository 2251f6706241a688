"""Decoding against an uncached forward on the true prefix, and drafting against plain autoregression."""
import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtp_jax.config import ObjectiveConfig
from mtp_jax.decode.decoder import Decoder
from mtp_jax.decode.drafters import Lookup, Other, futures
from mtp_jax.decode.loop import advance, best_length, prefill
from mtp_jax.decode.requests import EXACT
from mtp_jax.decode.verify import Sampler
from mtp_jax.evaluation import acceptance
from mtp_jax.objective import Read, future_states, loss

M, V, S = 4, 24, 44
LENGTHS_B = np.array([1, 2, 5, 8, 3, 8], np.int32)
LIMITS_B = np.array([40, 31, 6, 40, 17, 8], np.int32)
NEVER = np.int32(-1)


@pytest.fixture(scope='module')
def trained(tiny, random_model):
  """A model that has half learnt a noisy permutation of the ids, so that drafts of every length are accepted now and then."""
  def documents(rng, rows, length):
    tokens = rng.integers(0, V, (rows, length))
    for t in range(1, length):
      tokens[:, t] = np.where(rng.random(rows) < 0.9, (5 * tokens[:, t - 1] + 7) % V, tokens[:, t])
    return tokens.astype(np.int32)

  @functools.lru_cache
  def train(variant):
    model, rng = random_model(tiny(futures=M, **dict(variant))), np.random.default_rng(1)
    transform = optax.adam(1e-2)

    @jax.jit
    def step(model, state, tokens):
      batch = {'tokens': tokens, 'segments': jnp.ones_like(tokens), 'positions': jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)}
      grads = jax.grad(lambda model: loss(model, Read.of(batch, M), jnp.ones(M) / tokens.size, ObjectiveConfig())[0])(model)
      updates, state = transform.update(grads, state)
      return optax.apply_updates(model, updates), state

    state = transform.init(model)
    for _ in range(100 if model.config.kind == 'anticausal' else 40):  # whose next token depends on all the others
      model, state = step(model, state, documents(rng, 8, 16 + M))
    return model
  return lambda variant: train(tuple(variant.items()))


@pytest.fixture(scope='module')
def prompts_Bp() -> np.ndarray:
  return np.random.default_rng(0).integers(0, V, (len(LENGTHS_B), 8)).astype(np.int32)


ALLOWED_V = np.arange(V) != 11


@jax.jit
def choices_MBS(model, tokens_BS):
  """Every future's greedy choice after every prefix, without a cache; a future sees tokens up to those its family reads."""
  B, S = tokens_BS.shape
  batch = {'tokens': jnp.pad(tokens_BS, ((0, 0), (0, M))), 'segments': jnp.ones((B, S + M), jnp.int32), 'positions': jnp.broadcast_to(jnp.arange(S + M), (B, S + M))}
  logits_MBSV = future_states(model, Read.of(batch, M)) @ model.readout().table().T
  return jnp.argmax(jnp.where(ALLOWED_V, logits_MBSV, -jnp.inf), -1)


def uncached(model, prompts_Bp, length_B, limit_B, eos):
  """Greedy continuation, one full forward a token: a list of tokens a row."""
  tokens_BS = np.pad(prompts_Bp, ((0, 0), (0, S - prompts_Bp.shape[1])))
  length_B, done_B = length_B.copy(), length_B >= limit_B
  while not done_B.all():
    choice_BS = np.asarray(choices_MBS(model, tokens_BS)[0])
    for b in np.flatnonzero(~done_B):
      tokens_BS[b, length_B[b]] = choice_BS[b, length_B[b] - 1]
      length_B[b] += 1
      done_B[b] = length_B[b] == limit_B[b] or tokens_BS[b, length_B[b] - 1] == eos
  return [row[:n].tolist() for row, n in zip(tokens_BS, length_B)]


def sampler(n, *, seed=0, temperature=0.0, top_k=0, top_p=1.0, allowed_V=ALLOWED_V, same_seed=False, criterion=EXACT):
  row = lambda x, dtype: np.broadcast_to(x, n).astype(dtype)
  return Sampler(row(np.add(seed, np.arange(n)) if np.ndim(seed) == 0 else seed, np.uint32), row(temperature, np.float32), row(top_k, np.int32), row(top_p, np.float32), np.asarray(allowed_V),
                        not np.any(temperature), bool(np.any(top_k) or np.any(np.less(top_p, 1))), same_seed, criterion)


def start(model, prompts_Bp, length_B=LENGTHS_B, limit_B=LIMITS_B, *, draft, eos=NEVER, drafter=None, **options):
  """(what `advance` needs besides a Progress, the first Progress)."""
  decoder = Decoder.of(model, V)
  drafter = drafter or futures(decoder, draft)
  parts = decoder.reading(drafter.reads), drafter, sampler(len(prompts_Bp), **options)
  return parts, prefill(*parts, prompts_Bp, np.asarray(length_B, np.int32), np.asarray(limit_B, np.int32), np.int32(eos), slots=S + 8)


def generate(model, prompts_Bp, length_B=LENGTHS_B, limit_B=LIMITS_B, *, draft, eos=NEVER, lengths=None, pass_seconds=None, **options):
  parts, progress = start(model, prompts_Bp, length_B, limit_B, draft=draft, eos=eos, **options)
  return advance(*parts, progress, np.int32(eos), np.int32(1000), pass_seconds, lengths=lengths or (parts[1].depth,))


def rows(end) -> list[list[int]]:
  return [row[:n].tolist() for row, n in zip(np.asarray(end.tokens_BS), np.asarray(end.length_B))]


def test_every_draft_length_says_what_an_uncached_forward_says(trained, variant, prompts_Bp):
  model = trained(variant)
  free = uncached(model, prompts_Bp, LENGTHS_B, LIMITS_B, NEVER)
  ends = {eos: [row[:next((i + 1 for i in range(n, len(row)) if row[i] == eos), None)] for row, n in zip(free, LENGTHS_B)]
          for eos in sorted({token for row, n in zip(free, LENGTHS_B) for token in row[n:]})}
  assert [len(row) for row in free] == LIMITS_B.tolist()
  inside = 0  # an accepted draft
  forwards = []
  for draft in range(M):
    end = generate(model, prompts_Bp, draft=draft)
    assert rows(end) == free
    for eos, stopped in ends.items():
      assert rows(generate(model, prompts_Bp, draft=draft, eos=eos)) == stopped
      inside += sum(np.asarray(end.depth_BS)[b, len(row) - 1] > 0 and row[-1] == eos for b, row in enumerate(stopped))
    assert end.done_B.all()
    new = np.arange(S) < LIMITS_B[:, None]
    new &= np.arange(S) >= LENGTHS_B[:, None]
    depth_BS = np.asarray(end.depth_BS)[:, :S]
    assert not np.asarray(end.depth_BS)[:, S:].any()
    assert not depth_BS[~new].any() and depth_BS.max() <= draft
    np.testing.assert_array_equal(end.accepted_Bk.sum(0), [(depth_BS == k + 1).sum() for k in range(draft)])
    np.testing.assert_array_equal(end.accepted_Bk.sum(1) + end.forwards_B >= LIMITS_B - LENGTHS_B, True)
    assert (np.asarray(end.accepted_Bk) <= end.offered_Bk).all() and (np.diff(end.offered_Bk, axis=1) <= 0).all()
    forwards.append(int(end.forwards_B.sum()))
  assert forwards[0] == (LIMITS_B - LENGTHS_B).sum() and forwards[3] < 0.8 * forwards[0]
  assert inside > 0  # some row ended within an accepted draft


def test_nothing_is_accepted_before_anything_was_drafted(trained, family, prompts_Bp):
  end = generate(trained(family), prompts_Bp, draft=M - 1, allowed_V=np.arange(V) == 0)  # every draft is right
  active = LIMITS_B > LENGTHS_B
  assert not np.asarray(end.depth_BS)[active, LENGTHS_B[active]].any()
  np.testing.assert_array_equal(end.forwards_B, np.where(active, 1 + -(-(LIMITS_B - LENGTHS_B - 1) // M), 0))


def test_a_row_does_not_depend_on_its_neighbours(trained, family, prompts_Bp):
  model, other = trained(family), np.random.default_rng(5)
  alone = rows(generate(model, prompts_Bp, draft=M - 1))
  for b in (0, 3):
    neighbours_Bp, length_B = other.integers(0, V, prompts_Bp.shape).astype(np.int32), other.integers(1, 9, len(LENGTHS_B)).astype(np.int32)
    neighbours_Bp[b, :LENGTHS_B[b]], length_B[b] = prompts_Bp[b, :LENGTHS_B[b]], LENGTHS_B[b]  # what fills up the prompt changes too
    limit_B = np.where(np.arange(len(LENGTHS_B)) == b, LIMITS_B, length_B + other.integers(0, 20, len(LENGTHS_B))).astype(np.int32)
    assert rows(generate(model, neighbours_Bp, length_B, limit_B, draft=M - 1))[b] == alone[b]


def passes(model, prompts_Bp, limit_B, draft):
  """The Progress before and after each pass of a greedy generation."""
  parts, progress = start(model, prompts_Bp, LENGTHS_B, limit_B, draft=draft)
  seen, drafted = [], jax.jit(lambda p: parts[1].draft(parts[0], p.memory, p.tokens_BS, p.length_B[:, None], draft, parts[2])[0])
  look = lambda: jax.device_get(dataclasses.replace(progress, memory=drafted(progress), caches=None))
  seen.append(look())
  while not progress.done_B.all():
    progress = advance(*parts, progress, NEVER, np.int32(1), lengths=(draft,))
    seen.append(look())
  return list(zip(seen, seen[1:]))


def test_the_cache_says_what_the_true_prefix_says_after_every_accepted_length(trained, variant, prompts_Bp):
  model, K, limit_B = trained(variant), M - 1, np.full(len(LENGTHS_B), S - M, np.int32)
  accepted = set()
  for before, after in passes(model, prompts_Bp, limit_B, K):
    tokens_BS, choice_BS = after.tokens_BS.copy(), np.asarray(choices_MBS(model, after.tokens_BS)[0])
    for b in np.flatnonzero(~before.done_B):
      new = np.arange(before.length_B[b], after.length_B[b])
      np.testing.assert_array_equal(tokens_BS[b, new], choice_BS[b, new - 1])
      accepted.add(len(new) - 1)
    live = np.flatnonzero(~after.done_B)
    last = after.length_B[live] - 1
    for k in range(K):  # a sequential future reads the drafts before its own
      drafts = np.asarray(choices_MBS(model, tokens_BS))[k + 1, live, last - 1]
      np.testing.assert_array_equal(after.memory[live, k], drafts)
      tokens_BS[live, last + 1 + k] = drafts
  assert accepted == set(range(M))


def test_at_the_same_seed_samples_are_those_of_plain_sampling_whatever_drafts(trained, family, prompts_Bp):
  """Every draft length, truncated laws, adaptive lengths, and any company."""
  model, options = trained(family), {'temperature': np.array([0.7, 1.0, 0.0, 1.3, 0.7, 1.0]), 'top_k': np.array([0, 5, 0, 0, 9, 0]), 'top_p': np.array([1, 1, 1, .8, .9, 1]), 'same_seed': True}
  wanted = rows(generate(model, prompts_Bp, draft=0, **options))
  assert wanted != rows(generate(model, prompts_Bp, draft=0))
  for draft in range(1, M):
    end = generate(model, prompts_Bp, draft=draft, **options)
    assert rows(end) == wanted
    assert end.accepted_Bk.any()
  assert rows(generate(model, prompts_Bp, draft=M - 1, lengths=(1, 2, 3), pass_seconds=np.array([1, 1.2, 1.3], np.float32), **options)) == wanted
  order = np.array([4, 3, 1])
  some = {name: value[order] if np.ndim(value) else value for name, value in options.items()}
  assert rows(generate(model, prompts_Bp[order], LENGTHS_B[order], LIMITS_B[order], draft=M - 1, seed=order, **some)) == [wanted[b] for b in order]
  other = rows(generate(model, prompts_Bp, draft=0, seed=100, **options))
  assert all(a != b for b_, (a, b, n) in enumerate(zip(wanted, other, LIMITS_B - LENGTHS_B)) if n > 10 and b_ != 2)
  assert wanted[2] == other[2] == rows(generate(model, prompts_Bp, draft=0))[2]  # at temperature 0


def test_a_sampled_row_does_not_depend_on_its_neighbours(trained, family, prompts_Bp):
  """By speculative sampling, whose text depends on the drafts, but not on the company."""
  model, options = trained(family), {'temperature': np.array([0.7, 1.0, 0.0, 1.3, 0.7, 1.0])}
  wanted = rows(generate(model, prompts_Bp, draft=2, **options))
  for order in ([3, 0], [4, 2, 1, 3]):
    order = np.array(order)
    found = rows(generate(model, prompts_Bp[order], LENGTHS_B[order], LIMITS_B[order], draft=2, seed=order, temperature=options['temperature'][order]))
    assert found == [wanted[b] for b in order]


def test_samples_follow_the_softmax_of_capped_logits_over_temperature(trained, prompts_Bp):
  model, rows_, temperature, cap = trained({'kind': 'parallel', 'logit_cap': 3.0}), 4096, 1.7, 3.0
  prompt_1p = prompts_Bp[3:4]
  end = generate(model, np.tile(prompt_1p, (rows_, 1)), np.full(rows_, 8), np.full(rows_, 9), draft=0, temperature=temperature)
  found_V = np.bincount(np.asarray(end.tokens_BS)[:, 8], minlength=V)

  ones = jnp.ones((1, 8 + M), jnp.int32)
  batch = {'tokens': jnp.pad(prompt_1p, ((0, 0), (0, M))), 'segments': ones, 'positions': jnp.arange(8 + M)[None]}
  logits_MV = future_states(model, Read.of(batch, M))[:, 0, -1] @ model.readout().table().T
  assert np.abs(logits_MV[0]).max() > cap
  p_V = np.exp(cap * np.tanh(np.float64(logits_MV[0]) / cap) / temperature) * ALLOWED_V
  p_V /= p_V.sum()
  assert found_V[11] == 0
  order = np.argsort(p_V)[::-1]
  often = order[rows_ * p_V[order] >= 5][:V - 2]  # so that something is left to be the rest
  seen = np.append(found_V[often], rows_ - found_V[often].sum())
  expected = np.append(p_V[often], 1 - p_V[often].sum()) * rows_
  free = len(often)
  assert free >= 5
  bound = free * (1 - 2 / (9 * free) + 3.09 * np.sqrt(2 / (9 * free)))**3  # Wilson and Hilferty: exceeded once in a thousand seeds
  assert ((seen - expected)**2 / expected).sum() < bound


@pytest.mark.parametrize('lengths', [(0,), (1,), (M - 1,), (1, 2, M - 1)], ids=str)
def test_no_pass_copies_a_cache_and_every_array_is_given_on(trained, family, prompts_Bp, lengths):
  """In the compiled loop, of one row and of several: no array as large as a cache is copied, and all of Progress is written where it lies."""
  model = trained(family)
  for n in (1, 3):
    parts, progress = start(model, prompts_Bp[:n], LENGTHS_B[:n], LIMITS_B[:n], draft=max(lengths))
    pass_seconds = np.ones(len(lengths), np.float32) if len(lengths) > 1 else None
    text = advance.lower(*parts, progress, NEVER, np.int32(5), pass_seconds, lengths=lengths).compile().as_text()
    cache = progress.caches[0].k_RSK.shape
    assert ','.join(map(str, cache)) in text
    assert not re.findall(rf"= f32\[{','.join(map(str, cache))}\]\S* copy\(", text)
    assert text.split('entry_computation_layout')[0].count('-alias') == len(jax.tree.leaves(progress))


@pytest.mark.parametrize('drafts', ['shared module', 'other model', 'lookup'])
def test_drafters_beyond_the_trained_depth_change_no_token(trained, prompts_Bp, drafts):
  """A shared module applied six times where it was trained for three, another model, and what followed before."""
  model = trained({'kind': 'sequential', 'share_modules': True})
  wanted = rows(generate(model, prompts_Bp, draft=0))
  other = Decoder.of(trained({'kind': 'parallel'}), V)
  drafter = {'shared module': None, 'other model': Other(other, 6), 'lookup': Lookup(6)}[drafts]
  end = generate(model, prompts_Bp, draft=6, drafter=drafter)
  assert rows(end) == wanted
  assert np.asarray(end.accepted_Bk)[:, :3 if drafts == 'lookup' else 4].any(0).all() and int(end.forwards_B.sum()) < (LIMITS_B - LENGTHS_B).sum()
  assert rows(generate(model, prompts_Bp, draft=6, drafter=drafter, lengths=(1, 3, 6), pass_seconds=np.array([1, 1, 1], np.float32))) == wanted
  sampled = {'temperature': 0.8, 'same_seed': True}
  assert rows(generate(model, prompts_Bp, draft=6, drafter=drafter, **sampled)) == rows(generate(model, prompts_Bp, draft=0, **sampled))


def test_another_model_drafts_what_it_would_say_itself(trained, prompts_Bp):
  """After every accepted length: its cached drafts against its own uncached forward on the true prefix."""
  model, other = trained({'kind': 'parallel'}), trained({'kind': 'linear'})
  parts, progress = start(model, prompts_Bp, draft=3, drafter=Other(Decoder.of(other, V), 3))
  drafted, accepted = jax.jit(lambda p: parts[1].draft(parts[0], p.memory, p.tokens_BS, p.length_B[:, None], 3, parts[2])[0]), set()
  while not progress.done_B.all():
    drafts_Bk, live, tokens_BS, length_B = np.asarray(drafted(progress)), np.flatnonzero(~progress.done_B), np.array(progress.tokens_BS)[:, :S], np.asarray(progress.length_B)
    for k in range(3):
      inside = live[length_B[live] + k < S]
      said = np.asarray(choices_MBS(other, tokens_BS))[0, inside, length_B[inside] + k - 1]
      np.testing.assert_array_equal(drafts_Bk[inside, k], said)
      tokens_BS[inside, length_B[inside] + k] = said
    progress = advance(*parts, progress, NEVER, np.int32(1), lengths=(3,))
    accepted |= set((np.asarray(progress.length_B) - length_B)[live].tolist())
  assert {1, 4} <= accepted


def test_lookup_is_the_longest_latest_repetition(trained, prompts_Bp):
  """By a double loop over places and lengths."""
  rng, k = np.random.default_rng(3), 5
  tokens_BS, length_B = rng.integers(0, 3, (200, 30)).astype(np.int32), rng.integers(2, 25, 200)
  found = np.asarray(Lookup(k, 4).draft(None, (), jnp.asarray(tokens_BS), jnp.asarray(length_B)[:, None], k, sampler(200, allowed_V=np.ones(3, bool)))[0])
  for row, n, drafts in zip(tokens_BS, length_B, found):
    best = (-1, -1)
    for place in range(n - 1):
      alike = next((i for i in range(4) if place - i < 0 or row[place - i] != row[n - 1 - i]), 4)
      best = max(best, (alike, place))
    text = row[:n].tolist()
    for _ in range(k):
      text.append(text[len(text) - (n - 1 - best[1])])
    assert drafts.tolist() == text[n:]


def test_the_draft_length_chosen_is_the_one_that_promises_most(prompts_Bp):
  """The device's choice against the planner's formula, on many counts and costs; what was never tried is tried when it is cheap."""
  rng = np.random.default_rng(0)
  for _ in range(50):
    offered, share, pass_seconds = rng.integers(1000, 5000, 6), rng.random(6), 1 + np.cumsum(rng.random(6))
    recent = np.stack([offered, offered * share]).astype(np.float32)
    wanted = acceptance.best_draft((recent[1] + 0.8) / (recent[0] + 1), [np.inf, *pass_seconds]) - 1
    assert int(best_length(jnp.asarray(recent), jnp.asarray(pass_seconds, jnp.float32), (1, 2, 3, 4, 5, 6))) == wanted
  assert int(best_length(jnp.zeros((2, 3)), jnp.array([1.0, 1.01, 1.02]), (1, 2, 3))) == 2


def test_lengths_follow_what_is_accepted(trained, prompts_Bp):
  """A drafter that is always right is asked for all it has; one that is never right soon for the least."""
  model, pass_seconds = trained({'kind': 'parallel'}), np.array([1.0, 1.3, 1.6], np.float32)
  right, wrong = Other(Decoder.of(model, V), 3), Other(Decoder.of(jax.tree.map(lambda x: -x, model), V), 3)
  passes = lambda drafter: generate(model, prompts_Bp, draft=3, drafter=drafter, lengths=(1, 2, 3), pass_seconds=pass_seconds).passes_by_length.tolist()
  found = passes(right)
  assert found[3] > 0.8 * sum(found)
  found = passes(wrong)
  assert found[1] > 0.8 * sum(found)


def test_speculative_sampling_keeps_the_law_over_many_passes(trained, family):
  """4,096 samples of five tokens with three drafts: the law of the last pair of tokens against its exact law; noise is drawn anew each time."""
  model, n = trained(family), 4096
  prompts_Bp, allowed_V = np.full((n, 4), 3, np.int32), np.arange(V) < 3
  end = generate(model, prompts_Bp, np.full(n, 4), np.full(n, 7), draft=3, temperature=1.5, allowed_V=allowed_V)
  assert end.accepted_Bk.any() and (np.asarray(end.forwards_B) > 1).any()
  tree = np.array(list(itertools.product(range(3), repeat=3)), np.int32)
  full_BS = np.concatenate([np.full((27, 4), 3, np.int32), tree], 1)
  batch = {'tokens': jnp.pad(full_BS, ((0, 0), (0, M))), 'segments': jnp.ones((27, 7 + M), int), 'positions': jnp.tile(jnp.arange(7 + M), (27, 1))}
  logits_BSV = future_states(model, Read.of(batch, M))[0] @ model.readout().table().T
  law_BSV = np.float64(jax.nn.softmax(jnp.where(allowed_V, logits_BSV, -jnp.inf) / 1.5))
  chance = np.prod([law_BSV[np.arange(27), 3 + i, tree[:, i]] for i in range(3)], 0)
  assert chance.sum() == pytest.approx(1, abs=1e-5)
  seen = np.bincount(np.asarray(end.tokens_BS)[:, 4:7] @ [9, 3, 1], minlength=27)
  often = chance * n >= 5
  statistic = ((seen - chance * n)**2 / (chance * n))[often].sum() + (seen[~often].sum() - chance[~often].sum() * n)**2 / max(1, chance[~often].sum() * n)
  free = int(often.sum())
  assert statistic < free * (1 - 2 / (9 * free) + 3.09 * np.sqrt(2 / (9 * free)))**3  # exceeded once in a thousand seeds
