"""A run in progress: what it holds between steps, and all that it does but decide what comes next; that is fit.py."""
import contextlib
import dataclasses
import functools
import json
import pathlib
import secrets
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mtp_jax import chips
from mtp_jax.checkpoint import store
from mtp_jax.checkpoint.record import CONFIG, RUN, TOKENIZER, run_name
from mtp_jax.config import Config
from mtp_jax.config.errors import cannot
from mtp_jax.data.folder import Folder
from mtp_jax.data.rows import validation_batches
from mtp_jax.evaluation.held_out import evaluate
from mtp_jax.mesh import process_share, put
from mtp_jax.model import costs
from mtp_jax.model.model import conventions
from mtp_jax.report.display import Display, print_stderr
from mtp_jax.report.events import FILE as EVENTS
from mtp_jax.report.events import Events
from mtp_jax.report.log import FILE as METRICS
from mtp_jax.report.trackers import open_trackers
from mtp_jax.tokenizer import byte_lengths, decodable
from mtp_jax.train import processes
from mtp_jax.train.guards import Guard, changes_loss
from mtp_jax.train.opening import Opened
from mtp_jax.train.own_files import OwnFiles, check_owner
from mtp_jax.train.recording import Recorder, Step
from mtp_jax.train.self_check import twice
from mtp_jax.train.step import State, compiled_init, compiled_step, restore
from mtp_jax.train.watch import watched


class Run:
  """A run in progress: its state, its position in the data, its records and checkpoints."""

  def __init__(self, config: Config, own: OwnFiles, opened: Opened, skipped: list[tuple[int, int]],
               mesh, display: Display, started: float):
    workdir, folder, is_first = own.workdir, own.folder, own.is_first
    self.config, self.own, self.folder, self.mesh, self.display = config, own, folder, mesh, display
    self.step = self.saved_step = self.kept_step = opened.step  # saved: or about to be
    self.saved_at = time.monotonic()
    self.validation = {}
    self.active = ()  # futures that the step computes; known once the first one starts
    self.rows = 0  # of the step
    self.profiling = False
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
      self.events = stack.enter_context(contextlib.closing(Events(folder, display.line)))
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
    files = Folder(folder, '--workdir')
    files.write(CONFIG, f'{json.dumps(config.to_dict(), indent=2)}\n'.encode())
    if is_first:
      files.write(RUN, f'{self.record["run"]}\n'.encode())
    if is_first and opened.tokenizer.model:
      files.write(TOKENIZER, opened.tokenizer.model)
    own.publish(display.line)

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
    with self.recorder.speed.waiting(), self._watched(f'the batch of step {self.step + 1}'):
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
      timed = self._watched(f'the devices to take step {self.step + 1}')
    every = self.config.train.self_check_every
    advance = functools.partial(twice, self.step + 1) if every and (self.step + 1) % every == 0 else compiled_step
    with timed:
      self.state, metrics = advance(self.config, self.state, batch, self.byte_length_V, fraction, limits)
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
      with self._watched(f'the devices to end step {self.step}, the last one of the profile'):
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
      held_out = validation_batches(self.held_out, min(n, size), n, *self.share)
      while True:
        with self._watched('the next batch of held-out rows'):
          batch = next(held_out, None)
        if batch is None:
          return
        yield batch
        batch_is_done()
        if signal := heard():
          stopped.append(signal)
          return

    compiles = not self.validation  # which may take longer
    with (self.recorder.speed.paused('evaluation', self.step),
          watched(0 if compiles else self.config.train.hang_seconds,
                  f'the devices to end a batch of the validation after step {self.step}') as batch_is_done):
      metrics = evaluate(self.config, self.state.model, batches(), self.byte_length_V,
                         self.decodable_V, self.mesh)
      if stopped:
        return stopped[0]
      quarantined_rows = processes.total(self.held_out.quarantined, self.config.train.hang_seconds)
    self.validation = metrics | {'quarantined_rows': quarantined_rows}
    self.recorder.validation(self.step, self.validation)
    return 0

  def try_to_save(self) -> None:
    """Starts to write a checkpoint of the last step. Where that fails the run goes on, see `_go_on_unsaved`."""
    try:
      self.save()
    except store.NotSaved as error:
      self._go_on_unsaved(error)

  def save(self) -> None:
    """Starts to write a checkpoint of the last step, unless it has one, or is bad and not the end of the run.

    Raises:
      NotSaved: it cannot begin.
    """
    self.recorder.flush()
    self.wait()
    if self.step == self.saved_step or self.recorder.bad_in_a_row and self.step < self.config.train.steps:
      return
    with self.recorder.speed.paused('save', self.step), self._watched(f'the checkpoint of step {self.step} to begin'):
      self._publish()
      record = {'step': self.step, 'data': self.batches.get_state(), 'guard': self.guard.state(), **self.record}
      fingerprints = self.writer.save(self.step, self.state.model, self.state.without_model(), record)
      self.events.write('checkpoint', time.time(), 0.0, self.step, fingerprints)
    self.saved_step = self.step

  def _publish(self) -> None:
    """Copies the logs to a bucket. Raises BadInput if another run has started there."""
    if self.own.bucket is not None:
      self.own.publish(self.display.line)
      check_owner(self.own, processes.total(bool(self.own.taken_by), self.config.train.hang_seconds) > 0)

  def wait(self) -> None:
    """Waits for the checkpoint that is being written. Where it failed the run goes on, see `_go_on_unsaved`."""
    if self.writer.pending:
      try:
        with (self.recorder.speed.paused('wait_for_save', self.step),
              self._watched(f'the checkpoint of step {self.saved_step} to be written')):
          self.saved_at, self.kept_step = self.writer.wait(), self.saved_step
      except store.NotSaved as error:
        self._go_on_unsaved(error)

  def _watched(self, what: str):
    """`watched` for config.train.hang_seconds."""
    return watched(self.config.train.hang_seconds, what)

  def _go_on_unsaved(self, error: store.NotSaved) -> None:
    """Tells of a save that failed.

    Raises:
      NotSaved: the run could save nothing for config.train.unsaved_seconds, or is one of several processes, which
        would wait for each other.
    """
    self.saved_step = self.kept_step
    unsaved = time.monotonic() - self.saved_at
    if jax.process_count() > 1 or unsaved > self.config.train.unsaved_seconds:
      raise error
    self.display.line(f'step {self.step}: {error}; the run goes on, and saves the next one; nothing was saved for '
                      f'{unsaved:.0f} seconds')

  def close(self, after_error: bool = False) -> None:
    """Waits for the checkpoint that is being written, then closes all files.

    Args:
      after_error: the run ends by another error, which a save that failed must not hide.

    Raises:
      NotSaved: the save failed, and there is no other error.
    """
    try:
      self.profile(range(0))
      with (self.events.span('wait_for_save', self.step) if self.writer.pending else contextlib.nullcontext(),
            self._watched(f'the checkpoint of step {self.saved_step} to be written')):
        self.writer.close()
    except store.NotSaved as error:
      if not after_error:
        raise
      self.display.line(f'step {self.step}: {error}')
    finally:
      self.files.close()
      self.own.publish(self.display.line, seconds=60)


def _name_of_run(workdir: pathlib.Path, opened: Opened) -> str:
  """That of the run that is resumed; a new one if there is none."""
  resumed = opened.record and (opened.record.get('run') or run_name(workdir))
  return resumed or secrets.token_hex(8)
