"""What a run writes about its steps: metrics log, event log, display, and evidence of bad steps.

A step is recorded one step later: reading its metrics waits for the device, which then has the
next step to work on.
"""
import dataclasses
import pathlib
from collections.abc import Sequence

import jax

from mtp_jax.config import Config
from mtp_jax.config.errors import in_words
from mtp_jax.report.display import Display, format_numbers
from mtp_jax.report.events import Events
from mtp_jax.report.log import Log
from mtp_jax.report.speed import Speed
from mtp_jax.report.trackers import Tracker
from mtp_jax.train import processes
from mtp_jax.train.guards import CAUSES, NO_LIMITS, Guard, Limits
from mtp_jax.train.nonfinite import NotFinite, write_evidence
from mtp_jax.train.watch import watched


@dataclasses.dataclass(frozen=True)
class Step:
  """A step that was started and is not recorded yet."""
  number: int
  metrics: dict  # on the device
  batch: dict
  tokens: int
  flops_per_token: int  # of the model
  quarantined_rows: int  # of this process, since the start
  limits: Limits


class Recorder:
  """Records the steps of a run.

  Args:
    folder: of this process.
    step: at which the run begins.
    peak_flops: FLOP/s of all devices together, nan if unknown.
    guard: told of every step.
    skipped_rows: rows that roll-backs have left out so far.
  """

  def __init__(self, config: Config, folder: pathlib.Path, step: int, peak_flops: float,
               events: Events, display: Display, trackers: Sequence[Tracker], guard: Guard, skipped_rows: int):
    self.config, self.folder, self.display, self.guard = config, folder, display, guard
    self.skipped_rows = skipped_rows
    self.speed = Speed(step, peak_flops, events)
    self.log = Log(folder, step, trackers, display.line)
    self.waiting: Step | None = None
    self.bad_in_a_row = 0

  def add(self, step: Step) -> None:
    """Records the step before this one."""
    self.flush()
    self.waiting = step

  def flush(self) -> None:
    """Records the last step added; waits until it has run.

    Raises:
      NotFinite: it is the config.train.skipped_allowed-th bad step in a row, of any cause.
    """
    step, self.waiting = self.waiting, None
    if step is not None:
      with watched(self.config.train.hang_seconds, f'the devices to end step {step.number}'):
        self._record(step)

  def _record(self, step: Step) -> None:
    t, n = self.config.train, step.number
    self.speed.add(step.tokens, step.flops_per_token)
    metrics = jax.tree.map(lambda x: x.tolist(), jax.device_get(step.metrics))
    assert not metrics.get('dropped'), f'step {n}: {metrics["dropped"]} rows reached no expert'
    cause, self.bad_in_a_row = metrics['skip_cause'], metrics['skipped_in_a_row']
    self.guard.add(n, metrics['loss'], metrics['gradient_norm'], cause)
    metrics |= {'skipped_' + name.replace(' ', '_'): count for name, count in self.guard.skipped.items()}
    if step.limits != NO_LIMITS:
      metrics |= {f'{name}_limit': limit for name, limit in step.limits._asdict().items()}
    if self.skipped_rows:
      metrics['skipped_rows'] = self.skipped_rows
    if cause:
      try:
        evidence = f'evidence in {write_evidence(self.folder, n, step.batch, metrics)}'
      except OSError as error:
        evidence = f'no evidence is kept ({in_words(error)})'
      self.display.line(f'step {n} skipped, {CAUSES[cause - 1]}: loss {metrics["loss"]:.4g}, gradient norm '
                        f'{metrics["gradient_norm"]:.4g}; {evidence}')
    if cause or n % t.log_every == 0 or n == t.steps:
      metrics |= self.speed.since_last(n, t.steps)
      metrics |= {'quarantined_rows': processes.total(step.quarantined_rows, t.hang_seconds)}
      self.log.write(n, 'train', metrics)
      self.display.record(n, metrics)
    else:
      self.display.advance(n)
    if self.bad_in_a_row >= t.skipped_allowed:
      raise NotFinite(n, f'{self.bad_in_a_row} bad steps in a row, the last one: {CAUSES[cause - 1]}')

  def validation(self, step: int, metrics: dict) -> None:
    """Records the metrics of a validation."""
    self.log.write(step, 'validation', metrics)
    text = (f'step {step} validation: {metrics["bits_per_byte"]:.4f} bits per byte, '
            f'nats {format_numbers(metrics["nats"])}, accuracy {format_numbers(metrics["accuracy"])}')
    if metrics['acceptance_greedy']:
      text += f', acceptance {format_numbers(metrics["acceptance_greedy"])}'
    self.display.line(text)

  def close(self) -> None:
    self.log.close()
