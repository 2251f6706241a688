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
from jax.sharding import NamedSharding, PartitionSpec

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
