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
    t  tokens of a chunk, or of a device  j  experts of a token  a  rows of experts, t x j or e x c
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


def spec(letters: str) -> PartitionSpec:
  """'DHK' -> P(('fsdp', 'expert'), 'tensor', None): the first letter to ask for a mesh axis gets it; lower-case
  letters ask for none.
  """
  taken, dims = set(), []
  for letter in letters:
    axes = tuple(axis for axis in RULES.get(letter, ()) if axis not in taken)
    taken.update(axes)
    dims.append(axes if len(axes) > 1 else axes[0] if axes else None)
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
  return jnp.einsum(subscripts, a, b.astype(a.dtype), preferred_element_type=dtype, **out(result)), (a, b)


def _einsum_backward(subscripts, dtype, operands, gradient):
  a, b = operands
  left, right, result = subscripts.replace('->', ',').split(',')
  gradient = gradient.astype(a.dtype)
  sharded_like = lambda x: {'out_sharding': jax.typeof(x).sharding} if out('') else {}
  da = jnp.einsum(f'{result},{right}->{left}', gradient, b.astype(a.dtype),
                  preferred_element_type=a.dtype, **sharded_like(a))
  db = jnp.einsum(f'{left},{result}->{right}', a, gradient, preferred_element_type=b.dtype, **sharded_like(b))
  return da, db


einsum.defvjp(_einsum_forward, _einsum_backward)


def lookup(table_VD, ids_BL, dtype):
  """Rows of a table, in the type asked for: [B, L, D]. Its gradient is summed in float32.

  The table is not gathered: each device looks up its share of the width, for the rows of all
  devices that it shares a batch with, and devices exchange the rows found, here and in the backward
  pass.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return table_VD[ids_BL].astype(dtype)
  rows, length, _ = spec('BLD')
  width = RULES['D']
  whole = PartitionSpec(tuple(axis for axis in rows if axis not in width), length)
  x_BLD = table_VD.at[jax.sharding.reshard(ids_BL, whole)].get(out_sharding=PartitionSpec(*whole, width))
  return place(x_BLD.astype(dtype), 'BLD')


def place(x, letters: str):
  """An array, sharded by its letters."""
  return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, spec(letters))
