"""Pretraining: a pure, jitted step and a loop one can read.

    state, metrics = step(state, batch)          batch: int32[B, L + M] 'tokens', 'segments', 'positions'

The step sums the gradients of its microbatches, each weighted by counts over the whole batch, so that accumulation changes
nothing but memory. A step whose loss or gradient is not finite leaves parameters, moments and their counters as they were.
A future whose weight is exactly 0 is not computed: a stage of the schedule is a compiled step of its own. Its parameters have a gradient
of 0, as they would if it were computed; decay and momentum go on.
"""
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtp_jax import acceptance, checkpoint, metrics, objective, optimizer, processes, tokenizer
from mtp_jax.config import BadInput, Config
from mtp_jax.data.corpus import Corpus, difference, open_corpus
from mtp_jax.data.rows import validation_batches
from mtp_jax.data.shards import INDEX, Damaged
from mtp_jax.goodput import Events
from mtp_jax.model import Model, conventions
from mtp_jax.progress import Display, Speed, numbers, say, watched
from mtp_jax.sharding import make_mesh, out, parameter_spec, share, spec


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
  return State(zero, zero, zero, model, optimizer.to_rest(config.optimizer, optimizer.make(config.optimizer, config.train.steps).init(model)))


def abstract(config: Config, mesh) -> State:
  """The shapes, types and shardings of a state, on the devices; computes nothing. Call it under `jax.set_mesh(mesh)`."""
  shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
  on_mesh = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, x.sharding.spec if x.shape else jax.P()))
  return jax.tree.map(on_mesh, shapes)


def gradients(config: Config, model: Model, batch, weight_M, active: tuple[bool, ...], loss=objective.loss):
  """Of the loss over a whole batch, in config.train.accumulate microbatches: (float32 loss, Sums, a Model of gradients).

  Args:
    batch: int32[B, L + M], rows over (data, fsdp).
    weight_M: float32, the weight of each future.
    active: futures that are computed at all.
    loss: with the arguments and results of `objective.loss`.
  """
  M, k = config.model.futures, config.train.accumulate
  coefficient_M = weight_M / jnp.maximum(objective.counts(batch, M), 1)
  gradient = jax.value_and_grad(lambda model, batch: loss(model, batch, coefficient_M, config.objective, active), has_aux=True)

  def microbatch(total, batch):
    (loss, sums), grads = gradient(model, batch)
    return jax.tree.map(jnp.add, total, (loss, sums, grads)), None

  if k == 1:
    (loss, sums), grads = gradient(model, batch)
    return loss, sums, grads
  zeros_M = jnp.zeros(M, jnp.int32)
  nothing = (jnp.zeros(()), objective.Sums(jnp.zeros(M), zeros_M, zeros_M), jax.tree.map(jnp.zeros_like, model))
  return jax.lax.scan(microbatch, nothing, jax.tree.map(functools.partial(_split, k=k), batch))[0]


def counted_flops_per_token(config: Config) -> float:
  """What `gradients` really multiplies, recomputation included: traced on one device and counted, loops times their length."""
  M, L = config.model.futures, config.data.length
  model = jax.eval_shape(lambda: Model(config.model, jax.random.key(0)))
  batch = {name: jax.ShapeDtypeStruct((config.train.batch, L + M), jnp.int32) for name in ('tokens', 'segments', 'positions')}
  traced = jax.make_jaxpr(functools.partial(gradients, config, active=(True,) * M))(model, batch, jax.ShapeDtypeStruct((M,), jnp.float32))
  return metrics.matmul_flops(traced.jaxpr) / (config.train.batch * L)


