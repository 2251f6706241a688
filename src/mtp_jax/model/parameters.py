"""How parameters are initialised, and how they are stacked."""
import jax
import jax.numpy as jnp
from flax import nnx


def normal(key, fan_in: int, *shape: int) -> nnx.Param:
  """Truncated normal with variance 1/fan_in before truncation at two sigma."""
  return nnx.Param(nnx.initializers.truncated_normal(fan_in**-0.5)(key, shape))


def matrix(rngs: nnx.Rngs, fan_in: int, *shape: int) -> nnx.Param:
  """`normal` with the next key of a stream."""
  return normal(rngs.params(), fan_in, *shape)


def scale(size: int) -> nnx.Param:
  """The scale of an RMSNorm: ones."""
  return nnx.Param(jnp.ones(size))


def bias(*shape: int) -> nnx.Param:
  """Zeros."""
  return nnx.Param(jnp.zeros(shape))


def stack(make, n: int, key):
  """n modules as one: every parameter with a leading axis of size n (0 is allowed).

  Args:
    make: called with `nnx.Rngs`, returns one module.
  """
  return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(key, n))
