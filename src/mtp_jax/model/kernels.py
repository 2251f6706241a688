"""Kernels of the chips for attention and for experts. Where none fits the platform or the shapes, `attention.attend`
and `expert_rows.Tiles` run.

A kernel of attention is called under `jax.shard_map` on a device's own rows, heads and positions, and keeps the scores
in the chip's own memory. One of experts is called on a device's rows in the order of their experts.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.mesh import mesh_order
from mtp_jax.sharding import place, spec


def kernel_for(q_BLHJ, v_BSGK):
  """The attention kernel for the platform of the mesh and for such shapes, or None.

  It is called with (q_BLHJ, k_BSGJ, v_BSGK, segments_BL, mask_BLS). A TPU's takes tiles of 128 positions and
  widths of whole halves of 128; cuDNN's takes queries of up to 128 in bfloat16.
  """
  mesh, kind = jax.sharding.get_abstract_mesh(), device_kind()
  _, L, _, J = q_BLHJ.shape
  K = v_BSGK.shape[3]
  if 'TPU' in kind:
    c = mesh.shape['context']
    return splash if L % (128 * c) == 0 and L % c**2 == 0 and J % 64 == K % 64 == 0 else None
  if 'NVIDIA' in kind:
    return cudnn if q_BLHJ.dtype == jnp.bfloat16 and K <= J <= 128 and J % 8 == 0 else None
  return None


def device_kind() -> str:
  """Such as 'TPU v5p'; '' without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return getattr(None if mesh.empty else mesh.abstract_device, 'device_kind', '')


def splash(q_BLHJ, k_BSGJ, v_BSGK, segments_BL, mask_BLS=None, interpret: bool = False):
  """JAX's TPU kernel of causal attention within segments; it skips tiles that the causal mask
  hides. [B, L, H, K]

  Args:
    mask_BLS: not used; the kernel makes its own from segments.
    interpret: run it on any platform, slowly.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  mesh = jax.sharding.get_abstract_mesh()
  _, L, H, _ = q_BLHJ.shape
  context, order_L = mesh.shape['context'], mesh_order(L)
  text_order_S = None if context == 1 else np.argsort(order_L)
  tile = next(size for size in (512, 256, 128) if L // context % size == 0)
  mask = masks.CausalMask((L, L), shard_count=context)
  mask.q_sequence = order_L
  kernel = splash_kernels.make_splash_mha(
      mask=masks.MultiHeadMask([mask] * (H // mesh.shape['tensor'])), head_shards=1, q_seq_shards=context,
      block_sizes=splash_kernels.BlockSizes(block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile,
                                            block_q_dq=tile, block_kv_dq=tile),
      residual_checkpoint_name='attention', interpret=interpret)
  along_context = jax.NamedSharding(jax.sharding.AbstractMesh((context,), ('context',)), jax.P(None, 'context'))
  kernel_specs = kernel.manual_sharding_spec(along_context)
  kernel = jax.tree.map(jax.sharding.reshard, kernel, kernel_specs)

  def on_device(kernel, q_BLHJ, k_BSGJ, v_BSGK, segments_BL, segments_BS):
    if text_order_S is not None:
      k_BSGJ, v_BSGK, segments_BS = (x[:, text_order_S] for x in (k_BSGJ, v_BSGK, segments_BS))
    q_BHLJ = jnp.moveaxis(q_BLHJ * q_BLHJ.shape[3]**-0.5, 2, 1)
    k_BGSJ, v_BGSK = (jnp.moveaxis(x, 2, 1) for x in (k_BSGJ, v_BSGK))
    row = lambda q, k, v, own, all: kernel(q, k, v, segment_ids=splash_kernels.SegmentIds(own, all))
    return jnp.moveaxis(jax.vmap(row)(q_BHLJ, k_BGSJ, v_BGSK, segments_BL, segments_BS), 1, 2)

  specs = kernel_specs, *map(spec, ('BLHJ', 'BSGJ', 'BSGK', 'BL', 'BS'))
  return jax.shard_map(on_device, in_specs=specs, out_specs=spec('BLHK'), check_vma=False)(
      kernel, q_BLHJ, k_BSGJ, v_BSGK, segments_BL, place(segments_BL, 'BS'))


def cudnn(q_BLHJ, k_BSGJ, v_BSGK, segments_BL, mask_BLS, implementation: str = 'cudnn'):
  """cuDNN's flash attention, with the dense mask of the documents. [B, L, H, K]

  JAX's public call takes values as wide as keys, so narrower ones are filled up with zeros.

  Args:
    segments_BL: not used; JAX's public call takes no segments.
    implementation: 'xla' runs the same call on any platform.
  """
  whole = jax.sharding.get_abstract_mesh().shape['context'] == 1  # then later keys are skipped, not only masked

  K = v_BSGK.shape[3]

  def on_device(q_BLHJ, k_BSGJ, v_BSGK, mask_BLS):
    v_BSGJ = jnp.pad(v_BSGK, ((0, 0), (0, 0), (0, 0), (0, q_BLHJ.shape[3] - K)))
    return jax.nn.dot_product_attention(
        q_BLHJ, k_BSGJ, v_BSGJ, mask=mask_BLS[:, None], is_causal=whole, implementation=implementation)[..., :K]

  specs = tuple(map(spec, ('BLHJ', 'BSGJ', 'BSGK', 'BLS')))
  return jax.shard_map(on_device, in_specs=specs, out_specs=spec('BLHK'), check_vma=False)(
      q_BLHJ, k_BSGJ, v_BSGK, mask_BLS)


def grouped_kernel():
  """What multiplies rows by the matrices of their experts on the platform of the mesh, or None."""
  return Megablox() if 'TPU' in device_kind() else None


@dataclasses.dataclass(frozen=True)
class Megablox:
  """JAX's TPU kernels of grouped products. Places after the rows of the last expert are not multiplied, and what the
  result has there is undefined.

  Attributes:
    rows: of a tile; the rows are a whole number of them.
    interpret: run them on any platform, slowly.
  """
  rows: int = 512
  interpret: bool = False

  def product(self, x_aD, matrix_EDW, rows_E, transposed: bool = False):
    """Each row times the matrix of its expert, or its transpose, in the type of the rows: [a, W]."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm
    width = matrix_EDW.shape[1 if transposed else 2]
    tiling = self.rows, min(1024, x_aD.shape[1]), min(1024, width)
    return gmm(x_aD, matrix_EDW, rows_E, x_aD.dtype, tiling, transpose_rhs=transposed, interpret=self.interpret)

  def outer(self, x_aD, dy_aW, rows_E):
    """The sum over the rows of each expert of their outer products: float32[E, D, W]."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
    tiling = self.rows, min(512, x_aD.shape[1]), min(1024, dy_aW.shape[1])  # its float32 tile fills the chip's memory
    return tgmm(x_aD.T, dy_aW, rows_E, jnp.float32, tiling, interpret=self.interpret)
