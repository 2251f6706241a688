"""The event log of a run: what its time was spent on, in workdir/events.jsonl.

    one JSON object a line: time (seconds since 1970 when it began), kind, seconds (duration), step

A run begins with the event `start`. One `step` and one `data_wait` event cover all steps since the
last record. The event `checkpoint` has the fingerprints of what was saved: two runs of the same steps,
whatever interrupted them, have the same ones.
"""
import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator

from mtp_jax.config import BadInput, folder_path
from mtp_jax.config.errors import in_words
from mtp_jax.report.display import print_stderr
from mtp_jax.report.lines import Lines

FILE = 'events.jsonl'
KINDS = ('step', 'data_wait', 'evaluation', 'save', 'wait_for_save', 'compile', 'restore', 'setup')


class Events:
  """Appends to the event log of a workdir; a crash can cut off only the last line."""

  def __init__(self, workdir: pathlib.Path, note: Callable[[str], None] = print_stderr):
    self._lines = Lines(workdir / FILE, note)

  def write(self, kind: str, began: float, seconds: float, step: int, more: dict | None = None) -> None:
    """Appends an event that began at time `began`, in seconds since 1970, with the fields of `more`."""
    event = {'time': round(began, 3), 'kind': kind, 'seconds': round(seconds, 6), 'step': step}
    event |= more or {}
    self._lines.write(json.dumps(event))

  @contextlib.contextmanager
  def span(self, kind: str, step: int) -> Iterator[None]:
    """Appends an event that lasts as long as the block, even if the block raises."""
    began, start = time.time(), time.perf_counter()
    try:
      yield
    finally:
      self.write(kind, began, time.perf_counter() - start, step)

  def close(self) -> None:
    self._lines.close()


def read_events(workdir) -> list[dict]:
  """The events of a workdir, in order; lines that a crash cut off are skipped.

  Raises:
    BadInput: there are none.
  """
  path = folder_path(workdir) / FILE
  try:
    lines = path.read_bytes().decode(errors='replace').splitlines()
  except OSError as error:
    raise BadInput(f'--workdir={workdir}: no {FILE} there ({error.strerror or in_words(error)}); give the workdir of '
                   'a run') from None
  events = []
  for line in lines:
    with contextlib.suppress(ValueError, KeyError, TypeError):
      event = json.loads(line)
      events.append({'time': float(event['time']), 'kind': str(event['kind']),
                     'seconds': float(event['seconds']),
                     'step': int(event['step'])})
  if not events or events[0]['kind'] != 'start':
    raise BadInput(f'--workdir={workdir}: {FILE} holds no run; its first event is not start')
  return events


def split_runs(events: list[dict]) -> list[list[dict]]:
  """The events of each run; each list begins with its `start`."""
  runs = []
  for event in events:
    if event['kind'] == 'start':
      runs.append([])
    runs[-1].append(event)
  return runs
