"""Pretraining: open, then step, record, validate and save until the last step or a signal.

The loop keeps the device busy: it starts a step, and records the one before while the new one
runs. Batches are a function of (seed, step), and a checkpoint holds all that a step changes. So a
run that was stopped, or killed and started again, ends with the same parameters and the same log,
bit by bit, as one that was not.

After too many bad steps in a row it rolls back: it goes on from the newest checkpoint, without the
rows that were read since. (Without those of the bad steps alone it would come to the same
parameters, and fail again, if these are to blame.) The record of every later checkpoint lists the
roll-backs; one that was killed before rolls back again, in the same way. No checkpoint is saved
within a row of bad steps.
"""
import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator

import jax

from mtp_jax.checkpoint import store
from mtp_jax.checkpoint.record import FOLDER, DamagedCheckpoint, read_record, steps
from mtp_jax.config import BadInput, Config, folder_path
from mtp_jax.config.errors import in_words
from mtp_jax.config.paths import absolute
from mtp_jax.data.folder import Damaged, Unreadable
from mtp_jax.data.progress import quiet
from mtp_jax.mesh import make_mesh
from mtp_jax.programs import keep_programs
from mtp_jax.report.display import Display, print_stderr
from mtp_jax.report.trackers import check_installed
from mtp_jax.train import processes
from mtp_jax.train.nonfinite import NotFinite
from mtp_jax.train.opening import Opened, only_run, open_run
from mtp_jax.train.own_files import OwnFiles
from mtp_jax.train.run import Run
from mtp_jax.train.self_check import NotReproducible
from mtp_jax.train.watch import watched

__all__ = ['NotFinite', 'NotReproducible', 'Outcome', 'fit']


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended.

  Fields:
    step: the last one, or that of the newest checkpoint where a signal came within a row of bad
    steps. validation: metrics of the newest validation.
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
    NotReproducible: a step that config.train.self_check_every chose gave two results.
    NotFinite: config.train.skipped_allowed steps in a row were bad, after config.train.rollbacks_allowed roll-backs to
      the same checkpoint; their batches are in workdir/nonfinite.
  """
  if not isinstance(config, Config):
    raise BadInput(f'config={config!r}: must be a Config')
  if not isinstance(profile_steps, range) or not callable(note):
    raise BadInput(f'profile_steps={profile_steps!r}, note={note!r}: must be a range and a function of a line')
  workdir = absolute(folder_path(workdir))
  with watched(config.train.hang_seconds, 'the devices to answer JAX for the first time'):
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
  processes.check_same(t.hang_seconds, data=json.dumps(opened.corpus.identity))
  own = OwnFiles(workdir, config.data.cache, index)
  note(opened.corpus.sides())
  if opened.record:
    note(f'resumes after step {opened.step}')

  skipped = _skipped_rows(opened)
  with processes.interrupts() as interrupts, jax.set_mesh(mesh):
    while True:
      try:
        with (only_run(own, opened, t.hang_seconds), _writing(workdir),
              contextlib.closing(Display(t.steps, opened.step, note, bar=index == 0)) as display):
          return _train(Run(config, own, opened, skipped, mesh, display, started), interrupts,
                        profile_steps, opened.record is not None)
      except NotFinite as error:
        opened, skipped, line = _rolled_back(config, workdir, opened, skipped, error)
      note(line)
      started = time.time()


def _train(run: Run, interrupts, profile_steps: range, resumed: bool) -> Outcome:
  """To the last step, or a signal; closes the run."""
  try:
    outcome = _advance_to_end(run, interrupts, profile_steps, resumed)
  except BaseException:
    run.close(after_error=True)
    raise
  run.close()
  return outcome


def _advance_to_end(run: Run, interrupts, profile_steps: range, resumed: bool) -> Outcome:
  t = run.config.train

  def heard() -> int:
    with watched(t.hang_seconds, f'the other processes of this job to come to the same point after step {run.step}'):
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
      if stop_signal or run.step == t.steps:
        run.save()
      elif run.step % t.checkpoint_every == 0:
        run.try_to_save()
      elif run.writer.failed():
        run.wait()
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
  processes.check_same(t.hang_seconds, checkpoint=f'step {opened.step}')
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


@contextlib.contextmanager
def _writing(workdir: pathlib.Path) -> Iterator[None]:
  """Names the workdir where a file in it cannot be written."""
  try:
    yield
  except store.NotSaved as error:
    raise OSError(f'{error}, and run the same command to resume') from error
  except OSError as error:
    if not error.errno:  # in words already
      raise
    raise OSError(f'--workdir={workdir}: cannot write there ({in_words(error)}); make room or give permission, and '
                  'run the same command to resume') from error
