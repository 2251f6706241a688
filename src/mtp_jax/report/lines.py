"""A file of lines that a run appends to. Where it cannot be written, the run goes on, and the lines wait."""
import collections
import pathlib
from collections.abc import Callable

from mtp_jax.config.errors import in_words

MOST_WAITING = 100_000


class Lines:
  """Appends lines; those that could not be written, as on a full disk, are written before the next one that can.

  Args:
    note: gets one line when the file cannot be written, and one when it can again.
  """

  def __init__(self, path: pathlib.Path, note: Callable[[str], None]):
    self.path, self.note = path, note
    self.file, self.waiting = path.open('ab', buffering=0), collections.deque()
    self.is_failing, self.lost = False, 0
    self.is_torn = not _ends_with_a_line(path)  # a write ended within a line, which readers skip

  def write(self, line: str) -> None:
    self.waiting.append(line)
    if len(self.waiting) > MOST_WAITING:
      self.waiting.popleft()
      self.lost += 1
    try:
      while self.waiting:
        self._write_all(('\n' if self.is_torn else '') + self.waiting[0] + '\n')
        self.waiting.popleft()
      if self.is_failing:
        self.note(f'{self.path}: can be written again; {self.lost or "no"} lines are lost')
      self.is_failing = False
    except OSError as error:
      if not self.is_failing:
        self.note(f'{self.path}: cannot be written ({in_words(error)}); the run goes on, its lines wait')
      self.is_failing = True

  def _write_all(self, text: str) -> None:
    content = text.encode()
    while content:
      content = content[self.file.write(content):]
      self.is_torn = bool(content)

  def close(self) -> None:
    if self.waiting:
      self.note(f'{self.path}: {len(self.waiting)} lines could not be written')
    self.file.close()


def _ends_with_a_line(path: pathlib.Path) -> bool:
  with path.open('rb') as file:
    file.seek(max(0, path.stat().st_size - 1))
    return file.read() in (b'', b'\n')
