"""A decoder trunk and its futures: blocks stacked on a leading axis, once for depth and once for what lies ahead.

    tokens_BT -> x_BLD (embedding) -> z_BLD (trunk, N blocks) -> h_BLD of each future m -> logits_BLV (one shared unembedding)

Future m at position t predicts token t+1+m. The kinds of Gloeckle et al. 2024 (arXiv:2404.19737, section 2, appendix B):

    parallel, linear    h^m = norm(head_m(z)),                      m = 0..M-1; a head is a block, or one linear map
    causal              h^m = norm(head_m(... head_1(head_0(z)))),  the next token's head stands at the trunk
    anticausal          h^m = norm(head_m(... head_{M-1}(z))),      the farthest token's does

sequential (DeepSeek-V3, arXiv:2412.19437, equations 21-23): a causal chain that is told the tokens in between,

    h^0 = norm(z),  h^k_t = norm_k(block_k(join_k [norm_e(embed(token_{t+k})) ; norm_h(h^{k-1}_t)])),  k = 1..M-1

A model of one future is the plain decoder, whatever its kind. There is no loss and no sampling here.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.mesh import to_mesh_order
from mtp_jax.model.block import Block, Linear, normal, rms_norm, stack
from mtp_jax.sharding import einsum, lookup, place


def remat(c: ModelConfig, f):
  """f, whose backward pass makes again what config.model.remat says."""
  if c.remat == 'none':
    return f
  if c.remat == 'full':
    return jax.checkpoint(f)
  policies = jax.checkpoint_policies
  return jax.checkpoint(f, policy=policies.dots_with_no_batch_dims_saveable if c.remat == 'dots' else policies.save_only_these_names(*c.remat.split(',')))


class Module(nnx.Module):
  """One link of the sequential chain: joins a token's embedding, first, with the previous state, and runs a block."""

  def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
    D = c.width
    self.embedding_norm_D, self.hidden_norm_D, self.out_norm_D = (nnx.Param(jnp.ones(D)) for _ in range(3))
    self.join_CD = nnx.Param(normal(2 * D)(rngs.params(), (2 * D, D)))
    self.block = Block(c, rngs)

  def __call__(self, e_BLD, h_BLD, positions_BL, seen):
    """(state before its norm, state after it, seen)."""
    epsilon = self.block.config.norm_epsilon
    x_BLC = jnp.concatenate([rms_norm(e_BLD, self.embedding_norm_D[...], epsilon), rms_norm(h_BLD, self.hidden_norm_D[...], epsilon)], -1)
    x_BLD, seen = self.block(einsum('BLC,CD->BLD', x_BLC, self.join_CD[...]), positions_BL, seen)
    return x_BLD, rms_norm(x_BLD, self.out_norm_D[...], epsilon), seen


