"""The feed-forward part of a block: SwiGLU (arXiv:2002.05202), without biases.

    y_BLD = (silu(h_BLD gate_DF) * (h_BLD up_DF)) down_FD
"""
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import ModelConfig
from mtp_jax.model.parameters import matrix
from mtp_jax.sharding import devices_along, einsum


class SwiGLU(nnx.Module):

  def __init__(self, c: ModelConfig, rngs: nnx.Rngs, hidden: int | None = None):
    """hidden: F, by default config.model.feed_forward."""
    D, F = c.width, hidden or c.feed_forward
    self.gate_DF = matrix(rngs, D, D, F)
    self.up_DF = matrix(rngs, D, D, F)
    self.down_FD = matrix(rngs, F, F, D)
    self.config = c

  def __call__(self, h_BLD, keys=None):
    """[B, L, D]. keys: not read."""
    weights = self.gate_DF[...], self.up_DF[...], self.down_FD[...]
    n = stretches(self.config, h_BLD, weights[0].shape[1])
    return feed_forward(h_BLD, *weights) if n == 1 else in_stretches(n, h_BLD, *weights)

  @staticmethod
  def flops(c: ModelConfig, hidden: int | None = None) -> int:
    """Forward FLOPs of one token."""
    return 2 * 3 * c.width * (hidden or c.feed_forward)


LARGEST_BYTES = 2**28  # of an array [B, L, F] on a device
NARROWEST = 2048  # columns of a product that still fill a chip


def stretches(c: ModelConfig, h_BLD, F: int) -> int:
  """In how many stretches of F the layer runs, one after the other, where its backward pass recomputes all: each
  holds its own activations only. No product is computed more often.
  """
  B, L, _ = h_BLD.shape
  row_bytes = B * L // devices_along('P') * h_BLD.dtype.itemsize
  if c.remat != 'full' or devices_along('F') > 1:
    return 1
  allowed = [n for n in (1, 2, 4) if F % (128 * n) == 0 and F // n >= NARROWEST] or [1]
  return next((n for n in allowed if row_bytes * F // n <= LARGEST_BYTES), allowed[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_stretches(n: int, h_BLD, gate_DF, up_DF, down_FD):
  """`feed_forward`, whose backward pass recomputes one stretch after the other, and ends each with its gradients."""
  parts = zip(*_split(n, gate_DF, up_DF, down_FD))
  return functools.reduce(jnp.add, (feed_forward(h_BLD, *part) for part in parts))


def _split(n: int, gate_DF, up_DF, down_FD):
  return jnp.split(gate_DF, n, 1), jnp.split(up_DF, n, 1), jnp.split(down_FD, n)


def _in_stretches_forward(n, h_BLD, *weights):
  return in_stretches(n, h_BLD, *weights), (h_BLD, weights)


def _in_stretches_backward(n, residual, dy_BLD):
  h_BLD, weights = residual
  done = jnp.zeros_like(h_BLD), []
  for gate_DF, up_DF, down_FD in zip(*_split(n, *weights)):
    # XLA would compute all stretches at once, and sum their gradients over devices at the end.
    (h_BLD, dy_BLD), (dh_BLD, dparts) = jax.lax.optimization_barrier(((h_BLD, dy_BLD), done))
    (gate_BLF, up_BLF), back = jax.vjp(_project, h_BLD, gate_DF, up_DF)
    *dprojected, ddown_FD = _swiglu_backward((gate_BLF, up_BLF, down_FD), dy_BLD)
    added_BLD, dgate_DF, dup_DF = back(tuple(dprojected))
    done = dh_BLD + added_BLD, [*dparts, (dgate_DF, dup_DF, ddown_FD)]
  dh_BLD, dparts = jax.lax.optimization_barrier(done)
  dgates, dups, ddowns = zip(*dparts)
  return dh_BLD, jnp.concatenate(dgates, 1), jnp.concatenate(dups, 1), jnp.concatenate(ddowns)


in_stretches.defvjp(_in_stretches_forward, _in_stretches_backward)


def feed_forward(h_BLD, gate_DF, up_DF, down_FD):
  return swiglu(*_project(h_BLD, gate_DF, up_DF), down_FD)


def _project(h_BLD, gate_DF, up_DF):
  gate_BLF = checkpoint_name(einsum('BLD,DF->BLF', h_BLD, gate_DF), 'mlp')
  return gate_BLF, checkpoint_name(einsum('BLD,DF->BLF', h_BLD, up_DF), 'mlp')


@jax.custom_vjp
def swiglu(gate_BLF, up_BLF, down_FD):
  """(silu(gate) * up) down. Only gate and up are saved for the backward pass, which computes their
  product again.
  """
  return einsum('BLF,FD->BLD', jax.nn.silu(gate_BLF) * up_BLF, down_FD)


def _swiglu_forward(gate_BLF, up_BLF, down_FD):
  return swiglu(gate_BLF, up_BLF, down_FD), (gate_BLF, up_BLF, down_FD)


def _swiglu_backward(residual, dy_BLD):
  gate_BLF, up_BLF, down_FD = residual
  multiply = lambda gate_BLF, up_BLF: jax.nn.silu(gate_BLF) * up_BLF
  product_BLF, back = jax.vjp(multiply, gate_BLF, up_BLF)
  dgate_BLF, dup_BLF = back(einsum('BLD,FD->BLF', dy_BLD, down_FD))
  return dgate_BLF, dup_BLF, einsum('BLF,BLD->FD', product_BLF, dy_BLD, down_FD.dtype)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
