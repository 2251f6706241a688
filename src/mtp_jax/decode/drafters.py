"""Drafters: what guesses the next tokens, so that one pass of the model verifies them all.

    Heads     parallel and linear futures: each reads the trunk's state at the last position
    Chain     causal and anticausal futures: read on the way of the model's own forward
    Modules   sequential futures: each is told the drafts before its own
    Other     another, smaller model (Leviathan et al. 2022, arXiv:2211.17192)
    Lookup    what followed when the same few tokens last stood in the text (prompt lookup); costs next to nothing
    Nothing   no drafts: plain autoregression

What a drafter keeps, its memory, is a pytree that the loop carries. `begin` is shown the forward of the prompts, `learn` that of every
later pass, up to the last token accepted; `draft` then makes k drafts of the tokens after those known. Nothing is ever rolled
back: what a rejected draft left in a cache lies past the last known token, where no query looks until it has been written anew.
"""
import dataclasses
import typing

import jax
import jax.numpy as jnp

from mtp_jax.decode.decoder import Decoder, Forward
from mtp_jax.decode.verify import Sampler
from mtp_jax.model.attention import write


class Drafter(typing.Protocol):
  """The face of them all. depth: drafts at most. reads: futures past the next that the model's forward must read for it."""
  depth: int
  reads: int

  def begin(self, decoder: Decoder, forward: Forward, tokens_Bp, positions_Bp, last_B1, slots: int):
    """The memory after the prompts, which end at the index last_B1, and before the model's own token after each, for so many slots."""

  def draft(self, decoder: Decoder, memory, tokens_BS, length_B1, k: int, sampler: Sampler):
    """(int32[B, k], their laws as `Sampler.draft` returns them, memory): drafts for the positions length_B1 + 0..k-1."""

  def learn(self, decoder: Decoder, memory, forward: Forward, positions_Bi, last_B1):
    """The memory after a pass, whose tokens are true up to the index last_B1."""


def futures(decoder: Decoder, depth: int) -> Drafter:
  """The model's own futures 1..depth."""
  kind = {'sequential': Modules, 'causal': Chain, 'anticausal': Chain}.get(decoder.config.kind, Heads)
  return kind(depth) if depth else Nothing()


def _static(**default):
  return dataclasses.field(metadata={'static': True}, **default)


