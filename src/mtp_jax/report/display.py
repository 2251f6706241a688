"""What a run shows and hears while it works: a progress bar or plain lines, speed, signals."""
import math
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column


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

  def __init__(self, total: int, ready: int, note=say):
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
