"""The loop of decoding: a drafter guesses the next tokens, the next pass of the model verifies them, all rows of a batch at once.

A pass, on the device, of rows that each know a number of tokens of their own (Stern et al. 2018, arXiv:1811.03115, section 4;
Leviathan et al. 2022, arXiv:2211.17192, algorithm 1):

    draft     k tokens after those known                                         drafters.py
    forward   the last known token and the drafts, through trunk and cache       decoder.py
    verify    accept some of them, and one token of the model's own              verify.py

The pass over the prompts gives the first token. With k = 0 a pass is plain autoregression. Greedily, and with `same_seed`, the
text does not depend on the drafter, token for token, in float32 (in bfloat16 a pass over several tokens may round a near-tie the
other way); else its law does not.

Prompts are left-aligned: a row's slot s in a cache is its position s. `advance` gives its Progress away to the next one, caches and
all, and writes into them where they lie.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp

from mtp_jax.decode.decoder import Decoder
from mtp_jax.decode.drafters import Drafter
from mtp_jax.decode.verify import Sampler
from mtp_jax.model.attention import write


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
  """The loop's state; k is the drafter's depth.

  caches: of the model's forward. memory: the drafter's. tokens_BS: int32. depth_BS: 0 where the model spoke itself, m where its m-th
  draft was accepted. length_B: tokens known. forwards_B: passes in which the row took part, that over its prompt included.
  offered_Bk: passes in which all drafts before this one were accepted and it had room; accepted_Bk: in which it was as well.
  passes_by_length: of the batch, by draft length. recent_2k: offered and accepted, old passes counting less.
  """
  caches: tuple
  memory: object
  tokens_BS: jax.Array
  depth_BS: jax.Array
  length_B: jax.Array
  limit_B: jax.Array
  done_B: jax.Array
  forwards_B: jax.Array
  offered_Bk: jax.Array
  accepted_Bk: jax.Array
  passes_by_length: jax.Array
  recent_2k: jax.Array


@functools.partial(jax.jit, static_argnames='slots')
def prefill(decoder: Decoder, drafter: Drafter, sampler: Sampler, prompts_Bp, length_B, limit_B, eos, *, slots: int) -> Progress:
  """The pass over the prompts, and the first token after each.

  Args:
    prompts_Bp: int32, left-aligned.
    length_B: int32 >= 1, tokens of each prompt.
    limit_B: int32, tokens of each row in all; a row whose limit is its length does nothing.
    eos: int32, the id that ends a row.
    slots: S, positions a cache holds: the drafter's depth more than the longest limit, at least.
  """
  (B, p), k = prompts_Bp.shape, drafter.depth
  positions_Bp, last_B1 = jnp.broadcast_to(jnp.arange(p), (B, p)), length_B[:, None] - 1
  forward, caches = decoder.forward(prompts_Bp, positions_Bp, decoder.caches(B, p))  # no prompt attends to slots beyond it
  caches = tuple(cache and cache.grown(slots) for cache in caches)
  memory = drafter.begin(decoder, forward, prompts_Bp, positions_Bp, last_B1, slots)
  next_B1D = jnp.take_along_axis(forward.next_BiD, last_B1[..., None], 1)
  zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
  accepted_B, own_B = sampler.verify(decoder.logits(next_B1D), zeros(B, 0), sampler.certain(zeros(B, 0)), length_B[:, None])
  start = Progress(caches, memory, jnp.pad(prompts_Bp, ((0, 0), (0, slots - p))), zeros(B, slots), length_B, limit_B, length_B >= limit_B,
                   zeros(B), zeros(B, k), zeros(B, k), zeros(k + 1), jnp.zeros((2, k)))
  return _emit(start, zeros(B, 0), accepted_B, own_B, eos)


@functools.partial(jax.jit, static_argnames='lengths', donate_argnames='progress')
def advance(decoder: Decoder, drafter: Drafter, sampler: Sampler, progress: Progress, eos, passes, pass_seconds=None, *, lengths: tuple[int, ...]) -> Progress:
  """At most `passes` passes more, fewer when all rows are done.

  Args:
    progress: given away.
    passes: int32.
    lengths: how many tokens to draft. Of several, each pass takes the one that promises most tokens for its cost, given what was
      accepted of late.
    pass_seconds: seconds of a pass for each of `lengths`; only their ratios matter. Needed only where there are several.
  """
  goes_on = lambda state: (state[0] < passes) & ~jnp.all(state[1].done_B)
  chosen = lambda p: best_length(p.recent_2k, pass_seconds, lengths) if len(lengths) > 1 else 0

  def as_long_as_chosen(state):
    """A loop for each length, one after the other: unlike the branches of a conditional, loops write into the caches where they lie."""
    for i, k in enumerate(lengths):
      step = functools.partial(_pass, decoder, drafter, sampler, eos, k)
      state = jax.lax.while_loop(lambda state, i=i: goes_on(state) & (chosen(state[1]) == i), lambda state, step=step: (state[0] + 1, step(state[1])), state)
    return state

  return jax.lax.while_loop(goes_on, as_long_as_chosen, (0, progress))[1]


def best_length(recent_2k, pass_seconds, lengths: tuple[int, ...]):
  """The index in `lengths` with the largest 1 + a_1 + a_1 a_2 + ... over its cost, a_k being the acceptance at depth k: eight of ten where
  nothing is known, so that what has not been tried of late is tried again."""
  acceptance_k = (recent_2k[1] + 0.8) / (recent_2k[0] + 1)
  tokens_by_length = 1 + jnp.pad(jnp.cumsum(jnp.cumprod(acceptance_k)), (1, 0))
  return jnp.argmax(tokens_by_length[jnp.array(lengths)] / pass_seconds)


def _pass(decoder: Decoder, drafter: Drafter, sampler: Sampler, eos, k: int, p: Progress) -> Progress:
  """Draft, forward, verify."""
  length_B1 = p.length_B[:, None]
  with jax.named_scope('draft'):
    drafts_Bk, q_BkV, memory = drafter.draft(decoder, p.memory, p.tokens_BS, length_B1, k, sampler)
  inputs_Bi = jnp.concatenate([jnp.take_along_axis(p.tokens_BS, length_B1 - 1, 1), drafts_Bk], 1)
  positions_Bi = length_B1 - 1 + jnp.arange(k + 1)
  with jax.named_scope('forward'):
    forward, caches = decoder.forward(inputs_Bi, positions_Bi, p.caches)
  with jax.named_scope('verify'):
    accepted_B, own_B = sampler.verify(decoder.logits(forward.next_BiD), drafts_Bk, q_BkV, positions_Bi + 1)
  memory = drafter.learn(decoder, memory, forward, positions_Bi, accepted_B[:, None])
  return _emit(dataclasses.replace(p, caches=caches, memory=memory), drafts_Bk, accepted_B, own_B, eos)


def _emit(p: Progress, drafts_Bk, accepted_B, own_B, eos) -> Progress:
  """Writes the accepted drafts and the own token of every row that is not done, up to its limit and its first eos."""
  k = drafts_Bk.shape[1]
  ahead_i, accepted_B1, slots_Bi = jnp.arange(k + 1), accepted_B[:, None], p.length_B[:, None] + jnp.arange(k + 1)
  new_Bi = jnp.where(ahead_i < accepted_B1, jnp.pad(drafts_Bk, ((0, 0), (0, 1))), own_B[:, None])
  offered_Bi = (ahead_i <= accepted_B1) & (slots_Bi < p.limit_B[:, None]) & ~p.done_B[:, None]
  ends_Bi = offered_Bi & (new_Bi == eos)
  emitted_Bi = offered_Bi & (jnp.cumsum(ends_Bi, 1) - ends_Bi == 0)
  slots_Bi = jnp.where(emitted_Bi, slots_Bi, p.tokens_BS.shape[1])
  length_B = p.length_B + jnp.sum(emitted_Bi, 1, dtype=jnp.int32)
  offered_Bk = emitted_Bi[:, :k]
  accepted_Bk = offered_Bk & (ahead_i[:k] < accepted_B1)
  counted_2k = jnp.stack([jnp.sum(offered_Bk, 0), jnp.sum(accepted_Bk, 0)]).astype(jnp.float32)
  return dataclasses.replace(
      p, tokens_BS=write(p.tokens_BS, new_Bi, slots_Bi), depth_BS=write(p.depth_BS, jnp.where(ahead_i < accepted_B1, ahead_i + 1, 0), slots_Bi),
      length_B=length_B, done_B=p.done_B | jnp.any(ends_Bi & emitted_Bi, 1) | (length_B >= p.limit_B), forwards_B=p.forwards_B + ~p.done_B,
      offered_Bk=p.offered_Bk.at[:, :k].add(offered_Bk), accepted_Bk=p.accepted_Bk.at[:, :k].add(accepted_Bk),
      passes_by_length=p.passes_by_length.at[k].add(1), recent_2k=(0.95 * p.recent_2k).at[:, :k].add(counted_2k))
