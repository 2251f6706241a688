"""A transformer block, in two lines:

    x_BLD += attention(norm(x_BLD))
    x_BLD += feed_forward(norm(x_BLD))

Pre-norm, residual. The same block trains and decodes: `keys` holds the keys and values that its tokens may
attend to, as the `Documents` of a batch or as a `Cache`. Parameters are float32; `einsum` casts them to the type of
x_BLD where it uses them.
"""
import jax
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.model.attention import GroupedQueryAttention
from mtp_jax.model.experts import Experts
from mtp_jax.model.feed_forward import SwiGLU
from mtp_jax.model.latent import LatentAttention
from mtp_jax.model.norm import rms_norm
from mtp_jax.model.parameters import matrix, scale
from mtp_jax.sharding import einsum


def attention_of(c: ModelConfig) -> type[GroupedQueryAttention | LatentAttention]:
  """The kind of attention that the config chooses."""
  return LatentAttention if c.attention == 'latent' else GroupedQueryAttention


class Block(nnx.Module):
  """One transformer block. A stack of blocks is one object too; its parameters have a leading axis.

  Args:
    experts: whether the feed-forward is a mixture of experts.
  """

  def __init__(self, c: ModelConfig, experts: bool, rngs: nnx.Rngs):
    self.attention_norm_D, self.attention = scale(c.width), attention_of(c)(c, rngs)
    self.feed_forward_norm_D, self.feed_forward = scale(c.width), feed_forward(experts)(c, rngs)
    self.config = c

  def __call__(self, x_BLD, positions_BL, keys):
    """(x_BLD after the block, `keys` with the keys and values of these tokens)."""
    keys = self.write(x_BLD, positions_BL, keys)
    return self.read(x_BLD, positions_BL, keys), keys

  def write(self, x_BLD, positions_BL, keys):
    """`keys` with the keys and values of these tokens."""
    return self.attention.write(self._norm(x_BLD, self.attention_norm_D), positions_BL, keys)

  def read(self, x_BLD, positions_BL, keys):
    """x_BLD after the block, of tokens whose keys and values are written already."""
    x_BLD += self.attention(self._norm(x_BLD, self.attention_norm_D), positions_BL, keys)
    x_BLD += self.feed_forward(self._norm(x_BLD, self.feed_forward_norm_D), keys)
    return x_BLD

  def _norm(self, x_BLD, scale_D: nnx.Param):
    return rms_norm(x_BLD, scale_D[...], self.config.norm_epsilon)

  @staticmethod
  def flops(c: ModelConfig, keys: int, experts: bool = False) -> int:
    """Forward FLOPs of one token that attends to so many keys."""
    return attention_of(c).flops(c, keys) + feed_forward(experts).flops(c)


def feed_forward(experts: bool) -> type:
  """The kind of a block's feed-forward."""
  return Experts if experts else SwiGLU


class Linear(nnx.Module):
  """A head that is one linear map (Gloeckle et al. 2024, appendix B), called like a `Block`."""

  def __init__(self, c: ModelConfig, experts: bool, rngs: nnx.Rngs):
    self.map_Dd = matrix(rngs, c.width, c.width, c.width)

  def __call__(self, x_BLD, positions_BL, keys):
    return self.read(x_BLD, positions_BL, keys), keys

  def write(self, x_BLD, positions_BL, keys):
    return keys

  def read(self, x_BLD, positions_BL, keys) -> jax.Array:
    return einsum('BLD,Dd->BLd', x_BLD, self.map_Dd[...])

  @staticmethod
  def flops(c: ModelConfig, keys: int, experts: bool = False) -> int:
    return 2 * c.width**2
