"""One alphabet: a tensor's letters are its shape, its einsum subscript and its sharding.

    B batch  L length (queries)  S source length (keys)  D width  C two states side by side (2D)  H query heads
    G key/value heads  K head width  F feed-forward width  V vocabulary  N trunk layers (stacked)  M futures (stacked)
    P parts of a batch, one for each device that holds other tokens  T tokens of a part
    R rows of a cache, B x G

`x_BLD` is a float array of batch x length x width, `einsum('BLD,DHK->BLHK', x_BLD, wq_DHK)` contracts it, and
`spec('BLHK')` says where the result lives on a mesh with the axes data, fsdp, context, tensor and expert. A parameter's name
ends in its axes, so its name is its sharding; stacked axes (N, M) lead and are not in the name. The meshes are `Explicit`:
shardings are part of the types, and a mistake is an error while tracing.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mtp_jax.config import BadInput, MeshConfig

AXES = ('data', 'fsdp', 'context', 'tensor', 'expert')
RULES = {'B': ('data', 'fsdp'), 'L': ('context',), 'D': ('fsdp',), 'C': ('fsdp',), 'H': ('tensor',), 'G': ('tensor',),
         'F': ('tensor',), 'V': ('tensor',), 'E': ('expert',), 'P': ('data', 'fsdp', 'context')}


def spec(letters: str) -> PartitionSpec:
  """'DHK' -> P('fsdp', 'tensor', None): the first letter to ask for a mesh axis gets it; lower-case letters ask for none."""
  taken, dims = set(), []
  for letter in letters:
    axes = tuple(axis for axis in RULES.get(letter, ()) if axis not in taken)
    taken.update(axes)
    dims.append(axes if len(axes) > 1 else axes[0] if axes else None)
  return PartitionSpec(*dims)


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


def share(mesh: jax.sharding.Mesh) -> tuple[int, int]:
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


def name(path) -> str:
  """The attribute a leaf stands at: 'wq_DHK' for model.trunk.wq_DHK."""
  return [key.name for key in path if getattr(key, 'name', 'value') != 'value'][-1]


def letters(path) -> str:
  """The axes in a parameter's name, without the stacked ones: 'DHK'."""
  return name(path).rpartition('_')[2]


def parameter_spec(path, leaf) -> PartitionSpec:
  """Where a parameter lives: matrices as their name says, vectors replicated, stacked axes whole."""
  own = letters(path)
  return PartitionSpec(*[None] * (len(leaf.shape) - len(own)), *(spec(own) if len(own) > 1 else [None]))


def shardings(tree, mesh):
  """A tree of NamedShardings for a tree of parameters, or of shapes."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, parameter_spec(path, leaf)), tree)


def out(letters: str) -> dict:
  """{'out_sharding': spec} under an Explicit mesh, {} without one: the one place where shardings meet operations."""
  mesh = jax.sharding.get_abstract_mesh()
  return {} if mesh.empty else {'out_sharding': spec(letters)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(subscripts: str, a, b, dtype=None):
  """jnp.einsum of two arrays in the type of the first, sharded as the result's letters say; `dtype` is that of the result.

  Its gradients are einsums of the same letters, sharded like the operands, each in its operand's own type: a float32 parameter is cast
  here, at the point of use, and its gradient is a float32 sum, over the tokens of a device and over devices alike. Left to itself, XLA's
  transpose of a contraction copies activations on a CPU, which costs 1.7 x the time of a SwiGLU's backward pass.
  """
  return _einsum_forward(subscripts, a, b, dtype)[0]


def _einsum_forward(subscripts, a, b, dtype):
  return jnp.einsum(subscripts, a, b.astype(a.dtype), preferred_element_type=dtype, **out(subscripts.split('->')[1])), (a, b)


def _einsum_backward(subscripts, dtype, operands, gradient):
  (a, b), (left, right, result) = operands, subscripts.replace('->', ',').split(',')
  gradient = gradient.astype(a.dtype)
  like = lambda x: {'preferred_element_type': x.dtype, **({'out_sharding': jax.typeof(x).sharding} if out('') else {})}
  return (jnp.einsum(f'{result},{right}->{left}', gradient, b.astype(a.dtype), **like(a)),
          jnp.einsum(f'{left},{result}->{right}', a, gradient, **like(b)))


einsum.defvjp(_einsum_forward, _einsum_backward)


def lookup(table_VD, ids_BL, dtype):
  """Rows of a table: dtype[B, L, D]. Its gradient adds up in float32.

  The table stays where it is: each device looks up its share of the width for the rows of all that share a batch, and what is
  exchanged is rows, here and in the backward pass.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return table_VD[ids_BL].astype(dtype)
  rows, length, _ = spec('BLD')
  whole = PartitionSpec(tuple(axis for axis in rows if axis != 'fsdp'), length)
  x_BLD = table_VD.at[jax.sharding.reshard(ids_BL, whole)].get(out_sharding=PartitionSpec(*whole, 'fsdp'))
  return place(x_BLD.astype(dtype), 'BLD')


