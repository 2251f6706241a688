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
import pathlib
import time

import jax
import numpy as np

from mtp_jax import chips, tokenizer
from mtp_jax.checkpoint import store
from mtp_jax.checkpoint.record import check_conventions, check_resumes, check_tokenizer, read_record, steps
from mtp_jax.config import BadInput, Config
from mtp_jax.data.corpus import Corpus, difference, open_corpus
from mtp_jax.data.folder import Damaged
from mtp_jax.data.prepared_set import INDEX
from mtp_jax.data.rows import validation_batches
from mtp_jax.evaluation.held_out import evaluate
from mtp_jax.mesh import make_mesh, process_share, put
from mtp_jax.model import costs
from mtp_jax.model.model import conventions
from mtp_jax.report.display import Display, Meter, format_numbers, print_stderr
from mtp_jax.report.events import Events
from mtp_jax.report.log import Log
from mtp_jax.report.speed import Speed
from mtp_jax.tokenizer import byte_lengths, check_vocabulary, decodable
from mtp_jax.train import processes
from mtp_jax.train.step import compiled_step, init, restore
from mtp_jax.train.watch import watched


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended: its last step, the newest validation, and the signal that stopped it (all processes of it), 0 if none."""
  step: int
  validation: dict
  signal: int


class NotFinite(RuntimeError):
  """Too many steps in a row had a loss or gradient that is not finite."""


def fit(config: Config, workdir, profile_steps: range = range(0), note=print_stderr) -> Outcome:
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
  record = read_record(workdir) if steps(workdir) else None
  changes = check_resumes(config, record, workdir) if record else []
  if record:
    check_conventions(conventions(config.model), record, workdir)
  tokens = tokenizer.load(config.data.tokenizer)
  check_vocabulary(config, tokens)
  if record:
    check_tokenizer(f'config.data.tokenizer={config.data.tokenizer}', tokens.digest, record, 'use the same tokenizer, or another --workdir')
  corpus = open_corpus(config.data, tokens, print_stderr, Meter)
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
    self.display, self.share = None, process_share(mesh)
    line = lambda text: (self.display.line if self.display else note)(text)
    damage = line if first else lambda text: print_stderr(f'{own.name}: {text}')  # which no other process sees
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
    self.allowed_V = decodable(config, tokens)
    self.compiled = compiled_step(config)
    self.speed = Speed(self.step, t.batch * config.data.length, chips.peak_flops() * mesh.size, self.events)
    self.writer = store.Writer(workdir, t.checkpoints_kept)
    self.log = Log(own, self.step, t.tensorboard and first)
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
      self.flops = costs.flops_per_token(self.state.model, self.config.data.length, active)['total'] * self.speed.tokens_per_step
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
                      f'nats {format_numbers(found["nats"])}, accuracy {format_numbers(found["accuracy"])}'
                      + (f', acceptance {format_numbers(found["acceptance_greedy"])}' if found['acceptance_greedy'] else ''))

  def save(self) -> None:
    """Starts to write a checkpoint of this step, unless it has one."""
    self._record_last()
    if self.step == self.saved:
      return
    self.saved = self.step
    with self.speed.paused('save', self.step):
      record = {'step': self.step, 'data': self.batches.get_state(), **self.record}
      self.writer.save(self.step, self.state.model, self.state.without_model(), record)

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


def _keep_evidence(own: pathlib.Path, step: int, batch, found: dict) -> pathlib.Path:
  folder = own / 'nonfinite'
  folder.mkdir(exist_ok=True)
  local = {name: np.concatenate([shard.data for shard in x.addressable_shards if shard.replica_id == 0]) for name, x in batch.items()}
  np.savez(folder / f'step-{step}.npz', **local)
  (folder / f'step-{step}.json').write_text(json.dumps(found) + '\n')
  return folder / f'step-{step}.npz'
