"""The loss of every future and its gradient, in one walk over the heads.

    loss = sum_m weight_m / count_m * sum_{b,t} (nats + z_loss * lse^2)

(Gloeckle et al. 2024, arXiv:2404.19737, section 2.) With several futures the logits take most of the time and memory.
So the backward pass is written by hand:

    for each group of futures, the last of a chain first:
      heads forward
      for each chunk of their positions:   logits, their gradient, dh, dw      (stream.py)
      heads backward: adds to the gradient of the state that they read

Whatever the number of futures, memory holds the activations of one group and the logits of one chunk at a time
(Gloeckle et al., figure 2). It also holds the float32 gradients of the unembedding and of the heads, and in a chain
the state that each head reads. A group is config.model.head_batch independent heads, vmapped, or one head of a chain.
A group of one head has no axis g: with an axis of size 1, XLA on a CPU keeps a tenth more memory.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import ObjectiveConfig
from mtp_jax.model.attention import Documents, documents
from mtp_jax.model.model import Futures, Model, capped, remat
from mtp_jax.objective.stream import cross_entropy, cross_entropy_and_gradients
from mtp_jax.objective.table import Table
from mtp_jax.objective.targets import Labels, Read, Sums
from mtp_jax.sharding import out


def trunk_state(model: Model, read: Read, balance_loss: float = 0.0):
  """(z_BLD of the trunk, the documents within which its tokens attend)."""
  keys = documents(read.segments_BL, balance_loss / read.rows)
  return model.run_trunk(model.embed(read.inputs_BL), read.positions_BL, keys), keys


def future_states(model: Model, read: Read, futures: int | None = None, balance_loss: float = 0.0):
  """The normed state of every future, or of the first so many, which the unembedding reads: [M, B, L, D]."""
  z_BLD, keys = trunk_state(model, read, balance_loss)
  take = lambda h_BLD, _: h_BLD
  first = range(futures or model.config.futures)
  return model.readout().map(take, None, z_BLD, read.targets_MBL, read.positions_BL, keys, first)


def loss(model: Model, read: Read, coefficient_M, o: ObjectiveConfig, active: tuple[bool, ...] | None = None):
  """sum_m coefficient_M[m] * (nats_M[m] + z-loss), and the sums behind it.

  Only the loss has a gradient, and only for the model.

  Args:
    coefficient_M: weight_m / count_m; the counts are those of the whole step, so that losses of microbatches add up.
    active: the futures to compute, by default all; the sums of the others are 0. In a chain the heads that an active
      one depends on run too.

  Returns:
    (float32 scalar, Sums).
  """
  z_BLD, keys = trunk_state(model, read, o.balance_loss)
  active = active or (True,) * model.config.futures
  return _loss(o, active, model.readout(), z_BLD, coefficient_M, read, keys)


def dense(model: Model, read: Read, coefficient_M, o: ObjectiveConfig, active: tuple[bool, ...] | None = None):
  """`loss` in its plainest form, for comparison: the logits of all futures at once, differentiated by JAX."""
  c, h_MBLD = model.config, future_states(model, read, balance_loss=o.balance_loss)
  counted_MBL = read.counted_MBL & jnp.array(active or (True,) * c.futures)[:, None, None]
  logits_MBLV = jnp.einsum('MBLD,VD->MBLV', h_MBLD, model.readout().table(), preferred_element_type=jnp.float32)
  logits_MBLV = capped(logits_MBLV, c)
  lse_MBL = jax.nn.logsumexp(logits_MBLV, -1)
  nats_MBL = lse_MBL - jnp.sum(logits_MBLV, -1, where=jnp.arange(c.vocab) == read.targets_MBL[..., None])
  total = lambda x_MBL: jnp.sum(x_MBL, (1, 2), where=counted_MBL)
  count = lambda x_MBL: jnp.sum(x_MBL, (1, 2), dtype=jnp.int32)
  correct_MBL = (jnp.argmax(logits_MBLV, -1) == read.targets_MBL) & counted_MBL
  sums = Sums(total(nats_MBL), count(correct_MBL), count(counted_MBL))
  return jnp.dot(coefficient_M, total(nats_MBL + o.z_loss * lse_MBL**2)), sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(o: ObjectiveConfig, active: tuple[bool, ...], futures: Futures, z_BLD, coefficient_M,
          read: Read, keys: Documents):
  """Loss and sums, without a gradient."""
  table, active_M = Table.for_rows(futures, read.inputs_BL), jnp.array(active)

  def score(h_BLD, labels):
    group = jax.tree.map(lambda x_BL: x_BL[None], (h_BLD, labels))
    return cross_entropy(futures.config, o, group[0], table, group[1])

  labels = Labels.of(read, coefficient_M)
  loss_M, sums_M1 = futures.map(score, labels, z_BLD, read.targets_MBL, read.positions_BL, keys)
  sums = jax.tree.map(lambda x_M1: jnp.where(active_M, x_M1[:, 0], 0), sums_M1)
  return jnp.sum(loss_M, where=active_M), sums


def _loss_forward(o: ObjectiveConfig, active: tuple[bool, ...], futures: Futures, z_BLD, coefficient_M,
                  read: Read, keys: Documents):
  """Loss and sums; as residuals, the finished gradients of the futures and of the trunk's state."""
  with jax.named_scope('futures'):
    walk = _Walk(o, active, futures, Table.for_rows(futures, read.inputs_BL), read.positions_BL, keys)
    return walk.run(z_BLD, read.targets_MBL, Labels.of(read, coefficient_M))


