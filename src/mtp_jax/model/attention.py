"""The attention part of a block: grouped-query attention (arXiv:2305.13245).

    q_BLHK = rotary(h_BLD wq_DHK)    k_BSGK = rotary(h_BSD wk_DGK)    v_BSGK = h_BSD wv_DGK
    y_BLD  = softmax(q k / sqrt(K)) v wo_HKD

With qkv_bias each of the three has a bias, added before the rotary embedding, which is in half-split order
(arXiv:2104.09864). What a query may look at is an argument, `keys`: the `Documents` of a packed
batch in training, a `Cache` in decoding. A block first writes the keys and values of its tokens
into it, then reads.
"""
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import ModelConfig
from mtp_jax.mesh import mesh_order
from mtp_jax.model import kernels
from mtp_jax.model.norm import rms_norm
from mtp_jax.model.parameters import bias, matrix, scale
from mtp_jax.sharding import einsum, out, place


class GroupedQueryAttention(nnx.Module):

  def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
    D, H, G, K = c.width, c.heads, c.kv_heads, c.head_width
    self.wq_DHK = matrix(rngs, D, D, H, K)
    self.wo_HKD = matrix(rngs, H * K, H, K, D)
    self.wk_DGK = matrix(rngs, D, D, G, K)
    self.wv_DGK = matrix(rngs, D, D, G, K)
    if c.qk_norm:
      self.q_norm_K, self.k_norm_K = scale(K), scale(K)
    if c.qkv_bias:
      self.q_bias_HK, self.k_bias_GK, self.v_bias_GK = bias(H, K), bias(G, K), bias(G, K)
    self.config = c

  def write(self, h_BLD, positions_BL, keys):
    """`keys` with the keys and values of these tokens."""
    c = self.config
    k_BLGK = einsum('BLD,DGK->BLGK', h_BLD, self.wk_DGK[...])
    v_BLGK = einsum('BLD,DGK->BLGK', h_BLD, self.wv_DGK[...])
    if c.qkv_bias:
      k_BLGK += self.k_bias_GK[...].astype(k_BLGK.dtype)[None, None]
      v_BLGK += self.v_bias_GK[...].astype(v_BLGK.dtype)[None, None]
    if c.qk_norm:
      k_BLGK = rms_norm(k_BLGK, self.k_norm_K[...], c.norm_epsilon)
    k_BLGK = rotary(k_BLGK, positions_BL, c.rope_base, keys.slots)
    return keys.write(checkpoint_name(k_BLGK, 'qkv'), checkpoint_name(v_BLGK, 'qkv'), positions_BL)

  def __call__(self, h_BLD, positions_BL, keys):
    """What these tokens read from `keys`, which hold their own keys and values already. [B, L, D]"""
    c = self.config
    q_BLHK = einsum('BLD,DHK->BLHK', h_BLD, self.wq_DHK[...])
    if c.qkv_bias:
      q_BLHK += self.q_bias_HK[...].astype(q_BLHK.dtype)[None, None]
    if c.qk_norm:
      q_BLHK = rms_norm(q_BLHK, self.q_norm_K[...], c.norm_epsilon)
    q_BLHK = checkpoint_name(rotary(q_BLHK, positions_BL, c.rope_base, keys.slots), 'qkv')
    return einsum('BLHK,HKD->BLD', keys.attend(q_BLHK, positions_BL), self.wo_HKD[...])

  @staticmethod
  def flops(c: ModelConfig, keys: int) -> int:
    """Forward FLOPs of one token that attends to so many keys: four matrices, the scores, and the
    sum of the values.
    """
    matrices = 2 * c.width * c.head_width * (2 * c.heads + 2 * c.kv_heads)
    return matrices + 2 * GroupedQueryAttention.score_flops(c, keys)

  @staticmethod
  def score_flops(c: ModelConfig, keys: int) -> int:
    """FLOPs of one token's scores."""
    return 2 * c.heads * c.head_width * keys


