"""model/kernels."""

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.mesh import mesh_order
from mtp_jax.sharding import place, spec


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


def _splash(q_BLHK, k_BSGK, v_BSGK, seen, interpret: bool = False):
  """JAX's TPU kernel of causal attention within segments, each device on its own rows, heads and stretches of the length; tiles that a causal
  mask hides are skipped. `interpret` runs it anywhere."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  mesh, (_, L, H, _), G = jax.sharding.get_abstract_mesh(), q_BLHK.shape, k_BSGK.shape[2]
  context, heads = mesh.shape['context'], H // mesh.shape['tensor']
  laid_L = mesh_order(L)
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


def _cudnn(q_BLHK, k_BSGK, v_BSGK, seen, implementation: str = 'cudnn'):
  """cuDNN's flash attention, each device on its own rows, heads and stretches of the length; 'xla' runs the same call anywhere."""
  whole = jax.sharding.get_abstract_mesh().shape['context'] == 1  # then later keys are skipped, not only masked

  def local(q_BLHK, k_BSGK, v_BSGK, mask_BLS):
    return jax.nn.dot_product_attention(q_BLHK, k_BSGK, v_BSGK, mask=mask_BLS[:, None], is_causal=whole, implementation=implementation)

  return jax.shard_map(local, in_specs=tuple(map(spec, ('BLHK', 'BSGK', 'BSGK', 'BLS'))), out_specs=spec('BLHK'), check_vma=False)(
      q_BLHK, k_BSGK, v_BSGK, seen.mask_BLS)
