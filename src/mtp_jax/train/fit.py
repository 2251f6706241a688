"""Pretraining: open, then step, record, validate and save until the last step or a signal.

The loop keeps the device busy: it starts a step, and records the one before while the new one
runs. Batches are a function of (seed, step), and a checkpoint holds all that a step changes. So a
run that was stopped, or killed and started again, ends with the same parameters and the same log,
bit by bit, as one that was not.

After too many bad steps in a row it rolls back: it goes on from the newest checkpoint, without the rows that
were read since. (Without those of the bad steps alone it would come to the same parameters, and fail again, if these
are to blame.) The record of every later checkpoint lists the roll-backs; one that was killed before rolls back again,
in the same way. No checkpoint is saved within a row of bad steps.
"""
import contextlib
import dataclasses
import json
import pathlib
import secrets
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from mtp_jax import chips
from mtp_jax.checkpoint import store
from mtp_jax.checkpoint.record import CONFIG, FOLDER, RUN, TOKENIZER, DamagedCheckpoint, read_record, run_name, steps
from mtp_jax.config import BadInput, Config, local_path
from mtp_jax.config.errors import cannot, in_words
from mtp_jax.data.folder import Damaged, Folder, Unreadable
from mtp_jax.data.progress import quiet
from mtp_jax.data.rows import validation_batches
from mtp_jax.evaluation.held_out import evaluate
from mtp_jax.mesh import make_mesh, process_share, put
from mtp_jax.model import costs
from mtp_jax.model.model import conventions
from mtp_jax.programs import keep_programs
from mtp_jax.report.display import Display, print_stderr
from mtp_jax.report.events import FILE as EVENTS
from mtp_jax.report.events import Events
from mtp_jax.report.log import FILE as METRICS
from mtp_jax.report.trackers import check_installed, open_trackers
from mtp_jax.tokenizer import byte_lengths, decodable
from mtp_jax.train import processes
from mtp_jax.train.guards import Guard, changes_loss
from mtp_jax.train.nonfinite import NotFinite
from mtp_jax.train.opening import Opened, only_run, open_run
from mtp_jax.train.recording import Recorder, Step
from mtp_jax.train.step import State, compiled_init, compiled_step, restore
from mtp_jax.train.watch import watched