def step(config: Config, state: State, batch, byte_length_V, weight_M, active: tuple[bool, ...], loss=objective.loss) -> tuple[State, dict]:
  """One optimizer step.

  Args:
    byte_length_V: int32, bytes that each id stands for. The others are those of `gradients`.

  Returns:
    The next state, and metrics: scalars and [M] arrays, each a sum divided once by its count; nan where nothing counted.
  """
  loss, sums, grads = gradients(config, state.model, batch, weight_M, active, loss)
  with jax.named_scope('update'):
    norm = optax.tree.norm(grads)
    ok = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, moments = optimizer.update(config.optimizer, config.train.steps, grads, state.optimizer, state.model, ok)
    model = jax.tree.map(lambda new, old: jnp.where(ok, new, old), optax.apply_updates(state.model, updates), state.model)
    bad = (~ok).astype(jnp.int32)
    following = State(state.step + 1, state.skipped + bad, (state.skipped_in_a_row + 1) * bad, model, moments)
  return following, {
      'loss': loss,
      'nats': sums.nats_M / sums.count_M,
      'accuracy': sums.correct_M / sums.count_M,
      'nats_sum': sums.nats_M,
      'correct': sums.correct_M,
      'count': sums.count_M,
      'weight': weight_M,
      'bits_per_byte': jnp.where(active[0], sums.nats_M[0] / math.log(2) / target_bytes(batch, byte_length_V, config.model.futures), jnp.nan),
      'gradient_norm': norm,
      'update_norm': jnp.where(ok, optax.tree.norm(updates), 0.0),
      'learning_rate': jnp.asarray(optimizer.schedule(config.optimizer, config.train.steps)(state.optimizer[-1].count), jnp.float32),
      'padding': jnp.mean(batch['segments'][:, :config.data.length] == 0, dtype=jnp.float32),
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
  """advance(state, batch, byte_length_V, fraction) -> (state, metrics): `step` with the weights at that fraction of training.

  Jitted once for each set of futures whose weight is not 0; the state is donated.
  """
  jitted, M = jax.jit(functools.partial(step, config), donate_argnums=0, static_argnames='active'), config.model.futures

  def advance(state: State, batch, byte_length_V, fraction: float):
    return jitted(state, batch, byte_length_V, np.float32(config.objective.weights_M(M, fraction)), active=config.objective.active(M, fraction))
  return advance


@functools.partial(jax.jit, static_argnums=0)
def _evaluate_step(config: Config, model: Model, batch, byte_length_V, allowed_V):
  c, o = config.model, config.objective
  readout = model.readout()
  h_MBLD = readout.map(lambda m, h_BLD: h_BLD, *objective.states(model, batch))
  y_MBL, counted_MBL = objective.all_targets(batch, c.futures)
  sums = objective.cross_entropy(c, o, h_MBLD, readout.table(), y_MBL, counted_MBL.astype(jnp.float32), counted_MBL)[1]
  return sums, target_bytes(batch, byte_length_V, c.futures), acceptance.drafts(c, h_MBLD, readout.table(), batch, allowed_V, o.chunk)


def evaluate(config: Config, model: Model, batches, byte_length_V, allowed_V, mesh) -> dict:
  """Over held-out batches, one entry a future: nats and accuracy, and the sums they are made of; bits per byte of future 0; and, greedily
  and at temperature 1, one entry a draft depth: acceptance; one entry a draft length from 0 on: tokens per forward (see `acceptance`).

  Args:
    allowed_V: bool, ids that a decoder may emit.

  Sums, divided once, in float64; nan for a future that no held-out document is long enough for.
  """
  total = None
  for batch in batches:
    found = jax.tree.map(np.float64, jax.device_get(_evaluate_step(config, model, put(batch, mesh), byte_length_V, allowed_V)))
    total = found if total is None else jax.tree.map(np.add, total, found)
  sums, size, drafts = total
  with np.errstate(divide='ignore', invalid='ignore'):
    by_way = {}
    for way, forwards_M, offered_K, accepted_K in zip(acceptance.WAYS, drafts.forwards_WM, drafts.offered_WK, drafts.accepted_WK):
      by_way |= {f'acceptance_{way}': (accepted_K / offered_K).tolist(), f'tokens_per_forward_{way}': (drafts.tokens / forwards_M).tolist()}
    return {'nats': (sums.nats_M / sums.count_M).tolist(), 'accuracy': (sums.correct_M / sums.count_M).tolist(), 'nats_sum': sums.nats_M.tolist(),
            'correct': sums.correct_M.astype(int).tolist(), 'count': sums.count_M.astype(int).tolist(),
            'bits_per_byte': float(sums.nats_M[0] / math.log(2) / size), **by_way}


def emitted(config: Config, tokens) -> np.ndarray:
  """bool[V]: ids that a decoder may emit, whatever stands for bytes, and eos."""
  allowed_V = byte_lengths(config, tokens) > 0
  allowed_V[tokens.eos] = True
  return allowed_V


def put(batch, mesh):
  """The rows that this process reads (see `share`), as arrays over the whole mesh."""
  sharding = jax.NamedSharding(mesh, spec('Bt'))
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)  # the same in half the time
  return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended: its last step, the newest validation, and the signal that stopped it (all processes of it), 0 if none."""
  step: int
  validation: dict
  signal: int


class NotFinite(RuntimeError):
  """Too many steps in a row had a loss or gradient that is not finite."""


def fit(config: Config, workdir, profile_steps: range = range(0), note=say) -> Outcome:
  """Trains to config.train.steps, starting anew or from the newest checkpoint in workdir, bitwise as if never stopped.

  SIGTERM or Ctrl-C save a checkpoint and return. Everything is recorded in workdir/metrics.jsonl. Of several processes the first one writes
  there and tells `note`; each other one keeps its own log, events, and rows of bad steps in workdir/process-INDEX.

  Raises:
    BadInput: for what the user can mend, before anything is written.
    Damaged: a block of the data is not what was written; a run of one process saves a checkpoint first.
    NotFinite: after config.train.skipped_allowed bad steps in a row; the batches are in workdir/nonfinite.
  """
  began, index = time.time(), jax.process_index()
  workdir = pathlib.Path(workdir).expanduser().absolute()
  note = note if index == 0 else lambda line: None
  tokens, corpus, record = _open(config, workdir, note)
  mesh = make_mesh(config.mesh)
  processes.check_same(config=json.dumps(config.to_dict()), checkpoint=f'step {record["step"] if record else 0}', data=json.dumps(corpus.identity))
  own = workdir / f'process-{index}' if index else workdir
  try:
    own.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise BadInput(f'--workdir={workdir}: cannot be a folder ({error.strerror}); choose another') from None
  with processes.interrupts() as heard, jax.set_mesh(mesh), contextlib.closing(_Run(config, workdir, own, tokens, corpus, record, mesh, note, began)) as run:
    stopping = 0
    try:
      if record and run.evaluates(run.step):  # a run may end between a checkpoint and its validation
        run.validate()
      while run.step < config.train.steps and not stopping:
        run.profile(profile_steps)
        run.advance()
        with watched(config.train.hang_seconds):
          stopping = processes.stops(heard, run.step)
        if stopping or run.step == config.train.steps or run.step % config.train.checkpoint_every == 0:
          run.save()
        if run.evaluates(run.step) and not stopping:
          run.validate()
    except Damaged:
      if jax.process_count() == 1:  # the steps until here are good; of several processes the others may be a step ahead
        run.save()
      raise
  return Outcome(run.step, run.validation, stopping)


def _open(config: Config, workdir: pathlib.Path, note):
  """Tokenizer, documents, and the record of the newest checkpoint or None, all found to agree with the config."""
  if workdir.exists() and not workdir.is_dir():
    raise BadInput(f'--workdir={workdir}: cannot be a folder, it is a file; choose another')
  if (workdir / INDEX).exists():
    raise BadInput(f'--workdir={workdir}: holds a prepared set; choose another')
  record = checkpoint.metadata(workdir) if checkpoint.steps(workdir) else None
  changes = checkpoint.check_resumes(config, record, workdir) if record else []
  if record:
    checkpoint.check_conventions(conventions(config.model), record, workdir)
  tokens = tokenizer.load(config.data.tokenizer)
  check_vocabulary(config, tokens)
  if record:
    checkpoint.check_same(f'config.data.tokenizer={config.data.tokenizer}', tokens.digest, record, 'tokenizer',
                          'use the same tokenizer, or another --workdir')
  corpus = open_corpus(config.data, tokens)
  differing = difference(corpus.identity, record['identity']) if record else []
  if differing and not config.data.accept_changed:
    raise BadInput(f'config.data: not what the checkpoint in {workdir} was trained on: {"; ".join(differing)}; restore that, choose another --workdir, '
                   'or set config.data.accept_changed=True to go on with these data from the same row number')
  for change in (*changes, *(f'the data have changed: {what}' for what in differing)):
    note(change)
  return tokens, corpus, record


class _Run:
  """A run under way: the state, its place in the data, and where it is recorded."""

  def __init__(self, config: Config, workdir: pathlib.Path, own: pathlib.Path, tokens, corpus: Corpus, record: dict | None, mesh, note, began: float):
    t, first = config.train, own == workdir
    self.config, self.own, self.mesh, self.validation, self.unrecorded, self.profiling = config, own, mesh, {}, None, False
    self.display, self.share = None, share(mesh)
    line = lambda text: (self.display.line if self.display else note)(text)
    damage = line if first else lambda text: say(f'{own.name}: {text}')  # which no other process sees
    rows = corpus.rows(config.model.futures, damage)
    self.held_out = corpus.held_out(config.model.futures, damage)
    self.batches = corpus.batches(rows, t.batch, *self.share, place=lambda batch: put(batch, mesh))
    self.step = self.saved = record['step'] if record else 0
    self.events = Events(own)
    self.events.write('start', began, 0.0, self.step)
    self.events.write('setup', began, time.time() - began, self.step)
    with self.events.span('restore' if record else 'compile', self.step):
      if record:
        self.state = restore(config, workdir, record['step'], mesh)
        self.batches.set_state(record['data'])
      else:
        self.state = jax.jit(functools.partial(init, config))(jax.random.key(t.seed))
    self.active = ()
    self.record = {'config': config.to_dict(), 'conventions': conventions(config.model), 'tokenizer': tokens.digest,
                   'identity': corpus.identity}
    self.byte_length_V = jax.device_put(byte_lengths(config, tokens), jax.NamedSharding(mesh, jax.P()))
    self.allowed_V = emitted(config, tokens)
    self.compiled = compiled_step(config)
    self.speed = Speed(self.step, t.batch * config.data.length, metrics.peak_flops() * mesh.size, self.events)
    self.writer = checkpoint.Writer(workdir, t.checkpoints_kept)
    self.log = metrics.Log(own, self.step, t.tensorboard and first)
    (own / 'config.json').write_text(json.dumps(config.to_dict(), indent=2) + '\n')
    self.display = Display(t.steps, self.step, note, bar=first)

  def advance(self) -> None:
    """Starts the next step; while it runs, records the one before."""
    limit = self.config.train.hang_seconds
    with self.speed.waiting(), watched(limit):
      batch = next(self.batches)
    compiles = self._enters_stage()
    with self.speed.paused('compile', self.step) if compiles else watched(limit):
      self.state, found = self.compiled(self.state, batch, self.byte_length_V, self.step / self.config.train.steps)
    self.step += 1
    self._record_last()
    self.unrecorded = self.step, found, batch, self.flops, self.batches.quarantined

  def _enters_stage(self) -> bool:
    """Whether the next step computes other futures than the last one; notes its FLOPs."""
    active = self.config.objective.active(self.config.model.futures, self.step / self.config.train.steps)
    changed = active != self.active
    if changed:
      self._record_last()
      self.flops = metrics.flops_per_token(self.state.model, self.config.data.length, active)['total'] * self.speed.tokens_per_step
      if not all(active) or self.active:
        self.display.line(f'step {self.step + 1}: futures {" ".join(str(m) for m, a in enumerate(active) if a)} are computed, the others have weight 0')
      self.active = active
    return changed

  def _record_last(self) -> None:
    last, self.unrecorded = self.unrecorded, None
    if last is not None:
      with watched(self.config.train.hang_seconds):
        self._record(*last)

  def _record(self, step: int, found, batch, flops: float, quarantined: int) -> None:
    self.speed.flops += flops
    t, found = self.config.train, jax.tree.map(lambda x: x.tolist(), jax.device_get(found))
    bad = found['skipped_in_a_row']
    if bad:
      evidence = _keep_evidence(self.own, step, batch, found)
      self.display.line(f'step {step} skipped: loss {found["loss"]}, gradient norm {found["gradient_norm"]}; evidence in {evidence}')
    if bad or step % t.log_every == 0 or step == t.steps:
      found |= self.speed.since_last(step, t.steps) | {'quarantined_rows': processes.total(quarantined)}
      self.log.write(step, 'train', found)
      self.display.record(step, found)
    else:
      self.display.advance(step)
    if bad >= t.skipped_allowed:
      raise NotFinite(f'step {step}: {bad} steps in a row had a loss or gradient that is not finite; evidence in {evidence}; '
                      'lower config.optimizer.learning_rate, or resume from the last checkpoint with other data')

  def profile(self, steps: range) -> None:
    """Starts a trace before the first of `steps`, stops it after the last."""
    if not self.profiling and self.step + 1 in steps:
      jax.profiler.start_trace(str(self.own / 'profile'))
      self.profiling = True
    elif self.profiling and self.step + 1 not in steps:
      jax.block_until_ready(self.state)
      jax.profiler.stop_trace()
      self.profiling = False
      self.display.line(f'profile of the steps up to {self.step} in {self.own / "profile"}')

  def evaluates(self, step: int) -> bool:
    t = self.config.train
    return step == t.steps or (t.evaluate_every > 0 and step % t.evaluate_every == 0)

  def validate(self) -> None:
    self._record_last()
    n = self.config.train.evaluate_rows
    with self.speed.paused('evaluation', self.step):
      batches = validation_batches(self.held_out, n, n, *self.share)
      found = evaluate(self.config, self.state.model, batches, self.byte_length_V, self.allowed_V, self.mesh)
      found = self.validation = found | {'quarantined_rows': processes.total(self.held_out.quarantined)}
    self.log.write(self.step, 'validation', found)
    self.display.line(f'step {self.step} validation: {found["bits_per_byte"]:.4f} bits per byte, '
                      f'nats {numbers(found["nats"])}, accuracy {numbers(found["accuracy"])}'
                      + (f', acceptance {numbers(found["acceptance_greedy"])}' if found['acceptance_greedy'] else ''))

  def save(self) -> None:
    """Starts to write a checkpoint of this step, unless it has one."""
    self._record_last()
    if self.step == self.saved:
      return
    self.saved = self.step
    with self.speed.paused('save', self.step):
      s = self.state
      rest = {'step': s.step, 'skipped': s.skipped, 'skipped_in_a_row': s.skipped_in_a_row, 'optax': s.optimizer}
      self.writer.save(self.step, s.model, rest, {'step': self.step, 'data': self.batches.get_state(), **self.record})

  def close(self) -> None:
    self.profile(range(0))
    self.display.close()
    try:
      with self.events.span('save', self.step) if self.writer.pending else contextlib.nullcontext():
        self.writer.close()
    finally:
      self.events.close()
      self.log.close()
      self.batches.close()


def check_vocabulary(config: Config, tokens) -> None:
  if config.model.vocab < tokens.size:
    raise BadInput(f'config.model.vocab={config.model.vocab}: the tokenizer {config.data.tokenizer} has {tokens.size} ids; set at least that')


def byte_lengths(config: Config, tokens) -> np.ndarray:
  """int32[V]: the bytes each id stands for, 0 for rows of the embedding past the tokenizer's ids."""
  return np.pad(tokens.byte_lengths, (0, config.model.vocab - tokens.size))


def restore(config: Config, workdir, step: int, mesh) -> State:
  """The state of a checkpoint, on the mesh at hand."""
  like = abstract(config, mesh)
  rest = {'step': like.step, 'skipped': like.skipped, 'skipped_in_a_row': like.skipped_in_a_row, 'optax': like.optimizer}
  loaded = checkpoint.restore(workdir, step, parameters=like.model, optimizer=rest)
  rest = loaded['optimizer']
  return State(rest['step'], rest['skipped'], rest['skipped_in_a_row'], loaded['parameters'], optimizer.to_rest(config.optimizer, rest['optax']))


def _keep_evidence(own: pathlib.Path, step: int, batch, found: dict) -> pathlib.Path:
  folder = own / 'nonfinite'
  folder.mkdir(exist_ok=True)
  local = {name: np.concatenate([shard.data for shard in x.addressable_shards if shard.replica_id == 0]) for name, x in batch.items()}
  np.savez(folder / f'step-{step}.npz', **local)
  (folder / f'step-{step}.json').write_text(json.dumps(found) + '\n')
  return folder / f'step-{step}.npz'
