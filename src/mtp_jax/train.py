"""Pretraining: a pure, jitted step and a loop one can read.

    state, metrics = step(state, batch)          batch: int32[B, L + M] 'tokens', 'segments', 'positions'

The step sums the gradients of its microbatches, each weighted by counts over the whole batch, so that accumulation changes
nothing but memory. A step whose loss or gradient is not finite leaves parameters, moments and their counters as they were.
"""
import collections
import dataclasses
import functools
import json
import math
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtp_jax import checkpoint, data, metrics, objective, optimizer, tokenizer
from mtp_jax.config import BadInput, Config
from mtp_jax.model import Model, conventions
from mtp_jax.sharding import make_mesh, out, parameter_spec, spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """All that a step changes. step counts batches, skipped those that were not finite, in all and in a row."""
  step: jax.Array
  skipped: jax.Array
  skipped_in_a_row: jax.Array
  model: Model
  optimizer: optax.OptState


def init(config: Config, key) -> State:
  """A fresh state; under a mesh every leaf lives where its name says."""
  model = Model(config.model, key)
  if not jax.sharding.get_abstract_mesh().empty:
    model = jax.tree_util.tree_map_with_path(lambda path, x: jax.sharding.reshard(x, parameter_spec(path, x)), model)
  zero = jnp.zeros((), jnp.int32)
  return State(zero, zero, zero, model, optimizer.make(config.optimizer, config.train.steps).init(model))


def abstract(config: Config, mesh) -> State:
  """The shapes, types and shardings of a state; computes nothing. Call it under `jax.set_mesh(mesh)`."""
  shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
  on_mesh = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, x.sharding.spec if x.shape else jax.P()))
  return jax.tree.map(on_mesh, shapes)


def step(config: Config, state: State, batch, byte_length_V) -> tuple[State, dict]:
  """One optimizer step.

  Args:
    batch: int32[B, L + M], rows over (data, fsdp).
    byte_length_V: int32, bytes that each id stands for.

  Returns:
    The next state, and metrics: scalars and [M] arrays, each a sum divided once by its count.
  """
  M, k = config.model.futures, config.train.accumulate
  count_M = objective.counts(batch, M)
  coefficient_M = jnp.asarray(config.objective.weights_M(M)) / jnp.maximum(count_M, 1)
  gradient = jax.value_and_grad(functools.partial(objective.loss, chunk=config.objective.chunk), has_aux=True)

  def microbatch(total, batch):
    (loss, sums), grads = gradient(state.model, batch, coefficient_M)
    return jax.tree.map(jnp.add, total, (loss, sums, grads)), None

  if k == 1:
    (loss, sums), grads = gradient(state.model, batch, coefficient_M)
  else:
    zeros_M = jnp.zeros(M, jnp.int32)
    nothing = (jnp.zeros(()), objective.Sums(jnp.zeros(M), zeros_M, zeros_M), jax.tree.map(jnp.zeros_like, state.model))
    (loss, sums, grads), _ = jax.lax.scan(microbatch, nothing, jax.tree.map(functools.partial(_split, k=k), batch))

  with jax.named_scope('update'):
    transform = optimizer.make(config.optimizer, config.train.steps)
    updates, moments = transform.update(grads, state.optimizer, state.model)
    norm = optax.tree.norm(grads)
    ok = jnp.isfinite(loss) & jnp.isfinite(norm)
    keep = lambda new, old: jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, old)
    bad = (~ok).astype(jnp.int32)
    following = State(state.step + 1, state.skipped + bad, (state.skipped_in_a_row + 1) * bad,
                      keep(optax.apply_updates(state.model, updates), state.model), keep(moments, state.optimizer))
  return following, {
      'loss': loss,
      'nats': sums.nats_M / jnp.maximum(sums.count_M, 1),
      'accuracy': sums.correct_M / jnp.maximum(sums.count_M, 1),
      'count': sums.count_M,
      'bits_per_byte': sums.nats_M[0] / math.log(2) / jnp.maximum(target_bytes(batch, byte_length_V, M), 1),
      'gradient_norm': norm,
      'update_norm': jnp.where(ok, optax.tree.norm(updates), 0.0),
      'learning_rate': jnp.asarray(optimizer.schedule(config.optimizer, config.train.steps)(state.optimizer[-1].count), jnp.float32),
      'skipped': following.skipped,
      'skipped_in_a_row': following.skipped_in_a_row,
  }