def _loss_backward(o, active, gradients, cotangents):
  """The forward pass computed the gradients; this scales them by the gradient of the loss."""
  futures, z_BLD = jax.tree.map(lambda x: cotangents[0].astype(x.dtype) * x, gradients)
  return futures, z_BLD, None, None, None


_loss.defvjp(_loss_forward, _loss_backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Total:
  """The running loss, and the running gradient of the unembedding, float32[D, V]."""
  loss: jax.Array
  dw_DV: jax.Array


@dataclasses.dataclass(frozen=True)
class _Walk:
  """The walk over the heads, and the inputs that all groups share."""
  o: ObjectiveConfig
  active: tuple[bool, ...]
  futures: Futures
  table: Table
  positions_BL: jax.Array
  keys: Documents

  @property
  def heads_to_run(self) -> list[int]:
    return self.futures.config.heads_to_run(self.active)

  @property
  def g(self) -> int:
    """How many heads run at a time."""
    return self.futures.config.heads_at_a_time(self.active)

  def run(self, z_BLD, targets_MBL, labels: Labels):
    """((loss, Sums of all futures), (gradients in the shape of `Futures`, gradient of z_BLD))."""
    futures, c = self.futures, self.futures.config
    active, heads_to_run = self.active, self.heads_to_run
    start = lambda norm_D, z_BLD: dataclasses.replace(futures, final_norm_D=norm_D).start(z_BLD)
    # h_BLD is future 0's state where it has no head of its own, else None.
    (state_BLD, h_BLD), back_to_trunk = jax.vjp(start, futures.final_norm_D, z_BLD)
    common = futures.shared(), futures.final_norm_D, futures.embed_VD
    total = _Total(jnp.zeros(()), jnp.zeros((c.width, c.vocab), jnp.float32, **out('DV')))
    sums, dstacked = Sums.zeros(c.futures), None
    dcommon, dstate_BLD = jax.tree.map(jnp.zeros_like, (common, state_BLD))

    if heads_to_run:
      groups = self.grouped(targets_MBL, labels)
      total, sums_ng, dstacked, dcommon, dstate_BLD = self.walk_back(total, groups, common, state_BLD)
      sums = sums.set(np.array(heads_to_run), jax.tree.map(jnp.ravel, sums_ng))
      if self.g > 1:
        dstacked = jax.tree.map(lambda x: _regroup(x, 2, (len(heads_to_run),)), dstacked)

    dh_BLD = None if h_BLD is None else jnp.zeros_like(h_BLD)
    if h_BLD is not None and active[0]:  # future 0 reads the trunk itself
      total, sums_g, dh_gBLD = self.score(total, h_BLD[None], jax.tree.map(lambda x_MBL: x_MBL[:1], labels))
      sums, dh_BLD = sums.set(np.array([0]), sums_g), dh_gBLD[0]

    dnorm_D, dz_BLD = back_to_trunk((dstate_BLD, dh_BLD))
    dshared, dcommon_norm_D, dembed_VD = dcommon
    dheads = futures.unstacked(heads_to_run, dstacked, dshared)
    gradients = Futures(dheads, dcommon_norm_D + dnorm_D, dembed_VD, total.dw_DV.T, c)
    sums = jax.tree.map(lambda x_M: jnp.where(jnp.array(active), x_M, 0), sums)
    return (total.loss, sums), (gradients, dz_BLD)

  def grouped(self, targets_MBL, labels: Labels):
    """(heads, the tokens they are given, their labels), stacked over groups and, within a group, over g."""
    heads_to_run, g = self.heads_to_run, self.g
    n = len(heads_to_run) // g
    split = lambda x: _regroup(x, 1, (n, g)) if g > 1 else x
    chosen = labels
    if len(heads_to_run) < len(self.active):
      chosen = jax.tree.map(lambda x_MBL: jnp.stack([x_MBL[m] for m in heads_to_run]), labels)
    heads = self.futures.stacked(heads_to_run), self.futures.given(heads_to_run, targets_MBL)
    return *jax.tree.map(split, heads), jax.tree.map(lambda x: _regroup(x, 1, (n, g)), chosen)

  def heads(self, head, common, state_BLD, given_BL):
    """A group of heads that read one state: (the state that the next group reads, h_gBLD).

    Args:
      head: a head, or a group of them stacked.
      given_BL: the tokens that it is given, or they are.
    """
    shared, norm_D, embed_VD = common
    futures = dataclasses.replace(self.futures, final_norm_D=norm_D, embed_VD=embed_VD)

    def run(head, given_BL):  # head is None where all futures use one shared module
      return futures.run_head(shared if head is None else head, state_BLD, given_BL, self.positions_BL, self.keys)

    if self.g == 1:
      next_BLD, h_BLD = run(head, given_BL)
      return next_BLD, h_BLD[None]
    return state_BLD, jax.vmap(run)(head, given_BL)[1]

  def score(self, total: _Total, h_gBLD, labels: Labels):
    """(total with the loss of these futures added, their Sums, the gradient of h_gBLD)."""
    loss, sums, dh_gBLD, dw_DV = cross_entropy_and_gradients(
        self.futures.config, self.o, h_gBLD, self.table, labels)
    # The barrier makes the devices share out the sum of each one's tokens, and free it, before the heads'
    # activations are computed again.
    dw_DV, dh_gBLD = jax.lax.optimization_barrier((total.dw_DV + dw_DV, dh_gBLD))
    return _Total(total.loss + loss, dw_DV), sums, dh_gBLD

  def states_of_chain(self, head_n, common, state_BLD, given_nBL):
    """The state that each head of a chain reads: [n, B, L, D]. Nothing reads that of the last, so it does not run."""
    last_first = self.futures.config.kind == 'anticausal'
    links = jax.tree.map(lambda x: x[1:] if last_first else x[:-1], (head_n, given_nBL))

    def onward(state_BLD, link):
      head, given_BL = link
      return self.heads(head, common, state_BLD, given_BL)[0], state_BLD

    end_BLD, earlier = jax.lax.scan(onward, state_BLD, links, reverse=last_first)
    return jnp.concatenate([end_BLD[None], earlier] if last_first else [earlier, end_BLD[None]])

  def walk_back(self, total: _Total, groups, common, start_BLD):
    """Runs every group forward, scores it, and runs it backward: (total, Sums, gradients of the heads, of `common` and
    of start_BLD).
    """
    c = self.futures.config
    head_n, given_nBL, labels_n = groups
    state_nBLD = None if c.independent else self.states_of_chain(head_n, common, start_BLD, given_nBL)

    def step(carry, group):
      total, dcommon, dstate_BLD = carry
      head, given_BL, labels, state_BLD = group
      # What a head's norm reads is saved: to compute it again would take the head's last product once more.
      run = remat(c, functools.partial(self.heads, given_BL=given_BL), 'head')
      (_, h_gBLD), back = jax.vjp(run, head, common, start_BLD if state_BLD is None else state_BLD)
      total, sums, dh_gBLD = self.score(total, h_gBLD, labels)
      dhead, added, dstate_BLD = back((dstate_BLD, dh_gBLD))
      return (total, jax.tree.map(jnp.add, dcommon, added), dstate_BLD), (sums, dhead)

    zeros = jax.tree.map(jnp.zeros_like, (common, start_BLD))
    (total, dcommon, dstate_BLD), (sums_ng, dhead_n) = jax.lax.scan(
        step, (total, *zeros), (head_n, given_nBL, labels_n, state_nBLD), reverse=c.kind != 'anticausal')
    return total, sums_ng, dhead_n, dcommon, dstate_BLD


def _regroup(x, axes: int, sizes: tuple[int, ...]):
  """Reshapes the first `axes` axes, whole on every device, to `sizes`; the other axes keep their sharding.

  Left to itself, a reshape drops the sharding of every axis of size 1.
  """
  shape = (*sizes, *x.shape[axes:])
  if jax.sharding.get_abstract_mesh().empty:
    return jnp.reshape(x, shape)
  spec = jax.sharding.PartitionSpec(*[None] * len(sizes), *jax.typeof(x).sharding.spec[axes:])
  return jnp.reshape(x, shape, out_sharding=spec)
