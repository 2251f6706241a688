"""Blocks: pre-norm attention and SwiGLU, both residual; no biases.

    x_BLD -> x_BLD + attention(rms_norm(x_BLD)) -> x_BLD + swiglu(rms_norm(x_BLD))

RMSNorm (arXiv:1910.07467), rotary embedding in half-split order (arXiv:2104.09864), grouped-query attention
(arXiv:2305.13245), SwiGLU (arXiv:2002.05202). One forward serves training and decoding: keys and values come from the
`Documents` of the batch, or, in decoding, from all that was written into a `Cache` so far. Parameters are float32; `einsum` casts them to the
compute type, that of x_BLD, at the point of use.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import ModelConfig
from mtp_jax.sharding import einsum, order, out, place, spec


def normal(fan_in: int):
  """Truncated normal with variance 1/fan_in before truncation at two sigma."""
  return nnx.initializers.truncated_normal(fan_in**-0.5)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def rms_norm(x_BLD, scale_D, epsilon: float):
  """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, computed in float32; same type out as in. Only x outlives it."""
  x = x_BLD.astype(jnp.float32)
  return (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon) * scale_D).astype(x_BLD.dtype)


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


def _platform() -> str:
  """'tpu', 'gpu', or '' for all else: what the mesh is of, be it here or only described."""
  mesh = jax.sharding.get_abstract_mesh()
  kind = getattr(None if mesh.empty else mesh.abstract_device, 'device_kind', '')
  return 'tpu' if 'TPU' in kind else 'gpu' if 'NVIDIA' in kind else ''


def _fits(kernel, q_BLHK) -> bool:
  """Whether the kernel takes such shapes: tiles of 128 on a TPU; cuDNN heads of up to 128 in 16 bits."""
  _, L, _, K = q_BLHK.shape
  c = jax.sharding.get_abstract_mesh().shape['context']
  if kernel is _cudnn:
    return q_BLHK.dtype == jnp.bfloat16 and K <= 128 and K % 8 == 0
  return L % (128 * c) == 0 and L % c**2 == 0 and K % 64 == 0


def _splash(q_BLHK, k_BSGK, v_BSGK, seen: Documents, interpret: bool = False):
  """JAX's TPU kernel of causal attention within segments, each device on its own rows, heads and stretches of the length; tiles that a causal
  mask hides are skipped. `interpret` runs it anywhere."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  mesh, (_, L, H, _), G = jax.sharding.get_abstract_mesh(), q_BLHK.shape, k_BSGK.shape[2]
  context, heads = mesh.shape['context'], H // mesh.shape['tensor']
  laid_L = order(L)
  as_they_come = None if context == 1 else np.argsort(laid_L)
  tile = next(size for size in (512, 256, 128) if L // context % size == 0)
  mask = masks.CausalMask((L, L), shard_count=context)
  mask.q_sequence = laid_L
  sizes = kernels.BlockSizes(block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile, block_q_dq=tile, block_kv_dq=tile)
  kernel = kernels.make_splash_mha(mask=masks.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=context, block_sizes=sizes,
                                   residual_checkpoint_name='attention', interpret=interpret)
  specs = kernel.manual_sharding_spec(jax.NamedSharding(mesh, jax.P(None, 'context')))
  kernel = jax.tree.map(jax.sharding.reshard, kernel, specs)

  def local(kernel, q_BLHK, k_BSGK, v_BSGK, segments_BL, segments_BS):
    if as_they_come is not None:
      k_BSGK, v_BSGK, segments_BS = (x[:, as_they_come] for x in (k_BSGK, v_BSGK, segments_BS))
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q_BLHK * q_BLHK.shape[3]**-0.5, jnp.repeat(k_BSGK, H // G, 2), jnp.repeat(v_BSGK, H // G, 2)))
    o_BHLK = jax.vmap(lambda q, k, v, own, all: kernel(q, k, v, segment_ids=kernels.SegmentIds(own, all)))(q, k, v, segments_BL, segments_BS)
    return jnp.moveaxis(o_BHLK, 1, 2)

  return jax.shard_map(local, in_specs=(specs, *map(spec, ('BLHK', 'BSGK', 'BSGK', 'BL', 'BS'))), out_specs=spec('BLHK'), check_vma=False)(
      kernel, q_BLHK, k_BSGK, v_BSGK, seen.segments_BL, place(seen.segments_BL, 'BS'))


def _cudnn(q_BLHK, k_BSGK, v_BSGK, seen: Documents, implementation: str = 'cudnn'):
  """cuDNN's flash attention, each device on its own rows, heads and stretches of the length; 'xla' runs the same call anywhere."""
  whole = jax.sharding.get_abstract_mesh().shape['context'] == 1  # then later keys are skipped, not only masked

  def local(q_BLHK, k_BSGK, v_BSGK, mask_BLS):
    return jax.nn.dot_product_attention(q_BLHK, k_BSGK, v_BSGK, mask=mask_BLS[:, None], is_causal=whole, implementation=implementation)

  return jax.shard_map(local, in_specs=tuple(map(spec, ('BLHK', 'BSGK', 'BSGK', 'BLS'))), out_specs=spec('BLHK'), check_vma=False)(
      q_BLHK, k_BSGK, v_BSGK, seen.mask_BLS)


@jax.custom_vjp
def swiglu(gate_BLF, up_BLF, down_FD):
  """(silu(gate) * up) down; only gate and up outlive it, and the backward pass makes the product again."""
  return einsum('BLF,FD->BLD', jax.nn.silu(gate_BLF) * up_BLF, down_FD)


def _swiglu_forward(gate_BLF, up_BLF, down_FD):
  return swiglu(gate_BLF, up_BLF, down_FD), (gate_BLF, up_BLF, down_FD)


def _swiglu_backward(residual, dy_BLD):
  gate_BLF, up_BLF, down_FD = residual
  product_BLF, back = jax.vjp(lambda gate_BLF, up_BLF: jax.nn.silu(gate_BLF) * up_BLF, gate_BLF, up_BLF)
  return *back(einsum('BLD,FD->BLF', dy_BLD, down_FD)), einsum('BLF,BLD->FD', product_BLF, dy_BLD, down_FD.dtype)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


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
  """Of segments that `lay` has put in place."""
  segments_BS, laid_S = place(segments_BL, 'BS'), jnp.asarray(order(segments_BL.shape[1]))
  causal_LS = place(laid_S, 'L')[:, None] >= laid_S
  return Documents((segments_BL[:, :, None] == segments_BS[:, None, :]) & causal_LS, segments_BL)


class Block(nnx.Module):
  """One transformer block; a stack of them carries a leading axis on every parameter."""

  def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
    D, H, G, K, F = c.width, c.heads, c.kv_heads, c.head_width, c.feed_forward
    matrix = lambda fan_in, *shape: nnx.Param(normal(fan_in)(rngs.params(), shape))
    self.attention_norm_D, self.mlp_norm_D = nnx.Param(jnp.ones(D)), nnx.Param(jnp.ones(D))
    self.wq_DHK, self.wo_HKD = matrix(D, D, H, K), matrix(H * K, H, K, D)
    self.wk_DGK, self.wv_DGK = matrix(D, D, G, K), matrix(D, D, G, K)
    self.gate_DF, self.up_DF, self.down_FD = matrix(D, D, F), matrix(D, D, F), matrix(F, F, D)
    if c.qk_norm:
      self.q_norm_K, self.k_norm_K = nnx.Param(jnp.ones(K)), nnx.Param(jnp.ones(K))
    self.config = c

  def keys_values(self, x_BLD, positions_BL, slots: int | None):
    """Keys and values of these tokens: (float[B, L, G, K], float[B, L, G, K]). slots: as in `rotary`."""
    c = self.config
    h_BLD = rms_norm(x_BLD, self.attention_norm_D[...], c.norm_epsilon)
    k_BLGK = einsum('BLD,DGK->BLGK', h_BLD, self.wk_DGK[...])
    v_BLGK = einsum('BLD,DGK->BLGK', h_BLD, self.wv_DGK[...])
    if c.qk_norm:
      k_BLGK = rms_norm(k_BLGK, self.k_norm_K[...], c.norm_epsilon)
    return checkpoint_name(rotary(k_BLGK, positions_BL, c.rope_base, slots), 'qkv'), checkpoint_name(v_BLGK, 'qkv')

  def read(self, x_BLD, positions_BL, seen):
    """The block's output for these tokens, given what they may look at."""
    c = self.config
    h_BLD = rms_norm(x_BLD, self.attention_norm_D[...], c.norm_epsilon)
    q_BLHK = einsum('BLD,DHK->BLHK', h_BLD, self.wq_DHK[...])
    if c.qk_norm:
      q_BLHK = rms_norm(q_BLHK, self.q_norm_K[...], c.norm_epsilon)
    o_BLHK = seen.attend(checkpoint_name(rotary(q_BLHK, positions_BL, c.rope_base, seen.slots), 'qkv'), positions_BL)
    x_BLD += einsum('BLHK,HKD->BLD', o_BLHK, self.wo_HKD[...])
    h_BLD = rms_norm(x_BLD, self.mlp_norm_D[...], c.norm_epsilon)
    gate_BLF = checkpoint_name(einsum('BLD,DF->BLF', h_BLD, self.gate_DF[...]), 'mlp')
    up_BLF = checkpoint_name(einsum('BLD,DF->BLF', h_BLD, self.up_DF[...]), 'mlp')
    return x_BLD + swiglu(gate_BLF, up_BLF, self.down_FD[...])

  def __call__(self, x_BLD, positions_BL, seen):
    """(x_BLD, seen): the `Documents` of a batch in training, in decoding a `Cache`; what comes back holds the new keys and values."""
    seen = seen.write(*self.keys_values(x_BLD, positions_BL, seen.slots), positions_BL)
    return self.read(x_BLD, positions_BL, seen), seen


class Linear(nnx.Module):
  """A head that is one linear map (Gloeckle et al. 2024, appendix B), called like a Block."""

  def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
    self.map_Dd = nnx.Param(normal(c.width)(rngs.params(), (c.width, c.width)))

  def read(self, x_BLD, positions_BL, seen):
    return einsum('BLD,Dd->BLd', x_BLD, self.map_Dd[...])

  def __call__(self, x_BLD, positions_BL, seen):
    return self.read(x_BLD, positions_BL, seen), seen


def stack(make, n: int, key):
  """n modules as one: every parameter with a leading axis of size n (0 is allowed)."""
  return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(key, n))
