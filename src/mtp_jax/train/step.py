"""One training step: a pure function of state and batch, jitted with its state donated.

    state, metrics = step(state, batch)          batch: int32[B, L + M] 'tokens', 'segments', 'positions'

The gradients of the microbatches of a step are added up. Each is weighted by counts over the
whole batch, so accumulation changes only the memory that a step needs. A bad step (guards.py)
leaves parameters, moments, their counters and the biases of experts as they were (but for moments in
host memory, see `optimizer.update`). A future whose
weight is exactly 0 is not computed; each set of futures that are computed is a program of its
own. The gradient of a future that is not computed is 0, as it would be otherwise; weight decay
and momentum go on.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtp_jax import objective
from mtp_jax.checkpoint import store
from mtp_jax.config import Config
from mtp_jax.model import costs
from mtp_jax.model.model import Model
from mtp_jax.objective import Read, Sums
from mtp_jax.sharding import parameter_spec, sum_over_slices
from mtp_jax.train import balance, optimizer
from mtp_jax.train.guards import NO_LIMITS, Limits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """All that a step changes.

  step counts batches; skipped and skipped_in_a_row count bad steps.
  """
  step: jax.Array
  skipped: jax.Array
  skipped_in_a_row: jax.Array
  model: Model
  optimizer: optax.OptState

  def without_model(self) -> 'State':
    """What a checkpoint keeps beside the parameters; only a resumed run needs it."""
    return dataclasses.replace(self, model=None)


def init(config: Config, key) -> State:
  """A fresh state; under a mesh every leaf lives where its name says."""
  model = Model(config.model, key)
  if not jax.sharding.get_abstract_mesh().empty:
    place = lambda path, x: jax.sharding.reshard(x, parameter_spec(path, x))
    model = jax.tree_util.tree_map_with_path(place, model)
  return fresh(config, model)


def fresh(config: Config, model: Model) -> State:
  """The state of a run that begins with this model."""
  zero = jnp.zeros((), jnp.int32)
  moments = optimizer.make(config.optimizer, config.train.steps).init(model)
  return State(zero, zero, zero, model, optimizer.to_storage(config.optimizer, moments))


def abstract(config: Config, mesh) -> State:
  """The shapes, types and shardings of a state, on the devices; computes nothing. Call it under
  `jax.set_mesh(mesh)`.
  """
  shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))

  def on_mesh(x):
    spec = x.sharding.spec if x.shape else jax.P()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

  return jax.tree.map(on_mesh, shapes)


def gradients(config: Config, model: Model, read: Read, weight_M, active: tuple[bool, ...],
              loss=objective.loss):
  """Those of the loss over the rows of a step, in microbatches of train.batch / train.accumulate:
  (float32 loss, Sums, a Model of gradients).

  Args:
    read: all rows of the step, over (data, fsdp).
    weight_M: float32, the weight of each future.
    active: futures that are computed at all.
    loss: with the arguments and results of `objective.loss`.
  """
  coefficient_M = weight_M / jnp.maximum(read.count_M, 1)
  microbatches = len(read.segments_BL) * config.train.accumulate // config.train.batch

  def of_slice(model, read, coefficient_M):
    loss_of = lambda model, read: loss(model, read, coefficient_M, config.objective, active)
    gradient = jax.value_and_grad(loss_of, has_aux=True)

    def microbatch(total, read):
      return jax.tree.map(jnp.add, total, gradient(model, read)), None

    if microbatches == 1:
      return gradient(model, read)
    zeros = (jnp.zeros(()), Sums.zeros(config.model.futures)), jax.tree.map(jnp.zeros_like, model)
    return jax.lax.scan(microbatch, zeros, read.microbatches(microbatches))[0]

  specs = jax.tree_util.tree_map_with_path(parameter_spec, model)
  (total, sums), grads = sum_over_slices(of_slice, (jax.P(), specs), model, read, coefficient_M)
  return total, sums, grads


def counted_flops_per_token(config: Config) -> float:
  """FLOPs that `gradients` multiplies, recomputation included: traced on one device, loops
  counted times their length.
  """
  M, L = config.model.futures, config.data.length
  model = jax.eval_shape(lambda: Model(config.model, jax.random.key(0)))
  ids_BT = jax.ShapeDtypeStruct((config.train.batch, L + M), jnp.int32)
  batch = dict.fromkeys(('tokens', 'segments', 'positions'), ids_BT)

  def run(model, batch, weight_M):
    return gradients(config, model, Read.of(batch, M), weight_M, (True,) * M)

  traced = jax.make_jaxpr(run)(model, batch, jax.ShapeDtypeStruct((M,), jnp.float32))
  return costs.matmul_flops(traced.jaxpr) / (config.train.batch * L)


def step(config: Config, state: State, batch, byte_length_V, weight_M, active: tuple[bool, ...],
         loss=objective.loss, balance_rate=0.0, limits=NO_LIMITS) -> tuple[State, dict]:
  """One optimizer step.

  Args:
    batch: int32[B, L + M] 'tokens', 'segments' and 'positions', rows over (data, fsdp).
    byte_length_V: int32, bytes that each id stands for.
    weight_M, active, loss: as in `gradients`.
    balance_rate: how far the biases of experts move.
    limits: `guards.Limits`, above which loss or gradient norm is a spike.

  Returns:
    The next state, and metrics: scalars and [M] arrays, each a sum divided once by its count; nan
      where nothing counted. skip_cause is 0, or 1 + the index of the first of guards.CAUSES that holds.
  """
  read = Read.of(batch, config.model.futures)
  loss, sums, grads_and_loads = gradients(config, state.model, read, weight_M, active, loss)
  grads = balance.without_loads(grads_and_loads)
  with jax.named_scope('update'):
    norm = optax.tree.norm(grads)
    causes = [~jnp.isfinite(loss), ~jnp.isfinite(norm), loss > limits.loss, norm > limits.gradient_norm]
    ok = ~jnp.any(jnp.stack(causes))
    updates, update_norm, moments, ok = optimizer.update(config.optimizer, config.train.steps, grads,
                                                         state.optimizer, state.model, ok)
    updates = balance.with_biases(updates, grads_and_loads, balance_rate)
    updated = optax.apply_updates(state.model, updates)
    model = jax.tree.map(lambda new, old: jnp.where(ok, new, old), updated, state.model)
    causes = jnp.stack([*causes[:2], ~jnp.isfinite(update_norm), *causes[2:]])
    bad = jnp.any(causes)
    following = State(state.step + 1, state.skipped + bad, (state.skipped_in_a_row + 1) * bad,
                      model, moments)
  bits_per_byte = sums.nats_M[0] / math.log(2) / read.target_bytes(byte_length_V)
  return following, {
      'loss': loss,
      'nats': sums.nats_M / sums.count_M,
      'accuracy': sums.correct_M / sums.count_M,
      'nats_sum': sums.nats_M,
      'correct': sums.correct_M,
      'count': sums.count_M,
      'weight': weight_M,
      'bits_per_byte': jnp.where(active[0], bits_per_byte, jnp.nan),
      'gradient_norm': norm,
      'update_norm': jnp.where(ok, update_norm, 0.0),
      'learning_rate': optimizer.learning_rate(config.optimizer, config.train.steps,
                                               state.optimizer),
      'padding': jnp.mean(read.segments_BL == 0, dtype=jnp.float32),
      'skipped': following.skipped,
      'skipped_in_a_row': following.skipped_in_a_row,
      'skip_cause': jnp.where(bad, 1 + jnp.argmax(causes), 0),
      **balance.metrics(config.model, state.model, grads_and_loads, jnp.sum(read.segments_BL > 0), active),
  }


# Jitted here, once a process, so that a second run of the same config compiles and traces nothing.
compiled_init = jax.jit(init, static_argnames='config')
_compiled_step = jax.jit(step, static_argnames=('config', 'active', 'loss'), donate_argnames='state')


def compiled_step(config: Config, state: State, batch, byte_length_V, fraction: float,
                  limits: Limits = NO_LIMITS) -> tuple[State, dict]:
  """`step`, with the weights of the futures when this fraction of training is done.

  Compiled once for each set of futures whose weight is not 0; the state is donated.
  """
  M, o = config.model.futures, config.objective
  weight_M = np.float32(o.weights_M(M, fraction))
  rate = np.float32(o.balance_rate_at(fraction))
  return _compiled_step(config, state, batch, byte_length_V, weight_M, active=o.active(M, fraction), balance_rate=rate,
                        limits=Limits(*map(np.float32, limits)))


def restore(config: Config, workdir, step: int, mesh) -> State:
  """The state of a checkpoint, on this mesh. Raises BadInput when its arrays are not those of the
  config.
  """
  shapes = abstract(config, mesh)
  loaded = store.restore(workdir, step, parameters=shapes.model, training=shapes.without_model())
  state = loaded['training']
  moments = optimizer.to_storage(config.optimizer, state.optimizer)
  return dataclasses.replace(state, model=loaded['parameters'], optimizer=moments)
