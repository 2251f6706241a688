"""Load balancing of experts without an auxiliary loss (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

    bias_e <- bias_e + rate * sign(mean load - load_e)

after each step, with the load of the whole batch. The backward pass gives the load of an expert in place of the
gradient of its bias (model/experts.py).
"""
import jax
import jax.numpy as jnp

from mtp_jax.config import ModelConfig
from mtp_jax.sharding import name


def _is_bias(path) -> bool:
  return name(path) == 'bias_E'


def without_loads(gradients):
  """The gradients, 0 for the biases: what norms, clipping and the optimizer see."""
  return jax.tree_util.tree_map_with_path(lambda path, x: jnp.zeros_like(x) if _is_bias(path) else x, gradients)


def with_biases(updates, gradients, rate):
  """The optimizer's updates, with those of the biases.

  Args:
    gradients: as the backward pass gives them.
    rate: how far a bias moves.
  """
  def update(path, update, gradient):
    mean = jnp.mean(gradient, -1, keepdims=True)
    return rate * jnp.sign(mean - gradient) if _is_bias(path) else update

  return jax.tree_util.tree_map_with_path(update, updates, gradients)


def metrics(c: ModelConfig, model, gradients, tokens, active: tuple[bool, ...]) -> dict:
  """Of every block with experts, trunk first, lists of: expert_load, the largest load over the mean; expert_entropy,
  the entropy of the shares of the load over that of equal shares; expert_bias, the largest bias minus the smallest.
  And `dropped`, the rows that no expert multiplied: 0. Nothing in a model without experts.

  Args:
    gradients: as the backward pass gives them.
    tokens: how many were routed, without padding.
  """
  biases, loads = _biases(model), _biases(gradients)
  if not biases:
    return {}
  bias_nE, load_nE = (jnp.concatenate([jnp.reshape(x, (-1, c.experts)) for x in leaves]) for leaves in (biases, loads))
  total_n1 = jnp.maximum(jnp.sum(load_nE, -1, keepdims=True), 1)  # 0 in a future that is not computed
  share_nE = load_nE / total_n1
  uses = c.expert_trunk_layers + c.experts_in_futures * len(c.heads_to_run(active))
  rows = jnp.sum(load_nE.astype(jnp.int32), -1)
  return {
      'expert_load': c.experts * jnp.max(share_nE, -1),
      'expert_entropy': -jnp.sum(jax.scipy.special.xlogy(share_nE, share_nE), -1) / jnp.log(c.experts),
      'expert_bias': jnp.max(bias_nE, -1) - jnp.min(bias_nE, -1),
      'dropped': uses * c.experts_per_token * tokens - jnp.sum(rows),
  }


def _biases(tree) -> list:
  return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if _is_bias(path)]
