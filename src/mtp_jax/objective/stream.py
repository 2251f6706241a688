"""Cross-entropy in chunks: the logits of a chunk are computed once, turned into their gradient, and dropped.

    logits  = cap(h w^T)   nats = lse - logit of the target        lse = log sum exp logits
    dlogits = weight * ((1 + 2 z_loss lse) softmax - one-hot) * cap'       dh = dlogits w        dw += dlogits^T h

cap is the identity, or with config.model.logit_cap a tanh. The weight of every position is known before the forward
pass, so a chunk's gradient follows its softmax directly. That takes three matrix products a chunk; the backward pass
repeats none. The logits of one chunk are in memory at a time. (z-loss: PaLM, arXiv:2204.02311, section 5.)
"""
import jax
import jax.numpy as jnp

from mtp_jax.config import ModelConfig, ObjectiveConfig
from mtp_jax.mesh import by_device, by_row
from mtp_jax.model.model import capped
from mtp_jax.objective.table import Table
from mtp_jax.objective.targets import Labels, Sums
from mtp_jax.sharding import einsum, on_devices, out


def cross_entropy(c: ModelConfig, o: ObjectiveConfig, h_gBLD, table: Table, labels: Labels):
  """(float32 loss, Sums of the group's futures).

  Args:
    h_gBLD: normed states.
    table: the unembedding, in the same type.
  """
  def on_device(h_gBLD, table, labels):
    def step(_, inputs):
      return None, _Chunk(c, o, table, *inputs).scores()

    _, (loss_n, sums_n) = jax.lax.scan(step, None, _chunks(h_gBLD, labels, table, o.positions(c.vocab)))
    return table.over_tokens((jnp.sum(loss_n), _by_future(sums_n, len(h_gBLD))))

  with jax.named_scope('loss'):
    return on_devices(on_device, _INPUTS, ('', ''))(h_gBLD, table, labels)


def cross_entropy_and_gradients(c: ModelConfig, o: ObjectiveConfig, h_gBLD, table: Table, labels: Labels):
  """(float32 loss, Sums of the group's futures, gradient of h_gBLD, float32 gradient of the unembedding, [D, V])."""
  def on_device(h_gBLD, table, labels):
    def step(dw_PDV, inputs):
      chunk = _Chunk(c, o, table, *inputs)
      dh_PtD, added_PDV = chunk.gradients()
      return dw_PDV + added_PDV, (*chunk.scores(), dh_PtD)

    zeros_PDV = jnp.zeros(jnp.swapaxes(table.w_PVD, 1, 2).shape, jnp.float32)
    chunks = _chunks(h_gBLD, labels, table, o.positions(c.vocab))
    dw_PDV, (loss_n, sums_n, dh_nPtD) = jax.lax.scan(step, zeros_PDV, chunks)
    loss, sums = table.over_tokens((jnp.sum(loss_n), _by_future(sums_n, len(h_gBLD))))
    return loss, sums, whole(dh_nPtD, h_gBLD.shape[:3]), table.scatter_gradient(dw_PDV)

  with jax.named_scope('loss'):
    return on_devices(on_device, _INPUTS, ('', '', 'gBLD', 'DV'))(h_gBLD, table, labels)


_INPUTS = 'gBLD', 'PVD', 'gBL'


