"""AdamW with a schedule, as one Optax transform (decoupled decay: Loshchilov & Hutter, arXiv:1711.05101).

    g <- g * min(1, clip / |g|)        m, v <- moments(g)        p <- p - rate(step) * (m / (sqrt(v) + epsilon) + decay * p)

A parameter's name chooses its group: two letters or more (a matrix, however many axes are stacked before it) decay, vectors do not.
"""
import jax
import jax.numpy as jnp
import optax

from mtp_jax.config import OptimizerConfig
from mtp_jax.sharding import letters


def groups(model):
  """'decayed' or 'plain' for every parameter."""
  return jax.tree_util.tree_map_with_path(lambda path, _: 'decayed' if len(letters(path)) > 1 else 'plain', model)


def to_rest(c: OptimizerConfig, state):
  """The optimizer's state where it stays between steps: on the device, or, with config.optimizer.moments='host', in its host's memory."""
  return state if c.moments == 'device' else _moved(state, jax.memory.Space.Host)


def _moved(state, space):
  return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, state)


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
  return optax.chain(*_transforms(c, steps))


def _transforms(c: OptimizerConfig, steps: int) -> tuple[optax.GradientTransformation, ...]:
  return (optax.clip_by_global_norm(c.clip),
          optax.scale_by_adam(c.b1, c.b2, c.epsilon),
          optax.add_decayed_weights(c.weight_decay, mask=lambda model: jax.tree.map(lambda group: group == 'decayed', groups(model))),
          optax.scale_by_learning_rate(schedule(c, steps)))


def update(c: OptimizerConfig, steps: int, grads, state, model, ok):
  """(updates, next state) of `make`; where not `ok` the state stays what it was. The states are `to_rest`."""
  keep = lambda new, old: jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, old)
  if c.moments == 'host':
    return _one_by_one(_transforms(c, steps), grads, state, model, keep)
  updates, following = make(c, steps).update(grads, state, model)
  return updates, keep(following, state)


def _one_by_one(transforms, grads, state, model, keep):
  """The same with moments in the host, of which those of one parameter are on the device at a time: a barrier lets none in before the ones ahead
  have left."""
  (clip, *others), (clip_state, adam, *rest), structure = transforms, state, jax.tree.structure(model)
  grads, clip_state = clip.update(grads, clip_state)
  alone = lambda tree, i: structure.unflatten([x if j == i else None for j, x in enumerate(jax.tree.leaves(tree))])
  updates, mu, nu = [], [], []
  for i in range(structure.num_leaves):
    coming, (mu[-1:], nu[-1:]) = jax.lax.optimization_barrier(((alone(adam.mu, i), alone(adam.nu, i)), (mu[-1:], nu[-1:])))
    m, v = _moved(coming, jax.memory.Space.Device)
    held = adam._replace(mu=m, nu=v), *rest
    found, following = optax.chain(*others).update(alone(grads, i), held, alone(model, i))
    following = keep(following, held)
    for leaves, tree in ((updates, found), *zip((mu, nu), _moved((following[0].mu, following[0].nu), jax.memory.Space.Host))):
      leaves += jax.tree.leaves(tree)
  updates, mu, nu = map(structure.unflatten, (updates, mu, nu))
  return updates, (clip_state, following[0]._replace(mu=mu, nu=nu), *following[1:])
