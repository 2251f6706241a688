"""A decoder trunk and its futures: blocks stacked on a leading axis, once for depth and once for
the tokens ahead.

    tokens_BL -> x_BLD (embedding) -> z_BLD (trunk, N blocks)
              -> h_BLD of each future m -> logits_BLV (one shared unembedding)

Future m at position t predicts token t+1+m. The kinds of Gloeckle et al. 2024 (arXiv:2404.19737,
section 2, appendix B):

    parallel, linear    h^m = norm(head_m(z)), m = 0..M-1; a head is a block, or one linear map
    causal              h^m = norm(head_m(... head_1(head_0(z)))),  the next token's head comes first
    anticausal          h^m = norm(head_m(... head_{M-1}(z))),      the farthest token's comes first

sequential (DeepSeek-V3, arXiv:2412.19437, equations 21-23): a causal chain that is given the tokens
in between,

    h^0   = norm(z)
    h^k_t = norm_k(block_k(join_k [norm_e(embed(token_{t+k})) ; norm_h(h^{k-1}_t)])),  k = 1..M-1

With module_input='trunk' every module reads h^0_t instead of h^{k-1}_t (MiMo): there is no chain.
A model of one future is the plain decoder, of whatever kind. There is no loss and no sampling here.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import ModelConfig
from mtp_jax.model.block import Block, Linear
from mtp_jax.model.norm import rms_norm
from mtp_jax.model.parameters import matrix, normal, scale, stack
from mtp_jax.sharding import einsum, lookup, place


def remat(c: ModelConfig, f, *saved: str):
  """f with activations recomputed in its backward pass as config.model.remat says; full saves those named."""
  policies = jax.checkpoint_policies
  if c.remat == 'none':
    return f
  if c.remat == 'full':
    return jax.checkpoint(f, policy=policies.save_only_these_names(*saved) if saved else None)
  if c.remat == 'dots':
    return jax.checkpoint(f, policy=policies.dots_with_no_batch_dims_saveable)
  return jax.checkpoint(f, policy=policies.save_only_these_names(*c.remat.split(',')))


class Module(nnx.Module):
  """One link of the sequential chain: joins a token's embedding, first, with the previous state,
  and runs a block.
  """

  def __init__(self, c: ModelConfig, experts: bool, rngs: nnx.Rngs):
    D = c.width
    self.embedding_norm_D, self.hidden_norm_D, self.out_norm_D = scale(D), scale(D), scale(D)
    self.join_CD = matrix(rngs, 2 * D, 2 * D, D)
    self.block = Block(c, experts, rngs)

  def __call__(self, e_BLD, h_BLD, positions_BL, keys):
    """(state before its norm, state after it, keys with those of these tokens)."""
    c = self.block.config

    def join(e_BLD, h_BLD, embedding_norm_D, hidden_norm_D, join_CD):
      e_BLD = rms_norm(e_BLD, embedding_norm_D, c.norm_epsilon)
      h_BLD = rms_norm(h_BLD, hidden_norm_D, c.norm_epsilon)
      return einsum('BLC,CD->BLD', jnp.concatenate([e_BLD, h_BLD], -1), join_CD)

    # With remat='full' the two states side by side are made anew after the block's backward pass; the product is not.
    join = jax.checkpoint(join) if c.remat == 'full' else join
    norms = self.embedding_norm_D[...], self.hidden_norm_D[...]
    x_BLD, keys = self.block(join(e_BLD, h_BLD, *norms, self.join_CD[...]), positions_BL, keys)
    x_BLD = checkpoint_name(x_BLD, 'head')
    return x_BLD, rms_norm(x_BLD, self.out_norm_D[...], c.norm_epsilon), keys

  @staticmethod
  def flops(c: ModelConfig, keys: int, experts: bool = False) -> int:
    """Forward FLOPs of one token that attends to so many keys."""
    return 2 * 2 * c.width * c.width + Block.flops(c, keys, experts)


HEADS = {'parallel': Block, 'linear': Linear, 'causal': Block, 'anticausal': Block, 'sequential': Module}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Futures:
  """What turns the trunk's state into predictions.

  Attributes:
    heads: the futures' heads or modules, stacked over those that have their own; None in a plain
      language model.
    final_norm_D: the norm that they share. Sequential modules have their own.
    embed_VD: the embedding, for sequential modules, else None.
    unembed_VD: the unembedding.
  """
  heads: nnx.Module | None
  final_norm_D: jax.Array
  embed_VD: jax.Array | None
  unembed_VD: jax.Array
  config: ModelConfig = dataclasses.field(metadata={'static': True})

  def norm(self, x_BLD):
    return rms_norm(x_BLD, self.final_norm_D, self.config.norm_epsilon)

  def table(self):
    """The unembedding in the compute type, its width gathered once for all futures: [V, D]."""
    return place(self.unembed_VD.astype(self.config.dtype), 'Vd')

  def start(self, z_BLD):
    """(the state that the first head reads; h_BLD of a future 0 without a head of its own, else
    None).
    """
    if not self.config.first_own_head:
      return z_BLD, None
    h_BLD = self.norm(z_BLD)
    return h_BLD if self.config.hidden_input == 'post_norm' else z_BLD, h_BLD

  def run_head(self, head, state_BLD, given_BL, positions_BL, keys):
    """One future: (the state that the next head reads, which is its own where all read the trunk; the
    normed state that the unembedding reads).

    Args:
      given_BL: the token that a sequential module is given at each position; not read by other
        kinds.
    """
    c = self.config
    if c.kind == 'sequential':
      raw_BLD, h_BLD, _ = head(lookup(self.embed_VD, given_BL, c.dtype), state_BLD, positions_BL, keys)
      next_BLD = h_BLD if c.hidden_input == 'post_norm' else raw_BLD
    else:
      next_BLD, _ = head(state_BLD, positions_BL, keys)
      next_BLD = checkpoint_name(next_BLD, 'head')
      h_BLD = self.norm(next_BLD)
    return state_BLD if c.independent else next_BLD, h_BLD

  def stacked(self, futures: list[int]):
    """The heads of these futures, stacked; None where all share one."""
    if self.config.share_modules:
      return None
    own = np.array(futures) - self.config.first_own_head
    return self.heads if len(own) == self.config.own_heads else jax.tree.map(lambda x: x[own], self.heads)

  def shared(self):
    """The module that all futures share, or None where each has a head of its own."""
    return jax.tree.map(lambda x: x[0], self.heads) if self.config.share_modules else None

  def unstacked(self, futures: list[int], stacked, shared):
    """The inverse of `stacked` and `shared`, for gradients: in the shape of `heads`, zeros for all
    other futures.
    """
    if self.config.share_modules:
      return jax.tree.map(lambda x: x[None], shared)
    if not futures:
      return jax.tree.map(jnp.zeros_like, self.heads)
    own = np.array(futures) - self.config.first_own_head
    if len(own) == self.config.own_heads:
      return stacked
    return jax.tree.map(lambda x, part: jnp.zeros_like(x).at[own].set(part), self.heads, stacked)

  def given(self, futures: list[int], targets_MBL):
    """The tokens that the modules of these futures are given, stacked: the targets of the future
    before; else None.
    """
    if self.config.kind != 'sequential':
      return None
    return jnp.stack([targets_MBL[m - 1] for m in futures])

  def map(self, f, xs, z_BLD, targets_MBL, positions_BL, keys, futures: range | None = None):
    """f(h_BLD, x) of every future, stacked: one head after the other, in the order of the chain.

    Args:
      f: called with the normed state that the unembedding reads, and the future's entry of xs;
        returns a pytree of arrays.
      xs: a pytree of arrays with a leading axis M.
      z_BLD: what `run_trunk` returned.
      targets_MBL: what each future predicts; sequential modules are given those of the future
        before.
      futures: of these only; other heads run only where these depend on them.
    """
    c = self.config
    futures = futures or range(c.futures)
    heads_to_run = c.heads_to_run(tuple(m in futures for m in range(c.futures)))

    def step(state_BLD, inputs):
      head, given_BL, x = inputs
      head = self.shared() if head is None else head
      state_BLD, h_BLD = self.run_head(head, state_BLD, given_BL, positions_BL, keys)
      return state_BLD, f(h_BLD, x)

    with jax.named_scope('futures'):
      state_BLD, h_BLD = self.start(z_BLD)
      results = []
      if h_BLD is not None and 0 in futures:
        first = f(h_BLD, jax.tree.map(lambda x_M: x_M[0], xs))
        results.append(jax.tree.map(lambda x: x[None], first))
      if heads_to_run:
        later = jax.tree.map(lambda x_M: x_M[heads_to_run[0]:heads_to_run[-1] + 1], xs)
        inputs = self.stacked(heads_to_run), self.given(heads_to_run, targets_MBL), later
        own = jax.lax.scan(step, state_BLD, inputs, reverse=c.kind == 'anticausal')[1]
        wanted = slice(max(0, futures.start - heads_to_run[0]), futures.stop - heads_to_run[0])
        results.append(jax.tree.map(lambda x: x[wanted], own))
      return jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)


class Model(nnx.Module):
  """The parameters of an experiment, an immutable pytree."""

  def __init__(self, c: ModelConfig, key):
    keys = jax.random.split(key, 4)
    table = lambda key: normal(key, c.width, c.vocab, c.width)
    self.embed_VD = table(keys[0])
    if c.dense_trunk_layers:
      self.trunk = stack(functools.partial(Block, c, False), c.dense_trunk_layers, keys[1])
    if c.expert_trunk_layers:
      key = jax.random.fold_in(keys[1], 1)
      self.expert_trunk = stack(functools.partial(Block, c, True), c.expert_trunk_layers, key)
    self.final_norm_D = scale(c.width)
    if c.own_heads:
      self.futures = stack(functools.partial(HEADS[c.kind], c, c.experts_in_futures), c.own_heads, keys[2])
    if not c.tie_embeddings:
      self.unembed_VD = table(keys[3])
    self.config = c

  def embed(self, tokens_BL):
    """[B, L, D] in the compute type."""
    return lookup(self.embed_VD[...], tokens_BL, self.config.dtype)

  @property
  def stacks(self) -> tuple[Block, ...]:
    """The blocks of the trunk in their order: dense ones first, then those of experts."""
    return tuple(getattr(self, name) for name in ('trunk', 'expert_trunk') if hasattr(self, name))

  def run_trunk(self, x_BLD, positions_BL, keys):
    """The residual stream after N blocks, not normed."""
    def layer(x_BLD, block):
      return block(x_BLD, positions_BL, keys)[0], None

    with jax.named_scope('trunk'):
      for blocks in self.stacks:
        x_BLD = jax.lax.scan(remat(self.config, layer), x_BLD, blocks)[0]
      return x_BLD

  def readout(self) -> Futures:
    """What turns the trunk's state into predictions."""
    table_VD = self.embed_VD if self.config.tie_embeddings else self.unembed_VD
    embed_VD = self.embed_VD[...] if self.config.kind == 'sequential' else None
    return Futures(getattr(self, 'futures', None), self.final_norm_D[...], embed_VD, table_VD[...], self.config)


def capped(logits, c: ModelConfig):
  """cap * tanh(logits / cap), where a cap is set (Gemma 2, arXiv:2408.00118, section 2)."""
  return c.logit_cap * jnp.tanh(logits / c.logit_cap) if c.logit_cap else logits


def conventions(c: ModelConfig) -> dict:
  """What a reader of the weights must know besides their shapes; every checkpoint holds it."""
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
      **({'module_input': 'trunk'} if sequential and c.independent else {}),
      **({'attention': 'latent: of a query the last rope_width are rotated'} if c.attention == 'latent' else {}),
  }
