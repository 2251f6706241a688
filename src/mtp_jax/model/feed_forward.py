"""The feed-forward part of a block: SwiGLU (arXiv:2002.05202), without biases.

    y_BLD = (silu(h_BLD gate_DF) * (h_BLD up_DF)) down_FD
"""
import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import ModelConfig
from mtp_jax.model.parameters import matrix
from mtp_jax.sharding import einsum


class SwiGLU(nnx.Module):

  def __init__(self, c: ModelConfig, rngs: nnx.Rngs, hidden: int | None = None):
    """hidden: F, by default config.model.feed_forward."""
    D, F = c.width, hidden or c.feed_forward
    self.gate_DF = matrix(rngs, D, D, F)
    self.up_DF = matrix(rngs, D, D, F)
    self.down_FD = matrix(rngs, F, F, D)

  def __call__(self, h_BLD, keys=None):
    """[B, L, D]. keys: not read."""
    gate_BLF = checkpoint_name(einsum('BLD,DF->BLF', h_BLD, self.gate_DF[...]), 'mlp')
    up_BLF = checkpoint_name(einsum('BLD,DF->BLF', h_BLD, self.up_DF[...]), 'mlp')
    return swiglu(gate_BLF, up_BLF, self.down_FD[...])

  @staticmethod
  def flops(c: ModelConfig, hidden: int | None = None) -> int:
    """Forward FLOPs of one token."""
    return 2 * 3 * c.width * (hidden or c.feed_forward)


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