def rotary(x_BLho, positions_BL, base: float, slots: int | None = None):
  """Rotates the pairs (i, i + o/2) of a head, or of a part of it, by position * base^(-2i/o).

  Args:
    x_BLho: query heads or key heads.
    slots: a bound of the positions, if there is one: sines are then read from a table. In the loop
      of a decoder XLA computes the table once, before the loop.
  """
  half = x_BLho.shape[-1] // 2
  frequency_o = jnp.tile(base ** (-jnp.arange(half) / half), 2)
  if slots is None:
    angle = positions_BL[..., None] * frequency_o
    cos, sin = jnp.cos(angle), jnp.sin(angle)
  else:
    angle = jnp.arange(slots)[:, None] * frequency_o
    cos, sin = jnp.cos(angle)[positions_BL], jnp.sin(angle)[positions_BL]
  a, b = jnp.split(x_BLho, 2, -1)
  turned_BLho = jnp.concatenate([-b, a], -1)  # exact in any type, so that nothing in float32 is as large as x
  return (x_BLho * cos[:, :, None] + turned_BLho * sin[:, :, None]).astype(x_BLho.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Documents:
  """What the tokens of a packed batch may look at: those before them in their document; padding
  looks at padding only.

  Attributes:
    mask_BLS: bool, whether a query may look at a key.
    segments_BL: int32, the number of each token's document in its row, 0 for padding; the mask is
      made from it.
    k_BSGJ, v_BSGK: keys and values, once written.
    balance: weight of a row in the loss that balances experts, read by no attention.
  """
  mask_BLS: jax.Array
  segments_BL: jax.Array
  k_BSGJ: jax.Array | None = None
  v_BSGK: jax.Array | None = None
  balance: float = dataclasses.field(default=0.0, metadata={'static': True})
  slots = None  # positions have no bound

  def write(self, k_BLGJ, v_BLGK, positions_BL) -> 'Documents':
    return dataclasses.replace(self, k_BSGJ=place(k_BLGJ, 'BSGJ'), v_BSGK=place(v_BLGK, 'BSGK'))

  def attend(self, q_BLHJ, positions_BL):
    """Softmax attention within documents, by the kernel of the chip where there is one. [B, L, H,
    K]
    """
    kernel = kernels.kernel_for(q_BLHJ, self.v_BSGK)
    if kernel:
      return kernel(q_BLHJ, self.k_BSGJ, self.v_BSGK, self.segments_BL, self.mask_BLS)
    return attend(q_BLHJ, self.k_BSGJ, self.v_BSGK, self.mask_BLS)


def documents(segments_BL, balance: float = 0.0) -> Documents:
  """The `Documents` of segments in mesh order."""
  segments_BS, order_S = place(segments_BL, 'BS'), jnp.asarray(mesh_order(segments_BL.shape[1]))
  causal_LS = place(order_S, 'L')[:, None] >= order_S
  mask_BLS = (segments_BL[:, :, None] == segments_BS[:, None, :]) & causal_LS
  return Documents(mask_BLS, segments_BL, balance=balance)


def attend(q_BLHJ, k_BSGJ, v_BSGK, mask_BLS):
  """softmax(q k / sqrt(J)) v over the keys that the mask allows; scores and softmax in float32. [B,
  L, H, K]

  The queries of a key head, Q = L x r of r = H/G heads, are put side by side, so that each (B, G)
  is one matrix product.
  """
  B, L, H, J = q_BLHJ.shape
  G, K = v_BSGK.shape[2:]
  q_BLGrJ = jnp.reshape(q_BLHJ * J**-0.5, (B, L, G, H // G, J), **out('BLGrJ'))
  q_BGQJ = jnp.reshape(jnp.moveaxis(q_BLGrJ, 2, 1), (B, G, L * H // G, J), **out('BGQJ'))
  o_BGLrK = jnp.reshape(_attend(q_BGQJ, k_BSGJ, v_BSGK, mask_BLS), (B, G, L, H // G, K), **out('BGLrK'))
  return jnp.reshape(jnp.moveaxis(o_BGLrK, 1, 2), (B, L, H, K), **out('BLHK'))


@jax.custom_vjp
def _attend(q_BGQJ, k_BSGJ, v_BSGK, mask_BLS):
  """Attention whose backward pass recomputes the scores (arXiv:2205.14135, section 3.1): no L x S
  array is saved.
  """
  return _attend_forward(q_BGQJ, k_BSGJ, v_BSGK, mask_BLS)[0]


def _scores(q_BGQJ, k_BSGJ, mask_BLS):
  """Masked scores, float32[B, G, Q, S]. A mask entry holds for all r query heads that share a key
  head.
  """
  scores_BGQS = einsum('BGQJ,BSGJ->BGQS', q_BGQJ, k_BSGJ, jnp.float32)
  B, G, Q, S = scores_BGQS.shape
  L = mask_BLS.shape[1]
  scores_BGLrS = jnp.reshape(scores_BGQS, (B, G, L, Q // L, S), **out('BGLrS'))
  masked_BGLrS = jnp.where(mask_BLS[:, None, :, None], scores_BGLrS, -1e30)
  return jnp.reshape(masked_BGLrS, (B, G, Q, S), **out('BGQS'))


def _attend_forward(q_BGQJ, k_BSGJ, v_BSGK, mask_BLS):
  scores_BGQS = _scores(q_BGQJ, k_BSGJ, mask_BLS)
  top_BGQ1 = jnp.max(scores_BGQS, -1, keepdims=True)
  e_BGQS = jnp.exp(scores_BGQS - top_BGQ1)
  sum_BGQ1 = jnp.sum(e_BGQS, -1, keepdims=True)
  o_BGQK = einsum('BGQS,BSGK->BGQK', e_BGQS.astype(v_BSGK.dtype), v_BSGK, jnp.float32) / sum_BGQ1
  o_BGQK, lse_BGQ1 = checkpoint_name((o_BGQK.astype(q_BGQJ.dtype), top_BGQ1 + jnp.log(sum_BGQ1)), 'attention')
  return o_BGQK, (q_BGQJ, k_BSGJ, v_BSGK, mask_BLS, o_BGQK, lse_BGQ1)


def _attend_backward(residual, do_BGQK):
  q_BGQJ, k_BSGJ, v_BSGK, mask_BLS, o_BGQK, lse_BGQ1 = residual
  dtype = q_BGQJ.dtype
  p_BGQS = jnp.exp(_scores(q_BGQJ, k_BSGJ, mask_BLS) - lse_BGQ1)
  dp_BGQS = einsum('BGQK,BSGK->BGQS', do_BGQK, v_BSGK, jnp.float32)
  delta_BGQ1 = jnp.sum(do_BGQK.astype(jnp.float32) * o_BGQK, -1, keepdims=True)
  ds_BGQS = (p_BGQS * (dp_BGQS - delta_BGQ1)).astype(dtype)
  dq_BGQJ = einsum('BGQS,BSGJ->BGQJ', ds_BGQS, k_BSGJ)
  dk_BSGJ = einsum('BGQS,BGQJ->BSGJ', ds_BGQS, q_BGQJ)
  dv_BSGK = einsum('BGQS,BGQK->BSGK', p_BGQS.astype(dtype), do_BGQK)
  return dq_BGQJ, dk_BSGJ, dv_BSGK, None


_attend.defvjp(_attend_forward, _attend_backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of one block in decoding; slot s holds position s of its sequence, and a query
  reads up to its own.

  The key heads of all sequences are rows, R = B x G, so that attention is one matrix product a row,
  and XLA writes new tokens in place, without a copy. Keys have slots last: with slots first,
  XLA on a CPU would transpose all of them in every pass over several tokens.
  """
  k_RKS: jax.Array
  v_RSK: jax.Array
  # For a mesh: the axes of what `write` and `attend` take besides positions.
  new, queries = ('blGK', 'blGK'), ('blHK',)

  @classmethod
  def empty(cls, c: ModelConfig, batch: int, slots: int) -> 'Cache':
    zeros_RSK = jnp.zeros((batch * c.kv_heads, slots, c.head_width), c.dtype)
    return cls(jnp.swapaxes(zeros_RSK, 1, 2), zeros_RSK)

  @property
  def slots(self) -> int:
    return self.v_RSK.shape[1]

  def grown(self, slots: int) -> 'Cache':
    """With so many slots."""
    none, new = (0, 0), (0, slots - self.slots)
    return Cache(jnp.pad(self.k_RKS, (none, none, new)), jnp.pad(self.v_RSK, (none, new, none)))

  def write(self, k_BLGK, v_BLGK, positions_BL) -> 'Cache':
    """With new keys and values at their positions."""
    B, L, G, K = k_BLGK.shape
    as_rows = lambda x_BLGK: jnp.reshape(jnp.moveaxis(x_BLGK, 2, 1), (B * G, L, K))
    positions_RL = jnp.repeat(positions_BL, G, 0)
    return Cache(write(self.k_RKS, as_rows(k_BLGK), positions_RL, 2), write(self.v_RSK, as_rows(v_BLGK), positions_RL))

  def attend(self, q_BLHK, positions_BL):
    """Softmax attention over the slots up to each query's position. [B, L, H, K]"""
    B, L, H, K = q_BLHK.shape
    R, S, _ = self.v_RSK.shape
    G, r = R // B, H * B // R
    q_BGLrK = jnp.moveaxis(jnp.reshape(q_BLHK * K**-0.5, (B, L, G, r, K)), 2, 1)
    mask_BGLrS = jnp.broadcast_to(jnp.arange(S) <= positions_BL[:, None, :, None, None], (B, G, L, r, S))
    scores_RQS = einsum('RQK,RKS->RQS', jnp.reshape(q_BGLrK, (R, L * r, K)), self.k_RKS, jnp.float32)
    scores_RQS = jnp.where(jnp.reshape(mask_BGLrS, (R, L * r, S)), scores_RQS, -1e30)
    e_RQS = jnp.exp(scores_RQS - jnp.max(scores_RQS, -1, keepdims=True))
    o_RQK = einsum('RQS,RSK->RQK', e_RQS.astype(self.v_RSK.dtype), self.v_RSK, jnp.float32)
    o_RQK = (o_RQK / jnp.sum(e_RQS, -1, keepdims=True)).astype(q_BLHK.dtype)
    return jnp.reshape(jnp.moveaxis(jnp.reshape(o_RQK, (B, G, L, r, K)), 1, 2), (B, L, H, K))


def write(old, new, positions, axis: int = 1):
  """`old` with each row's new entries at their positions; those outside 0..S-1 are dropped.

  Args:
    old: [rows, S, ...], or with S at another axis. new: [rows, n, ...]. positions: int32[rows, n].
  """
  rows = jnp.arange(positions.shape[0])[:, None]
  slots = jnp.where(positions < 0, old.shape[axis], positions)
  if slots.size == 1:  # XLA on a CPU copies `old` to write a single entry: add one, which is dropped
    slots, new = jnp.pad(slots, ((0, 0), (0, 1)), constant_values=old.shape[axis]), jnp.repeat(new, 2, 1)
  return old.at[(rows, *[slice(None)] * (axis - 1), slots)].set(new, mode='drop')
