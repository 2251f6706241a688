"""AdamW with a schedule, as one Optax transform (decoupled decay: Loshchilov & Hutter, arXiv:1711.05101).

    g <- g * min(1, clip / |g|)        m, v <- moments(g)        p <- p - rate(step) * (m / (sqrt(v) + epsilon) + decay * p)

A parameter's name chooses its group: two letters or more (a matrix, however many axes are stacked before it) decay, vectors do not.
"""
import jax
import optax

from mtp_jax.config import OptimizerConfig
from mtp_jax.sharding import letters


def groups(model):
  """'decayed' or 'plain' for every parameter."""
  return jax.tree_util.tree_map_with_path(lambda path, _: 'decayed' if len(letters(path)) > 1 else 'plain', model)


def to_device(c: OptimizerConfig, state):
  """The optimizer's state where a step computes."""
  return _moved(c, state, jax.memory.Space.Device)


def to_rest(c: OptimizerConfig, state):
  """The optimizer's state where it stays between steps: on the device, or, with config.optimizer.moments='host', in its host's memory."""
  return _moved(c, state, jax.memory.Space.Host)


def _moved(c: OptimizerConfig, state, space):
  return state if c.moments == 'device' else jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, state)


def schedule(c: OptimizerConfig, steps: int) -> optax.Schedule:
  """Learning rate at each step: linear warm-up from 0, then a cosine, or a plateau and a linear decay, to final_ratio * peak."""
  peak, final = c.learning_rate, c.learning_rate * c.final_ratio
  if c.schedule == 'cosine':
    rest = optax.cosine_decay_schedule(peak, steps - c.warmup_steps, c.final_ratio)
  else:
    decay = round(c.decay_share * steps)
    rest = optax.linear_schedule(peak, final, max(1, decay), steps - c.warmup_steps - decay)
  if c.warmup_steps == 0:
    return rest
  return optax.join_schedules([optax.linear_schedule(0.0, peak, c.warmup_steps), rest], [c.warmup_steps])


def make(c: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  return optax.chain(
      optax.clip_by_global_norm(c.clip),
      optax.scale_by_adam(c.b1, c.b2, c.epsilon),
      optax.add_decayed_weights(c.weight_decay, mask=lambda model: jax.tree.map(lambda group: group == 'decayed', groups(model))),
      optax.scale_by_learning_rate(schedule(c, steps)))
