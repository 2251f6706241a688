"""What the tests of decoding share: half-trained models, decoding with few arguments, references."""
import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiments import nudged

from mtp_jax.config import ObjectiveConfig
from mtp_jax.decode import loop
from mtp_jax.decode.decoder import Decoder
from mtp_jax.decode.drafters import futures
from mtp_jax.decode.engine import tally
from mtp_jax.decode.loop import DecodeState
from mtp_jax.decode.requests import EXACT
from mtp_jax.decode.verify import Sampler
from mtp_jax.objective import Read, future_states, loss

M, V, S = 4, 24, 44
LENGTHS_B = np.array([1, 2, 5, 8, 3, 8], np.int32)
LIMITS_B = np.array([40, 31, 6, 40, 17, 8], np.int32)
PROMPTS_Bp = np.random.default_rng(0).integers(0, V, (len(LENGTHS_B), 8)).astype(np.int32)
ALLOWED_V = np.arange(V) != 11
NEVER = np.int32(-1)  # an id that no row ends with
prefill = jax.jit(loop.prefill, static_argnames='slots')
decode_passes = jax.jit(loop.decode_passes, static_argnames='lengths', donate_argnames='state')


def half_trained_models(tiny, random_model):
  """model(variant): has half learnt a noisy permutation of the ids, so that it accepts some drafts.

  Drafts of every depth are accepted sometimes, and rejected sometimes.
  """
  @functools.cache
  def trained(variant):
    model = random_model(tiny(futures=M, **dict(variant)))
    # an anticausal model's next token depends on all other heads, so it learns more slowly
    return _train(model, steps=100 if model.config.kind == 'anticausal' else 40)

  return lambda variant: trained(tuple(variant.items()))


def _train(model, steps: int):
  transform, rng = optax.adam(1e-2), np.random.default_rng(1)

  @jax.jit
  def step(model, state, tokens):
    batch = {'tokens': tokens, 'segments': jnp.ones_like(tokens),
             'positions': jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)}
    read, weights_M = Read.of(batch, M), jnp.ones(M) / tokens.size
    grads = jax.grad(lambda model: loss(model, read, weights_M, ObjectiveConfig())[0])(model)
    updates, state = transform.update(grads, state)
    return optax.apply_updates(model, updates), state

  state = transform.init(model)
  for _ in range(steps):
    model, state = step(model, state, _noisy_permutation(rng, 8, 16 + M))
  return model


def _noisy_permutation(rng, rows: int, length: int):
  """Rows in which nine of ten tokens are 5 x + 7 modulo V of the one before."""
  tokens = rng.integers(0, V, (rows, length))
  for t in range(1, length):
    tokens[:, t] = np.where(rng.random(rows) < 0.9, (5 * tokens[:, t - 1] + 7) % V, tokens[:, t])
  return tokens.astype(np.int32)


def logits_MBSV(model, tokens_BS):
  """Every future's logits after every prefix, without a cache and without a cap.

  A future of the sequential kind also reads the tokens between the prefix and its own.
  """
  B, length = tokens_BS.shape
  ones, positions = jnp.ones((B, length + M), jnp.int32), jnp.arange(length + M)
  batch = {'tokens': jnp.pad(tokens_BS, ((0, 0), (0, M))), 'segments': ones,
           'positions': jnp.broadcast_to(positions, ones.shape)}
  return future_states(model, Read.of(batch, M)) @ model.readout().table().T


@jax.jit
def choices_MBS(model, tokens_BS):
  """Every future's greedy choice after every prefix, without a cache."""
  return jnp.argmax(allowed_logits_MBSV(model, tokens_BS), -1)


@jax.jit
def clear_MBS(model, tokens_BS):
  """Where that choice leads by more than 1e-3, a hundred times what two programs differ by."""
  best, second = jnp.moveaxis(jax.lax.top_k(allowed_logits_MBSV(model, tokens_BS), 2)[0], -1, 0)
  return best - second > 1e-3


def allowed_logits_MBSV(model, tokens_BS):
  return jnp.where(ALLOWED_V, logits_MBSV(model, tokens_BS), -jnp.inf)


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


