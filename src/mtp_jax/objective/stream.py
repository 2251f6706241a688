"""objective/stream."""

import jax
import jax.numpy as jnp

from mtp_jax.config import ModelConfig, ObjectiveConfig
from mtp_jax.mesh import by_device, by_row
from mtp_jax.model.model import capped
from mtp_jax.objective.targets import Sums
from mtp_jax.sharding import einsum, out, place


def cross_entropy(c: ModelConfig, o: ObjectiveConfig, h_GBLD, w_VD, y_GBL, k_GBL, counted_GBL, dw_PDV=None):
  """Weighted cross-entropy of G futures, and its gradients in the same walk over chunks of (future, position).

  Args:
    h_GBLD: normed states. w_VD: the unembedding, in the same type.
    y_GBL: targets. k_GBL: weight of each in the loss. counted_GBL: where it counts.
    dw_PDV: float32, the gradient of the unembedding so far, each part that of its own tokens; None computes no gradient.

  Returns:
    (float32 loss, Sums of G, gradient of h_GBLD or None, dw_PDV with this one's added or None).
  """
  G, B, L, _ = h_GBLD.shape

  def step(dw_PDV, inputs):
    h_PTD, y_PT, k_PT, counted_PT = inputs
    k_PT = jnp.where(counted_PT, k_PT, 0.0)
    logits_PTV = capped(einsum('PTD,VD->PTV', h_PTD, w_VD, jnp.float32), c)
    top_PT = jnp.max(logits_PTV, -1)
    e_PTV = jnp.exp(logits_PTV - top_PT[..., None])
    sum_PT = jnp.sum(e_PTV, -1)
    lse_PT = top_PT + jnp.log(sum_PT)
    ids_V = place(jnp.arange(logits_PTV.shape[-1]), 'V')
    hit_PTV = ids_V == y_PT[..., None]
    nats_PT = lse_PT - jnp.sum(logits_PTV, -1, where=hit_PTV)
    correct_PT = jnp.min(jnp.where(logits_PTV == top_PT[..., None], ids_V, len(ids_V)), -1) == y_PT  # the first of equals
    sums = Sums(jnp.sum(nats_PT, where=counted_PT), jnp.sum(correct_PT, where=counted_PT, dtype=jnp.int32), jnp.sum(counted_PT, dtype=jnp.int32))
    loss = jnp.sum(k_PT * (nats_PT + o.z_loss * lse_PT**2))
    if dw_PDV is None:
      return None, (loss, sums, None)
    slope_PT = k_PT * (1 + 2 * o.z_loss * lse_PT) / sum_PT
    g_PTV = slope_PT[..., None] * e_PTV - jnp.where(hit_PTV, k_PT[..., None], 0.0)
    if c.logit_cap:
      g_PTV *= 1 - (logits_PTV / c.logit_cap)**2
    g_PTV = g_PTV.astype(h_PTD.dtype)
    return dw_PDV + einsum('PTD,PTV->PDV', h_PTD, g_PTV, jnp.float32), (loss, sums, einsum('PTV,VD->PTD', g_PTV, w_VD))

  with jax.named_scope('loss'):
    dw_PDV, (loss_n, sums_n, dh_nPTD) = jax.lax.scan(step, dw_PDV, tuple(chunked(x, o.chunk) for x in (h_GBLD, y_GBL, k_GBL, counted_GBL)))
    sums_G = jax.tree.map(lambda x_n: jnp.sum(jnp.reshape(x_n, (G, -1)), 1), sums_n)
    return jnp.sum(loss_n), sums_G, None if dh_nPTD is None else whole(dh_nPTD, G, B, L), dw_PDV


def chunked(x_GBL, chunk: int):
  """[G, B, L, ...] -> [n, P, T, ...]: each part's tokens, at most `chunk` at a time and in equal chunks; the last ones are filled up."""
  x_GPT = jnp.stack([by_device(x_BL) for x_BL in x_GBL])
  G, P, T, *rest = x_GPT.shape
  n = -(-T // chunk)
  size, tail = -(-T // n), 'r' * len(rest)
  x_GPT = jnp.pad(x_GPT, [(0, 0), (0, 0), (0, n * size - T), *[(0, 0)] * len(rest)])
  x_GPnT = jnp.reshape(x_GPT, (G, P, n, size, *rest), **out('gPnt' + tail))
  return jnp.reshape(jnp.moveaxis(x_GPnT, 2, 1), (G * n, P, size, *rest), **out('nPt' + tail))


def whole(x_nPT, G: int, B: int, L: int):
  """The inverse of `chunked`: [G, B, L, ...]."""
  n, P, size, *rest = x_nPT.shape
  tail = 'r' * len(rest)
  x_GnPT = jnp.reshape(x_nPT, (G, n // G, P, size, *rest), **out('gnPt' + tail))
  x_GPT = jnp.reshape(jnp.moveaxis(x_GnPT, 1, 2), (G, P, n // G * size, *rest), **out('gPt' + tail))
  return jnp.stack([by_row(x_PT[:, :B * L // P], B) for x_PT in x_GPT])
