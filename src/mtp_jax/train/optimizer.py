"""AdamW with a learning-rate schedule, as one Optax transform (decoupled decay: Loshchilov &
Hutter, arXiv:1711.05101).

    g <- g * min(1, clip / |g|)
    m, v <- moments(g)
    p <- p - rate(step) * (m / (sqrt(v) + epsilon) + decay * p)

Its state is a dict by the name of each part: state['adam'].mu, state['adam'].nu,
state['learning_rate'].count. Weight decay applies to parameters with at least two axes of their
own (matrices, stacked or not), never to vectors and biases.
"""
import collections

import jax
import jax.numpy as jnp
import optax

from mtp_jax import sharding
from mtp_jax.config import OptimizerConfig
from mtp_jax.config.weights import parse_weight
from mtp_jax.sharding import letters


def make(c: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """The whole update as one transform, for a run of `steps` steps."""
  return optax.named_chain(*_parts(c, steps).items())


def _parts(c: OptimizerConfig, steps: int) -> dict[str, optax.GradientTransformation]:
  return {
      'clip': optax.clip_by_global_norm(c.clip),
      'adam': optax.scale_by_adam(c.b1, c.b2, c.epsilon),
      'weight_decay': optax.add_decayed_weights(c.weight_decay, mask=decayed),
      'learning_rate': optax.scale_by_learning_rate(schedule(c, steps)),
  }


def decayed(model):
  """A tree of bools: whether weight decay applies to each parameter."""
  is_matrix = lambda path: len(letters(path)) > 1 and '_bias_' not in sharding.name(path)
  return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), model)


def schedule(c: OptimizerConfig, steps: int) -> optax.Schedule:
  """Learning rate at each step: linear warm-up from 0, then a cosine, a plateau and a linear decay,
  or a path in words.

  The last value is config.optimizer.final_ratio times the peak, or what the path ends with.
  """
  peak, final = c.learning_rate, c.learning_rate * c.final_ratio
  if c.schedule == 'cosine':
    after_warmup = optax.cosine_decay_schedule(peak, steps - c.warmup_steps, c.final_ratio)
  elif c.schedule != 'wsd':
    warmup = lambda step: jnp.minimum(1, step / max(1, c.warmup_steps))
    return lambda step: peak * warmup(step) * _along(c.schedule, step / steps)
  else:
    decay_steps = round(c.decay_share * steps)
    plateau_steps = steps - c.warmup_steps - decay_steps
    after_warmup = optax.linear_schedule(peak, final, max(1, decay_steps), plateau_steps)
  if c.warmup_steps == 0:
    return after_warmup
  warmup = optax.linear_schedule(0.0, peak, c.warmup_steps)
  return optax.join_schedules([warmup, after_warmup], [c.warmup_steps])


def _along(path: str, fraction):
  """`weight_at`, of a traced fraction."""
  value, segments = parse_weight(path)
  before = value
  for segment in segments:
    width = segment.end - segment.start
    done = jnp.clip((fraction - segment.start) / width, 0, 1) if width else fraction >= segment.start
    if segment.shape == 'cosine':
      done = (1 - jnp.cos(jnp.pi * done)) / 2
    value, before = value + (segment.goal - before) * done, segment.goal
  return value


def learning_rate(c: OptimizerConfig, steps: int, state) -> jax.Array:
  """float32: the rate of the next update."""
  return jnp.asarray(schedule(c, steps)(state['learning_rate'].count), jnp.float32)


def to_storage(c: OptimizerConfig, state):
  """The state in the memory that keeps it between steps: the device's, or with
  config.optimizer.moments='host' the host's.
  """
  return state if c.moments == 'device' else _move(state, jax.memory.Space.Host)


def _move(state, space):
  return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, state)


def update(c: OptimizerConfig, steps: int, grads, state, model, ok):
  """(updates, their norm, next state, ok) of the transform `make`.

  ok becomes False where the norm is not finite: then nothing but moments in host memory may change. Those have left
  the device by then, and would have to come back. They are damaged in any case: of good ones the norm is at most
  rate * (clip / epsilon + decay * |p|).

  Args:
    state: as `to_storage` leaves it.
    ok: bool[]; where it is False the next state is the old one.
  """
  if c.moments == 'host':
    updates, following = _update_one_by_one(_parts(c, steps), grads, state, model, ok)
    norm = optax.tree.norm(updates)
    ok &= jnp.isfinite(norm)
    return updates, norm, _with_counters(following, state, ok), ok
  advance = make(c, steps).update
  norm = optax.tree.norm(advance(grads, state, model)[0])
  # the barrier makes XLA compute the updates again, rather than keep them until the norm is known
  grads, ok = jax.lax.optimization_barrier((grads, ok & jnp.isfinite(norm)))
  updates, following = advance(grads, state, model)
  return updates, norm, _choose(ok, following, state), ok


def _with_counters(following, state, ok):
  """The next state of moments in host memory, its counters those of `state` where ok is False."""
  return jax.tree.map(lambda new, old: new if new.ndim else jnp.where(ok, new, old), following, state)


def _choose(ok, new, old):
  return jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, old)


def _update_one_by_one(parts, grads, state, model, ok):
  """The same update with moments in host memory, one parameter at a time.

  A barrier lets the moments of a parameter onto the device only after those of the parameter
  before have left it.
  """
  structure = jax.tree.structure(model)

  def only(tree, i: int):
    """The tree with None for every parameter but number i."""
    return structure.unflatten([x if j == i else None for j, x in enumerate(jax.tree.leaves(tree))])

  adam = state['adam']
  following = collections.OrderedDict(state)
  grads, following['clip'] = parts['clip'].update(grads, state['clip'])
  updates, mu, nu = [], [], []
  for i in range(structure.num_leaves):
    arriving, leaving = (only(adam.mu, i), only(adam.nu, i)), (mu[-1:], nu[-1:])
    arriving, leaving = jax.lax.optimization_barrier((arriving, leaving))
    mu[-1:], nu[-1:] = leaving
    mu_i, nu_i = _move(arriving, jax.memory.Space.Device)

    adam_i = adam._replace(mu=mu_i, nu=nu_i)
    update_i, new_adam_i = parts['adam'].update(only(grads, i), adam_i, only(model, i))
    for name in ('weight_decay', 'learning_rate'):
      update_i, new = parts[name].update(update_i, state[name], only(model, i))
      following[name] = _choose(ok, new, state[name])
    new_adam_i = _choose(ok, new_adam_i, adam_i)

    updates += jax.tree.leaves(update_i)
    mu += jax.tree.leaves(_move(new_adam_i.mu, jax.memory.Space.Host))
    nu += jax.tree.leaves(_move(new_adam_i.nu, jax.memory.Space.Host))
  following['adam'] = new_adam_i._replace(mu=structure.unflatten(mu), nu=structure.unflatten(nu))
  return structure.unflatten(updates), following