def sampler(rows: int, *, seed=0, number=None, temperature=0.0, top_k=0, top_p=1.0,
            allowed_V=ALLOWED_V, same_seed=False, criterion=EXACT) -> Sampler:
  """Numbers are broadcast; row i has number i unless numbers are given."""
  per_row = lambda x, dtype: np.broadcast_to(x, rows).astype(dtype)
  return Sampler(
      seed_B2=np.stack([per_row(seed, np.uint32),
                        per_row(np.arange(rows) if number is None else number, np.uint32)], 1),
      temperature_B=per_row(temperature, np.float32),
      top_k_B=per_row(top_k, np.int32),
      top_p_B=per_row(top_p, np.float32),
      allowed_V=np.asarray(allowed_V),
      greedy=not np.any(temperature),
      truncated=bool(np.any(top_k) or np.any(np.less(top_p, 1))),
      same_seed=same_seed,
      criterion=criterion)


def start(model, prompts_Bp, length_B=LENGTHS_B, limit_B=LIMITS_B, *, draft, eos=NEVER, drafter=None,
          mesh=None, **options) -> tuple[tuple, DecodeState]:
  """((decoder, drafter, sampler), the state after the prompts)."""
  decoder = Decoder.of(model, V, mesh)
  drafter = drafter or futures(decoder, draft)
  decoder = decoder.with_futures_in_forward(drafter.futures_in_forward)
  parts = decoder, drafter, sampler(len(prompts_Bp), **options)
  length_B, limit_B = np.asarray(length_B, np.int32), np.asarray(limit_B, np.int32)
  return parts, prefill(*parts, prompts_Bp, length_B, limit_B, np.int32(eos), slots=S + 8)


def generate(model, prompts_Bp, length_B=LENGTHS_B, limit_B=LIMITS_B, *, draft, eos=NEVER,
             lengths=None, pass_costs=None, **options) -> DecodeState:
  """The state when all rows have ended."""
  parts, state = start(model, prompts_Bp, length_B, limit_B, draft=draft, eos=eos, **options)
  _, drafter, _ = parts
  return decode_passes(*parts, state, np.int32(eos), np.int32(1000), pass_costs,
                       lengths=lengths or (drafter.depth,))


def rows(state) -> list[list[int]]:
  """Known tokens of each row, prompt included."""
  return [row[:n].tolist() for row, n in zip(np.asarray(state.tokens_BS), np.asarray(state.length_B))]


def tallies(state, start_B=LENGTHS_B) -> list[np.ndarray]:
  """Of each row: passes by draft length, offered and accepted drafts by depth; see `tally`."""
  state = jax.device_get(dataclasses.replace(state, memory=None, caches=None))
  new = [slice(a, b) for a, b in zip(start_B, state.length_B)]
  most = state.recent_2k.shape[1]
  counts = [tally(depth_S[n], drafted_S[n], most)
            for depth_S, drafted_S, n in zip(state.depth_BS, state.drafted_BS, new)]
  return [np.array(count) for count in zip(*counts)]


def settled_lengths(model, generated_rows) -> list[int | None]:
  """How many tokens of each row no rounding can change; None is the whole row.

  generated_rows: function of a model. Those tokens are settled that two nudged models generate too.
  """
  texts = [generated_rows(m) for m in (model, nudged(model, 1), nudged(model, 2))]
  lengths = []
  for one, *others in zip(*texts):
    agreeing = min(len(os.path.commonprefix([one, other])) for other in others)
    lengths.append(None if all(one == other for other in others) else agreeing)
  assert sum(n is None for n in lengths) > len(lengths) / 2, lengths
  return lengths


def equal_where_settled(some_rows, other_rows, lengths: list[int | None]) -> bool:
  """Whether two programs generated the same rows up to the first near tie of each."""
  return all(a[:n] == b[:n] for a, b, n in zip(some_rows, other_rows, lengths, strict=True))


def drafts_of(parts, k: int):
  """A function of a state: the drafts that the next pass would verify, int32[B, k]."""
  decoder, drafter, sampler = parts

  @jax.jit
  def drafts_Bk(state):
    length_B1 = state.length_B[:, None]
    return drafter.draft(decoder, state.memory, state.tokens_BS, length_B1, k, sampler)[0]

  return drafts_Bk


def chi_squared_bound(free: int) -> float:
  """What chi squared exceeds once in a thousand seeds (Wilson and Hilferty)."""
  return free * (1 - 2 / (9 * free) + 3.09 * np.sqrt(2 / (9 * free)))**3
