"""Watches a run: ends it when it hangs, records the signals that ask it to stop."""
import contextlib
import dataclasses
import faulthandler
import functools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

TICK_SECONDS = 1  # between two looks at what is waited for
GRACE_SECONDS = 10  # more, until a process ends in which Python itself hangs


@dataclasses.dataclass(eq=False)
class _Wait:
  """A block that is watched: how long it may take, what it waits for, when it is too late."""
  seconds: float
  what: str
  until: float = math.inf

  def restart(self) -> None:
    self.until = time.monotonic() + self.seconds


_waits: list[_Wait] = []  # of this process, the innermost one last


@contextlib.contextmanager
def watched(seconds: float, what: str) -> Iterator[Callable[[], None]]:
  """Ends the process with exit code 1 when the block takes longer; prints the stacks of all threads first, then a
  line that names what was waited for.

  Yields a function that starts the time anew: a block of many parts calls it after each. Blocks may lie in each
  other. Works even when Python itself hangs, but then without the line. With 0 seconds nothing is watched.

  Args:
    what: such as 'the batch of step 7'.
  """
  wait = _Wait(seconds, what)
  if not seconds:
    yield wait.restart
    return
  wait.restart()
  _start_watching(os.getpid())
  _waits.append(wait)
  _set_alarm(seconds)
  try:
    yield wait.restart
  finally:
    _waits.remove(wait)
    if not _waits:
      faulthandler.cancel_dump_traceback_later()


@functools.cache
def _start_watching(process: int) -> None:
  """Starts the thread that watches, once in a process."""
  threading.Thread(target=_watch, name='watch', daemon=True).start()


def _set_alarm(seconds: float) -> None:
  """Ends the process a little later than that, by a thread outside of Python, where this one cannot run."""
  faulthandler.dump_traceback_later(min(seconds, 3600) + GRACE_SECONDS, exit=True, file=_stderr_descriptor())


def _watch() -> None:
  """Looks at what is waited for, and sets the alarm anew."""
  alarm_is_set = False
  while True:
    waits = list(_waits)
    left = min((wait.until for wait in waits), default=math.inf) - time.monotonic()
    if left <= 0:
      _end(waits[-1])
    if waits:
      _set_alarm(left)
    elif alarm_is_set:
      faulthandler.cancel_dump_traceback_later()
    alarm_is_set = bool(waits)
    time.sleep(max(0.01, min(left, TICK_SECONDS)))


def _end(wait: _Wait) -> None:
  """Ends the process with its last words."""
  faulthandler.dump_traceback(file=_stderr_descriptor())
  line = (f'mtp_jax: waited {wait.seconds:g} seconds for {wait.what}; the stacks of all threads are above; run the '
          'same command to resume, with a higher config.train.hang_seconds if it is only slow\n')
  with contextlib.suppress(OSError):
    os.write(_stderr_descriptor(), line.encode())
  os._exit(1)


def _stderr_descriptor() -> int:
  """That of the process: a notebook's sys.stderr has none, and a closed one is None."""
  return sys.__stderr__.fileno() if sys.__stderr__ else 2


class Interrupts:
  """Records signals; a second Ctrl-C interrupts. SIGHUP stays ignored where `nohup` had it ignored.

  received: the last signal, 0 if none. forwarded: whether the other processes of the job know of
    it. asked: how often this process has asked whether to stop.
  """

  def __init__(self, numbers: tuple[int, ...]):
    self.numbers = numbers

  def __enter__(self) -> 'Interrupts':
    self.received, self.forwarded, self.asked, self.old_handlers = 0, False, 0, {}
    # handlers can be set in the main thread only; some notebooks run in another
    with contextlib.suppress(ValueError):
      self.old_handlers = {number: signal.signal(number, self._receive) for number in heard(self.numbers)}
    return self

  def _receive(self, number, frame) -> None:
    if self.received == signal.SIGINT == number:
      raise KeyboardInterrupt
    self.received = number

  def __exit__(self, *_) -> None:
    for number, handler in self.old_handlers.items():
      signal.signal(number, handler)


def heard(numbers: tuple[int, ...]) -> list[int]:
  """Those of the signals that this process may handle: not a SIGHUP that `nohup` had ignored."""
  return [number for number in numbers
          if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
