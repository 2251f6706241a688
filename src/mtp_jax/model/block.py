"""Blocks: pre-norm attention and SwiGLU, both residual; no biases.

    x_BLD -> x_BLD + attention(rms_norm(x_BLD)) -> x_BLD + swiglu(rms_norm(x_BLD))

RMSNorm (arXiv:1910.07467), rotary embedding in half-split order (arXiv:2104.09864), grouped-query attention
(arXiv:2305.13245), SwiGLU (arXiv:2002.05202). One forward serves training and decoding: keys and values come from the
`Documents` of the batch, or, in decoding, from all that was written into a `Cache` so far. Parameters are float32; `einsum` casts them to the
compute type, that of x_BLD, at the point of use.
"""
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import ModelConfig
from mtp_jax.model.attention import rotary
from mtp_jax.sharding import einsum


def normal(fan_in: int):
  """Truncated normal with variance 1/fan_in before truncation at two sigma."""
  return nnx.initializers.truncated_normal(fan_in**-0.5)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def rms_norm(x_BLD, scale_D, epsilon: float):
  """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, computed in float32; same type out as in. Only x outlives it."""
  x = x_BLD.astype(jnp.float32)
  return (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon) * scale_D).astype(x_BLD.dtype)


@jax.custom_vjp
def swiglu(gate_BLF, up_BLF, down_FD):
  """(silu(gate) * up) down; only gate and up outlive it, and the backward pass makes the product again."""
  return einsum('BLF,FD->BLD', jax.nn.silu(gate_BLF) * up_BLF, down_FD)


def _swiglu_forward(gate_BLF, up_BLF, down_FD):
  return swiglu(gate_BLF, up_BLF, down_FD), (gate_BLF, up_BLF, down_FD)


def _swiglu_backward(residual, dy_BLD):
  gate_BLF, up_BLF, down_FD = residual
  product_BLF, back = jax.vjp(lambda gate_BLF, up_BLF: jax.nn.silu(gate_BLF) * up_BLF, gate_BLF, up_BLF)
  return *back(einsum('BLD,FD->BLF', dy_BLD, down_FD)), einsum('BLF,BLD->FD', product_BLF, dy_BLD, down_FD.dtype)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


class Block(nnx.Module):
  """One transformer block; a stack of them carries a leading axis on every parameter."""

  def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
    D, H, G, K, F = c.width, c.heads, c.kv_heads, c.head_width, c.feed_forward
    matrix = lambda fan_in, *shape: nnx.Param(normal(fan_in)(rngs.params(), shape))
    self.attention_norm_D, self.mlp_norm_D = nnx.Param(jnp.ones(D)), nnx.Param(jnp.ones(D))
    self.wq_DHK, self.wo_HKD = matrix(D, D, H, K), matrix(H * K, H, K, D)
    self.wk_DGK, self.wv_DGK = matrix(D, D, G, K), matrix(D, D, G, K)
    self.gate_DF, self.up_DF, self.down_FD = matrix(D, D, F), matrix(D, D, F), matrix(F, F, D)
    if c.qk_norm:
      self.q_norm_K, self.k_norm_K = nnx.Param(jnp.ones(K)), nnx.Param(jnp.ones(K))
    self.config = c

  def keys_values(self, x_BLD, positions_BL, slots: int | None):
    """Keys and values of these tokens: (float[B, L, G, K], float[B, L, G, K]). slots: as in `rotary`."""
    c = self.config
    h_BLD = rms_norm(x_BLD, self.attention_norm_D[...], c.norm_epsilon)
    k_BLGK = einsum('BLD,DGK->BLGK', h_BLD, self.wk_DGK[...])
    v_BLGK = einsum('BLD,DGK->BLGK', h_BLD, self.wv_DGK[...])
    if c.qk_norm:
      k_BLGK = rms_norm(k_BLGK, self.k_norm_K[...], c.norm_epsilon)
    return checkpoint_name(rotary(k_BLGK, positions_BL, c.rope_base, slots), 'qkv'), checkpoint_name(v_BLGK, 'qkv')

  def read(self, x_BLD, positions_BL, seen):
    """The block's output for these tokens, given what they may look at."""
    c = self.config
    h_BLD = rms_norm(x_BLD, self.attention_norm_D[...], c.norm_epsilon)
    q_BLHK = einsum('BLD,DHK->BLHK', h_BLD, self.wq_DHK[...])
    if c.qk_norm:
      q_BLHK = rms_norm(q_BLHK, self.q_norm_K[...], c.norm_epsilon)
    o_BLHK = seen.attend(checkpoint_name(rotary(q_BLHK, positions_BL, c.rope_base, seen.slots), 'qkv'), positions_BL)
    x_BLD += einsum('BLHK,HKD->BLD', o_BLHK, self.wo_HKD[...])
    h_BLD = rms_norm(x_BLD, self.mlp_norm_D[...], c.norm_epsilon)
    gate_BLF = checkpoint_name(einsum('BLD,DF->BLF', h_BLD, self.gate_DF[...]), 'mlp')
    up_BLF = checkpoint_name(einsum('BLD,DF->BLF', h_BLD, self.up_DF[...]), 'mlp')
    return x_BLD + swiglu(gate_BLF, up_BLF, self.down_FD[...])

  def __call__(self, x_BLD, positions_BL, seen):
    """(x_BLD, seen): the `Documents` of a batch in training, in decoding a `Cache`; what comes back holds the new keys and values."""
    seen = seen.write(*self.keys_values(x_BLD, positions_BL, seen.slots), positions_BL)
    return self.read(x_BLD, positions_BL, seen), seen


class Linear(nnx.Module):
  """A head that is one linear map (Gloeckle et al. 2024, appendix B), called like a Block."""

  def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
    self.map_Dd = nnx.Param(normal(c.width)(rngs.params(), (c.width, c.width)))

  def read(self, x_BLD, positions_BL, seen):
    return einsum('BLD,Dd->BLd', x_BLD, self.map_Dd[...])

  def __call__(self, x_BLD, positions_BL, seen):
    return self.read(x_BLD, positions_BL, seen), seen


def stack(make, n: int, key):
  """n modules as one: every parameter with a leading axis of size n (0 is allowed)."""
  return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(key, n))
