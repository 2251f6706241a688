"""What a run shows and hears while it works: a progress bar or plain lines, speed, signals."""
import collections
import contextlib
import math
import signal
import statistics
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
  """A progress bar on a terminal, one plain line a record elsewhere."""

  def __init__(self, steps: int, start: int, note):
    self.note, self.bar = note, None
    if sys.stderr.isatty():
      self.bar = Progress(TextColumn('train'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn('{task.description}'),
                          console=Console(stderr=True))
      self.task = self.bar.add_task('', total=steps, completed=start)
      self.bar.start()

  def line(self, text: str) -> None:
    if self.bar:
      self.bar.console.print(text, markup=False, highlight=False)
    else:
      self.note(text)

  def advance(self, step: int) -> None:
    if self.bar:
      self.bar.update(self.task, completed=step)

  def record(self, step: int, found: dict) -> None:
    text = (f'loss {found["loss"]:.4f}  nats {numbers(found["nats"])}  bits/byte {found["bits_per_byte"]:.3f}  lr {found["learning_rate"]:.2e}  '
            f'grad {found["gradient_norm"]:.2f}  update {found["update_norm"]:.3f}  {found["tokens_per_second"]:,.0f} tokens/s  '
            f'MFU {found.get("mfu", math.nan):.1%}  data wait {found["data_wait"]:.1%}')
    if self.bar:
      self.bar.update(self.task, completed=step, description=text)
    else:
      self.note(f'step {step}  {text}  eta {found["eta_seconds"]:.0f} s')

  def close(self) -> None:
    if self.bar:
      self.bar.stop()


def numbers(values) -> str:
  return ' '.join(f'{value:.3f}' for value in values)


class Speed:
  """Tokens a second, MFU (where the chip's peak is known), the share of time spent waiting for data, and what remains, between two records."""

  def __init__(self, step: int, tokens_per_step: int, peak_flops: float):
    self.tokens_per_step, self.peak_flops = tokens_per_step, peak_flops
    self.recent = collections.deque(maxlen=20)  # seconds a step
    self._restart(step)

  def _restart(self, step: int) -> None:
    self.step, self.start, self.waited, self.flops = step, time.perf_counter(), 0.0, 0  # flops: of the steps since, added up by the run

  @contextlib.contextmanager
  def waiting(self):
    """Counts as time spent waiting for data."""
    start = time.perf_counter()
    yield
    self.waited += time.perf_counter() - start

  @contextlib.contextmanager
  def paused(self):
    """Does not count: validation and checkpoints."""
    start = time.perf_counter()
    yield
    self.start += time.perf_counter() - start

  def since_last(self, step: int, steps: int) -> dict:
    seconds, done, waited, flops = max(time.perf_counter() - self.start, 1e-9), step - self.step, self.waited, self.flops
    self._restart(step)
    self.recent.append(seconds / max(done, 1))
    rate = done * self.tokens_per_step / seconds
    found = {'tokens_per_second': rate, 'data_wait': waited / seconds, 'eta_seconds': (steps - step) * statistics.median(self.recent)}
    return found if math.isnan(self.peak_flops) else found | {'mfu': flops / seconds / self.peak_flops}


class Interrupts:
  """Remembers SIGTERM and SIGINT instead of dying of them; a second Ctrl-C interrupts at once."""

  def __enter__(self):
    self.received, self.old = 0, {}
    with contextlib.suppress(ValueError):  # outside the main thread, as in some notebooks, signals stay with their owner
      self.old = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
    return self

  def _receive(self, number, frame):
    if self.received == signal.SIGINT == number:
      raise KeyboardInterrupt
    self.received = number

  def __exit__(self, *_):
    for number, handler in self.old.items():
      signal.signal(number, handler)
