"""Tokens per second, model-FLOP utilisation and the wait for data, between two log records."""
import collections
import contextlib
import math
import statistics
import time
from collections.abc import Iterator

from mtp_jax.report.events import Events


class Speed:
  """Measures the steps since the last record, and writes to the event log what the time was spent
  on.

  Args:
    step: the step at which the run begins.
    peak_flops: FLOP/s of all devices together; nan where it is not known, and then there is no MFU.
  """

  def __init__(self, step: int, peak_flops: float, events: Events):
    self.peak_flops, self.events = peak_flops, events
    self.step_seconds = collections.deque(maxlen=20)  # of the latest records
    self._restart(step)

  def _restart(self, step: int) -> None:
    self.step, self.start, self.began, self.waited = step, time.perf_counter(), time.time(), 0.0
    self.tokens = self.flops = 0  # of the steps since

  def add(self, tokens: int, flops_per_token: int) -> None:
    """Counts a step."""
    self.tokens += tokens
    self.flops += tokens * flops_per_token

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the block as time spent waiting for data."""
    start = time.perf_counter()
    yield
    self.waited += time.perf_counter() - start

  @contextlib.contextmanager
  def paused(self, kind: str, step: int) -> Iterator[None]:
    """Does not count the block as time of steps: compilation, evaluation, saving."""
    start = time.perf_counter()
    with self.events.span(kind, step):
      yield
    self.start += time.perf_counter() - start

  def since_last(self, step: int, steps: int) -> dict:
    """Values since the last call: tokens_per_second, data_wait (a fraction), eta_seconds, mfu.

    mfu is nan where it would be above 1: then the peak was measured while other work kept the machine busy.
    """
    seconds = max(time.perf_counter() - self.start, 1e-9)
    done, waited, tokens, flops = step - self.step, self.waited, self.tokens, self.flops
    self.events.write('data_wait', self.began, waited, step)
    self.events.write('step', self.began, seconds - waited, step)
    self._restart(step)
    self.step_seconds.append(seconds / max(done, 1))
    values = {'tokens_per_second': tokens / seconds,
              'data_wait': waited / seconds,
              'eta_seconds': (steps - step) * statistics.median(self.step_seconds)}
    if not math.isnan(self.peak_flops):
      mfu = flops / seconds / self.peak_flops
      values['mfu'] = mfu if mfu <= 1 else math.nan
    return values
