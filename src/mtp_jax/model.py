"""A decoder trunk and its futures: blocks stacked on a leading axis, once for depth and once for what lies ahead.

    tokens_BT -> x_BLD (embedding) -> z_BLD (trunk, N blocks) -> h_BLD of each future m -> logits_BLV (one shared unembedding)

Future m at position t predicts token t+1+m. Two families:

parallel (Gloeckle et al. 2024, arXiv:2404.19737, section 2): every future is one block that reads the trunk's residual stream,

    h^m = norm(block_m(z)),  m = 0..M-1

sequential (DeepSeek-V3, arXiv:2412.19437, equations 21-23): a causal chain that is told the tokens in between,

    h^0 = norm(z),  h^k_t = norm_k(block_k(join_k [norm_e(embed(token_{t+k})) ; norm_h(h^{k-1}_t)])),  k = 1..M-1

A model of one future is the plain decoder in both families. There is no loss and no sampling here.
"""
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.layers import Block, Cache, normal, rms_norm, stack
from mtp_jax.sharding import einsum, lookup, place

REMAT = {'none': lambda f: f,
         'dots': functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
         'full': jax.checkpoint}


class Module(nnx.Module):
  """One link of the sequential chain: joins a token's embedding, first, with the previous state, and runs a block."""

  def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
    D = c.width
    self.embedding_norm_D, self.hidden_norm_D, self.out_norm_D = (nnx.Param(jnp.ones(D)) for _ in range(3))
    self.join_CD = nnx.Param(normal(2 * D)(rngs.params(), (2 * D, D)))
    self.block = Block(c, rngs)

  def __call__(self, e_BLD, h_BLD, positions_BL, mask_BLS, cache: Cache | None = None):
    """(state before its norm, state after it, cache)."""
    epsilon = self.block.config.norm_epsilon
    x_BLC = jnp.concatenate([rms_norm(e_BLD, self.embedding_norm_D[...], epsilon), rms_norm(h_BLD, self.hidden_norm_D[...], epsilon)], -1)
    x_BLD, cache = self.block(einsum('BLC,CD->BLD', x_BLC, self.join_CD[...].astype(x_BLC.dtype)), positions_BL, mask_BLS, cache)
    return x_BLD, rms_norm(x_BLD, self.out_norm_D[...], epsilon), cache


class Model(nnx.Module):
  """The parameters of an experiment, an immutable pytree."""

  def __init__(self, c: ModelConfig, key):
    keys = jax.random.split(key, 4)
    table = lambda key: nnx.Param(normal(c.width)(key, (c.vocab, c.width)))
    self.embed_VD = table(keys[0])
    self.trunk = stack(functools.partial(Block, c), c.trunk_layers, keys[1])
    self.final_norm_D = nnx.Param(jnp.ones(c.width))
    if c.modules:
      self.futures = stack(functools.partial(Block if c.kind == 'parallel' else Module, c), c.modules, keys[2])
    if not c.tie_embeddings:
      self.unembed_VD = table(keys[3])
    self.config = c

  def embed(self, tokens_BL):
    """float[B, L, D] in the compute type."""
    return lookup(place(self.embed_VD[...], 'Vd'), tokens_BL).astype(self.config.dtype)

  def run_trunk(self, x_BLD, positions_BL, mask_BLS, cache: Cache | None = None):
    """(residual stream after N blocks, not normed; cache)."""
    def layer(x_BLD, inputs):
      block, cache = inputs
      return block(x_BLD, positions_BL, mask_BLS, cache)

    with jax.named_scope('trunk'):
      return jax.lax.scan(REMAT[self.config.remat](layer), x_BLD, (self.trunk, cache))

  def norm(self, x_BLD):
    return rms_norm(x_BLD, self.final_norm_D[...], self.config.norm_epsilon)

  def unembedding(self):
    """float32[V, D], its width gathered once for all futures; cast where it is used, so that its gradient adds up in float32."""
    table_VD = self.embed_VD if self.config.tie_embeddings else self.unembed_VD
    return place(table_VD[...], 'Vd')

  def module(self, k):
    """The sequential module of future k >= 1; k may be traced."""
    return jax.tree.map(lambda x: x[0 if self.config.share_modules else k - 1], self.futures)

  def map_futures(self, f, z_BLD, tokens_BT, positions_BL, mask_BLS):
    """f(m, h_BLD) of every future m, stacked over M. With remat, one future's activations are alive at a time.

    Args:
      f: called with m (traced) and the normed state that the unembedding reads; returns a pytree of arrays.
      z_BLD: what `run_trunk` returned.
      tokens_BT: T = L + M tokens of each row; the sequential family reads those in between.

    Returns:
      The pytree f returns, with a leading axis M.
    """
    c, L = self.config, z_BLD.shape[1]

    def head(inputs):
      block, m = inputs
      return f(m, self.norm(block(z_BLD, positions_BL, mask_BLS)[0]))

    def link(h_BLD, inputs):
      module, k = inputs
      e_BLD = self.embed(jax.lax.dynamic_slice_in_dim(tokens_BT, k, L, 1))
      raw_BLD, normed_BLD, _ = (self.module(k) if module is None else module)(e_BLD, h_BLD, positions_BL, mask_BLS)
      return normed_BLD if c.hidden_input == 'post_norm' else raw_BLD, f(k, normed_BLD)

    with jax.named_scope('futures'):
      if c.kind == 'parallel':
        batch_size = None if c.head_batch == 1 else c.head_batch
        return jax.lax.map(REMAT[c.remat](head), (self.futures, jnp.arange(c.futures)), batch_size=batch_size)
      h_BLD = self.norm(z_BLD)
      first = jax.tree.map(lambda x: x[None], REMAT[c.remat](f)(0, h_BLD))
      if c.futures == 1:
        return first
      inputs = None if c.share_modules else self.futures, jnp.arange(1, c.futures)
      rest = jax.lax.scan(REMAT[c.remat](link), h_BLD if c.hidden_input == 'post_norm' else z_BLD, inputs)[1]
      return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, rest)


def conventions(c: ModelConfig) -> dict:
  """What a reader of the weights must know besides their shapes; travels in every checkpoint."""
  return {
      'target': 'future m at position t predicts token t+1+m',
      'futures': c.futures,
      'kind': c.kind,
      'placement': c.placement,
      'trunk_layers': c.trunk_layers,
      'share_modules': c.share_modules,
      'hidden_input': 'residual stream' if c.kind == 'parallel' else c.hidden_input,
      'join': 'none' if c.kind == 'parallel' else 'embedding first, hidden second',
      'final_norm': 'shared by all futures' if c.kind == 'parallel' else 'one a module',
      'positions': "of the query's own token, from its document's first token in the row",
      'rotary': 'half-split',
      'tie_embeddings': c.tie_embeddings,
  }
