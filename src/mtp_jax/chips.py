"""Published peaks of TPUs and GPUs, and the measured one of a CPU.

Sources: Google Cloud TPU system architecture pages (v4, v5e, v5p, v6e, TPU7x; network: a chip's
part of its pod's data-centre network); NVIDIA data sheets of A100, H100 and H200 (SXM, without
sparsity; links: NVLink).
"""
import dataclasses
import math
import time

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peaks of one chip.

  flops: bfloat16 FLOP/s. hbm_bytes: size of its memory; hbm_bandwidth: bytes/s to it.
  link_bandwidth: bytes/s sent along one dimension of the torus (two links), or without a torus.
  network_bandwidth: bytes/s to the data-centre network; nan where it is not published.
  ring: a dimension closes to a ring if its size is a multiple of this.
  """
  flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  link_bandwidth: float
  network_bandwidth: float
  ring: int = 1


CHIPS = {  # as JAX names them
    'TPU v4': Chip(275e12, 32 * 2**30, 1228e9, 100e9, math.nan, 4),
    'TPU v5': Chip(459e12, 95 * 2**30, 2765e9, 200e9, 6.25e9, 4),
    'TPU v5p': Chip(459e12, 95 * 2**30, 2765e9, 200e9, 6.25e9, 4),
    'TPU v5 lite': Chip(197e12, 16 * 2**30, 819e9, 100e9, 3.125e9, 16),
    'TPU v6 lite': Chip(918e12, 32 * 2**30, 1600e9, 200e9, 12.5e9, 16),
    # A chip is two devices.
    'TPU7x': Chip(2307e12 / 2, 96 * 2**30, 7380e9 / 2, 200e9, math.nan, 4),
    'NVIDIA A100-SXM4-40GB': Chip(312e12, 40e9, 1555e9, 300e9, math.nan),
    'NVIDIA A100-SXM4-80GB': Chip(312e12, 80e9, 2039e9, 300e9, math.nan),
    'NVIDIA H100 80GB HBM3': Chip(989e12, 80e9, 3350e9, 450e9, math.nan),
    'NVIDIA H200': Chip(989e12, 141e9, 4800e9, 450e9, math.nan),
}


def peak_flops(seconds: float = 0.5) -> float:
  """FLOP/s of one local device: published for known chips, nan for others, measured on a CPU.

  On a CPU it is the best float32 matrix product within `seconds`, on every device of the mesh at
  once, so that devices which share the machine also share its speed.
  """
  device = jax.local_devices()[0]
  if device.platform != 'cpu':
    return CHIPS[device.device_kind].flops if device.device_kind in CHIPS else math.nan
  n = 2048
  x = jnp.ones((n, n), jnp.float32)
  matmul = jax.jit(lambda x: x @ x)
  matmul(x).block_until_ready()
  best, end = math.inf, time.perf_counter() + seconds
  while time.perf_counter() < end:
    start = time.perf_counter()
    matmul(x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * n**3 / best
