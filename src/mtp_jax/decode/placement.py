"""Decoding on a mesh: where parameters, caches and the rest of the state are.

A model that does not fit one device is decoded from where training holds it:

    matrices    as their letters say: D over fsdp and expert; E over expert; H, G, F, W and V over tensor.
                A product over a sharded width is summed over devices, so a pass moves activations between
                devices, no weights
    experts     E over all axes of rows that divide it, W over tensor: every device multiplies the rows of its own
                experts, and the results are summed over devices
    caches      rows over data, fsdp and context, key heads over tensor; an axis that does not divide
                the rows divides the key heads, or else the devices along it hold the same. Latents are
                shared by all heads: the devices that would hold other heads hold the same, and read
                for their own query heads
    the rest    whole on every device, but D over fsdp

The mesh has the devices of the training mesh and axes of type Auto: XLA chooses the shardings of
activations. Only attention is placed by hand, since it must stay beside its cache.
"""
import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mtp_jax.config import ModelConfig
from mtp_jax.model.attention import Cache
from mtp_jax.model.experts_in_decoding import decoding_spec, dividing
from mtp_jax.model.grouped import MATRICES
from mtp_jax.model.latent import LatentCache
from mtp_jax.sharding import RULES, letters, spec

ROW_AXES = RULES['P']


def decoding_mesh(mesh: Mesh) -> Mesh | None:
  """A mesh of the same devices with axes of type Auto; None for a single device."""
  if mesh.size == 1:
    return None
  return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeshCache:
  """A cache whose rows are divided among devices.

  Each device holds the key heads and rows of the batch that are its own, in any order: only it reads
  and writes them.

  Attributes:
    cache: of all rows. R of a `Cache` is over `row_axes` and `head_axes` together, B of a `LatentCache` over
      `row_axes`.
    row_axes: mesh axes that divide the rows of the batch.
    head_axes: mesh axes that divide the heads.
  """
  cache: Cache | LatentCache
  mesh: Mesh = dataclasses.field(metadata={'static': True})
  row_axes: tuple[str, ...] = dataclasses.field(metadata={'static': True})
  head_axes: tuple[str, ...] = dataclasses.field(metadata={'static': True})

  @classmethod
  def of(cls, cache: Cache | LatentCache, heads: int, batch: int, mesh: Mesh) -> 'MeshCache':
    """The cache of so many key heads and rows, on the mesh."""
    row_axes = dividing(batch, ROW_AXES, mesh)
    unused = [axis for axis in ROW_AXES if axis not in row_axes]
    head_axes = dividing(heads, ('tensor', *unused), mesh)
    return cls(cache, mesh, row_axes, head_axes).placed()

  @property
  def slots(self) -> int:
    return self.cache.slots

  @property
  def sharding(self) -> NamedSharding:
    """Of all arrays of the cache."""
    return NamedSharding(self.mesh, self._spec)

  @property
  def _spec(self) -> PartitionSpec:
    of_each_head = 'G' in self.cache.new[0]
    return PartitionSpec((*self.row_axes, *(self.head_axes if of_each_head else ())) or None)

  def placed(self) -> 'MeshCache':
    return self._with(jax.lax.with_sharding_constraint(self.cache, self.sharding))

  def grown(self, slots: int) -> 'MeshCache':
    """With so many slots."""
    return self._with(self.cache.grown(slots)).placed()

  def write(self, *new_and_positions) -> 'MeshCache':
    """With new keys and values, or latents, at their positions."""
    write = lambda cache, *arguments: cache.write(*arguments)
    return self._with(self._on_devices(write, self.cache.new, self._spec, *new_and_positions))

  def attend(self, *queries_and_positions):
    """What the cache's own `attend` returns, of all queries."""
    attend = lambda cache, *arguments: cache.attend(*arguments)
    first, *_ = self.cache.queries
    read = self._on_devices(attend, self.cache.queries, self._spec_of(first), *queries_and_positions)
    return self._of_all_rows(read, first)

  def _on_devices(self, function, named: tuple[str, ...], out_specs, *arguments):
    """The function of the cache and these arguments, whose letters are given, and of positions, on each device's
    own part of them.
    """
    named = (*named, 'bl')
    in_specs = (self._spec, *map(self._spec_of, named))
    on_devices = jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return on_devices(self.cache, *map(self._of_all_rows, arguments, named))

  def _of_all_rows(self, x, named: str):
    """An array as the products before and after attention have it: rows whole, the rest as its letters say."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, fitting(named, x.shape, self.mesh)))

  def _spec_of(self, named: str) -> PartitionSpec:
    """Of heads of either kind, of latents, or of positions, where attention reads them."""
    rows, heads = self.row_axes or None, self.head_axes or None
    return PartitionSpec(rows, None, heads) if set(named) & {'G', 'H'} else PartitionSpec(rows)

  def _with(self, cache: Cache | LatentCache) -> 'MeshCache':
    return dataclasses.replace(self, cache=cache)


def empty_cache(c: ModelConfig, batch: int, slots: int, mesh: Mesh | None) -> Cache | LatentCache | MeshCache:
  """An empty cache for one block."""
  cache = (LatentCache if c.attention == 'latent' else Cache).empty(c, batch, slots)
  return cache if mesh is None else MeshCache.of(cache, c.kv_heads, batch, mesh)


def parameter_shardings(tree, mesh: Mesh):
  """A tree of NamedShardings for the parameters of a model, or of a decoder, or for their shapes."""
  def sharding(path, leaf):
    named = letters(path)
    stacked = leaf.ndim - len(named)
    shape = leaf.shape[stacked:]
    if named in MATRICES:
      fitted = decoding_spec(named, shape, mesh)
    else:
      fitted = fitting(named if len(named) > 1 else named.lower(), shape, mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * stacked, *fitted))

  return jax.tree_util.tree_map_with_path(sharding, tree)


def state_shardings(state, mesh: Mesh):
  """A tree of NamedShardings for what the decoding loop carries, or for its shapes."""
  def sharding(x):
    if isinstance(x, MeshCache):
      return jax.tree.map(lambda _: x.sharding, x)
    return NamedSharding(mesh, fitting('blD', x.shape, mesh) if x.ndim == 3 else PartitionSpec())

  return jax.tree.map(sharding, state, is_leaf=lambda x: isinstance(x, MeshCache))


def place(state, mesh: Mesh | None):
  """What the decoding loop carries, where `state_shardings` has it."""
  return state if mesh is None else jax.lax.with_sharding_constraint(state, state_shardings(state, mesh))


def fitting(named: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """`spec`, without the axes that do not divide their dimension, such as 259 ids by 2."""
  def fits(axes, size: int) -> bool:
    return axes is not None and size % math.prod(mesh.shape[axis] for axis in np.ravel(axes)) == 0

  return PartitionSpec(*(axes if fits(axes, size) else None for axes, size in zip(spec(named), shape)))
