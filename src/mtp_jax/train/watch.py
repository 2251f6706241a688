"""Watches a run: ends it when a step hangs, records the signals that ask it to stop."""
import contextlib
import faulthandler
import signal
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def watched(seconds: float) -> Iterator[None]:
  """Ends the process with exit code 1 when the block takes longer; prints the stacks of all
  threads first.

  Works even when Python itself hangs. With 0 seconds nothing is watched.
  """
  if not seconds:
    yield
    return
  faulthandler.dump_traceback_later(seconds, exit=True, file=_stderr_descriptor())
  try:
    yield
  finally:
    faulthandler.cancel_dump_traceback_later()


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