def _split(x_BT, k: int):
  """[B, T] -> [k, B/k, T]: every k-th row, so that each microbatch is spread over the devices like the batch."""
  B, T = x_BT.shape
  return jnp.moveaxis(jnp.reshape(x_BT, (B // k, k, T), **out('Bkt')), 1, 0)


def target_bytes(batch, byte_length_V, futures: int):
  """Bytes that future 0's counted targets stand for: int32."""
  y_BL, counted_BL = objective.targets(batch, 0, futures)
  return jnp.sum(byte_length_V.at[y_BL].get(**out('BL')), where=counted_BL, dtype=jnp.int32)


def compiled_step(config: Config):
  """`step`, jitted; the state is donated."""
  return jax.jit(functools.partial(step, config), donate_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _evaluate_step(config: Config, model: Model, batch, byte_length_V):
  M = config.model.futures
  return objective.loss(model, batch, jnp.zeros(M), config.objective.chunk)[1], target_bytes(batch, byte_length_V, M)


def evaluate(config: Config, model: Model, batches, byte_length_V, mesh) -> dict:
  """Over held-out batches: nats, accuracy and count of each future, bits per byte of future 0. Sums, divided once, in float64."""
  M = config.model.futures
  nats, correct, count, size = np.zeros(M), np.zeros(M, int), np.zeros(M, int), 0
  for batch in batches:
    sums, bytes_ = jax.device_get(_evaluate_step(config, model, put(batch, mesh), byte_length_V))
    nats, correct, count, size = nats + sums.nats_M, correct + sums.correct_M, count + sums.count_M, size + int(bytes_)
  if not count.all():
    raise BadInput(f'config.data.length={config.data.length}: some future has no target in the held-out documents; they are shorter than {M + 1} tokens')
  return {'nats': (nats / count).tolist(), 'accuracy': (correct / count).tolist(), 'count': count.tolist(),
          'bits_per_byte': float(nats[0] / math.log(2) / size)}


def put(batch, mesh):
  """This process's rows, as arrays over the whole mesh."""
  return {name: jax.make_array_from_process_local_data(jax.NamedSharding(mesh, spec('Bt')), rows) for name, rows in batch.items()}


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended: its last step, the newest validation, and the signal that stopped it, 0 if none."""
  step: int
  validation: dict
  signal: int


class NotFinite(RuntimeError):
  """Too many steps in a row had a loss or gradient that is not finite."""


def fit(config: Config, workdir, profile_steps: range = range(0), note=lambda line: print(line, file=sys.stderr)) -> Outcome:
  """Trains to config.train.steps, starting anew or from the newest checkpoint in workdir, bitwise as if never stopped.

  SIGTERM or Ctrl-C save a checkpoint and return. Everything is recorded in workdir/metrics.jsonl.

  Raises:
    BadInput: for what the user can mend, before anything is written.
    NotFinite: after config.train.skipped_allowed bad steps in a row; the last batch is in workdir/nonfinite.
  """
  t, workdir = config.train, pathlib.Path(workdir).expanduser().absolute()
  resumed = bool(checkpoint.steps(workdir))
  record = checkpoint.metadata(workdir) if resumed else None
  if resumed:
    changes = checkpoint.check_resumes(config, record, workdir)
    checkpoint.check_conventions(conventions(config.model), record, workdir)
  tokens = tokenizer.load(config.data.tokenizer)
  check_vocabulary(config, tokens)
  if resumed:
    checkpoint.check_same(f'config.data.tokenizer={config.data.tokenizer}', tokens.digest, record, 'tokenizer', 'use the same tokenizer, or another --workdir')
  prepared = data.prepare(config.data, tokens)
  if resumed:
    checkpoint.check_same('config.data', prepared.fingerprint, record, 'fingerprint', 'the documents have changed; restore them, or choose another --workdir')
    for change in changes:
      note(change)
  rows, held_out = (data.Rows(split, config.data.length, config.model.futures, tokens.pad) for split in (prepared.train, prepared.validation))

  with _Interrupts() as interrupts, jax.set_mesh(make_mesh(config.mesh)) as _:
    mesh = make_mesh(config.mesh)
    if resumed:
      state = restore(config, workdir, record['step'], mesh)
    else:
      state = jax.jit(functools.partial(init, config))(jax.random.key(t.seed))
    start = int(state.step)
    batches = data.batches(rows, t.batch, config.data.seed, jax.process_index(), jax.process_count())
    if resumed:
      batches.set_state(record['data'])
    byte_length_V = jax.device_put(np.pad(tokens.byte_lengths, (0, config.model.vocab - tokens.size)), jax.NamedSharding(mesh, jax.P()))
    advance = compiled_step(config)
    flops = metrics.flops_per_token(state.model, config.data.length)['total']
    speed = _Speed(config, flops, metrics.peak_flops() * mesh.size)
    writer = checkpoint.Writer(workdir, t.checkpoints_kept)
    log = metrics.Log(workdir, start, t.tensorboard)
    (workdir / 'config.json').write_text(json.dumps(config.to_dict(), indent=2) + '\n')
    display = Display(t.steps, start, note)
    validation = {}

    def validate(step: int, state: State) -> dict:
      found = evaluate(config, state.model, data.validation_batches(held_out, t.evaluate_rows, t.evaluate_rows, jax.process_index(), jax.process_count()), byte_length_V, mesh)
      log.write(step, 'validation', found)
      display.line(f'step {step} validation: {found["bits_per_byte"]:.4f} bits per byte, nats {_numbers(found["nats"])}, accuracy {_numbers(found["accuracy"])}')
      return found

    def save(step: int, state: State) -> None:
      if step not in checkpoint.steps(workdir):
        writer.save(step, state.model, {'step': state.step, 'skipped': state.skipped, 'skipped_in_a_row': state.skipped_in_a_row, 'optax': state.optimizer},
                    {'step': step, 'config': config.to_dict(), 'conventions': conventions(config.model), 'tokenizer': tokens.digest,
                     'fingerprint': prepared.fingerprint, 'data': positions[0]})

    def account(step: int, found: dict, batch) -> None:
      """Records a step that has ended, while the next one runs."""
      found = jax.tree.map(lambda x: x.tolist(), jax.device_get(found))
      if found['skipped_in_a_row']:
        evidence = _keep_evidence(workdir, step, batch, found)
        display.line(f'step {step} skipped: loss {found["loss"]}, gradient norm {found["gradient_norm"]}; evidence in {evidence}')
        if found['skipped_in_a_row'] >= t.skipped_allowed:
          raise NotFinite(f'step {step}: {found["skipped_in_a_row"]} steps in a row had a loss or gradient that is not finite; evidence in {evidence}; '
                          'lower config.optimizer.learning_rate, or resume from the last checkpoint with other data')
      if step % t.log_every == 0 or step == t.steps or found['skipped_in_a_row']:
        found |= speed.since_last(step, t.steps)
        log.write(step, 'train', found)
        display.train(step, found)
      else:
        display.advance(step)

    evaluated_at = lambda step: step == t.steps or (t.evaluate_every and step % t.evaluate_every == 0)
    positions = [batches.get_state()]
    previous = None
    try:
      if resumed and evaluated_at(start):  # a run may end between a checkpoint and its validation
        validation = validate(start, state)
      speed.start(start)
      for number in range(start + 1, t.steps + 1):
        if number == profile_steps.start and profile_steps:
          jax.profiler.start_trace(str(workdir / 'profile'))
        with speed.waiting():
          batch = put(next(batches), mesh)
        positions[0] = batches.get_state()
        state, found = advance(state, batch, byte_length_V)
        if previous:
          account(*previous)
        previous = number, found, batch
        stopping = bool(interrupts.received)
        if profile_steps and number == profile_steps.stop - 1:
          jax.block_until_ready(state)
          jax.profiler.stop_trace()
          display.line(f'profile of steps {profile_steps.start} to {number} in {workdir / "profile"}')
        at_end = number == t.steps
        evaluates = evaluated_at(number)
        if evaluates or stopping or at_end or number % t.checkpoint_every == 0:
          account(*previous)
          previous = None
          with speed.paused():
            if stopping or at_end or number % t.checkpoint_every == 0:
              save(number, state)
            if evaluates and not stopping:
              validation = validate(number, state)
        if stopping:
          break
    finally:
      display.close()
      try:
        writer.close()
      finally:
        log.close()
        batches.close()
  return Outcome(int(state.step), validation, interrupts.received)


def check_vocabulary(config: Config, tokens) -> None:
  if config.model.vocab < tokens.size:
    raise BadInput(f'config.model.vocab={config.model.vocab}: the tokenizer {config.data.tokenizer} has {tokens.size} ids; set at least that')


def restore(config: Config, workdir, step: int, mesh) -> State:
  """The state of a checkpoint, on the mesh at hand."""
  like = abstract(config, mesh)
  rest = {'step': like.step, 'skipped': like.skipped, 'skipped_in_a_row': like.skipped_in_a_row, 'optax': like.optimizer}
  loaded = checkpoint.restore(workdir, step, parameters=like.model, optimizer=rest)
  rest = loaded['optimizer']
  return State(rest['step'], rest['skipped'], rest['skipped_in_a_row'], loaded['parameters'], rest['optax'])


def _keep_evidence(workdir: pathlib.Path, step: int, batch, found: dict) -> pathlib.Path:
  folder = workdir / 'nonfinite'
  folder.mkdir(exist_ok=True)
  local = {name: np.concatenate([shard.data for shard in x.addressable_shards if shard.replica_id == 0]) for name, x in batch.items()}
  np.savez(folder / f'step-{step}.npz', **local)
  (folder / f'step-{step}.json').write_text(json.dumps(found) + '\n')
  return folder / f'step-{step}.npz'


class _Interrupts:
  """Remembers SIGTERM and SIGINT instead of dying of them; a second SIGINT interrupts at once."""

  def __enter__(self):
    self.received = 0
    try:
      self.old = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread, as in a notebook's worker: signals stay with their owner
      self.old = {}
    return self

  def _receive(self, number, frame):
    if self.received == signal.SIGINT == number:
      raise KeyboardInterrupt
    self.received = number

  def __exit__(self, *_):
    for number, handler in self.old.items():
      signal.signal(number, handler)


class _Speed:
  """Tokens a second, MFU, the share of time spent waiting for data, and what remains, since the last record."""

  def __init__(self, config: Config, flops_per_token: int, peak: float):
    self.tokens_per_step = config.train.batch * config.data.length
    self.flops_per_token, self.peak = flops_per_token, peak

  def start(self, step: int) -> None:
    self.step, self.since, self.waited, self.rates = step, time.perf_counter(), 0.0, collections.deque(maxlen=20)

  def waiting(self):
    return _Stopwatch(lambda seconds: setattr(self, 'waited', self.waited + seconds))

  def paused(self):
    return _Stopwatch(lambda seconds: setattr(self, 'since', self.since + seconds))

  def since_last(self, step: int, steps: int) -> dict:
    seconds = max(time.perf_counter() - self.since, 1e-9)
    done, waited = step - self.step, self.waited
    self.step, self.since, self.waited = step, time.perf_counter(), 0.0
    rate = done * self.tokens_per_step / seconds
    self.rates.append(seconds / max(done, 1))
    return {'tokens_per_second': rate, 'mfu': rate * self.flops_per_token / self.peak, 'data_wait': waited / seconds,
            'eta_seconds': (steps - step) * float(np.median(self.rates))}


class _Stopwatch:
  def __init__(self, report):
    self.report = report

  def __enter__(self):
    self.start = time.perf_counter()

  def __exit__(self, *_):
    self.report(time.perf_counter() - self.start)


class Display:
  """A progress bar on a terminal, one plain line a record elsewhere."""

  def __init__(self, steps: int, start: int, note):
    self.note, self.bar = note, None
    if sys.stderr.isatty():
      from rich.console import Console
      from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
      self.bar = Progress(TextColumn('train'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn('{task.description}'), console=Console(stderr=True))
      self.task = self.bar.add_task('', total=steps, completed=start)
      self.bar.start()

  def line(self, text: str) -> None:
    self.bar.console.print(text, markup=False, highlight=False) if self.bar else self.note(text)

  def advance(self, step: int) -> None:
    if self.bar:
      self.bar.update(self.task, completed=step)

  def train(self, step: int, found: dict) -> None:
    text = (f'loss {found["loss"]:.4f}  nats {_numbers(found["nats"])}  bits/byte {found["bits_per_byte"]:.3f}  lr {found["learning_rate"]:.2e}  '
            f'grad {found["gradient_norm"]:.2f}  {found["tokens_per_second"]:,.0f} tokens/s  MFU {found["mfu"]:.1%}  data wait {found["data_wait"]:.1%}')
    if self.bar:
      self.bar.update(self.task, completed=step, description=text)
    else:
      self.note(f'step {step}  {text}  eta {found["eta_seconds"]:.0f} s')

  def close(self) -> None:
    if self.bar:
      self.bar.stop()


def _numbers(values) -> str:
  return ' '.join(f'{value:.3f}' for value in values)
