"""The metrics log, workdir/metrics.jsonl, and the same numbers for the trackers (trackers.py)."""
import contextlib
import json
import math
import pathlib
from collections.abc import Callable, Sequence

from mtp_jax.config.errors import in_words
from mtp_jax.report.display import print_stderr
from mtp_jax.report.lines import Lines
from mtp_jax.report.trackers import Tracker, flat

FILE = 'metrics.jsonl'


class Log:
  """Writes one JSON line per record to workdir/metrics.jsonl, and its numbers to the trackers.

  A tracker that fails is left out from then on, with a line; it never ends the run.

  On resume, records after the checkpoint are dropped, and so is the validation at its step, which
  the run repeats: the file then holds what a run without interruption would have written.

  Args:
    step: of the checkpoint; 0 for a new run.
    note: gets a line when something cannot be written.
  """

  def __init__(self, workdir: pathlib.Path, step: int, trackers: Sequence[Tracker] = (),
               note: Callable[[str], None] = print_stderr):
    self.path, self.trackers, self.note = workdir / FILE, list(trackers), note
    self.failed = []
    if self.path.exists():
      lines = self.path.read_text(errors='replace').splitlines()
      kept = [line for line in lines if _position(line) <= (step, False)]
      temporary = self.path.with_suffix('.tmp')
      temporary.write_text(''.join(line + '\n' for line in kept))
      temporary.replace(self.path)
    self.lines = Lines(self.path, note)

  def write(self, step: int, kind: str, values: dict) -> None:
    """Writes numbers, or lists of one number per future; null where one is not finite."""
    self.lines.write(json.dumps(finite({'step': step, 'kind': kind, **values})))
    self._tell(lambda tracker: tracker.write(step, flat(kind, values)))

  def close(self) -> None:
    self.lines.close()
    self._tell(lambda tracker: tracker.close())
    for tracker in self.failed:
      with contextlib.suppress(Exception):
        tracker.close()

  def _tell(self, tell: Callable[[Tracker], None]) -> None:
    for tracker in tuple(self.trackers):
      try:
        tell(tracker)
      except Exception as error:  # whatever a program of others may raise
        self.note(f'{type(tracker).__name__}: gets no more records ({in_words(error)}); the run goes on')
        self.trackers.remove(tracker)
        self.failed.append(tracker)


def read_log(workdir: pathlib.Path) -> list[dict]:
  """The records of a workdir, in order; none if it has no log. Lines that a crash cut off are skipped."""
  records = []
  with contextlib.suppress(FileNotFoundError):
    for line in (workdir / FILE).read_bytes().decode(errors='replace').splitlines():
      if _position(line)[0] < math.inf:
        records.append(json.loads(line))
  return records


def finite(value):
  """The value with None, JSON's null, in place of every number that is not finite."""
  if isinstance(value, dict):
    return {key: finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _position(line: str) -> tuple[float, bool]:
  """(step, is a validation) of a record; a line that a crash cut off comes after all others."""
  try:
    record = json.loads(line)
    return record['step'], record['kind'] == 'validation'
  except (ValueError, TypeError, KeyError):
    return math.inf, True
