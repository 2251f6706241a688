"""A Model laid out for decoding, and its forward over new tokens, with a cache."""
import dataclasses
import functools

import jax
import jax.numpy as jnp

from mtp_jax.config import ModelConfig
from mtp_jax.model.attention import Cache
from mtp_jax.model.block import Block
from mtp_jax.model.model import Model, capped
from mtp_jax.model.norm import rms_norm
from mtp_jax.sharding import einsum, letters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forward:
  """What a forward of some tokens leaves.

  state_BiD: what drafts are made of: the trunk's state, or what the first sequential module reads of it. next_BiD: what the
  unembedding reads for the next token. ahead: what it reads for those after it, where their heads run on the way.
  """
  state_BiD: jax.Array
  next_BiD: jax.Array
  ahead: tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoder:
  """Every layer by itself and matrices in the compute type, so that no pass slices or casts a weight.

  heads: of the futures, or modules. unembed_DV: the columns of the tokenizer's ids. read: how many futures past the next one the
  forward reads, where their heads stand in a chain.
  """
  layers: tuple[Block, ...]
  heads: tuple
  final_norm_D: jax.Array
  embed_VD: jax.Array
  unembed_DV: jax.Array
  config: ModelConfig = dataclasses.field(metadata={'static': True})
  read: int = dataclasses.field(default=0, metadata={'static': True})

  @classmethod
  def of(cls, model: Model, size: int) -> 'Decoder':
    """size: how many ids the tokenizer has."""
    return _lay_out(model, size)

  def reading(self, read: int) -> 'Decoder':
    return dataclasses.replace(self, read=read)

  def embed(self, tokens_Bi):
    return self.embed_VD[tokens_Bi]

  def norm(self, x_BiD):
    return rms_norm(x_BiD, self.final_norm_D, self.config.norm_epsilon)

  def logits(self, h_BiD):
    """float32[B, i, V]"""
    return capped(einsum('BLD,DV->BLV', h_BiD, self.unembed_DV, jnp.float32), self.config)

  def head(self, m: int):
    """The head or module of future m; a shared module goes on for ever."""
    return self.heads[0 if self.config.share_modules else m - self.config.first_own_head]

  def cache(self, batch: int, slots: int) -> Cache | None:
    """An empty one of a head."""
    return None if self.config.kind == 'linear' else Cache.empty(self.config, batch, slots)

  def caches(self, batch: int, slots: int) -> tuple:
    """Empty ones of all that `forward` runs."""
    return (Cache.empty(self.config, batch, slots),) * len(self.layers) + (self.cache(batch, slots),) * len(self.running)

  def forward(self, tokens_Bi, positions_Bi, caches: tuple) -> tuple[Forward, tuple]:
    """New tokens through the trunk and the heads that stand on the way of the next token."""
    c, x_BiD, written, read = self.config, self.embed(tokens_Bi), [], {}
    for layer, cache in zip(self.layers, caches):
      x_BiD, cache = layer(x_BiD, positions_Bi, cache)
      written.append(cache)
    state_BiD = x_BiD
    for m, cache in zip(self.running, caches[len(self.layers):]):
      x_BiD, cache = self.head(m)(x_BiD, positions_Bi, cache)
      written.append(cache)
      read[m] = self.norm(x_BiD)
    next_BiD = read[0] if read else self.norm(state_BiD)
    if c.kind == 'sequential' and c.hidden_input == 'post_norm':
      state_BiD = next_BiD
    return Forward(state_BiD, next_BiD, tuple(read[m] for m in range(1, self.read + 1))), tuple(written)

  @property
  def running(self) -> list[int]:
    """The futures whose heads every forward runs, in their order."""
    c = self.config
    if c.first_own_head:
      return []
    return list(range(c.futures - 1, -1, -1)) if c.kind == 'anticausal' else list(range(self.read + 1))


@functools.partial(jax.jit, static_argnums=1)
def _lay_out(model: Model, size: int) -> Decoder:
  c, readout = model.config, model.readout()
  cast = lambda path, x: x.astype(c.dtype) if len(letters(path)) > 1 else x
  row = lambda stack, i: jax.tree_util.tree_map_with_path(lambda path, x: cast(path, x[i]), stack)
  return Decoder(tuple(row(model.trunk, i) for i in range(c.trunk_layers)), tuple(row(readout.heads, i) for i in range(c.own_heads)),
                 readout.final_norm_D, model.embed_VD[...].astype(c.dtype), readout.table()[:size].T, c)