__all__ = ['NotFinite', 'Outcome', 'fit']


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended.

  Fields:
    step: the last one, or that of the newest checkpoint where a signal came within a row of bad steps.
    validation: metrics of the newest validation.
    signal: the one that stopped the run on all its processes; 0 if none did.
  """
  step: int
  validation: dict
  signal: int


def fit(config: Config, workdir, profile_steps: range = range(0), note=print_stderr) -> Outcome:
  """Trains to config.train.steps, from the newest checkpoint in workdir or from the beginning.

  SIGTERM, SIGHUP or Ctrl-C saves a checkpoint and returns, also during a validation, which the next
  run then repeats. The metrics of every record are in
  workdir/metrics.jsonl. Among several processes the first one writes there and calls `note`;
  every other one keeps its own log, events and evidence of bad steps in workdir/process-INDEX.

  Args:
    profile_steps: steps to trace with jax.profiler.
    note: prints a line.

  Raises:
    BadInput: for what the user can fix, before anything is written.
    Damaged, Unreadable: the data cannot be read; a run of one process saves a checkpoint first.
    NotFinite: config.train.skipped_allowed steps in a row were bad, after config.train.rollbacks_allowed roll-backs to
      the same checkpoint; their batches are in workdir/nonfinite.
  """
  if not isinstance(config, Config):
    raise BadInput(f'config={config!r}: must be a Config')
  if not isinstance(profile_steps, range) or not callable(note):
    raise BadInput(f'profile_steps={profile_steps!r}, note={note!r}: must be a range and a function of a line')
  workdir = local_path(workdir, '--workdir').absolute()
  note = quiet if jax.process_index() else note
  check_installed(config.train.trackers)
  keep_programs(config)
  damaged = set()
  while True:
    opened = open_run(config, workdir, note, damaged)
    try:
      return _fit(config, workdir, profile_steps, note, opened)
    except DamagedCheckpoint as error:  # its files are what was written, its arrays are not
      note(f'{error}; an older checkpoint is used')
      damaged.add(error.step)


def _fit(config: Config, workdir: pathlib.Path, profile_steps: range, note, opened: Opened) -> Outcome:
  """`fit` from the checkpoint that was opened."""
  started, t, index = time.time(), config.train, jax.process_index()
  mesh = make_mesh(config.mesh)
  processes.check_same(data=json.dumps(opened.corpus.identity))
  folder = _make_folder(workdir, f'process-{index}' if index else '')
  note(opened.corpus.sides())

  skipped = _skipped_rows(opened)
  with processes.interrupts() as interrupts, jax.set_mesh(mesh):
    while True:
      try:
        with (contextlib.nullcontext() if index else only_run(workdir, opened), _writing(workdir),
              contextlib.closing(Display(t.steps, opened.step, note, bar=index == 0)) as display):
          return _train(_Run(config, workdir, folder, opened, skipped, mesh, display, started), interrupts,
                        profile_steps, opened.record is not None)
      except NotFinite as error:
        opened, skipped, line = _rolled_back(config, workdir, opened, skipped, error)
      note(line)
      started = time.time()


def _train(run: '_Run', interrupts, profile_steps: range, resumed: bool) -> Outcome:
  """To the last step, or a signal; closes the run."""
  with contextlib.closing(run):
    return _advance_to_end(run, interrupts, profile_steps, resumed)


def _advance_to_end(run: '_Run', interrupts, profile_steps: range, resumed: bool) -> Outcome:
  t = run.config.train

  def heard() -> int:
    with watched(t.hang_seconds):
      return processes.stop_signal(interrupts)

  stop_signal = 0
  try:
    # the run before may have ended between a checkpoint and its validation
    if resumed and run.validation_due():
      stop_signal = run.validate(heard)
    while run.step < t.steps and not stop_signal:
      run.profile(profile_steps)
      run.advance()
      stop_signal = heard()
      if stop_signal or run.step == t.steps or run.step % t.checkpoint_every == 0:
        run.save()
      if run.validation_due() and not stop_signal:
        stop_signal = run.validate(heard)
        if stop_signal:
          run.save()
  except (Damaged, Unreadable):
    if jax.process_count() == 1:  # among several processes the others may be a step ahead
      run.save()
    raise
  return Outcome(run.saved_step if stop_signal else run.step, run.validation, stop_signal)


def _skipped_rows(opened: Opened) -> list[tuple[int, int]]:
  """(step of the checkpoint, rows left out after it) of each roll-back before the checkpoint."""
  return [tuple(window) for window in opened.record.get('skipped_rows', [])] if opened.record else []


def _rolled_back(config: Config, workdir: pathlib.Path, opened: Opened, skipped: list[tuple[int, int]],
                 error: NotFinite) -> tuple[Opened, list[tuple[int, int]], str]:
  """What to go on from after too many bad steps in a row, with one roll-back more, and a line about it.

  Raises:
    NotFinite: there were as many roll-backs to this checkpoint as are allowed.
  """
  t, available = config.train, steps(workdir)
  opened = dataclasses.replace(opened, record=read_record(workdir, available[-1]) if available else None,
                               damaged=())
  processes.check_same(checkpoint=f'step {opened.step}')
  place = f'step {opened.step}' if available else 'the beginning'
  before = sum(step == opened.step for step, _ in skipped)
  if before >= t.rollbacks_allowed:
    further = f', remove {FOLDER}/{available[-1]} to go back further' if available else ''
    raise NotFinite(error.step, f'{error.text}, after {before} roll-backs to {place}; evidence in {workdir}/nonfinite; '
                    'the same command would end here again: lower config.optimizer.learning_rate'
                    f'{further}, leave out more rows with a higher config.train.rollbacks_allowed, or see with '
                    f'--replay_step={error.step} whether the machine is to blame')
  rows = t.rows_before(error.step) - t.rows_before(opened.step)
  line = (f'step {error.step}: {error.text}; roll-back {before + 1} of {t.rollbacks_allowed} to {place}, '
          f'without the {rows:,} rows read since')
  return opened, [*skipped, (opened.step, rows)], line


def _make_folder(workdir: pathlib.Path, name: str) -> pathlib.Path:
  with cannot('be a folder', f'--workdir={workdir}', 'choose another'):
    (workdir / name).mkdir(parents=True, exist_ok=True)
  return workdir / name


def _name_of_run(workdir: pathlib.Path, opened: Opened) -> str:
  """That of the run that is resumed; a new one if there is none."""
  resumed = opened.record and (opened.record.get('run') or run_name(workdir))
  return resumed or secrets.token_hex(8)


@contextlib.contextmanager
def _writing(workdir: pathlib.Path) -> Iterator[None]:
  """Names the workdir where a file in it cannot be written."""
  try:
    yield
  except OSError as error:
    if not error.errno:  # in words already
      raise
    raise OSError(f'--workdir={workdir}: cannot write there ({in_words(error)}); make room or give permission, and '
                  'run the same command to resume') from error


class _Run:
  """A run in progress: its state, its position in the data, its records and checkpoints."""

  def __init__(self, config: Config, workdir: pathlib.Path, folder: pathlib.Path, opened: Opened,
               skipped: list[tuple[int, int]], mesh, display: Display, started: float):
    self.config, self.folder, self.mesh, self.display = config, folder, mesh, display
    self.step = self.saved_step = opened.step
    self.validation = {}
    self.active = ()  # futures that the step computes; known once the first one starts
    self.rows = 0  # of the step
    self.profiling = False
    is_first = folder == workdir
    with cannot('write', f'--workdir={workdir}', 'give a folder that can be written'):
      for name in (EVENTS, METRICS, CONFIG):
        (folder / name).open('a').close()
    trackers = open_trackers(config.train.trackers if is_first else (), folder, self.step, config.to_dict())

    M = config.model.futures
    note = display.line if is_first else lambda line: print_stderr(f'{folder.name}: {line}')
    self.share = process_share(mesh)
    self.held_out = opened.corpus.held_out(M, note)
    rows = opened.corpus.rows(M, note)
    self.batches = opened.corpus.batches(rows, config.train.batch, *self.share,
                                         place=lambda batch: put(batch, mesh),
                                         rows_before=config.train.rows_before)
    self.guard = Guard.resumed(config, opened.corpus.identity, opened.record)
    with contextlib.ExitStack() as stack:  # closes all of it where the state cannot be restored
      stack.callback(self.batches.close)
      self.events = stack.enter_context(contextlib.closing(Events(folder)))
      self.recorder = stack.enter_context(contextlib.closing(
          Recorder(config, folder, self.step, chips.peak_flops() * mesh.size, self.events, display, trackers,
                   self.guard, sum(rows for _, rows in skipped))))
      self.events.write('start', started, 0.0, self.step)
      self.events.write('setup', started, time.time() - started, self.step)
      self.state = self._first_state(workdir, opened)
      self.files = stack.pop_all()
    if left_out := sum(rows for step, rows in skipped if step == self.step):  # roll-backs to here
      self.batches.skip(left_out)
      self.state = dataclasses.replace(self.state, skipped_in_a_row=jnp.zeros_like(self.state.skipped_in_a_row))

    self.byte_length_V = jax.device_put(byte_lengths(config, opened.tokenizer),
                                        jax.NamedSharding(mesh, jax.P()))
    self.decodable_V = decodable(config, opened.tokenizer)
    self.record = {'config': config.to_dict(), 'conventions': conventions(config.model),
                   'tokenizer': opened.tokenizer.digest, 'identity': opened.corpus.identity,
                   'run': _name_of_run(workdir, opened), 'skipped_rows': skipped}
    self.writer = store.Writer(workdir, config.train.checkpoints_kept, opened.damaged)
    (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + '\n')
    if is_first:
      (workdir / RUN).write_text(self.record['run'] + '\n')
    if is_first and opened.tokenizer.model:
      Folder(folder, '--workdir').write(TOKENIZER, opened.tokenizer.model)

  def _first_state(self, workdir: pathlib.Path, opened: Opened) -> State:
    """A new state, or the checkpoint's, with the batches at its position in the data."""
    if opened.record is None:
      with self.events.span('compile', self.step):
        return compiled_init(self.config, jax.random.key(self.config.train.seed))
    with self.events.span('restore', self.step):
      self.batches.set_state(opened.record['data'], self.step)
      return restore(self.config, workdir, self.step, self.mesh)

  def advance(self) -> None:
    """Starts the next step; while it runs, records the one before."""
    hang_seconds = self.config.train.hang_seconds
    with self.recorder.speed.waiting(), watched(hang_seconds):
      batch = next(self.batches)
    fraction = self.step / self.config.train.steps
    active = self.config.objective.active(self.config.model.futures, fraction)
    rows = self.config.train.rows_at(self.step)
    if changes_loss(self.config, self.step):
      self.recorder.flush()
      self.guard.forget()
    limits = self.guard.limits(self.step + 1)
    if (active, rows) != (self.active, self.rows):
      self._enter_stage(active, rows)
      timed = self.recorder.speed.paused('compile', self.step)
    else:
      timed = watched(hang_seconds)
    with timed:
      self.state, metrics = compiled_step(self.config, self.state, batch, self.byte_length_V, fraction, limits)
    self.step += 1
    self.recorder.add(Step(self.step, metrics, batch, rows * self.config.data.length, self.flops_per_token,
                           self.batches.quarantined, limits))

  def _enter_stage(self, active: tuple[bool, ...], rows: int) -> None:
    """From the next step on these futures are computed, of so many rows, by a program that may not be compiled yet."""
    self.recorder.flush()
    self.flops_per_token = costs.flops_per_token(self.config.model, self.config.data.length, active)['total']
    if rows != (self.rows or self.config.train.batch):
      self.display.line(f'step {self.step + 1}: batches of {rows} rows')
    self.rows = rows
    if active != self.active and (self.active or not all(active)):
      computed = ' '.join(str(m) for m, is_active in enumerate(active) if is_active)
      self.display.line(f'step {self.step + 1}: futures {computed} are computed, the others have weight 0')
    self.active = active

  def profile(self, steps: range) -> None:
    """Starts a trace before the first of `steps`, stops it after the last."""
    is_profiled = self.step + 1 in steps
    if is_profiled and not self.profiling:
      jax.profiler.start_trace(str(self.folder / 'profile'))
    if self.profiling and not is_profiled:
      jax.block_until_ready(self.state)
      jax.profiler.stop_trace()
      self.display.line(f'profile of the steps up to {self.step} in {self.folder / "profile"}')
    self.profiling = is_profiled

  def validation_due(self) -> bool:
    """Whether a validation follows the last step."""
    t = self.config.train
    return self.step == t.steps or (t.evaluate_every > 0 and self.step % t.evaluate_every == 0)

  def validate(self, heard: Callable[[], int]) -> int:
    """Evaluates config.train.evaluate_rows held-out rows, and records the metrics; the signal that
    ended it before its end, else 0.

    heard: that signal, asked for after every batch.
    """
    self.recorder.flush()
    n, size = self.config.train.evaluate_rows, self.config.train.batch // self.config.train.accumulate
    stopped = []

    def batches():
      for batch in validation_batches(self.held_out, min(n, size), n, *self.share):
        yield batch
        if signal := heard():
          stopped.append(signal)
          return

    with self.recorder.speed.paused('evaluation', self.step):
      metrics = evaluate(self.config, self.state.model, batches(), self.byte_length_V,
                         self.decodable_V, self.mesh)
      if stopped:
        return stopped[0]
      quarantined_rows = processes.total(self.held_out.quarantined)
    self.validation = metrics | {'quarantined_rows': quarantined_rows}
    self.recorder.validation(self.step, self.validation)
    return 0

  def save(self) -> None:
    """Starts to write a checkpoint of the last step, unless it has one, or is bad and not the end of the run."""
    self.recorder.flush()
    if self.step == self.saved_step or self.recorder.bad_in_a_row and self.step < self.config.train.steps:
      return
    self.saved_step = self.step
    with self.recorder.speed.paused('save', self.step):
      record = {'step': self.step, 'data': self.batches.get_state(), 'guard': self.guard.state(), **self.record}
      self.writer.save(self.step, self.state.model, self.state.without_model(), record)

  def close(self) -> None:
    """Waits for the checkpoint that is being written, then closes all files. Raises OSError when
    it failed.
    """
    self.profile(range(0))
    try:
      with self.events.span('save', self.step) if self.writer.pending else contextlib.nullcontext():
        self.writer.close()
    finally:
      self.files.close()
