"""The mesh: which devices form it, who reads which rows, in what order it holds positions, and the
tokens of each device.
"""
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mtp_jax.config import BadInput, Config, MeshConfig, nearest
from mtp_jax.sharding import AXES, RULES, devices_along, out, place, spec


def make_mesh(sizes: MeshConfig, devices=None) -> jax.sharding.Mesh:
  """An Explicit mesh over the first devices; neighbours in it are close to each other in the chips'
  own network.

  Devices may be in several slices, which only the data-centre network connects. Each slice then
  holds a part of the data axis, so that one sum of gradients a step is all that crosses that
  network.

  Raises:
    BadInput: it needs more devices than there are, leaves a process without one, or cuts across
      slices.
  """
  devices = jax.devices() if devices is None else devices
  shape = tuple(getattr(sizes, axis) for axis in AXES)
  needed = math.prod(shape)
  text = ' x '.join(f'{axis} {size}' for axis, size in zip(AXES, shape))
  if needed > len(devices) or (jax.process_count() > 1 and needed != len(devices)):
    raise BadInput(f'config.mesh: {text} = {needed} devices, but there are {len(devices)}; '
                   'change the sizes so that their product fits')
  types = (AxisType.Explicit,) * len(AXES)
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if slices == 1:
    try:
      return jax.make_mesh(shape, AXES, axis_types=types, devices=devices[:needed])
    except NotImplementedError:  # an axis is a part of a dimension of the torus
      grid = mesh_utils.create_device_mesh(shape, devices[:needed], allow_split_physical_axes=True)
      return jax.sharding.Mesh(grid, AXES, axis_types=types)
  if sizes.data % slices or needed != len(devices):
    raise BadInput(f'config.mesh: {text}; the {len(devices)} devices are in {slices} slices, each of which holds '
                   f'a part of the data axis: set config.mesh.data to a multiple of {slices}, '
                   f'and the product to {len(devices)}')
  within, across = (sizes.data // slices, *shape[1:]), (slices, *[1] * (len(AXES) - 1))
  grid = mesh_utils.create_hybrid_device_mesh(within, across, devices)
  return jax.sharding.Mesh(grid, AXES, axis_types=types)


def mesh_of_model(config: Config, sizes: Mapping[str, int] | None = None) -> jax.sharding.Mesh:
  """The mesh that a trained model is placed on.

  Args:
    sizes: devices along each axis, such as {'tensor': 4, 'fsdp': 2}; by default the config's mesh if
      there are enough devices, else one device.

  Raises:
    BadInput: there is no such axis, a size does not divide what is sharded along it, or there are
      fewer devices.
  """
  if sizes is None:
    try:
      return make_mesh(config.mesh)
    except BadInput:
      return make_mesh(MeshConfig())
  example = "give the devices along each axis, such as {'tensor': 4, 'fsdp': 2}"
  if not isinstance(sizes, Mapping):
    raise BadInput(f'mesh={sizes!r}: {example}')
  c = config.model
  by_width = {f'model.{name}': getattr(c, name)
              for name in ('width', *(('kv_rank', 'query_rank') if c.attention == 'latent' else ()))}
  divided = {'fsdp': by_width, 'context': {'data.length': config.data.length},
             'tensor': {f'model.{name}': getattr(c, name) for name in ('heads', 'kv_heads', 'feed_forward', 'vocab')},
             'expert': by_width | {'model.experts': c.experts}}
  named = AXES if c.experts else tuple(axis for axis in AXES if axis != 'expert')
  for axis, size in sizes.items():
    if axis not in named:
      raise BadInput(f'mesh={sizes!r}: no axis {axis!r}; {nearest(str(axis), named)}')
    if type(size) is not int or size < 1:
      raise BadInput(f'mesh={sizes!r}: {axis} must be a whole number from 1 on; {example}')
    for field, length in divided.get(axis, {}).items():
      if length % size:
        raise BadInput(f'mesh={sizes!r}: {axis}={size} does not divide config.{field}={length}')
  parts = sizes.get('fsdp', 1) * sizes.get('expert', 1)
  for field, length in by_width.items():
    if length % parts:
      raise BadInput(f'mesh={sizes!r}: fsdp x expert = {parts} does not divide config.{field}={length}')
  needed = math.prod(sizes.values())
  if needed > len(jax.devices()):
    raise BadInput(f'mesh={sizes!r}: needs {needed} devices, but there are {len(jax.devices())}')
  return make_mesh(MeshConfig(**sizes))


def row_parts(mesh: jax.sharding.Mesh) -> int:
  """How many devices, or groups of them, hold different rows of a batch."""
  return math.prod(mesh.shape[axis] for axis in RULES['B'])


def process_share(mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """(index, count): which of `count` equal shares of a batch this process reads.

  Processes whose devices hold the same rows read the same share.

  Raises:
    BadInput: the rows of two processes overlap, but are not the same.
  """
  row_groups = row_parts(mesh)
  rows_of_process = {}
  for device, (rows,) in NamedSharding(mesh, spec('B')).devices_indices_map((row_groups,)).items():
    rows_of_process.setdefault(device.process_index, set()).update(range(*rows.indices(row_groups)))
  shares = sorted({tuple(sorted(rows)) for rows in rows_of_process.values()})
  if sum(map(len, shares)) != row_groups or len(set(map(len, shares))) > 1:
    product = 'data x fsdp x expert' if mesh.shape['expert'] > 1 else 'data x fsdp'
    raise BadInput(f'config.mesh: {product} = {row_groups} cannot be divided among {len(rows_of_process)} '
                   'processes; make it a multiple of them, or 1')
  return shares.index(tuple(sorted(rows_of_process[jax.process_index()]))), len(shares)


def put(batch, mesh):
  """The rows that this process reads (see `process_share`), as arrays over the whole mesh."""
  sharding = jax.NamedSharding(mesh, spec('BT'))
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)  # the same in half the time
  return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def mesh_order(L: int) -> np.ndarray:
  """int32[L]: the position that each place along the context axis holds.

  Causal attention costs more at later positions. So the length is cut into 2c equal parts, and each
  of c devices gets one part from the front and its mirror image from the back: all have the same
  work. Where 2c does not divide L, the order is the text's.
  """
  mesh = jax.sharding.get_abstract_mesh()
  c = 1 if mesh.empty else mesh.shape['context']
  positions = np.arange(L, dtype=np.int32)
  if c == 1 or L % (2 * c):
    return positions
  parts = positions.reshape(2 * c, -1)
  return np.stack([parts[:c], parts[c:][::-1]], 1).ravel()


def to_mesh_order(x_BL, letters: str = 'BL'):
  """Text order -> mesh order, sharded by the letters. The second axis is the length."""
  return place(_reordered(x_BL, mesh_order(x_BL.shape[1])), letters)


def to_text_order(x_BL):
  """The inverse of `to_mesh_order`, with the length whole on every device."""
  whole = place(x_BL, 'Bl' + 'x' * (x_BL.ndim - 2))
  return _reordered(whole, np.argsort(mesh_order(x_BL.shape[1])))


def _reordered(x_BL, order_L):
  if (np.diff(order_L) == 1).all():
    return x_BL
  return x_BL.at[:, order_L].get(**out('Bl' + 'x' * (x_BL.ndim - 2)))


def by_device(x_BL):
  """[B, L, ...] -> [P, B L / P, ...]: the tokens of each device. Nothing moves between devices."""
  B, L, *rest = x_BL.shape
  if devices_along('P') == 1:
    return jnp.reshape(x_BL, (1, B * L, *rest), **out('Pt' + 'x' * len(rest)))
  b, c = devices_along('B'), devices_along('L')
  rows, length = spec('BL')
  split = jnp.reshape(x_BL, (b, B // b, c, L // c, *rest), **_sharded(rest, rows, None, length, None))
  return jnp.reshape(jnp.moveaxis(split, 2, 1), (b * c, B // b * (L // c), *rest), **out('Pt' + 'x' * len(rest)))


def by_row(x_Pt, B: int):
  """The inverse of `by_device`: [P, B L / P, ...] -> [B, L, ...]."""
  P, tokens, *rest = x_Pt.shape
  L = P * tokens // B
  if devices_along('P') == 1:
    return jnp.reshape(x_Pt, (B, L, *rest), **out('BL' + 'x' * len(rest)))
  b, c = devices_along('B'), devices_along('L')
  rows, length = spec('BL')
  split = jnp.reshape(x_Pt, (b, c, B // b, L // c, *rest), **_sharded(rest, rows, length, None, None))
  return jnp.reshape(jnp.moveaxis(split, 1, 2), (B, L, *rest), **_sharded(rest, rows, length))


def _sharded(rest, *axes) -> dict:
  return {'out_sharding': PartitionSpec(*axes, *[None] * len(rest))}
