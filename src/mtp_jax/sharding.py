"""One alphabet: a tensor's letters are its shape, its einsum subscript and its sharding.

Upper case, each the name of one axis, and where RULES say so sharded:

    B batch rows  L length (queries)  S keys, or slots of a cache  D width  C two states side by side, 2D
    H query heads  G key heads  K width of a head  F feed-forward  V vocabulary
    E experts  W width of an expert's feed-forward
    J width of a query or key: K, and in latent attention the rotary part besides
    A rank of compressed keys and values  U rank of compressed queries
    N trunk layers, stacked  M futures, stacked  T tokens of a whole row, L + M
    P devices that hold different tokens  Q queries of a key head, L x r  R rows of a cache, B x G

Lower case, never sharded:

    d l  width and length, whole on every device
    g  futures that run at once  n  steps of a loop: groups of futures, or chunks
    t  tokens of a chunk, or of a device  j  experts of a token  a  rows of experts, j x t or e x c
    b  rows of a tile  e  devices that hold different experts  c  rows that one sends to another at once
    r  query heads that share a key head  h  heads of either kind  x  any further axes
    p  tokens of a prompt  i  tokens that a decoder reads at once  k  drafts
    w  positions that a module runs again  o  the part of a head that is rotated

`x_BLD` is a float array of batch x length x width, `einsum('BLD,DHK->BLHK', x_BLD, wq_DHK)`
contracts it, and `spec('BLHK')` is where the result lives on a mesh with the axes data, fsdp,
context, tensor and expert. A parameter's name ends in its axes, so its name is its sharding;
stacked axes (N, M) come first and are not in the name. The meshes are `Explicit`: shardings are
part of the types, and a mistake is an error while tracing.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXES = ('data', 'fsdp', 'context', 'tensor', 'expert')
RULES = {
    'B': ('data', 'fsdp', 'expert'), 'L': ('context',), 'Q': ('context',),
    'D': ('fsdp', 'expert'), 'C': ('fsdp', 'expert'),
    'A': ('fsdp', 'expert'), 'U': ('fsdp', 'expert'),
    'H': ('tensor',), 'G': ('tensor',), 'F': ('tensor',), 'W': ('tensor',), 'V': ('tensor',),
    'E': ('expert',), 'P': ('data', 'fsdp', 'expert', 'context')}


def axes(letter: str) -> tuple[str, ...]:
  """The mesh axes that divide a letter; under `jax.shard_map` those that are not divided already."""
  manual = jax.sharding.get_abstract_mesh().manual_axes
  return tuple(axis for axis in RULES.get(letter, ()) if axis not in manual)


def spec(letters: str) -> PartitionSpec:
  """'DHK' -> P(('fsdp', 'expert'), 'tensor', None): the first letter to ask for a mesh axis gets it; lower-case
  letters ask for none.
  """
  taken, dims = set(), []
  for letter in letters:
    free = tuple(axis for axis in axes(letter) if axis not in taken)
    taken.update(free)
    dims.append(free if len(free) > 1 else free[0] if free else None)
  return PartitionSpec(*dims)


def name(path) -> str:
  """The attribute that holds a leaf: 'wq_DHK' for model.trunk.attention.wq_DHK."""
  return [key.name for key in path if getattr(key, 'name', 'value') != 'value'][-1]


def letters(path) -> str:
  """The axes in a parameter's name, without the stacked ones: 'DHK'."""
  return name(path).rpartition('_')[2]


def parameter_spec(path, leaf) -> PartitionSpec:
  """Where a parameter lives: matrices as their name says, vectors replicated, stacked axes whole."""
  named = letters(path)
  stacked = [None] * (len(leaf.shape) - len(named))
  return PartitionSpec(*stacked, *(spec(named) if len(named) > 1 else [None]))


def shardings(tree, mesh):
  """A tree of NamedShardings for a tree of parameters, or of shapes."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, parameter_spec(path, leaf)), tree)


def out(letters: str) -> dict:
  """{'out_sharding': spec} under an Explicit mesh, {} without one: the one place where shardings
  meet operations.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return {'out_sharding': spec(letters)} if AxisType.Explicit in mesh.axis_types else {}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(subscripts: str, a, b, dtype=None):
  """jnp.einsum of two arrays in the type of the first, sharded by the letters of the result.

  Its gradients are einsums of the same letters, sharded like the operands, each in its operand's
  own type: a float32 parameter is cast here, where it is used, and its gradient is a float32 sum,
  over the tokens of a device and over devices. XLA's own transpose of a contraction copies
  activations on a CPU, and makes a SwiGLU's backward pass 1.7 x as slow.

  Args:
    dtype: of the result, by default that of `a`.
  """
  return _einsum_forward(subscripts, a, b, dtype)[0]


def _einsum_forward(subscripts, a, b, dtype):
  result = subscripts.split('->')[1]
  return _product(subscripts, a, b.astype(a.dtype), dtype, **out(result)), (a, b)


def _einsum_backward(subscripts, dtype, operands, gradient):
  a, b = operands
  left, right, result = subscripts.replace('->', ',').split(',')
  gradient = gradient.astype(a.dtype)
  sharded_like = lambda x: {'out_sharding': jax.typeof(x).sharding} if out('') else {}
  da = _product(f'{result},{right}->{left}', gradient, b.astype(a.dtype), a.dtype, **sharded_like(a))
  return da, _product(f'{left},{result}->{right}', a, gradient, b.dtype, **sharded_like(b))


einsum.defvjp(_einsum_forward, _einsum_backward)

