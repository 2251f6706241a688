"""Drafters: they guess the next tokens, which one pass of the model then verifies together.

    ParallelHeads      parallel and linear futures: each reads the trunk's state at the last position
    HeadChain          causal and anticausal futures: computed within the model's own forward
    SequentialModules  sequential futures: each module also reads the drafts before its own
    DraftModel         another, smaller model (Leviathan et al. 2022, arXiv:2211.17192)
    PromptLookup       copies what followed the last few tokens earlier; costs almost nothing
    NoDrafts           plain autoregression

A drafter's memory is a pytree that the loop carries. `begin` makes it from the forward of the
prompts, `learn` updates it with the forward of each later pass, up to the last accepted token, and
`draft` makes k drafts of the tokens after those known. Nothing is rolled back. The cache entries of
a rejected draft are at positions after the last known token; a query looks only at positions up to
its own, and each of those is written again before any query reaches it.
"""
import dataclasses
import typing

import jax
import jax.numpy as jnp

from mtp_jax.decode.decoder import Decoder, Forward
from mtp_jax.decode.verify import Sampler
from mtp_jax.model.attention import write


class Drafter(typing.Protocol):
  """What the loop calls.

  Attributes:
    depth: the largest number of drafts in a pass.
    futures_in_forward: futures past the next token that the model's own forward must compute for
      this drafter.
  """
  depth: int
  futures_in_forward: int

  def begin(self, decoder: Decoder, forward: Forward, tokens_Bp, positions_Bp, last_B1, slots: int):
    """The memory after the forward of the prompts.

    Args:
      decoder: the model that verifies.
      forward: of the prompts.
      tokens_Bp, positions_Bp: the prompts, left-aligned.
      last_B1: index of each prompt's last token.
      slots: S, positions that a cache must hold.
    """

  def draft(self, decoder: Decoder, memory, tokens_BS, length_B1, k: int, sampler: Sampler):
    """(drafts, int32[B, k], for positions length_B1 + 0..k-1; their distributions; memory). k may be
    0: a drafter whose own caches need every token still reads the new ones.

    Distributions as `Sampler.draft` or `Sampler.one_hot` returns them.
    """

  def learn(self, decoder: Decoder, memory, forward: Forward, positions_Bi, last_B1):
    """The memory after a pass; its tokens up to index last_B1 were accepted."""


def futures(decoder: Decoder, depth: int) -> Drafter:
  """A drafter from the model's own futures 1..depth."""
  if not depth:
    return NoDrafts()
  drafters = {'sequential': SequentialModules, 'causal': HeadChain, 'anticausal': HeadChain}
  return drafters.get(decoder.config.kind, ParallelHeads)(depth)


def _static(**default):
  return dataclasses.field(metadata={'static': True}, **default)


