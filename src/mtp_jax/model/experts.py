"""The feed-forward part of a block as experts: DeepSeekMoE (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

    affinity_e = sigmoid(h router_e), or softmax over the experts                       (equation 15)
    chosen     = the j experts with the largest affinity_e + bias_e                     (16)
    weight_e   = scale * affinity_e / sum of the chosen affinities                      (13)
    y          = shared(h) + sum over the chosen of weight_e expert_e(h)                (12)

The router is float32. Every token reaches all its experts, however many others do (grouped.py); padding goes to
none.

What balances the load are the bias and a loss. The bias has no gradient of its own: in its place the backward
pass gives the load, the number of rows that each expert multiplied. So it is summed as gradients are, over
microbatches, devices and uses of a shared module, for the blocks of the trunk and of the futures, and
train/balance.py finds it where the optimizer finds gradients. The loss of the router (17 to 20) adds its gradient
to that of the model and to no metric.
"""
import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.model.attention import Documents
from mtp_jax.model.experts_in_decoding import mixture_in_decoding
from mtp_jax.model.feed_forward import SwiGLU
from mtp_jax.model.grouped import mixture
from mtp_jax.model.parameters import matrix
from mtp_jax.sharding import einsum, place


class Experts(nnx.Module):

  def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
    D, E, W = c.width, c.experts, c.expert_width
    self.router_DE = matrix(rngs, D, D, E)
    self.bias_E = nnx.Param(jnp.zeros(E))
    self.gate_EDW = matrix(rngs, D, E, D, W)
    self.up_EDW = matrix(rngs, D, E, D, W)
    self.down_EWD = matrix(rngs, W, E, W, D)
    if c.shared_experts:
      self.shared = SwiGLU(c, rngs, c.shared_experts * W)
    self.config = c

  def __call__(self, h_BLD, keys):
    """[B, L, D]. keys: what the block's attention reads; `Documents` tell what is padding."""
    c = self.config
    affinity_BLE = affinities(c, einsum('BLD,DE->BLE', h_BLD.astype(jnp.float32), self.router_DE[...]))
    expert_BLj = choose(c, affinity_BLE + self.bias_E[...])
    weight_BLj = weights(c, affinity_BLE, expert_BLj)
    real_BL = keys.segments_BL > 0 if isinstance(keys, Documents) else None
    if real_BL is not None:
      expert_BLj = jnp.where(real_BL[..., None], expert_BLj, c.experts)
    arguments = h_BLD, expert_BLj, weight_BLj, self.gate_EDW[...], self.up_EDW[...], self.down_EWD[...]
    mesh = getattr(keys, 'mesh', None)  # of a cache that is spread over devices
    if mesh is not None:
      y_BLD = mixture_in_decoding(mesh, *arguments)
    else:
      y_BLD, load_E = mixture(*arguments)
      y_BLD = _with_load(y_BLD, self.bias_E[...], load_E)
    if real_BL is not None and keys.balance:
      y_BLD = _with_loss(y_BLD, keys.balance * balance_loss(c, affinity_BLE, real_BL))
    return y_BLD + self.shared(h_BLD) if c.shared_experts else y_BLD

  @staticmethod
  def flops(c: ModelConfig) -> int:
    """Forward FLOPs of one token: the router, and the experts that it goes to."""
    used = c.shared_experts + c.experts_per_token
    return 2 * c.width * c.experts + used * SwiGLU.flops(c, c.expert_width)

  @staticmethod
  def recomputed_flops(c: ModelConfig) -> int:
    """FLOPs of one token that the backward pass multiplies again: gate and up of the routed experts."""
    return 2 * c.experts_per_token * SwiGLU.flops(c, c.expert_width) // 3


def affinities(c: ModelConfig, logits_BLE):
  """float32[B, L, E], above 0."""
  return jax.nn.sigmoid(logits_BLE) if c.router == 'sigmoid' else jax.nn.softmax(logits_BLE)


def choose(c: ModelConfig, score_BLE):
  """int32[B, L, j]: the experts with the largest scores.

  With config.model.expert_groups, only of the groups_per_token groups whose best two scores have the largest sum.
  """
  score_BLE = jax.lax.stop_gradient(score_BLE)
  if c.groups_per_token < c.expert_groups:
    grouped = jnp.reshape(score_BLE, (*score_BLE.shape[:2], c.expert_groups, -1))
    score = jnp.sum(jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0], -1)
    group = jax.lax.top_k(score, c.groups_per_token)[1]
    open_ = jnp.any(group[..., None] == jnp.arange(c.expert_groups), -2)
    score_BLE = jnp.reshape(jnp.where(open_[..., None], grouped, -jnp.inf), score_BLE.shape)
  return jax.lax.top_k(score_BLE, c.experts_per_token)[1]


def weights(c: ModelConfig, affinity_BLE, expert_BLj):
  """float32[B, L, j]: the affinities of the chosen experts, without bias, as shares of their sum."""
  is_chosen = expert_BLj[..., None] == jnp.arange(c.experts)
  chosen_BLj = jnp.sum(jnp.where(is_chosen, affinity_BLE[:, :, None], 0), -1)
  return c.expert_scale * chosen_BLj / (jnp.sum(chosen_BLj, -1, keepdims=True) + 1e-20)


def balance_loss(c: ModelConfig, affinity_BLE, real_BL):
  """sum over rows and experts of f_e P_e, 1 a row under an even load (DeepSeek-V3, equations 17 to 20).

  f_e is the share of a row's tokens whose largest affinities, without bias and groups, are those of e, times
  E / j; P_e the mean of its share of their affinities, the only factor with a gradient.
  """
  count_B1 = jnp.maximum(jnp.sum(real_BL, 1, keepdims=True), 1)
  mean = lambda x_BLE: jnp.sum(jnp.where(real_BL[..., None], x_BLE, 0), 1) / count_B1
  largest_BLj = jax.lax.top_k(jax.lax.stop_gradient(affinity_BLE), c.experts_per_token)[1]
  is_chosen_BLE = jnp.any(largest_BLj[..., None] == jnp.arange(c.experts), -2)
  share_BE = mean(affinity_BLE / jnp.sum(affinity_BLE, -1, keepdims=True))
  return c.experts / c.experts_per_token * jnp.sum(mean(is_chosen_BLE.astype(jnp.float32)) * share_BE)


@jax.custom_vjp
def _with_load(y_BLD, bias_E, load_E):
  """y_BLD; the backward pass gives load_E as the gradient of bias_E."""
  return y_BLD


_with_load.defvjp(lambda y_BLD, bias_E, load_E: (y_BLD, load_E),
                  lambda load_E, dy_BLD: (dy_BLD, place(load_E, 'e'), jnp.zeros_like(load_E)))


@jax.custom_vjp
def _with_loss(y_BLD, loss):
  """y_BLD; the backward pass adds the gradient of the loss, a scalar."""
  return y_BLD


_with_loss.defvjp(lambda y_BLD, loss: (y_BLD, loss), lambda loss, dy_BLD: (dy_BLD, jnp.ones_like(loss)))
