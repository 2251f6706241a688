"""train/watch."""
import contextlib
import faulthandler
import signal
import sys


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