HEADS = {'parallel': Block, 'linear': Linear, 'causal': Block, 'anticausal': Block, 'sequential': Module}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Futures:
  """What turns the trunk's state into predictions: the futures' heads or modules, stacked, and what they share."""
  heads: nnx.Module | None
  final_norm_D: jax.Array
  embed_VD: jax.Array | None  # of the sequential kind, which looks up the tokens in between
  unembed_VD: jax.Array
  config: ModelConfig = dataclasses.field(metadata={'static': True})

  def norm(self, x_BLD):
    return rms_norm(x_BLD, self.final_norm_D, self.config.norm_epsilon)

  def table(self):
    """The unembedding in the compute type, its width gathered once for all futures: [V, D]."""
    return place(self.unembed_VD.astype(self.config.dtype), 'Vd')

  def start(self, z_BLD):
    """(the state that the first head reads, what the unembedding reads for a future 0 that has no head of its own, else None)."""
    h_BLD = self.norm(z_BLD) if self.config.first_own_head else None
    return h_BLD if self.config.first_own_head and self.config.hidden_input == 'post_norm' else z_BLD, h_BLD

  def advance(self, head, m, state_BLD, tokens_BT, positions_BL, seen):
    """One future: (the state that the next head reads, the normed state that the unembedding reads). m may be traced."""
    c = self.config
    if c.kind == 'sequential':
      between_BL = to_mesh_order(jax.lax.dynamic_slice_in_dim(tokens_BT, m, state_BLD.shape[1], 1))
      e_BLD = lookup(self.embed_VD, between_BL, c.dtype)
      raw_BLD, h_BLD, _ = head(e_BLD, state_BLD, positions_BL, seen)
      return h_BLD if c.hidden_input == 'post_norm' else raw_BLD, h_BLD
    x_BLD, _ = head(state_BLD, positions_BL, seen)
    return state_BLD if c.independent else x_BLD, self.norm(x_BLD)

  def stacked(self, futures: list[int]):
    """(heads of these futures, stacked, or None where one is shared; their numbers): what a scan over futures runs through."""
    own = np.array(futures) - self.config.first_own_head
    if self.config.share_modules:
      return None, jnp.array(futures)
    return self.heads if len(own) == self.config.own_heads else jax.tree.map(lambda x: x[own], self.heads), jnp.array(futures)

  def unstacked(self, futures: list[int], own, shared):
    """The inverse of `stacked` and `shared`, for trees of the same shape: that of `heads`, with zeros for all other futures."""
    if self.config.share_modules:
      return jax.tree.map(lambda x: x[None], shared)
    if not futures:
      return jax.tree.map(jnp.zeros_like, self.heads)
    at = np.array(futures) - self.config.first_own_head
    return own if len(at) == self.config.own_heads else jax.tree.map(lambda x, part: jnp.zeros_like(x).at[at].set(part), self.heads, own)

  def shared(self):
    """The module that all futures share, or None where each has a head of its own."""
    return jax.tree.map(lambda x: x[0], self.heads) if self.config.share_modules else None

  def map(self, f, z_BLD, tokens_BT, positions_BL, seen):
    """f(m, h_BLD) of every future m, stacked over M.

    Args:
      f: called with m (traced) and the normed state that the unembedding reads; returns a pytree of arrays.
      z_BLD: what `run_trunk` returned.
      tokens_BT: T = L + M of each row; only the sequential kind reads them.
    """
    c = self.config
    futures = c.heads_to_run((True,) * c.futures)

    def step(state_BLD, inputs):
      head, m = inputs
      state_BLD, h_BLD = self.advance(self.shared() if head is None else head, m, state_BLD, tokens_BT, positions_BL, seen)
      return state_BLD, f(m, h_BLD)

    with jax.named_scope('futures'):
      state_BLD, h_BLD = self.start(z_BLD)
      parts = [] if h_BLD is None else [jax.tree.map(lambda x: x[None], f(jnp.int32(0), h_BLD))]
      if futures:
        parts.append(jax.lax.scan(step, state_BLD, self.stacked(futures), reverse=c.kind == 'anticausal')[1])
      return jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts)


class Model(nnx.Module):
  """The parameters of an experiment, an immutable pytree."""

  def __init__(self, c: ModelConfig, key):
    keys = jax.random.split(key, 4)
    table = lambda key: nnx.Param(normal(c.width)(key, (c.vocab, c.width)))
    self.embed_VD = table(keys[0])
    self.trunk = stack(functools.partial(Block, c), c.trunk_layers, keys[1])
    self.final_norm_D = nnx.Param(jnp.ones(c.width))
    if c.own_heads:
      self.futures = stack(functools.partial(HEADS[c.kind], c), c.own_heads, keys[2])
    if not c.tie_embeddings:
      self.unembed_VD = table(keys[3])
    self.config = c

  def embed(self, tokens_BL):
    """float[B, L, D] in the compute type."""
    return lookup(self.embed_VD[...], tokens_BL, self.config.dtype)

  def run_trunk(self, x_BLD, positions_BL, seen):
    """The residual stream after N blocks, not normed."""
    def layer(x_BLD, block):
      return block(x_BLD, positions_BL, seen)[0], None

    with jax.named_scope('trunk'):
      return jax.lax.scan(remat(self.config, layer), x_BLD, self.trunk)[0]

  def readout(self) -> Futures:
    table_VD = self.embed_VD if self.config.tie_embeddings else self.unembed_VD
    embed_VD = self.embed_VD[...] if self.config.kind == 'sequential' else None
    return Futures(getattr(self, 'futures', None), self.final_norm_D[...], embed_VD, table_VD[...], self.config)


def capped(logits_BLV, c: ModelConfig):
  """cap * tanh(logits / cap), where a cap is set (Gemma 2, arXiv:2408.00118, section 2)."""
  return c.logit_cap * jnp.tanh(logits_BLV / c.logit_cap) if c.logit_cap else logits_BLV


def conventions(c: ModelConfig) -> dict:
  """What a reader of the weights must know besides their shapes; travels in every checkpoint."""
  sequential = c.kind == 'sequential'
  return {
      'target': 'future m at position t predicts token t+1+m',
      'futures': c.futures,
      'kind': c.kind,
      'placement': c.placement,
      'trunk_layers': c.trunk_layers,
      'share_modules': c.share_modules,
      'hidden_input': c.hidden_input if sequential else 'residual stream',
      'join': 'embedding first, hidden second' if sequential else 'none',
      'final_norm': 'one a module' if sequential else 'shared by all futures',
      'positions': "of the query's own token, from its document's first token in the row",
      'rotary': 'half-split',
      'tie_embeddings': c.tie_embeddings,
      **({'logit_cap': c.logit_cap} if c.logit_cap else {}),
  }
