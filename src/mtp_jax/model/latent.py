"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434; DeepSeek-V3, arXiv:2412.19437, equations
1-11), without biases.

    c_BSA  = norm(h_BSD kv_down_DA)                       compressed keys and values
    r_BSo  = rotary(h_BSD k_rotary_Do)                    the rotary part of every head's keys
    k_BSHJ = [c_BSA k_up_AHK ; r_BSo]                     v_BSHK = c_BSA v_up_AHK
    q_BLHJ = norm(h_BLD q_down_DU) q_up_UHJ               of which the last o are rotated
    y_BLD  = softmax(q k / sqrt(J)) v wo_HKD

With query_rank 0, q_BLHJ = h_BLD wq_DHJ. This is the plain form; training runs it, through the same
kernels as grouped attention. In decoding only c and r are kept, A + o numbers a token, for all heads
together. The products that would expand them are moved to the queries and to what these read, which
is called the absorbed form:

    q_BLHK . k_BSHK = (q_BLHK k_up_AHK) . c_BSA           p_BLHS v_BSHK = (p_BLHS c_BSA) v_up_AHK
"""
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import ModelConfig
from mtp_jax.model.attention import Documents, rotary, write
from mtp_jax.model.norm import rms_norm
from mtp_jax.model.parameters import matrix, scale
from mtp_jax.sharding import einsum, out


class LatentAttention(nnx.Module):

  def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
    D, H, K, A, U, o = c.width, c.heads, c.head_width, c.kv_rank, c.query_rank, c.rope_width
    if U:
      self.q_down_DU, self.q_norm_U = matrix(rngs, D, D, U), scale(U)
      self.q_up_UHJ = matrix(rngs, U, U, H, K + o)
    else:
      self.wq_DHJ = matrix(rngs, D, D, H, K + o)
    self.kv_down_DA, self.kv_norm_A = matrix(rngs, D, D, A), scale(A)
    self.k_rotary_Do = matrix(rngs, D, D, o)
    self.k_up_AHK = matrix(rngs, A, A, H, K)
    self.v_up_AHK = matrix(rngs, A, A, H, K)
    self.wo_HKD = matrix(rngs, H * K, H, K, D)
    self.config = c

  def write(self, h_BLD, positions_BL, keys):
    """`keys` with those of these tokens: their keys and values, or in decoding their latents."""
    c = self.config
    c_BLA = rms_norm(einsum('BLD,DA->BLA', h_BLD, self.kv_down_DA[...]), self.kv_norm_A[...], c.norm_epsilon)
    r_BLo = einsum('BLD,Do->BLo', h_BLD, self.k_rotary_Do[...])
    r_BLo = rotary(r_BLo[:, :, None], positions_BL, c.rope_base, keys.slots)[:, :, 0]
    if not isinstance(keys, Documents):
      return keys.write(c_BLA, r_BLo, positions_BL)
    k_BLHK = einsum('BLA,AHK->BLHK', c_BLA, self.k_up_AHK[...])
    v_BLHK = einsum('BLA,AHK->BLHK', c_BLA, self.v_up_AHK[...])
    r_BLHo = jnp.broadcast_to(r_BLo[:, :, None], (*k_BLHK.shape[:3], c.rope_width), **out('BLHo'))
    k_BLHJ = jnp.concatenate([k_BLHK, r_BLHo], -1)
    return keys.write(checkpoint_name(k_BLHJ, 'qkv'), checkpoint_name(v_BLHK, 'qkv'), positions_BL)

  def __call__(self, h_BLD, positions_BL, keys):
    """What these tokens read from `keys`, which hold their own already. [B, L, D]"""
    q_BLHK, q_BLHo = self._queries(h_BLD, positions_BL, keys.slots)
    if isinstance(keys, Documents):
      q_BLHJ = checkpoint_name(jnp.concatenate([q_BLHK, q_BLHo], -1), 'qkv')
      o_BLHK = keys.attend(q_BLHJ, positions_BL)
    else:
      scaling = (self.config.head_width + self.config.rope_width)**-0.5
      q_BLHA = einsum('BLHK,AHK->BLHA', q_BLHK * scaling, self.k_up_AHK[...])
      o_BLHA = keys.attend(q_BLHA, q_BLHo * scaling, positions_BL)
      o_BLHK = einsum('BLHA,AHK->BLHK', o_BLHA, self.v_up_AHK[...])
    return einsum('BLHK,HKD->BLD', o_BLHK, self.wo_HKD[...])

  def _queries(self, h_BLD, positions_BL, slots: int | None):
    """(the part of the queries that is not rotated, the rotary part)."""
    c = self.config
    if c.query_rank:
      c_BLU = rms_norm(einsum('BLD,DU->BLU', h_BLD, self.q_down_DU[...]), self.q_norm_U[...], c.norm_epsilon)
      q_BLHJ = einsum('BLU,UHJ->BLHJ', c_BLU, self.q_up_UHJ[...])
    else:
      q_BLHJ = einsum('BLD,DHJ->BLHJ', h_BLD, self.wq_DHJ[...])
    q_BLHK, q_BLHo = jnp.split(q_BLHJ, [c.head_width], -1)
    return q_BLHK, rotary(q_BLHo, positions_BL, c.rope_base, slots)

  @staticmethod
  def flops(c: ModelConfig, keys: int) -> int:
    """Forward FLOPs of one token that attends to so many keys, in the plain form: its matrices, the scores,
    and the sum of the values.
    """
    heads, latents = c.heads * c.head_width, c.kv_rank + c.rope_width
    queries = c.heads * (c.head_width + c.rope_width)
    to_queries = c.query_rank * (c.width + queries) if c.query_rank else c.width * queries
    matrices = 2 * (to_queries + c.width * latents + 2 * c.kv_rank * heads + heads * c.width)
    return matrices + LatentAttention.score_flops(c, keys) + 2 * heads * keys

  @staticmethod
  def score_flops(c: ModelConfig, keys: int) -> int:
    """FLOPs of one token's scores."""
    return 2 * c.heads * (c.head_width + c.rope_width) * keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
  """The latents of one block in decoding, which all its heads share; slot s holds position s of its
  sequence, and a query reads up to its own.

  Scores are made with slots first, [S, Q] for the Q = L x H queries of a sequence: the latents are
  multiplied as they lie, both for the scores and for what is read. Only the scores are transposed.
  """
  c_BSA: jax.Array
  r_BSo: jax.Array
  # For a mesh, as in `Cache`. New latents are whole, since a norm reads them whole.
  new, queries = ('blx', 'blo'), ('blHA', 'blHo')

  @classmethod
  def empty(cls, c: ModelConfig, batch: int, slots: int) -> 'LatentCache':
    return cls(*(jnp.zeros((batch, slots, width), c.dtype) for width in (c.kv_rank, c.rope_width)))

  @property
  def slots(self) -> int:
    return self.c_BSA.shape[1]

  def grown(self, slots: int) -> 'LatentCache':
    """With so many slots."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, slots - self.slots), (0, 0))), self)

  def write(self, c_BLA, r_BLo, positions_BL) -> 'LatentCache':
    """With new latents at their positions."""
    return LatentCache(write(self.c_BSA, c_BLA, positions_BL), write(self.r_BSo, r_BLo, positions_BL))

  def attend(self, q_BLHA, q_BLHo, positions_BL):
    """softmax(q c + q r) c over the slots up to each query's position: [B, L, H, A].

    Args:
      q_BLHA, q_BLHo: queries of the latents and of the rotary part, both scaled.
    """
    B, L, H, A = q_BLHA.shape
    q_BAQ, q_BoQ = (jnp.moveaxis(jnp.reshape(q, (B, L * H, -1)), 1, 2) for q in (q_BLHA, q_BLHo))
    scores_BSQ = einsum('BSA,BAQ->BSQ', self.c_BSA, q_BAQ, jnp.float32)
    scores_BSQ += einsum('BSo,BoQ->BSQ', self.r_BSo, q_BoQ, jnp.float32)
    mask_BSQ = jnp.arange(self.slots)[:, None] <= jnp.repeat(positions_BL, H, 1)[:, None]
    scores_BSQ = jnp.where(mask_BSQ, scores_BSQ, -1e30)
    e_BSQ = jnp.exp(scores_BSQ - jnp.max(scores_BSQ, 1, keepdims=True))
    p_BSQ = (e_BSQ / jnp.sum(e_BSQ, 1, keepdims=True)).astype(self.c_BSA.dtype)
    o_BQA = einsum('BQS,BSA->BQA', jnp.moveaxis(p_BSQ, 1, 2), self.c_BSA)
    return jnp.reshape(o_BQA, (B, L, H, A))
