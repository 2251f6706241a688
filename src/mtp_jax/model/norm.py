"""RMSNorm (arXiv:1910.07467)."""
import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def rms_norm(x, scale, epsilon: float):
  """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, computed in float32, in the type of
  x.

  Only x is saved for the backward pass.
  """
  wide = x.astype(jnp.float32)
  return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + epsilon) * scale).astype(x.dtype)
