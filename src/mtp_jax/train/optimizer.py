"""AdamW with a learning-rate schedule, as one Optax transform (decoupled decay: Loshchilov &
Hutter, arXiv:1711.05101).

    g <- g * min(1, clip / |g|)
    m, v <- moments(g)
    p <- p - rate(step) * (m / (sqrt(v) + epsilon) + decay * p)

Its state is a dict by the name of each part: state['adam'].mu, state['adam'].nu,
state['learning_rate'].count. Weight decay applies to parameters with at least two axes of their
own (matrices, stacked or not), never to vectors.
"""
import collections
import typing

import jax
import jax.numpy as jnp
import optax

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
  return jax.tree_util.tree_map_with_path(lambda path, _: len(letters(path)) > 1, model)


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


def update_norm(c: OptimizerConfig, steps: int, grads, state, model) -> jax.Array:
  """float32: the norm of the updates that `update` gives. It keeps none of them, so that nothing
  need be changed before it is known; the moments are read twice.
  """
  if c.moments != 'host':
    return optax.tree.norm(make(c, steps).update(grads, state, model)[0])
  parts, squares = _parts(c, steps), jnp.zeros(())
  grads, _ = parts['clip'].update(grads, state['clip'])
  for i in range(jax.tree.structure(model).num_leaves):
    parameter = _one_parameter(parts, i, grads, state, model, squares)
    squares = parameter.before + optax.tree.norm(parameter.update, squared=True)
  return jnp.sqrt(squares)


def update(c: OptimizerConfig, steps: int, grads, state, model, ok):
  """(updates, next state) of the transform `make`.

  Args:
    state: as `to_storage` leaves it.
    ok: bool[]; where it is False the next state is the old one.
  """
  if c.moments == 'host':
    return _update_one_by_one(_parts(c, steps), grads, state, model, ok)
  # the barrier makes XLA compute the updates again, rather than keep them until it is known whether the step is bad
  grads, ok = jax.lax.optimization_barrier((grads, ok))
  updates, following = make(c, steps).update(grads, state, model)
  return updates, _choose(ok, following, state)


def _choose(ok, new, old):
  return jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, old)


def _update_one_by_one(parts, grads, state, model, ok):
  """The same update with moments in host memory, one parameter at a time."""
  structure, following = jax.tree.structure(model), collections.OrderedDict(state)
  grads, following['clip'] = parts['clip'].update(grads, state['clip'])
  updates, mu, nu = [], [], []
  for i in range(structure.num_leaves):
    parameter = _one_parameter(parts, i, grads, state, model, (mu[-1:], nu[-1:], ok))
    mu[-1:], nu[-1:], ok = parameter.before
    following |= {name: _choose(ok, parameter.following[name], parameter.state[name]) for name in parameter.following}
    updates += jax.tree.leaves(parameter.update)
    mu += jax.tree.leaves(_move(following['adam'].mu, jax.memory.Space.Host))
    nu += jax.tree.leaves(_move(following['adam'].nu, jax.memory.Space.Host))
  following['adam'] = following['adam']._replace(mu=structure.unflatten(mu), nu=structure.unflatten(nu))
  return structure.unflatten(updates), following


class _Parameter(typing.NamedTuple):
  """One parameter's: trees with None for every other one. `before`: what had to be known before."""
  update: typing.Any
  state: dict
  following: dict
  before: typing.Any


def _one_parameter(parts, i: int, grads, state, model, before) -> _Parameter:
  """The update of parameter number i, of clipped gradients, with its moments on the device.

  A barrier lets them onto the device only after `before`, such as the moments of the parameter before, have left it.
  """
  structure = jax.tree.structure(model)

  def only(tree):
    return structure.unflatten([x if j == i else None for j, x in enumerate(jax.tree.leaves(tree))])

  adam = state['adam']
  arriving, before = jax.lax.optimization_barrier(((only(adam.mu), only(adam.nu)), before))
  mu, nu = _move(arriving, jax.memory.Space.Device)
  update, old, following = only(grads), state | {'adam': adam._replace(mu=mu, nu=nu)}, {}
  for name in ('adam', 'weight_decay', 'learning_rate'):
    update, following[name] = parts[name].update(update, old[name], only(model))
  return _Parameter(update, old, following, before)
