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
  faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
  try:
    yield
  finally:
    faulthandler.cancel_dump_traceback_later()


class Interrupts:
  """Records signals; a second Ctrl-C interrupts.

  received: the last signal, 0 if none. forwarded: whether the other processes of the job know of
    it.
  """

  def __init__(self, numbers: tuple[int, ...]):
    self.numbers = numbers

  def __enter__(self) -> 'Interrupts':
    self.received, self.forwarded, self.old_handlers = 0, False, {}
    # handlers can be set in the main thread only; some notebooks run in another
    with contextlib.suppress(ValueError):
      self.old_handlers = {number: signal.signal(number, self._receive) for number in self.numbers}
    return self

  def _receive(self, number, frame) -> None:
    if self.received == signal.SIGINT == number:
      raise KeyboardInterrupt
    self.received = number

  def __exit__(self, *_) -> None:
    for number, handler in self.old_handlers.items():
      signal.signal(number, handler)