def _at(x_BS, index_Bi):
  """Entries of x_BS, or x_BSD, at these indices; an index out of range takes the nearest entry."""
  index_Bi = jnp.clip(index_Bi, 0, x_BS.shape[1] - 1)
  return jnp.take_along_axis(x_BS, index_Bi if x_BS.ndim == 2 else index_Bi[..., None], 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ParallelHeads:
  """Memory: (the trunk's state at the last known position, the heads' caches)."""
  depth: int = _static()
  futures_in_forward = 0

  def begin(self, decoder, forward, tokens_Bp, positions_Bp, last_B1, slots):
    empty = decoder.head_cache(len(tokens_Bp), slots)
    return self.learn(decoder, (None, (empty,) * self.depth), forward, positions_Bp, last_B1)

  def draft(self, decoder, memory, tokens_BS, length_B1, k, sampler):
    if not k:
      return *_no_drafts(tokens_BS, sampler), memory
    state_B1D, caches = memory
    heads = ((decoder.head(m), cache) for m, cache in enumerate(caches[:k], 1))
    normed = [decoder.norm(head.read(state_B1D, length_B1 - 2, cache)) for head, cache in heads]
    h_BkD = jnp.concatenate(normed, 1)
    return *sampler.draft(decoder.logits(h_BkD), length_B1 + jnp.arange(k)), memory

  def learn(self, decoder, memory, forward, positions_Bi, last_B1):
    """All heads write keys and values, also those that do not draft in the next pass."""
    _, caches = memory
    heads = map(decoder.head, range(1, self.depth + 1))
    state_BiD = forward.state_BiD
    caches = tuple(head.write(state_BiD, positions_Bi, cache) for head, cache in zip(heads, caches))
    return _at(state_BiD, last_B1), caches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadChain:
  """Memory: normed states of the drafts at the last known position, float[B, k, D]."""
  depth: int = _static()

  @property
  def futures_in_forward(self) -> int:
    return self.depth

  def begin(self, decoder, forward, tokens_Bp, positions_Bp, last_B1, slots):
    return self.learn(decoder, None, forward, positions_Bp, last_B1)

  def draft(self, decoder, memory, tokens_BS, length_B1, k, sampler):
    if not k:
      return *_no_drafts(tokens_BS, sampler), memory
    return *sampler.draft(decoder.logits(memory[:, :k]), length_B1 + jnp.arange(k)), memory

  def learn(self, decoder, memory, forward, positions_Bi, last_B1):
    return jnp.concatenate([_at(h_BiD, last_B1) for h_BiD in forward.later], 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequentialModules:
  """Memory: (the state of every position, which the first module reads, or with module_input='trunk' all
  modules; their caches).

  Module m's state at position t depends on token t+m, so a pass leaves final states at all but the
  last `depth` positions. Those and the new ones are computed again in the next pass: a window of w
  = depth + 1 positions. All modules run, however few drafts are asked for. A shared module can
  draft beyond the depth it was trained for.
  """
  depth: int = _static()
  futures_in_forward = 0

  def begin(self, decoder, forward, tokens_Bp, positions_Bp, last_B1, slots):
    B, p, _ = forward.state_BiD.shape
    h_BpD, caches = forward.state_BiD, []
    for m in range(1, self.depth + 1):
      empty = decoder.head_cache(B, p)
      h_BpD, _, cache = _run_module(decoder, m, tokens_Bp, h_BpD, positions_Bp, empty)
      caches.append(cache.grown(slots))
    return jnp.pad(forward.state_BiD, ((0, 0), (0, slots - p), (0, 0))), tuple(caches)

  def draft(self, decoder, memory, tokens_BS, length_B1, k, sampler):
    state_BSD, caches = memory
    window_Bw = length_B1 - 2 + jnp.arange(-self.depth, 1)
    h_BwD = _at(state_BSD, window_Bw)
    new_caches, distributions = [], []
    for m, cache in enumerate(caches, 1):
      h_BwD, normed_BwD, cache = _run_module(decoder, m, tokens_BS, h_BwD, window_Bw, cache)
      position_B1 = length_B1 + m - 1
      token_B1, q_B1V = sampler.draft(decoder.logits(normed_BwD[:, -1:]), position_B1)
      tokens_BS = write(tokens_BS, token_B1, position_B1)
      new_caches.append(cache)
      distributions.append(q_B1V)
    drafts_Bk = _at(tokens_BS, length_B1 + jnp.arange(k))
    return drafts_Bk, _first(distributions, k), (state_BSD, tuple(new_caches))

  def learn(self, decoder, memory, forward, positions_Bi, last_B1):
    state_BSD, caches = memory
    return write(state_BSD, forward.state_BiD, positions_Bi), caches


def _run_module(decoder: Decoder, m: int, tokens_BS, h_BwD, positions_Bw, cache):
  """Module m at these positions: (what the next module reads, its normed state, its cache)."""
  embedding_BwD = decoder.embed(_at(tokens_BS, positions_Bw + m))
  raw_BwD, normed_BwD, cache = decoder.head(m)(embedding_BwD, h_BwD, positions_Bw, cache)
  next_BwD = normed_BwD if decoder.config.hidden_input == 'post_norm' else raw_BwD
  return h_BwD if decoder.config.independent else next_BwD, normed_BwD, cache


def _first(distributions: list, k: int):
  """Distributions of the first k single drafts as one array, float[B, k, V], or None where none are needed."""
  return None if distributions[0] is None else jnp.concatenate(distributions, 1)[:, :k]


def _no_drafts(tokens_BS, sampler: Sampler):
  """(no drafts, int32[B, 0]; their distributions)"""
  drafts_Bk = jnp.zeros((len(tokens_BS), 0), jnp.int32)
  return drafts_Bk, sampler.one_hot(drafts_Bk)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftModel:
  """Another model with the same tokenizer, which drafts token by token. Memory: its caches.

  After a pass in which all drafts were accepted, its caches lack the last draft and the token after
  it; after any other pass they lack only that token. So its first forward reads the last two
  tokens.
  """
  model: Decoder
  depth: int = _static()
  futures_in_forward = 0

  def begin(self, decoder, forward, tokens_Bp, positions_Bp, last_B1, slots):
    _, caches = self.model.forward(tokens_Bp, positions_Bp, self.model.caches(*tokens_Bp.shape))
    return tuple(cache and cache.grown(slots) for cache in caches)

  def draft(self, decoder, memory, tokens_BS, length_B1, k, sampler):
    positions_Bi = length_B1 + jnp.arange(-2, 0)
    inputs_Bi = _at(tokens_BS, positions_Bi)
    drafts, distributions = [], []
    for _ in range(max(1, k)):
      forward, memory = self.model.forward(inputs_Bi, positions_Bi, memory)
      positions_Bi = positions_Bi[:, -1:] + 1
      inputs_Bi, q_B1V = sampler.draft(self.model.logits(forward.next_BiD[:, -1:]), positions_Bi)
      drafts.append(inputs_Bi)
      distributions.append(q_B1V)
    return jnp.concatenate(drafts, 1)[:, :k], _first(distributions, k), memory

  def learn(self, decoder, memory, forward, positions_Bi, last_B1):
    return memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptLookup:
  """Copies what followed the longest, then the latest, earlier match of the last tokens. No memory.

  longest: tokens compared at most. If the copy reaches the end of the text, it starts again after
    the match.
  """
  depth: int = _static()
  longest: int = _static(default=4)
  futures_in_forward = 0

  def begin(self, decoder, forward, tokens_Bp, positions_Bp, last_B1, slots):
    return ()

  def draft(self, decoder, memory, tokens_BS, length_B1, k, sampler):
    S, last_B1 = tokens_BS.shape[1], length_B1 - 1
    positions_S = jnp.arange(S)

    def equal_BS(back: int):
      """Whether the tokens so far before each position and before the last token are equal."""
      before_BS = _at(tokens_BS, jnp.broadcast_to(positions_S - back, tokens_BS.shape))
      inside_BS = (positions_S >= back) & (last_B1 >= back)
      return (before_BS == _at(tokens_BS, last_B1 - back)) & inside_BS

    equal = jnp.stack([equal_BS(back) for back in range(self.longest)]).astype(jnp.int32)
    match_length_BS = jnp.sum(jnp.cumprod(equal, 0), 0)
    match_length_BS = jnp.where(positions_S < last_B1, match_length_BS, -1)
    match_B1 = jnp.argmax(match_length_BS * S + positions_S, 1, keepdims=True)
    drafts_Bk = _at(tokens_BS, match_B1 + 1 + jnp.arange(k) % (last_B1 - match_B1))
    return drafts_Bk, sampler.one_hot(drafts_Bk), memory

  def learn(self, decoder, memory, forward, positions_Bi, last_B1):
    return memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoDrafts:
  """Plain autoregression. No memory."""
  depth: int = _static(default=0)
  futures_in_forward = 0

  def begin(self, decoder, forward, tokens_Bp, positions_Bp, last_B1, slots):
    return ()

  def draft(self, decoder, memory, tokens_BS, length_B1, k, sampler):
    return *_no_drafts(tokens_BS, sampler), memory

  def learn(self, decoder, memory, forward, positions_Bi, last_B1):
    return memory
