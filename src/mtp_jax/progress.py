"""What a run shows and hears while it works: a progress bar or plain lines, speed, signals."""
import collections
import contextlib
import faulthandler
import math
import signal
import statistics
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from mtp_jax.goodput import Events


def say(line: str) -> None:
  """Where nothing else is told to: a line of its own, apart from what a command prints."""
  print(line, file=sys.stderr, flush=True)


class Display:
  """A progress bar on a terminal, one plain line a record elsewhere."""

  def __init__(self, steps: int, start: int, note, bar: bool = True):
    self.note, self.bar = note, None
    if bar and sys.stderr.isatty():
      last = TextColumn('{task.description}', table_column=Column(ratio=1, no_wrap=True, overflow='ellipsis'))  # a narrow terminal cuts it alone
      self.bar = Progress(TextColumn('train'), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), last, console=Console(stderr=True), expand=True)
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
    if found['padding']:
      text += f'  padding {found["padding"]:.1%}'
    if found['quarantined_rows']:
      text += f'  quarantined {found["quarantined_rows"]} rows'
    if self.bar:
      self.bar.update(self.task, completed=step, description=text)
    else:
      self.note(f'step {step}  {text}  eta {found["eta_seconds"]:.0f} s')

  def close(self) -> None:
    if self.bar:
      self.bar.stop()


def numbers(values) -> str:
  return ' '.join(f'{value:.3f}' for value in values)


class Meter:
  """Progress through bytes of input: a bar on a terminal, a plain line every ten seconds elsewhere, and one at the end."""

  def __init__(self, total: int, ready: int, note):
    self.total, self.ready, self.note, self.done = total, ready, note, (0, 0, 0)
    self.start = self.said = time.perf_counter()
    self.bar = None
    if sys.stderr.isatty():
      self.bar = Progress(TextColumn('prepare'), BarColumn(), DownloadColumn(), TimeRemainingColumn(), TextColumn('{task.description}'),
                          console=Console(stderr=True), transient=True)
      self.task = self.bar.add_task('', total=total, completed=ready)

  def __enter__(self):
    if self.bar:
      self.bar.start()
    return self

  def __exit__(self, error, *_):
    if self.bar:
      self.bar.stop()
    if any(self.done) and not error:
      self.note(f'{self._text()} in {time.perf_counter() - self.start:.1f} s')

  def add(self, size: int, documents: int, tokens: int) -> None:
    self.show(self.done[0] + size, self.done[1] + documents, self.done[2] + tokens)

  def show(self, *done: int) -> None:
    """Bytes, documents and tokens since the beginning of this work."""
    self.done, now = done, time.perf_counter()
    if now - self.said < (0.1 if self.bar else 10):
      return
    self.said = now
    if self.bar:
      self.bar.update(self.task, completed=self.ready + done[0], description=self._text())
    else:
      left = (self.total - self.ready - done[0]) * (now - self.start) / max(done[0], 1)
      self.note(f'{(self.ready + done[0]) / max(self.total, 1):.1%}  {self._text()}  eta {left:.0f} s')

  def _text(self) -> str:
    size, documents, tokens = self.done
    seconds = max(time.perf_counter() - self.start, 1e-9)
    return (f'{size / 1e6:,.1f} MB read, {documents:,} documents ({documents / seconds:,.0f}/s), {tokens:,} tokens ({tokens / seconds:,.0f}/s)')


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


@contextlib.contextmanager
def watched(seconds: float):
  """Ends the process, exit code 1, when the block takes longer: after the stacks of all threads, even where Python itself hangs. 0: never."""
  if not seconds:
    yield
    return
  faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
  try:
    yield
  finally:
    faulthandler.cancel_dump_traceback_later()


class Interrupts:
  """Remembers signals instead of dying of them; a second Ctrl-C interrupts at once. passed_on: whether others have been told."""

  def __init__(self, numbers: tuple[int, ...]):
    self.numbers = numbers

  def __enter__(self):
    self.received, self.passed_on, self.old = 0, False, {}
    with contextlib.suppress(ValueError):  # outside the main thread, as in some notebooks, signals stay with their owner
      self.old = {number: signal.signal(number, self._receive) for number in self.numbers}
    return self

  def _receive(self, number, frame):
    if self.received == signal.SIGINT == number:
      raise KeyboardInterrupt
    self.received = number

  def __exit__(self, *_):
    for number, handler in self.old.items():
      signal.signal(number, handler)
