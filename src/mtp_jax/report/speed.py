"""report/speed."""
import collections
import contextlib
import math
import statistics
import time

from mtp_jax.report.goodput import Events


class Speed:
  """Tokens a second, MFU (where the chip's peak is known), the share of time spent waiting for data, and what remains, between two records.
  Tells the event log what the time was spent on."""

  def __init__(self, step: int, tokens_per_step: int, peak_flops: float, events: Events):
    self.tokens_per_step, self.peak_flops, self.events = tokens_per_step, peak_flops, events
    self.recent = collections.deque(maxlen=20)  # seconds a step
    self._restart(step)

  def _restart(self, step: int) -> None:
    self.step, self.start, self.began, self.waited = step, time.perf_counter(), time.time(), 0.0
    self.flops = 0  # of the steps since, added up by the run

  @contextlib.contextmanager
  def waiting(self):
    """Counts as time spent waiting for data."""
    start = time.perf_counter()
    yield
    self.waited += time.perf_counter() - start

  @contextlib.contextmanager
  def paused(self, kind: str, step: int):
    """Does not count: compilation, evaluation, saving."""
    start = time.perf_counter()
    with self.events.span(kind, step):
      yield
    self.start += time.perf_counter() - start

  def since_last(self, step: int, steps: int) -> dict:
    seconds, done, waited, flops = max(time.perf_counter() - self.start, 1e-9), step - self.step, self.waited, self.flops
    self.events.write('data_wait', self.began, waited, step)
    self.events.write('step', self.began, seconds - waited, step)
    self._restart(step)
    self.recent.append(seconds / max(done, 1))
    rate = done * self.tokens_per_step / seconds
    found = {'tokens_per_second': rate, 'data_wait': waited / seconds, 'eta_seconds': (steps - step) * statistics.median(self.recent)}
    return found if math.isnan(self.peak_flops) else found | {'mfu': flops / seconds / self.peak_flops}
