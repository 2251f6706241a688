"""model/attention."""
import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import ModelConfig
from mtp_jax.mesh import mesh_order
from mtp_jax.model.kernels import _cudnn, _fits, _platform, _splash
from mtp_jax.sharding import einsum, out, place


def rotary(x_BLHK, positions_BL, base: float, slots: int | None = None):
  """Rotates the pairs (k, k + K/2) by position * base^(-2k/K).

  slots: where positions lie below it and a loop surrounds all this, sines are read from a table, which XLA makes before the loop.
  """
  half = x_BLHK.shape[-1] // 2
  frequency_K = jnp.tile(base ** (-jnp.arange(half) / half), 2)
  if slots is None:
    angle = positions_BL[..., None] * frequency_K
    cos, sin = jnp.cos(angle), jnp.sin(angle)
  else:
    angle = jnp.arange(slots)[:, None] * frequency_K
    cos, sin = jnp.cos(angle)[positions_BL], jnp.sin(angle)[positions_BL]
  a, b = jnp.split(x_BLHK, 2, -1)
  turned_BLHK = jnp.concatenate([-b, a], -1)  # exact in any type, so that nothing float32 is as large as x
  return (x_BLHK * cos[:, :, None] + turned_BLHK * sin[:, :, None]).astype(x_BLHK.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Documents:
  """What the tokens of a packed batch see: those before them in their document; padding (segment 0) sees only padding.

  mask_BLS: bool; segments_BL: what it comes from. k_BSGK, v_BSGK: keys and values once written, over the whole length.
  """
  mask_BLS: jax.Array
  segments_BL: jax.Array
  k_BSGK: jax.Array | None = None
  v_BSGK: jax.Array | None = None
  slots = None  # positions are bounded by nothing

  def write(self, k_BLGK, v_BLGK, positions_BL) -> 'Documents':
    return dataclasses.replace(self, k_BSGK=place(k_BLGK, 'BSGK'), v_BSGK=place(v_BLGK, 'BSGK'))

  def attend(self, q_BLHK, positions_BL):
    return attend(q_BLHK, self.k_BSGK, self.v_BSGK, self)


def attend(q_BLHK, k_BSGK, v_BSGK, seen):
  """softmax(q k / sqrt(K)) v over the keys that are seen; scores and softmax in float32. float[B, L, H, K].

  Args:
    seen: bool[B, L, S], or the `Documents` of a packed batch, for which a TPU runs the splash kernel and a GPU, in bfloat16, cuDNN's:
      no score leaves the chip's own memory.

  The r = H/G query heads that share a key head stand beside the length, so that each (B, G) is one plain matrix product.
  """
  if isinstance(seen, Documents):
    kernel = {'tpu': _splash, 'gpu': _cudnn}.get(_platform())
    if kernel and _fits(kernel, q_BLHK):
      return kernel(q_BLHK, k_BSGK, v_BSGK, seen)
    seen = seen.mask_BLS
  B, L, H, K = q_BLHK.shape
  G = k_BSGK.shape[2]
  q_BLGrK = jnp.reshape(q_BLHK * K**-0.5, (B, L, G, H // G, K), **out('BLGrK'))
  q_BGLK = jnp.reshape(jnp.moveaxis(q_BLGrK, 2, 1), (B, G, L * H // G, K), **out('BGLK'))
  o_BGLrK = jnp.reshape(_attend(q_BGLK, k_BSGK, v_BSGK, seen), (B, G, L, H // G, K), **out('BGLrK'))
  return jnp.reshape(jnp.moveaxis(o_BGLrK, 1, 2), (B, L, H, K), **out('BLHK'))


@jax.custom_vjp
def _attend(q_BGLK, k_BSGK, v_BSGK, mask_BLS):
  """Attention whose backward pass recomputes the scores (arXiv:2205.14135, section 3.1): no L x S array outlives it."""
  return _attend_forward(q_BGLK, k_BSGK, v_BSGK, mask_BLS)[0]


def _scores(q_BGLK, k_BSGK, mask_BLS):
  """Masked scores, float32[B, G, L, S]; mask_BLS holds for the r neighbours of each query."""
  scores_BGLS = einsum('BGLK,BSGK->BGLS', q_BGLK, k_BSGK, jnp.float32)
  B, G, Lr, S = scores_BGLS.shape
  L = mask_BLS.shape[1]
  scores_BGLrS = jnp.reshape(scores_BGLS, (B, G, L, Lr // L, S), **out('BGLrS'))
  return jnp.reshape(jnp.where(mask_BLS[:, None, :, None], scores_BGLrS, -1e30), (B, G, Lr, S), **out('BGLS'))


def _attend_forward(q_BGLK, k_BSGK, v_BSGK, mask_BLS):
  scores_BGLS = _scores(q_BGLK, k_BSGK, mask_BLS)
  top_BGL1 = jnp.max(scores_BGLS, -1, keepdims=True)
  e_BGLS = jnp.exp(scores_BGLS - top_BGL1)
  sum_BGL1 = jnp.sum(e_BGLS, -1, keepdims=True)
  o_BGLK = (einsum('BGLS,BSGK->BGLK', e_BGLS.astype(v_BSGK.dtype), v_BSGK, jnp.float32) / sum_BGL1).astype(q_BGLK.dtype)
  o_BGLK, lse_BGL1 = checkpoint_name((o_BGLK, top_BGL1 + jnp.log(sum_BGL1)), 'attention')
  return o_BGLK, (q_BGLK, k_BSGK, v_BSGK, mask_BLS, o_BGLK, lse_BGL1)


def _attend_backward(residual, do_BGLK):
  q_BGLK, k_BSGK, v_BSGK, mask_BLS, o_BGLK, lse_BGL1 = residual
  dtype = q_BGLK.dtype
  p_BGLS = jnp.exp(_scores(q_BGLK, k_BSGK, mask_BLS) - lse_BGL1)
  dp_BGLS = einsum('BGLK,BSGK->BGLS', do_BGLK, v_BSGK, jnp.float32)
  delta_BGL1 = jnp.sum(do_BGLK.astype(jnp.float32) * o_BGLK, -1, keepdims=True)
  ds_BGLS = (p_BGLS * (dp_BGLS - delta_BGL1)).astype(dtype)
  return (einsum('BGLS,BSGK->BGLK', ds_BGLS, k_BSGK), einsum('BGLS,BGLK->BSGK', ds_BGLS, q_BGLK),
          einsum('BGLS,BGLK->BSGK', p_BGLS.astype(dtype), do_BGLK), None)


_attend.defvjp(_attend_forward, _attend_backward)


def write(old_BS, new_BL, positions_BL):
  """Puts each row's new entries at their positions; those outside 0..S-1 are dropped."""
  rows_B1 = jnp.arange(positions_BL.shape[0])[:, None]
  slots_BL = jnp.where(positions_BL < 0, old_BS.shape[1], positions_BL)
  return old_BS.at[rows_B1, slots_BL].set(new_BL, mode='drop')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of one block while decoding; slot s holds position s of its sequence, which sees the slots up to its own.

  The key heads of all sequences are rows (R = B x G), so that attention is one plain product of matrices a row, and XLA writes new
  tokens into the arrays where they lie, copying nothing.
  """
  k_RSK: jax.Array
  v_RSK: jax.Array

  @classmethod
  def empty(cls, c: ModelConfig, batch: int, slots: int) -> 'Cache':
    zeros = jnp.zeros((batch * c.kv_heads, slots, c.head_width), c.dtype)
    return cls(zeros, zeros)

  @property
  def slots(self) -> int:
    return self.k_RSK.shape[1]

  def grown(self, slots: int) -> 'Cache':
    """With room for more."""
    return Cache(*(jnp.pad(x_RSK, ((0, 0), (0, slots - self.slots), (0, 0))) for x_RSK in (self.k_RSK, self.v_RSK)))

  def write(self, k_BLGK, v_BLGK, positions_BL) -> 'Cache':
    """New keys and values at their positions."""
    B, L, G, K = k_BLGK.shape
    as_rows = lambda x_BLGK: jnp.reshape(jnp.moveaxis(x_BLGK, 2, 1), (B * G, L, K))
    positions_RL = jnp.repeat(positions_BL, G, 0)
    return Cache(write(self.k_RSK, as_rows(k_BLGK), positions_RL), write(self.v_RSK, as_rows(v_BLGK), positions_RL))

  def attend(self, q_BLHK, positions_BL):
    """Like `attend`, over the slots up to each query's position. float[B, L, H, K]."""
    B, L, H, K = q_BLHK.shape
    R, S, _ = self.k_RSK.shape
    G, r = R // B, H * B // R
    q_RLK = jnp.reshape(jnp.moveaxis(jnp.reshape(q_BLHK * K**-0.5, (B, L, G, r, K)), 2, 1), (R, L * r, K))
    seen_BGLrS = jnp.broadcast_to(jnp.arange(S) <= positions_BL[:, None, :, None, None], (B, G, L, r, S))
    scores_RLS = jnp.where(jnp.reshape(seen_BGLrS, (R, L * r, S)), einsum('RLK,RSK->RLS', q_RLK, self.k_RSK, jnp.float32), -1e30)
    e_RLS = jnp.exp(scores_RLS - jnp.max(scores_RLS, -1, keepdims=True))
    o_RLK = einsum('RLS,RSK->RLK', e_RLS.astype(self.v_RSK.dtype), self.v_RSK, jnp.float32) / jnp.sum(e_RLS, -1, keepdims=True)
    return jnp.reshape(jnp.moveaxis(jnp.reshape(o_RLK.astype(q_BLHK.dtype), (B, G, L, r, K)), 1, 2), (B, L, H, K))


def documents(segments_BL) -> Documents:
  """Of segments that `to_mesh_order` has put in place."""
  segments_BS, laid_S = place(segments_BL, 'BS'), jnp.asarray(mesh_order(segments_BL.shape[1]))
  causal_LS = place(laid_S, 'L')[:, None] >= laid_S
  return Documents((segments_BL[:, :, None] == segments_BS[:, None, :]) & causal_LS, segments_BL)
