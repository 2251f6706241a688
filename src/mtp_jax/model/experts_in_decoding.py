"""Experts of a decoder on several devices: each device multiplies the rows of its own experts."""
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mtp_jax.model.expert_rows import Tiles
from mtp_jax.sharding import RULES


def mixture_in_decoding(mesh: Mesh, h_BiD, expert_Bij, weight_Bij, gate_EDW, up_EDW, down_EWD):
  """`mixture` of few tokens, without gradients, on a mesh whose devices hold experts as `decoding_spec` has them:
  each multiplies the rows of its own, and the results are summed. [B, i, D]
  """
  specs = [decoding_spec(letters, matrix.shape, mesh) for letters, matrix in
           zip(('EDW', 'EDW', 'EWD'), (gate_EDW, up_EDW, down_EWD))]
  axes, tensor = _decoding_axes(gate_EDW.shape[0], gate_EDW.shape[2], mesh)

  def on_device(h_BiD, expert_Bij, weight_Bij, *matrices):
    x_tD, expert_tj, weight_tj = (jnp.reshape(x, (-1, x.shape[-1])) for x in (h_BiD, expert_Bij, weight_Bij))
    experts = len(matrices[0])
    own_tj = expert_tj - (jax.lax.axis_index(axes) * experts if axes else 0)
    own_jt = jnp.where((own_tj >= 0) & (own_tj < experts), own_tj, experts).T
    y_tD, _ = Tiles.of(own_jt, experts, own_jt.size).forward(x_tD, weight_tj.T, *matrices)
    y_tD = jax.lax.psum(y_tD, axes + tensor) if axes + tensor else y_tD
    return jnp.reshape(y_tD.astype(h_BiD.dtype), h_BiD.shape)

  whole = PartitionSpec()
  spread = jax.shard_map(on_device, mesh=mesh, in_specs=(whole, whole, whole, *specs), out_specs=whole, check_vma=False)
  return spread(h_BiD, expert_Bij, weight_Bij, gate_EDW, up_EDW, down_EWD)


def decoding_spec(letters: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """Where the matrices of experts are in decoding: E over all axes that divide it, W over tensor."""
  axes, tensor = _decoding_axes(shape[0], shape[letters.index('W')], mesh)
  placed = {'E': axes or None, 'D': None, 'W': tensor or None}
  return PartitionSpec(*(placed[letter] for letter in letters))


def _decoding_axes(experts: int, width: int, mesh: Mesh) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """(axes that divide the experts, axes that divide their width)"""
  rows = tuple(axis for axis in RULES['P'] if axis not in RULES['E'])
  return dividing(experts, RULES['E'] + rows, mesh), dividing(width, RULES['W'], mesh)


def dividing(size: int, axes: Sequence[str], mesh: Mesh) -> tuple[str, ...]:
  """Axes of several devices that divide a dimension together, each taken if it still can be."""
  taken = []
  for axis in axes:
    if mesh.shape[axis] > 1 and size % (mesh.shape[axis] * math.prod(mesh.shape[a] for a in taken)) == 0:
      taken.append(axis)
  return tuple(taken)