MOST_SCATTERED_TO = 32  # a TPU slice sums up the whole on all its chips instead, where these are more


def _product(subscripts: str, a, b, dtype, **sharding):
  """jnp.einsum; a sum over tokens, which is the gradient of a parameter, is summed over devices in two stages."""
  left, right, result = subscripts.replace('->', ',').split(',')
  if 'B' not in left or 'B' not in right or 'B' in result or devices_along('D') <= MOST_SCATTERED_TO:
    return jnp.einsum(subscripts, a, b, preferred_element_type=dtype, **sharding)
  width, dim = axes('D'), next(i for i, letter in enumerate(result) if set(axes('D')) & set(axes(letter)))
  summed = [letter for letter in left if letter in right and letter not in result]
  others = tuple(axis for letter in summed for axis in axes(letter) if axis not in width)
  near, far = neighbours(devices_along('D'))

  def on_device(a, b):
    x = jnp.einsum(subscripts, a, b, preferred_element_type=dtype)
    for groups in (far, near):
      x = jax.lax.psum_scatter(x, width, scatter_dimension=dim, tiled=True, axis_index_groups=groups)
    return jax.lax.psum(x, others)

  return jax.shard_map(on_device, in_specs=(spec(left), spec(right)), out_specs=spec(result), check_vma=False)(a, b)


def on_devices(f, inputs: tuple[str, ...], outputs):
  """f of each device's own part of its arguments, sharded by letters; f itself without a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return f
  specs = lambda letters: jax.tree.map(spec, letters)
  return jax.shard_map(f, in_specs=specs(inputs), out_specs=specs(outputs), check_vma=False)


def sum_over_slices(f, outputs, *arguments):
  """The sum of f of each slice's own rows: what f adds up crosses the network between slices once.

  Slices are along the mesh axis `data`. Within f no letter is divided over it.

  Args:
    outputs: the shardings of the results, as PartitionSpecs.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.shape['data'] == 1:
    return f(*arguments)
  within = tuple(axis for axis in AXES if axis != 'data')
  divided = lambda axes: jax.tree.map(lambda x: _divided(x, axes), arguments)
  # With Explicit axes alone, jax 0.10 would gather whatever goes into a shard_map of one axis, or comes out of it.
  on_slice = jax.sharding.explicit_axes(f, axes=within, in_sharding=divided(within))
  summed = jax.shard_map(lambda *own: jax.lax.psum(on_slice(*own), 'data'), in_specs=divided(('data',)),
                         out_specs=PartitionSpec(), axis_names={'data'}, check_vma=False)
  return jax.sharding.auto_axes(summed, axes=within, out_sharding=outputs)(*arguments)


def _divided(x, axes: tuple[str, ...]) -> PartitionSpec:
  """How these mesh axes alone divide an array."""
  dims = (dim if isinstance(dim, tuple) else (dim,) for dim in jax.typeof(x).sharding.spec)
  return PartitionSpec(*(tuple(axis for axis in dim if axis in axes) for dim in dims))


def devices_along(letter: str) -> int:
  """How many parts the mesh divides a letter into."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in axes(letter))


def neighbours(n: int, r: int | None = None) -> tuple[list[list[int]], list[list[int]]]:
  """(near, far) groups of n devices: r side by side, by default about as many as there are such groups; and one of
  each of them, at the same place.
  """
  r = r or max(r for r in range(1, math.isqrt(n) + 1) if n % r == 0)
  near = [list(range(start, start + r)) for start in range(0, n, r)]
  return near, [list(column) for column in zip(*near)]


COLUMNS = 128  # a TPU fills up narrower arrays to this width


def lookup(table_VD, ids_BL, dtype):
  """Rows of a table, in the type asked for: [B, L, D]. Its gradient is summed in float32.

  The table is not gathered, but for r neighbours that together hold 128 columns of it: each looks these up for its own
  tokens and those of the devices with the other columns, and they exchange what they found, here and in the backward
  pass.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return table_VD[ids_BL].astype(dtype)
  width, vocabulary = axes('D'), axes('V')
  n = devices_along('D')
  r = min(r for r in range(1, n + 1) if n % r == 0 and (r == n or table_VD.shape[1] // n * r >= COLUMNS))
  near, far = neighbours(n, r)

  def on_device(table_VD, ids_BL):
    if r > 1:
      table_VD = jax.lax.all_gather(table_VD, width, axis=1, tiled=True, axis_index_groups=near)
    if r < n:
      ids_BL = jax.lax.all_gather(ids_BL, width, tiled=True, axis_index_groups=far)
    x_BLD = _own_rows(table_VD, ids_BL, vocabulary).astype(dtype)
    return jax.lax.all_to_all(x_BLD, width, 0, 2, tiled=True, axis_index_groups=far) if r < n else x_BLD

  return jax.shard_map(on_device, in_specs=(spec('VD'), spec('BL')), out_specs=spec('BLD'), check_vma=False)(
      table_VD, ids_BL)


def _own_rows(table_VD, ids_BL, vocabulary):
  """Rows of a table whose rows are divided among devices."""
  if jax.lax.axis_size(vocabulary) == 1:
    return table_VD[ids_BL]
  own_BL = ids_BL - jax.lax.axis_index(vocabulary) * len(table_VD)
  here_BL = (own_BL >= 0) & (own_BL < len(table_VD))
  return jax.lax.psum(jnp.where(here_BL[..., None], table_VD[jnp.where(here_BL, own_BL, 0)], 0), vocabulary)


def place(x, letters: str):
  """An array, sharded by its letters."""
  return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, spec(letters))
