"""The decoding loop: a drafter guesses the next tokens, the next pass of the model verifies them,
for all rows of a batch together.

A pass, on the device; rows may have different numbers of known tokens (Stern et al. 2018,
arXiv:1811.03115, section 4; Leviathan et al. 2022, arXiv:2211.17192, algorithm 1):

    draft     k tokens after the known ones                                      drafters.py
    forward   the last known token and the drafts, through trunk and cache       decoder.py
    verify    accept some of the drafts, and add one token of the model's own    verify.py

The pass over the prompts (`prefill`) gives the first token. With k = 0 a pass is plain
autoregression. Greedily, and with `same_seed`, the text does not depend on the drafter, token for
token, in float32 (in bfloat16 a pass over several tokens may round two nearly equal logits
differently than a pass over one). Otherwise the distribution of the text does not depend on it.

Prompts are left-aligned: slot s of a row's cache holds position s. Both functions are compiled by
`engine`, `decode_passes` with its state donated, so that caches are updated in place.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp

from mtp_jax.decode.decoder import Decoder
from mtp_jax.decode.drafters import Drafter
from mtp_jax.decode.placement import place
from mtp_jax.decode.verify import Sampler
from mtp_jax.model.attention import write

# What is left of the weights in `recent_2k` after a pass. One without drafts shows nothing new, so it forgets little;
# a draft length that loses is then seldom tried again.
DECAY, DECAY_WITHOUT_DRAFTS = 0.95, 0.99


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """What the loop carries; k is the drafter's depth.

  Attributes:
    caches: of the model's forward.
    memory: the drafter's.
    tokens_BS: int32, prompts and generated tokens.
    depth_BS: 0 for a token of the model's own, m for an accepted m-th draft.
    drafted_BS: drafts of the pass that generated the token; 0 in the pass over the prompts.
    length_B: known tokens of each row.
    limit_B: the most tokens of each row, prompt included.
    done_B: rows that have ended.
    recent_2k: offered and accepted drafts of the whole batch, with weights that decay. A draft is
      offered where all drafts before it were accepted and it is within the limit.
  """
  caches: tuple
  memory: object
  tokens_BS: jax.Array
  depth_BS: jax.Array
  drafted_BS: jax.Array
  length_B: jax.Array
  limit_B: jax.Array
  done_B: jax.Array
  recent_2k: jax.Array


def prefill(decoder: Decoder, drafter: Drafter, sampler: Sampler,
            prompts_Bp, length_B, limit_B, eos, *, slots: int) -> DecodeState:
  """The state after the pass over the prompts, which generates the first token of each row.

  Args:
    prompts_Bp: int32, left-aligned.
    length_B: int32 >= 1, tokens of each prompt.
    limit_B: int32, the most tokens of each row, prompt included; a row whose limit is its length
      generates nothing.
    eos: int32, the id that ends a row.
    slots: S, positions of a cache; at least the largest limit plus the drafter's depth.
  """
  (B, p), k = prompts_Bp.shape, drafter.depth
  positions_Bp, last_B1 = jnp.broadcast_to(jnp.arange(p), (B, p)), length_B[:, None] - 1
  forward, caches = decoder.forward(prompts_Bp, positions_Bp, decoder.caches(B, p))  # needs no more slots
  caches = tuple(cache and cache.grown(slots) for cache in caches)
  memory = drafter.begin(decoder, forward, prompts_Bp, positions_Bp, last_B1, slots)
  no_drafts_Bk = jnp.zeros((B, 0), jnp.int32)
  state = DecodeState(
      caches=caches,
      memory=memory,
      tokens_BS=jnp.pad(prompts_Bp, ((0, 0), (0, slots - p))),
      depth_BS=jnp.zeros((B, slots), jnp.int32),
      drafted_BS=jnp.zeros((B, slots), jnp.int32),
      length_B=length_B,
      limit_B=limit_B,
      done_B=length_B >= limit_B,
      recent_2k=jnp.zeros((2, k)))
  next_B1D = jnp.take_along_axis(forward.next_BiD, last_B1[..., None], 1)
  logits_B1V, q_BkV = decoder.logits(next_B1D), sampler.one_hot(no_drafts_Bk)
  accepted_B, token_B = sampler.verify(logits_B1V, no_drafts_Bk, q_BkV, length_B[:, None])
  return place(_append(state, no_drafts_Bk, accepted_B, token_B, eos), decoder.mesh)


def decode_passes(decoder: Decoder, drafter: Drafter, sampler: Sampler, state: DecodeState,
                  eos, passes, pass_costs=None, *, lengths: tuple[int, ...]) -> DecodeState:
  """The state after `passes` more passes, or fewer if all rows end before.

  Args:
    passes: int32.
    lengths: numbers of drafts to choose from. Each pass takes the one that promises most tokens for
      its cost (`best_length`).
    pass_costs: seconds of a pass for each of `lengths`; only their ratios matter. Needed if there
      are several lengths.
  """
  def unfinished(counted):
    count, state = counted
    return (count < passes) & ~jnp.all(state.done_B)

  def chosen(state):
    return best_length(state.recent_2k, pass_costs, lengths) if len(lengths) > 1 else 0

  def pass_and_count(k, counted):
    count, state = counted
    return count + 1, one_pass(decoder, drafter, sampler, state, eos, k)

  def each_length_while_chosen(counted):
    """A loop for each length; unlike branches of a conditional, loops update caches in place."""
    for i, k in enumerate(lengths):
      still_chosen = lambda counted, i=i: unfinished(counted) & (chosen(counted[1]) == i)
      counted = jax.lax.while_loop(still_chosen, functools.partial(pass_and_count, k), counted)
    return counted

  _, state = jax.lax.while_loop(unfinished, each_length_while_chosen, (0, state))
  return state


def best_length(recent_2k, pass_costs, lengths: tuple[int, ...]):
  """Index of the draft length with the largest (1 + a_1 + a_1 a_2 + ...) / cost.

  a_k is the recent acceptance at depth k. It tends to 0.8 as the recent drafts of a depth become
  few, so that a length not tried for a while is tried again.
  """
  acceptance_k = (recent_2k[1] + 0.8) / (recent_2k[0] + 1)
  tokens_by_length = 1 + jnp.pad(jnp.cumsum(jnp.cumprod(acceptance_k)), (1, 0))
  return jnp.argmax(tokens_by_length[jnp.array(lengths)] / pass_costs)


def one_pass(decoder: Decoder, drafter: Drafter, sampler: Sampler, state: DecodeState, eos, k: int) -> DecodeState:
  """Draft, forward, verify."""
  tokens_BS, length_B1 = state.tokens_BS, state.length_B[:, None]
  with jax.named_scope('draft'):
    drafts_Bk, q_BkV, memory = drafter.draft(decoder, state.memory, tokens_BS, length_B1, k, sampler)
  last_B1 = jnp.take_along_axis(tokens_BS, length_B1 - 1, 1)
  inputs_Bi = jnp.concatenate([last_B1, drafts_Bk], 1)
  positions_Bi = length_B1 - 1 + jnp.arange(k + 1)
  with jax.named_scope('forward'):
    forward, caches = decoder.forward(inputs_Bi, positions_Bi, state.caches)
  with jax.named_scope('verify'):
    logits_BiV = decoder.logits(forward.next_BiD)
    accepted_B, token_B = sampler.verify(logits_BiV, drafts_Bk, q_BkV, positions_Bi + 1)
  memory = drafter.learn(decoder, memory, forward, positions_Bi, accepted_B[:, None])
  state = dataclasses.replace(state, caches=caches, memory=memory)
  return place(_append(state, drafts_Bk, accepted_B, token_B, eos), decoder.mesh)


def _append(state: DecodeState, drafts_Bk, accepted_B, token_B, eos) -> DecodeState:
  """Adds accepted drafts and the model's token to rows not done, up to the limit or first eos."""
  k = drafts_Bk.shape[1]
  index_i, accepted_B1 = jnp.arange(k + 1), accepted_B[:, None]
  is_draft_Bi = index_i < accepted_B1
  new_Bi = jnp.where(is_draft_Bi, jnp.pad(drafts_Bk, ((0, 0), (0, 1))), token_B[:, None])
  positions_Bi = state.length_B[:, None] + index_i

  within_limit_Bi = positions_Bi < state.limit_B[:, None]
  valid_Bi = (index_i <= accepted_B1) & within_limit_Bi & ~state.done_B[:, None]
  is_eos_Bi = valid_Bi & (new_Bi == eos)
  kept_Bi = valid_Bi & (jnp.cumsum(is_eos_Bi, 1) - is_eos_Bi == 0)
  length_B = state.length_B + jnp.sum(kept_Bi, 1, dtype=jnp.int32)
  done_B = state.done_B | jnp.any(is_eos_Bi & kept_Bi, 1) | (length_B >= state.limit_B)

  offered_Bk = kept_Bi[:, :k]
  accepted_Bk = offered_Bk & is_draft_Bi[:, :k]
  counts_2k = jnp.stack([jnp.sum(offered_Bk, 0), jnp.sum(accepted_Bk, 0)]).astype(jnp.float32)
  S = state.tokens_BS.shape[1]
  written_Bi = jnp.where(kept_Bi, positions_Bi, S)  # S is out of range, so not written
  return dataclasses.replace(
      state,
      tokens_BS=write(state.tokens_BS, new_Bi, written_Bi),
      depth_BS=write(state.depth_BS, jnp.where(is_draft_Bi, index_i + 1, 0), written_Bi),
      drafted_BS=write(state.drafted_BS, jnp.full_like(new_Bi, k), written_Bi),
      length_B=length_B,
      done_B=done_B,
      recent_2k=((DECAY if k else DECAY_WITHOUT_DRAFTS) * state.recent_2k).at[:, :k].add(counts_2k))