class _Chunk:
  """The logits of at most `chunk` tokens of each device, all of one future; their loss and gradients.

  A device's arrays have the rows of the table that it holds, and the tokens of all devices that share the table.
  """

  def __init__(self, c: ModelConfig, o: ObjectiveConfig, table: Table, h_PtD, labels: Labels):
    self.c, self.o, self.table = c, o, table
    self.h_PtD = table.gather_tokens(h_PtD)
    self.target_Pt, self.counted_Pt = labels.target_gBL, labels.counted_gBL
    self.weight_Pt = jnp.where(self.counted_Pt, labels.weight_gBL, 0.0)
    self.logits_PtV = capped(einsum('PtD,VD->PtV', self.h_PtD, table.w_PVD[0], jnp.float32), c)
    self.top_Pt = table.over_rows(jnp.max, jnp.max(self.logits_PtV, -1))
    self.e_PtV = jnp.exp(self.logits_PtV - self.top_Pt[..., None])
    self.sum_Pt = table.over_rows(jnp.sum, jnp.sum(self.e_PtV, -1))
    self.lse_Pt = self.top_Pt + jnp.log(self.sum_Pt)
    self.ids_V = table.ids_V(self.logits_PtV.shape[-1])
    self.hit_PtV = self.ids_V == self.target_Pt[..., None]

  def scores(self):
    """(loss, sums of one future), of the device's own tokens."""
    c, own, over_rows = self.c, self.table.own_tokens, self.table.over_rows
    nats_Pt = self.lse_Pt - over_rows(jnp.sum, jnp.sum(self.logits_PtV, -1, where=self.hit_PtV))
    is_top_PtV = self.logits_PtV == self.top_Pt[..., None]
    first_top_Pt = over_rows(jnp.min, jnp.min(jnp.where(is_top_PtV, self.ids_V, c.vocab), -1))
    count = lambda where_Pt: jnp.sum(own(where_Pt), where=own(self.counted_Pt), dtype=jnp.int32)
    sums = Sums(jnp.sum(own(nats_Pt), where=own(self.counted_Pt)), count(first_top_Pt == self.target_Pt),
                count(self.counted_Pt))
    return jnp.sum(own(self.weight_Pt * (nats_Pt + self.o.z_loss * self.lse_Pt**2))), sums

  def gradients(self):
    """(gradient of the device's own h_PtD, gradient of its rows of the table, [P, D, V])."""
    slope_Pt = self.weight_Pt * (1 + 2 * self.o.z_loss * self.lse_Pt) / self.sum_Pt
    g_PtV = slope_Pt[..., None] * self.e_PtV - jnp.where(self.hit_PtV, self.weight_Pt[..., None], 0.0)
    if self.c.logit_cap:
      g_PtV *= 1 - (self.logits_PtV / self.c.logit_cap)**2
    g_PtV = g_PtV.astype(self.h_PtD.dtype)
    dw_PDV = einsum('PtD,PtV->PDV', self.h_PtD, g_PtV, jnp.float32)
    return self.table.scatter_tokens(einsum('PtV,VD->PtD', g_PtV, self.table.w_PVD[0])), dw_PDV


def _chunks(h_gBLD, labels: Labels, table: Table, chunk: int):
  """States of the device's own tokens, and labels of all that share its table, in chunks."""
  h_nPtD, labels = jax.tree.map(lambda x: chunked(x, chunk), (h_gBLD, labels))
  return h_nPtD, jax.tree.map(jax.vmap(table.gather_tokens), labels)


def _by_future(sums_n: Sums, futures: int) -> Sums:
  return jax.tree.map(lambda x_n: jnp.sum(jnp.reshape(x_n, (futures, -1)), 1), sums_n)


def chunked(x_gBL, chunk: int):
  """[g, B, L, ...] -> [n, P, t, ...]: each device's tokens in n equal chunks of at most `chunk`; the last is padded."""
  all_tokens = jnp.stack([by_device(x_BL) for x_BL in x_gBL])
  g, P, tokens, *rest = all_tokens.shape
  n = -(-tokens // chunk)
  t, tail = -(-tokens // n), 'x' * len(rest)
  filled = jnp.pad(all_tokens, [(0, 0), (0, 0), (0, n * t - tokens), *[(0, 0)] * len(rest)])
  x_gPnt = jnp.reshape(filled, (g, P, n, t, *rest), **out('gPnt' + tail))
  return jnp.reshape(jnp.moveaxis(x_gPnt, 2, 1), (g * n, P, t, *rest), **out('nPt' + tail))


def whole(x_nPt, shape: tuple[int, int, int]):
  """The inverse of `chunked`: [n, P, t, ...] -> [g, B, L, ...], the first three sizes being
  `shape`.
  """
  g, B, L = shape
  n, P, t, *rest = x_nPt.shape
  tail = 'x' * len(rest)
  x_gnPt = jnp.reshape(x_nPt, (g, n // g, P, t, *rest), **out('gnPt' + tail))
  filled = jnp.reshape(jnp.moveaxis(x_gnPt, 1, 2), (g, P, n // g * t, *rest), **out('gPt' + tail))
  return jnp.stack([by_row(x[:, :B * L // P], B) for x in filled])
