"""Progress of a run on a terminal: bars of rich; elsewhere plain lines on stderr.

Telling never ends a run: what cannot be written, since stderr is closed, its reader has gone or the
disk is full, is dropped.
"""
import contextlib
import io
import math
import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column


class Stderr(io.TextIOBase):
  """stderr, without the errors of writing to it."""

  def __init__(self):
    self._stream = sys.stderr  # None where the process was started without one

  @property
  def encoding(self) -> str:
    return getattr(self._stream, 'encoding', None) or 'utf-8'

  def isatty(self) -> bool:
    with contextlib.suppress(AttributeError, OSError, ValueError):
      return self._stream.isatty()
    return False

  def fileno(self) -> int:
    if self._stream is None:
      raise io.UnsupportedOperation('fileno')
    return self._stream.fileno()

  def write(self, text: str) -> int:
    with contextlib.suppress(AttributeError, OSError, ValueError):
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):
      self._stream.flush()


def print_stderr(line: str) -> None:
  """Prints a line to stderr; stdout holds only what a command returns."""
  print(line, file=Stderr(), flush=True)


def flush() -> None:
  """Writes what stdout and stderr still hold."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or without a reader
      stream.flush()


def format_numbers(values) -> str:
  """'3.756 3.703': three decimals each."""
  return ' '.join(f'{value:.3f}' for value in values)


class Display:
  """Progress of training: a bar on a terminal, one plain line per record elsewhere.

  Args:
    steps: of the whole run; start: those already done.
    note: prints a plain line.
    bar: whether a terminal may show a bar.
  """

  def __init__(self, steps: int, start: int, note, bar: bool = True):
    self.note, self.bar = note, None
    stderr = Stderr()
    if bar and stderr.isatty():
      # A narrow terminal cuts off the last column only.
      last = TextColumn('{task.description}',
                        table_column=Column(ratio=1, no_wrap=True, overflow='ellipsis'))
      columns = BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), last
      self.bar = Progress(TextColumn('train'), *columns, console=Console(file=stderr), expand=True)
      self.task = self.bar.add_task('', total=steps, completed=start)
      self.bar.start()

  def line(self, text: str) -> None:
    """Prints a line, above the bar if there is one."""
    if self.bar:
      self.bar.console.print(text, markup=False, highlight=False)
    else:
      self.note(text)

  def advance(self, step: int) -> None:
    """Moves the bar to a step."""
    if self.bar:
      self.bar.update(self.task, completed=step)

  def record(self, step: int, values: dict) -> None:
    """Shows a record of the metrics log (`train.fit` lists its keys)."""
    known = math.isfinite(values.get('mfu', math.nan))
    mfu = f'MFU {values["mfu"]:.1%}  ' if known else ''
    text = (f'loss {values["loss"]:.4f}  nats {format_numbers(values["nats"])}  '
            f'bits/byte {values["bits_per_byte"]:.3f}  lr {values["learning_rate"]:.2e}  '
            f'grad {values["gradient_norm"]:.2f}  update {values["update_norm"]:.3f}  '
            f'{values["tokens_per_second"]:,.0f} tokens/s  {mfu}data wait {values["data_wait"]:.1%}')
    if values.get('expert_load'):
      text += f'  busiest expert {max(values["expert_load"]):.1f} x the mean'
    if values['padding']:
      text += f'  padding {values["padding"]:.1%}'
    if values['quarantined_rows']:
      text += f'  quarantined {values["quarantined_rows"]} rows'
    if self.bar:
      self.bar.update(self.task, completed=step, description=text)
    else:
      self.note(f'step {step}  {text}  eta {values["eta_seconds"]:.0f} s')

  def close(self) -> None:
    if self.bar:
      self.bar.stop()


class Meter:
  """Progress through bytes of input: a bar on a terminal, a plain line every ten seconds elsewhere,
  and one at the end.

  Args:
    total: bytes of all inputs; ready: those that an earlier run has done.
    note: prints a plain line.
  """

  def __init__(self, total: int, ready: int, note=print_stderr):
    self.total, self.ready, self.note = total, ready, note
    self.done = (0, 0, 0)  # bytes, documents, tokens
    self.start = self.last_shown = time.perf_counter()
    self.bar, stderr = None, Stderr()
    if stderr.isatty():
      columns = BarColumn(), DownloadColumn(), TimeRemainingColumn()
      self.bar = Progress(TextColumn('prepare'), *columns, TextColumn('{task.description}'),
                          console=Console(file=stderr), transient=True)
      self.task = self.bar.add_task('', total=total, completed=ready)

  def __enter__(self) -> 'Meter':
    if self.bar:
      self.bar.start()
    return self

  def __exit__(self, error, *_) -> None:
    if self.bar:
      self.bar.stop()
    if any(self.done) and not error:
      self.note(f'{self._text()} in {time.perf_counter() - self.start:.1f} s')

  def show(self, size: int, documents: int, tokens: int) -> None:
    """Shows bytes, documents and tokens done since the meter was made; may be called often."""
    self.done, now = (size, documents, tokens), time.perf_counter()
    if now - self.last_shown < (0.1 if self.bar else 10):
      return
    self.last_shown = now
    if self.bar:
      self.bar.update(self.task, completed=self.ready + size, description=self._text())
    else:
      eta_seconds = (self.total - self.ready - size) * (now - self.start) / max(size, 1)
      fraction = (self.ready + size) / max(self.total, 1)
      self.note(f'{fraction:.1%}  {self._text()}  eta {eta_seconds:.0f} s')

  def _text(self) -> str:
    size, documents, tokens = self.done
    seconds = max(time.perf_counter() - self.start, 1e-9)
    return (f'{size / 1e6:,.1f} MB read, {documents:,} documents ({documents / seconds:,.0f}/s), '
            f'{tokens:,} tokens ({tokens / seconds:,.0f}/s)')


class Count:
  """Progress through a number of equal steps: a bar on a terminal, elsewhere a line every ten
  seconds, so that what takes less prints nothing.

  Args:
    what: is done; '' shows nothing.
    total: steps of what, such as rows.
    unit: of a step, such as 'rows'.
    note: prints a plain line.
  """

  def __init__(self, what: str, total: int, unit: str, note=print_stderr):
    self.what, self.total, self.unit, self.note = what, total, unit, note
    self.start = self.last_shown = None  # since the end of the first step, which compiles
    self.bar, stderr = None, Stderr()
    if what and stderr.isatty():
      self.bar = Progress(TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn(),
                          console=Console(file=stderr), transient=True)
      self.task = self.bar.add_task('', total=total)

  def __enter__(self) -> 'Count':
    if self.bar:
      self.bar.start()
    return self

  def __exit__(self, *_) -> None:
    if self.bar:
      self.bar.stop()

  def show(self, done: int) -> None:
    """Shows how many steps are done; may be called often."""
    if self.bar:
      self.bar.update(self.task, completed=done)
      return
    now = time.perf_counter()
    if self.start is None:
      self.start, self.last_shown = (now, done), now
    elif self.what and done < self.total and now - self.last_shown >= 10:
      self.last_shown = now
      start, before = self.start
      eta_seconds = (self.total - done) * (now - start) / max(done - before, 1)
      self.note(f'{self.what}: {done:,} of {self.total:,} {self.unit}  eta {eta_seconds:.0f} s')