def place(x, letters: str):
  """Moves an array to where its letters say."""
  return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, spec(letters))


def order(L: int) -> np.ndarray:
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


def lay(x_BL, letters: str = 'BL'):
  """Positions as they come -> where `order` has them lie, and there on the mesh. The second axis is the length."""
  return place(_moved(x_BL, order(x_BL.shape[1])), letters)


def natural(x_BL):
  """The inverse of `lay`, the length whole on every device."""
  return _moved(place(x_BL, 'Bl' + 'r' * (x_BL.ndim - 2)), np.argsort(order(x_BL.shape[1])))


def _moved(x_BL, order_L):
  if (np.diff(order_L) == 1).all():
    return x_BL
  return x_BL.at[:, order_L].get(**out('Bl' + 'r' * (x_BL.ndim - 2)))


def summed(x_PDV, letters: str):
  """The sum over parts, of which each device keeps the share that `letters` give it: one reduce-scatter. [P, ...] -> [...].

  The first letter is the one over fsdp: an XLA that scatters any other dimension sums up the whole on every device first.
  """
  if parts() == 1:
    return place(x_PDV[0], letters)
  local = lambda x_1DV: jax.lax.psum(jax.lax.psum_scatter(x_1DV[0], 'fsdp', tiled=True), ('data', 'context'))
  return jax.shard_map(local, in_specs=spec('P' + letters), out_specs=spec(letters), check_vma=False)(x_PDV)


def parts() -> int:
  """P: how many devices hold other tokens than their neighbours."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape['data'] * mesh.shape['fsdp'] * mesh.shape['context']


def parted(x_BL):
  """[B, L, ...] -> [P, T, ...]: the tokens of each device in a row of their own. Moves nothing between devices."""
  B, L, *rest = x_BL.shape
  if parts() == 1:
    return jnp.reshape(x_BL, (1, B * L, *rest), **out('PT' + 'r' * len(rest)))
  c, tail = jax.sharding.get_abstract_mesh().shape['context'], 'r' * len(rest)
  b, (rows, length) = parts() // c, spec('BL')
  to = lambda *dims: {'out_sharding': PartitionSpec(*dims, *[None] * len(rest))}
  x = jnp.reshape(x_BL, (b, B // b, c, L // c, *rest), **to(rows, None, length, None))
  return jnp.reshape(jnp.moveaxis(x, 2, 1), (b * c, B // b * (L // c), *rest), **out('PT' + tail))


def joined(x_PT, B: int):
  """The inverse of `parted`: [P, T, ...] -> [B, L, ...]."""
  P, T, *rest = x_PT.shape
  L = P * T // B
  if parts() == 1:
    return jnp.reshape(x_PT, (B, L, *rest), **out('BL' + 'r' * len(rest)))
  c = jax.sharding.get_abstract_mesh().shape['context']
  b, (rows, length) = P // c, spec('BL')
  to = lambda *dims: {'out_sharding': PartitionSpec(*dims, *[None] * len(rest))}
  x = jnp.reshape(x_PT, (b, c, B // b, L // c, *rest), **to(rows, length, None, None))
  return jnp.reshape(jnp.moveaxis(x, 1, 2), (B, L, *rest), **to(rows, length))