def _at(x_Bi, index_Bi):
  """x_Bi, or x_BiD, at some of its positions; those outside are the nearest."""
  index_Bi = jnp.clip(index_Bi, 0, x_Bi.shape[1] - 1)
  return jnp.take_along_axis(x_Bi, index_Bi if x_Bi.ndim == 2 else index_Bi[..., None], 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Heads:
  """Memory: (the trunk's state at the last true position, the heads' caches)."""
  depth: int = _static()
  reads = 0

  def begin(self, decoder, forward, tokens_Bp, positions_Bp, last_B1, slots):
    empty = decoder.cache(len(tokens_Bp), slots)
    return self.learn(decoder, (None, (empty,) * self.depth), forward, positions_Bp, last_B1)

  def draft(self, decoder, memory, tokens_BS, length_B1, k, sampler):
    state_B1D, caches = memory
    h_BkD = jnp.concatenate([decoder.norm(decoder.head(m).read(state_B1D, length_B1 - 2, cache)) for m, cache in enumerate(caches[:k], 1)], 1)
    return *sampler.draft(decoder.logits(h_BkD), length_B1 + jnp.arange(k)), memory

  def learn(self, decoder, memory, forward, positions_Bi, last_B1):
    """Every head writes, whether or not it will draft."""
    write = lambda m, cache: decoder.head(m).write(forward.state_BiD, positions_Bi, cache)
    caches = tuple(write(m, cache) for m, cache in enumerate(memory[1], 1))
    return _at(forward.state_BiD, last_B1), caches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain:
  """Memory: what the unembedding reads for the drafts, at the last true position."""
  depth: int = _static()

  @property
  def reads(self) -> int:
    return self.depth

  def begin(self, decoder, forward, tokens_Bp, positions_Bp, last_B1, slots):
    return self.learn(decoder, None, forward, positions_Bp, last_B1)

  def draft(self, decoder, memory, tokens_BS, length_B1, k, sampler):
    return *sampler.draft(decoder.logits(memory[:, :k]), length_B1 + jnp.arange(k)), memory

  def learn(self, decoder, memory, forward, positions_Bi, last_B1):
    return jnp.concatenate([_at(h_BiD, last_B1) for h_BiD in forward.ahead], 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Modules:
  """Memory: (h^0 of every position, which the first module reads; the modules' caches).

  Module m's state at position t is final once token t+m is known, so what earlier passes left is final at all but the last `depth`
  positions and the new ones; these are run again, a window of depth + 1. All modules run, however many of their drafts are wanted.
  A shared module drafts beyond the depth it was trained for.
  """
  depth: int = _static()
  reads = 0

  def begin(self, decoder, forward, tokens_Bp, positions_Bp, last_B1, slots):
    B, p, _ = forward.state_BiD.shape
    caches = (decoder.cache(B, p),) * self.depth
    caches, _ = self._run(decoder, caches, forward.state_BiD, tokens_Bp, positions_Bp, lambda m, h_B1D, tokens_Bp: tokens_Bp)
    return jnp.pad(forward.state_BiD, ((0, 0), (0, slots - p), (0, 0))), tuple(cache.grown(slots) for cache in caches)

  def draft(self, decoder, memory, tokens_BS, length_B1, k, sampler):
    (state_BSD, caches), laws = memory, []
    window_Bw = length_B1 - 2 + jnp.arange(-self.depth, 1)

    def extend(m, h_B1D, tokens_BS):
      token_B1, law_B1V = sampler.draft(decoder.logits(h_B1D), length_B1 + m - 1)
      laws.append(law_B1V)
      return write(tokens_BS, token_B1, length_B1 + m - 1)

    caches, tokens_BS = self._run(decoder, caches, _at(state_BSD, window_Bw), tokens_BS, window_Bw, extend)
    return _at(tokens_BS, length_B1 + jnp.arange(k)), None if laws[0] is None else jnp.concatenate(laws[:k], 1), (state_BSD, caches)

  def learn(self, decoder, memory, forward, positions_Bi, last_B1):
    return write(memory[0], forward.state_BiD, positions_Bi), memory[1]

  def _run(self, decoder, caches, h_BwD, tokens_BS, positions_Bw, extend):
    """The modules in turn: (caches, tokens_BS); extend(m, h_B1D, tokens_BS) may append what module m says last."""
    written = []
    for m, cache in enumerate(caches, 1):
      raw_BwD, normed_BwD, cache = decoder.head(m)(decoder.embed(_at(tokens_BS, positions_Bw + m)), h_BwD, positions_Bw, cache)
      written.append(cache)
      tokens_BS = extend(m, normed_BwD[:, -1:], tokens_BS)
      h_BwD = normed_BwD if decoder.config.hidden_input == 'post_norm' else raw_BwD
    return tuple(written), tokens_BS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Other:
  """Another model of the same tokenizer, which drafts token by token. Memory: its caches.

  When all its drafts were accepted it has seen neither the last of them nor the model's own token after it, else all but that
  token: so its first forward runs the last two.
  """
  model: Decoder
  depth: int = _static()
  reads = 0

  def begin(self, decoder, forward, tokens_Bp, positions_Bp, last_B1, slots):
    caches = self.model.forward(tokens_Bp, positions_Bp, self.model.caches(*tokens_Bp.shape))[1]
    return tuple(cache and cache.grown(slots) for cache in caches)

  def draft(self, decoder, memory, tokens_BS, length_B1, k, sampler):
    positions_Bi, drafts, laws = length_B1 + jnp.arange(-2, 0), [], []
    new_Bi = _at(tokens_BS, positions_Bi)
    for _ in range(k):
      forward, memory = self.model.forward(new_Bi, positions_Bi, memory)
      positions_Bi = positions_Bi[:, -1:] + 1
      new_Bi, law_B1V = sampler.draft(self.model.logits(forward.next_BiD[:, -1:]), positions_Bi)
      drafts.append(new_Bi)
      laws.append(law_B1V)
    return jnp.concatenate(drafts, 1), None if laws[0] is None else jnp.concatenate(laws, 1), memory

  def learn(self, decoder, memory, forward, positions_Bi, last_B1):
    return memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lookup:
  """Where the last `longest` tokens, or fewer, stood before, most of them counting most, then the latest place: what followed there,
  over and over. No memory."""
  depth: int = _static()
  longest: int = _static(default=4)
  reads = 0

  def begin(self, decoder, forward, tokens_Bp, positions_Bp, last_B1, slots):
    return ()

  def draft(self, decoder, memory, tokens_BS, length_B1, k, sampler):
    place_S, last_B1 = jnp.arange(tokens_BS.shape[1]), length_B1 - 1
    equal = [(_at(tokens_BS, jnp.broadcast_to(place_S - i, tokens_BS.shape)) == _at(tokens_BS, last_B1 - i)) & (place_S >= i) & (last_B1 >= i)
             for i in range(self.longest)]
    alike_BS = jnp.where(place_S < last_B1, jnp.sum(jnp.cumprod(jnp.stack(equal).astype(jnp.int32), 0), 0), -1)
    place_B1 = jnp.argmax(alike_BS * tokens_BS.shape[1] + place_S, 1, keepdims=True)
    drafts_Bk = _at(tokens_BS, place_B1 + 1 + jnp.arange(k) % (last_B1 - place_B1))
    return drafts_Bk, sampler.certain(drafts_Bk), memory

  def learn(self, decoder, memory, forward, positions_Bi, last_B1):
    return memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nothing:
  """No drafts. No memory."""
  depth: int = _static(default=0)
  reads = 0

  def begin(self, decoder, forward, tokens_Bp, positions_Bp, last_B1, slots):
    return ()

  def draft(self, decoder, memory, tokens_BS, length_B1, k, sampler):
    drafts_Bk = jnp.zeros((len(tokens_BS), 0), jnp.int32)
    return drafts_Bk, sampler.certain(drafts_Bk), memory

  def learn(self, decoder, memory, forward, positions_Bi, last_B1):
    return memory
