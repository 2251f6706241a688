"""A Model arranged for decoding, and its forward over new tokens, with caches.

    tokens_Bi -> x_BiD (embedding) -> trunk -> state_BiD -> heads between the trunk and the next
    token -> next_BiD -> logits_BiV

i is the number of tokens that a forward reads: p of a prompt, or the last known token and k drafts.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp

from mtp_jax.config import ModelConfig
from mtp_jax.decode.placement import MeshCache, empty_cache, parameter_shardings
from mtp_jax.model.attention import Cache
from mtp_jax.model.block import Block
from mtp_jax.model.latent import LatentCache
from mtp_jax.model.model import Model, capped
from mtp_jax.model.norm import rms_norm
from mtp_jax.sharding import einsum, letters, name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forward:
  """What a forward computes for each of its tokens.

  Attributes:
    state_BiD: what drafts are made from: the trunk's state, or what the first sequential module
      reads.
    next_BiD: normed state that the unembedding reads for the next token.
    later: the same for futures 1, 2, ..., `Decoder.futures_in_forward` of them.
  """
  state_BiD: jax.Array
  next_BiD: jax.Array
  later: tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoder:
  """Parameters arranged so that no pass slices or casts a weight.

  Every layer is separate, and matrices are in the compute type.

  Attributes:
    layers: the trunk's blocks.
    heads: the heads or modules of the futures.
    unembed_DV: columns of the tokenizer's ids only.
    futures_in_forward: how many futures past the next token `forward` computes; only where heads
      form a chain.
    mesh: where it decodes, if there are several devices; see placement.py.
  """
  layers: tuple[Block, ...]
  heads: tuple
  final_norm_D: jax.Array
  embed_VD: jax.Array
  unembed_DV: jax.Array
  config: ModelConfig = dataclasses.field(metadata={'static': True})
  futures_in_forward: int = dataclasses.field(default=0, metadata={'static': True})
  mesh: jax.sharding.Mesh | None = dataclasses.field(default=None, metadata={'static': True})

  @classmethod
  def of(cls, model: Model, vocabulary: int, mesh: jax.sharding.Mesh | None = None) -> 'Decoder':
    """A copy of the parameters, on their device or on a `decoding_mesh`.

    Args:
      vocabulary: number of ids of the tokenizer.
    """
    if mesh is None:
      return _decoder(model, vocabulary)
    model = jax.device_put(model, parameter_shardings(model, mesh))
    arrange = functools.partial(arranged, vocabulary=vocabulary, mesh=mesh)
    placed = parameter_shardings(jax.eval_shape(arrange, model), mesh)
    return jax.jit(arrange, out_shardings=placed)(model)

  def with_futures_in_forward(self, futures: int) -> 'Decoder':
    return dataclasses.replace(self, futures_in_forward=futures)

  def embed(self, tokens_Bi):
    """float[B, i, D]"""
    return self.embed_VD[tokens_Bi]

  def norm(self, x_BiD):
    return rms_norm(x_BiD, self.final_norm_D, self.config.norm_epsilon)

  def logits(self, h_BiD):
    """float32[B, i, V]"""
    return capped(einsum('BiD,DV->BiV', h_BiD, self.unembed_DV, jnp.float32), self.config)

  def head(self, m: int):
    """The head or module of future m. A shared module serves every m, also beyond its training."""
    return self.heads[0 if self.config.share_modules else m - self.config.first_own_head]

  @property
  def heads_in_forward(self) -> list[int]:
    """Futures whose heads every forward runs, in order: those between trunk and next token."""
    c = self.config
    if c.first_own_head:
      return []
    if c.kind == 'anticausal':
      return list(range(c.futures - 1, -1, -1))
    return list(range(self.futures_in_forward + 1))

  def head_cache(self, batch: int, slots: int) -> Cache | LatentCache | MeshCache | None:
    """An empty cache for one head."""
    return None if self.config.kind == 'linear' else empty_cache(self.config, batch, slots, self.mesh)

  def caches(self, batch: int, slots: int) -> tuple:
    """Empty caches for all blocks that `forward` runs."""
    layers = (empty_cache(self.config, batch, slots, self.mesh),) * len(self.layers)
    return layers + (self.head_cache(batch, slots),) * len(self.heads_in_forward)

  def forward(self, tokens_Bi, positions_Bi, caches: tuple) -> tuple[Forward, tuple]:
    """New tokens through the trunk and the heads before the next token: (Forward, caches)."""
    c = self.config
    x_BiD, new_caches, normed = self.embed(tokens_Bi), [], {}
    for layer, cache in zip(self.layers, caches):
      x_BiD, cache = layer(x_BiD, positions_Bi, cache)
      new_caches.append(cache)
    state_BiD = x_BiD
    for m, cache in zip(self.heads_in_forward, caches[len(self.layers):]):
      x_BiD, cache = self.head(m)(x_BiD, positions_Bi, cache)
      new_caches.append(cache)
      normed[m] = self.norm(x_BiD)
    next_BiD = normed[0] if normed else self.norm(state_BiD)
    if c.kind == 'sequential' and c.hidden_input == 'post_norm':
      state_BiD = next_BiD
    later = tuple(normed[m] for m in range(1, self.futures_in_forward + 1))
    return Forward(state_BiD, next_BiD, later), tuple(new_caches)


@functools.partial(jax.jit, static_argnums=1)
def _decoder(model: Model, vocabulary: int) -> Decoder:
  return arranged(model, vocabulary)


def arranged(model: Model, vocabulary: int, mesh: jax.sharding.Mesh | None = None) -> Decoder:
  """See `Decoder.of`. Parameters stay where they are."""
  c, readout = model.config, model.readout()

  def cast(path, x):
    return x.astype(c.dtype) if len(letters(path)) > 1 and name(path) != 'router_DE' else x

  def unstacked(stack, n: int) -> tuple:
    layer = lambda i: jax.tree_util.tree_map_with_path(lambda path, x: cast(path, x[i]), stack)
    return tuple(map(layer, range(n)))

  return Decoder(
      layers=sum((unstacked(blocks, len(blocks.attention_norm_D)) for blocks in model.stacks), ()),
      heads=unstacked(readout.heads, c.own_heads),
      final_norm_D=readout.final_norm_D,
      embed_VD=model.embed_VD[...].astype(c.dtype),
      unembed_DV=readout.table()[:vocabulary].T,
      config=c,
      mesh=mesh)
