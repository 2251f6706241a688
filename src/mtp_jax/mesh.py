"""mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mtp_jax.config import BadInput, MeshConfig
from mtp_jax.sharding import AXES, out, place, spec


def make_mesh(sizes: MeshConfig, devices=None) -> jax.sharding.Mesh:
  """An Explicit mesh over the first devices, neighbours in it close to each other on the chips' own network.

  Where the devices stand in several slices, which only the data-centre network joins, each slice holds a stretch of the data axis, so
  that all that crosses is one sum of gradients a step.

  Raises:
    BadInput: when it asks for more devices than there are, leaves a process without one, or cuts across slices.
  """
  devices = jax.devices() if devices is None else devices
  shape = tuple(getattr(sizes, axis) for axis in AXES)
  wanted = 1
  for size in shape:
    wanted *= size
  text = ' x '.join(f'{axis} {size}' for axis, size in zip(AXES, shape))
  if wanted > len(devices) or (jax.process_count() > 1 and wanted != len(devices)):
    raise BadInput(f'config.mesh: {text} = {wanted} devices, but there are {len(devices)}; change the sizes so that their product fits')
  types, slices = (AxisType.Explicit,) * len(AXES), len({getattr(device, 'slice_index', 0) for device in devices})
  if slices == 1:
    try:
      return jax.make_mesh(shape, AXES, axis_types=types, devices=devices[:wanted])
    except NotImplementedError:  # an axis is a part of a dimension of the torus
      return jax.sharding.Mesh(mesh_utils.create_device_mesh(shape, devices[:wanted], allow_split_physical_axes=True), AXES, axis_types=types)
  if sizes.data % slices or wanted != len(devices):
    raise BadInput(f'config.mesh: {text}; the {len(devices)} devices stand in {slices} slices, each of which holds a stretch of the data axis: set '
                   f'config.mesh.data to a multiple of {slices}, and the product to {len(devices)}')
  within, across = (sizes.data // slices, *shape[1:]), (slices, *[1] * (len(AXES) - 1))
  return jax.sharding.Mesh(mesh_utils.create_hybrid_device_mesh(within, across, devices), AXES, axis_types=types)


def process_share(mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """(index, count): of the count equal parts that a batch has, which one this process must read. Processes whose devices hold the same
  rows read the same part.

  Raises:
    BadInput: the rows of two processes overlap, but are not the same.
  """
  groups = mesh.shape['data'] * mesh.shape['fsdp']
  rows_of = {}
  for device, (rows,) in NamedSharding(mesh, spec('B')).devices_indices_map((groups,)).items():
    rows_of.setdefault(device.process_index, set()).update(range(*rows.indices(groups)))
  parts = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
  if sum(map(len, parts)) != groups or len(set(map(len, parts))) > 1:
    raise BadInput(f'config.mesh: data x fsdp = {groups} does not share out the rows among {len(rows_of)} processes; make it a multiple of them, or 1')
  return parts.index(tuple(sorted(rows_of[jax.process_index()]))), len(parts)


def mesh_order(L: int) -> np.ndarray:
  """int32[L]: which position lies at each place along the context axis.

  Causal attention asks more of later positions, so of 2c equal stretches each of c devices gets one from the front and its mirror image
  from the back, and all work alike; where 2c does not divide L, positions lie as they come.
  """
  mesh = jax.sharding.get_abstract_mesh()
  c = 1 if mesh.empty else mesh.shape['context']
  places = np.arange(L, dtype=np.int32)
  if c == 1 or L % (2 * c):
    return places
  stretches = places.reshape(2 * c, -1)
  return np.stack([stretches[:c], stretches[c:][::-1]], 1).ravel()


def to_mesh_order(x_BL, letters: str = 'BL'):
  """Positions as they come -> where `mesh_order` has them lie, and there on the mesh. The second axis is the length."""
  return place(_moved(x_BL, mesh_order(x_BL.shape[1])), letters)


def to_text_order(x_BL):
  """The inverse of `to_mesh_order`, the length whole on every device."""
  return _moved(place(x_BL, 'Bl' + 'r' * (x_BL.ndim - 2)), np.argsort(mesh_order(x_BL.shape[1])))


def _moved(x_BL, order_L):
  if (np.diff(order_L) == 1).all():
    return x_BL
  return x_BL.at[:, order_L].get(**out('Bl' + 'r' * (x_BL.ndim - 2)))


def sum_over_devices(x_PDV, letters: str):
  """The sum over parts, of which each device keeps the share that `letters` give it: one reduce-scatter. [P, ...] -> [...].

  The first letter is the one over fsdp: an XLA that scatters any other dimension sums up the whole on every device first.
  """
  if token_shards() == 1:
    return place(x_PDV[0], letters)
  local = lambda x_1DV: jax.lax.psum(jax.lax.psum_scatter(x_1DV[0], 'fsdp', tiled=True), ('data', 'context'))
  return jax.shard_map(local, in_specs=spec('P' + letters), out_specs=spec(letters), check_vma=False)(x_PDV)


def token_shards() -> int:
  """P: how many devices hold other tokens than their neighbours."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape['data'] * mesh.shape['fsdp'] * mesh.shape['context']


def by_device(x_BL):
  """[B, L, ...] -> [P, T, ...]: the tokens of each device in a row of their own. Moves nothing between devices."""
  B, L, *rest = x_BL.shape
  if token_shards() == 1:
    return jnp.reshape(x_BL, (1, B * L, *rest), **out('PT' + 'r' * len(rest)))
  c, tail = jax.sharding.get_abstract_mesh().shape['context'], 'r' * len(rest)
  b, (rows, length) = token_shards() // c, spec('BL')
  to = lambda *dims: {'out_sharding': PartitionSpec(*dims, *[None] * len(rest))}
  x = jnp.reshape(x_BL, (b, B // b, c, L // c, *rest), **to(rows, None, length, None))
  return jnp.reshape(jnp.moveaxis(x, 2, 1), (b * c, B // b * (L // c), *rest), **out('PT' + tail))


def by_row(x_PT, B: int):
  """The inverse of `by_device`: [P, T, ...] -> [B, L, ...]."""
  P, T, *rest = x_PT.shape
  L = P * T // B
  if token_shards() == 1:
    return jnp.reshape(x_PT, (B, L, *rest), **out('BL' + 'r' * len(rest)))
  c = jax.sharding.get_abstract_mesh().shape['context']
  b, (rows, length) = P // c, spec('BL')
  to = lambda *dims: {'out_sharding': PartitionSpec(*dims, *[None] * len(rest))}
  x = jnp.reshape(x_PT, (b, c, B // b, L // c, *rest), **to(rows, length, None, None))
  return jnp.reshape(jnp.moveaxis(x, 1, 2), (B, L, *rest), **to(rows, length))


def put(batch, mesh):
  """The rows that this process reads (see `process_share`), as arrays over the whole mesh."""
  sharding = jax.NamedSharding(mesh, spec('Bt'))
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)  # the same in half the time
  return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
