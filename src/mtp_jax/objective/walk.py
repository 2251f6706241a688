"""Targets, and the loss of every future with its gradient, computed in one walk.

Future m at position t predicts token t+1+m, and counts iff that token stands in the same document as t:

    loss = sum_m weight_m / count_m * sum_{b,t} (nats + z * lse^2)         nats = lse - logit of the target, lse = log sum exp logits

(Gloeckle et al. 2024, arXiv:2404.19737, section 2; z-loss: PaLM, arXiv:2204.02311, section 5.) A batch is a dict of int32[B, T],
T = L + M: 'tokens', 'segments' (0 is padding) and 'positions'. Targets are read off the tokens at hand, m+1 places on, so there is
no roll and the farthest future has a target at the last position.

With several futures the unembedding is the cost, so its gradient is our own. Weights and counts are known before the walk, hence
so is every logit's gradient the moment its softmax is: each chunk of logits is made once, turned into its gradient, multiplied
into the gradients of states and of the unembedding, and dropped: three matrix products a chunk, none again in the backward pass.

    for each future, the last of a chain first:           head forward
      for each chunk of its positions:                    logits = h u^T;  g = weight/count * (softmax - one-hot);  dh = g u;  du += g^T h
                                                          head backward, into the gradient of the state it read

One head's activations and one chunk's logits are alive at a time (Gloeckle et al., figure 2), whatever the number of futures; a chain
keeps one state a head besides, the way a trunk keeps one a block.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import ObjectiveConfig
from mtp_jax.mesh import sum_over_devices, token_shards
from mtp_jax.model.model import Futures, Model, capped, remat
from mtp_jax.objective.stream import cross_entropy
from mtp_jax.objective.targets import Sums, _weighted, all_targets, states
from mtp_jax.sharding import out


def loss(model: Model, batch, coefficient_M, o: ObjectiveConfig, active: tuple[bool, ...] | None = None):
  """sum_m coefficient_M[m] * (nats_M[m] + z-loss), and the sums it is made of; only the loss has a gradient, and only to the model.

  Args:
    batch: rows of L + M tokens.
    coefficient_M: weight_m / count_m, the counts being those of the whole step, so that microbatches add up exactly.
    active: futures that are computed, all of them unless given; of the others the sums are 0. In a chain those that an active one hangs
      from are computed too.

  Returns:
    (float32 scalar, Sums).
  """
  z_BLD, _, positions_BL, seen = states(model, batch)
  run = _Run(o, active or (True,) * model.config.futures)
  return _futures(run, model.readout(), z_BLD, coefficient_M, (batch, positions_BL, seen))


def dense(model: Model, batch, coefficient_M, o: ObjectiveConfig, active: tuple[bool, ...] | None = None):
  """`loss` as one would first write it, every future's logits at once and JAX's own gradient: to be compared with, in value and in cost."""
  c, readout = model.config, model.readout()
  h_MBLD = readout.map(lambda m, h_BLD: h_BLD, *states(model, batch))
  y_MBL, counted_MBL = all_targets(batch, c.futures)
  counted_MBL &= jnp.array(active or (True,) * c.futures)[:, None, None]
  logits_MBLV = capped(jnp.einsum('MBLD,VD->MBLV', h_MBLD, readout.table(), preferred_element_type=jnp.float32), c)
  lse_MBL = jax.nn.logsumexp(logits_MBLV, -1)
  nats_MBL = lse_MBL - jnp.sum(logits_MBLV, -1, where=jnp.arange(c.vocab) == y_MBL[..., None])
  total = lambda x_MBL: jnp.sum(x_MBL, (1, 2), where=counted_MBL)
  count = lambda x_MBL: jnp.sum(x_MBL, (1, 2), dtype=jnp.int32)
  sums = Sums(total(nats_MBL), count((jnp.argmax(logits_MBLV, -1) == y_MBL) & counted_MBL), count(counted_MBL))
  return jnp.dot(coefficient_M, total(nats_MBL + o.z_loss * lse_MBL**2)), sums


@dataclasses.dataclass(frozen=True)
class _Run:
  objective: ObjectiveConfig
  active: tuple[bool, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _futures(run: _Run, readout: Futures, z_BLD, coefficient_M, rows):
  """Loss and sums without a gradient: what an evaluation runs."""
  batch, positions_BL, seen = rows
  c, w_VD, active_M = readout.config, readout.table(), jnp.array(run.active)

  def future(m, h_BLD):
    return cross_entropy(c, run.objective, h_BLD[None], w_VD, *_weighted(batch, m[None], c.futures, coefficient_M))[:2]

  loss_M, sums_M1 = readout.map(future, z_BLD, batch['tokens'], positions_BL, seen)
  return jnp.sum(loss_M, where=active_M), jax.tree.map(lambda x_M1: jnp.where(active_M, x_M1[:, 0], 0), sums_M1)


def _futures_forward(run: _Run, readout: Futures, z_BLD, coefficient_M, rows):
  """Loss and sums, and as residuals the gradients of the readout and of the trunk's state."""
  batch, positions_BL, seen = rows
  c, w_VD, needed = readout.config, readout.table(), readout.config.heads_to_run(run.active)
  G = c.head_batch if c.independent and len(needed) % c.head_batch == 0 else 1

  grouped = lambda tree: jax.tree.map(lambda x: jnp.reshape(x, (-1, G, *x.shape[1:])), tree) if G > 1 else tree  # one by one, XLA copies nothing
  single = lambda tree: jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), tree) if G > 1 else tree

  def heads(own, common, state_BLD, m_G):
    """A head, or a group of G: (the state that the next one reads, what the unembedding reads: [G, B, L, D])."""
    shared, norm_D, embed_VD = common
    reader = dataclasses.replace(readout, final_norm_D=norm_D, embed_VD=embed_VD)
    advance = lambda own, m: reader.advance(shared if own is None else own, m, state_BLD, batch['tokens'], positions_BL, seen)
    if G > 1:
      return state_BLD, jax.vmap(lambda own, m: advance(own, m)[1])(own, m_G)
    state_BLD, h_BLD = advance(own, m_G)
    return state_BLD, h_BLD[None]

  def read(total, h_GBLD, m_G):
    """Adds the loss of some futures and its gradient of the unembedding: (total, Sums of G, gradient of h_GBLD)."""
    loss, dw_DV = total
    zeros_PDV = jnp.zeros((token_shards(), *w_VD.shape[::-1]), jnp.float32, **out('PDV'))
    added, sums, dh_GBLD, dw_PDV = cross_entropy(c, run.objective, h_GBLD, w_VD, *_weighted(batch, m_G, c.futures, coefficient_M), zeros_PDV)
    # Each device's own sum is as large as the whole table: the barrier has it shared out before a head's activations come back to life.
    dw_DV, dh_GBLD = jax.lax.optimization_barrier((dw_DV + sum_over_devices(dw_PDV, 'DV'), dh_GBLD))
    return (loss + added, dw_DV), sums, dh_GBLD

  def inputs_of_chain(own, m_nG):
    """The state that each head reads; the last one of the chain need not run for that."""
    far_first = c.kind == 'anticausal'
    others = jax.tree.map(lambda x: x[1:] if far_first else x[:-1], (own, m_nG))
    onward = lambda state_BLD, inputs: (heads(inputs[0], common, state_BLD, inputs[1])[0], state_BLD)
    last_BLD, state_nBLD = jax.lax.scan(onward, start_BLD, others, reverse=far_first)
    return jnp.concatenate([last_BLD[None], state_nBLD] if far_first else [state_nBLD, last_BLD[None]])

  def back(carry, inputs):
    total, dcommon, dstate_BLD = carry
    own, m_G, state_BLD = inputs
    (_, h_GBLD), pull = jax.vjp(remat(c, functools.partial(heads, m_G=m_G)), own, common, start_BLD if state_BLD is None else state_BLD)
    total, sums, dh_GBLD = read(total, h_GBLD, jnp.reshape(m_G, G))
    down, dcommon_, dstate_BLD = pull((dstate_BLD, dh_GBLD))
    return (total, jax.tree.map(jnp.add, dcommon, dcommon_), dstate_BLD), (sums, down)

  with jax.named_scope('futures'):
    start = lambda norm_D, z_BLD: dataclasses.replace(readout, final_norm_D=norm_D).start(z_BLD)
    (start_BLD, h_BLD), to_trunk = jax.vjp(start, readout.final_norm_D, z_BLD)
    common = readout.shared(), readout.final_norm_D, readout.embed_VD
    total = jnp.zeros(()), jnp.zeros(w_VD.shape[::-1], jnp.float32, **out('DV'))
    carry = total, *jax.tree.map(jnp.zeros_like, (common, start_BLD))
    sums = Sums(*(jnp.zeros(c.futures, dtype) for dtype in (jnp.float32, jnp.int32, jnp.int32)))
    down = None
    if needed:
      own, m_nG = grouped(readout.stacked(needed))
      state_nBLD = None if c.independent else inputs_of_chain(own, m_nG)
      carry, (found, down) = jax.lax.scan(back, carry, (own, m_nG, state_nBLD), reverse=c.kind != 'anticausal')
      sums = jax.tree.map(lambda x_M, y_nG: x_M.at[np.array(needed)].set(y_nG.ravel()), sums, found)
      down = single(down)
    total, (dshared, dnorm_D, dembed_VD), dstate_BLD = carry
    dh_BLD = None if h_BLD is None else jnp.zeros_like(h_BLD)
    if h_BLD is not None and run.active[0]:
      total, found, dh_1BLD = read(total, h_BLD[None], jnp.zeros(1, jnp.int32))
      sums, dh_BLD = jax.tree.map(lambda x_M, y_1: x_M.at[0].set(y_1[0]), sums, found), dh_1BLD[0]
    dstart_D, dz_BLD = to_trunk((dstate_BLD, dh_BLD))
    loss, dw_DV = total
  active_M = jnp.array(run.active)
  gradients = Futures(readout.unstacked(needed, down, dshared), dnorm_D + dstart_D, dembed_VD, dw_DV.T, c), dz_BLD
  return (loss, jax.tree.map(lambda x_M: jnp.where(active_M, x_M, 0), sums)), gradients


def _futures_backward(run: _Run, gradients, cotangents):
  return *jax.tree.map(lambda x: cotangents[0].astype(x.dtype) * x, gradients), None, None


_futures.defvjp(_futures_forward, _futures_backward)
