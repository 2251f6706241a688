"""Where the time of a run went: an event log that every run writes, and its account over all restarts.

    workdir/events.jsonl   one line an event: {'time': seconds since 1970, when it began, 'kind', 'seconds', 'step'}

A run begins with the event `start`; `step` and `data_wait` events stand for all steps since the last record. A run that was killed and began again
lost the steps after its checkpoint: their time is moved to `lost`. `down` is the time between runs, and that of the steps since the last record
of a run that was killed, of which nothing is known; `other` what no event covers. Goodput is the share of `step`. Nothing here needs JAX, or a cloud.
"""
import contextlib
import json
import pathlib
import time

from mtp_jax.config import BadInput
from mtp_jax.report.picture import picture

FILE = 'events.jsonl'
KINDS = ('step', 'data_wait', 'evaluation', 'save', 'compile', 'restore', 'setup', 'lost', 'other', 'down')


class Events:
  """Appends to the event log of a workdir. Each line is whole: what a crash cut off is dropped when it is read."""

  def __init__(self, workdir: pathlib.Path):
    self._file = (workdir / FILE).open('a', buffering=1)

  def write(self, kind: str, began: float, seconds: float, step: int) -> None:
    self._file.write(json.dumps({'time': round(began, 3), 'kind': kind, 'seconds': round(seconds, 6), 'step': step}) + '\n')

  @contextlib.contextmanager
  def span(self, kind: str, step: int):
    began, start = time.time(), time.perf_counter()
    try:
      yield
    finally:
      self.write(kind, began, time.perf_counter() - start, step)

  def close(self) -> None:
    self._file.close()


def read(workdir) -> list[dict]:
  """The events of a workdir, in order.

  Raises:
    BadInput: there are none.
  """
  path = pathlib.Path(workdir).expanduser() / FILE
  try:
    lines = path.read_text(errors='replace').splitlines()
  except OSError as error:
    raise BadInput(f'--workdir={workdir}: no {FILE} there ({error.strerror}); give the workdir of a run') from None
  events = []
  for line in lines:
    with contextlib.suppress(ValueError, KeyError, TypeError):
      event = json.loads(line)
      events.append({'time': float(event['time']), 'kind': str(event['kind']), 'seconds': float(event['seconds']), 'step': int(event['step'])})
  if not events or events[0]['kind'] != 'start':
    raise BadInput(f'--workdir={workdir}: {FILE} holds no run; it begins with another event than start')
  return events


def runs(events: list[dict]) -> list[list[dict]]:
  """The events of each run, from its `start` on."""
  found = []
  for event in events:
    if event['kind'] == 'start':
      found.append([])
    found[-1].append(event)
  return found


def account(events: list[dict]) -> dict:
  """Seconds by kind over all runs, which sum up to `wall_seconds`; and runs, steps, lost_steps, goodput."""
  seconds, lost_steps, each = dict.fromkeys(KINDS, 0.0), 0, runs(events)
  for i, run in enumerate(each):
    began, ended = run[0]['time'], max(event['time'] + event['seconds'] for event in run)
    resumed = each[i + 1][0]['step'] if i + 1 < len(each) else None
    covered, last = 0.0, run[0]['step']
    for event in run[1:]:
      kind, covered = event['kind'], covered + event['seconds']
      if kind == 'step':
        steps, last = event['step'] - last, event['step']
        gone = max(0, min(steps, last - resumed)) if resumed is not None else 0
        lost_steps += gone
        lost = event['seconds'] * gone / max(1, steps)
        seconds['lost'] += lost
        seconds['step'] += event['seconds'] - lost
      else:
        seconds[kind if kind in seconds else 'other'] += event['seconds']
    seconds['other'] += max(0.0, ended - began - covered)
    if i + 1 < len(each):
      seconds['down'] += max(0.0, each[i + 1][0]['time'] - ended)
  wall = sum(seconds.values())
  return {'runs': len(each), 'steps': each[-1][0]['step'] if len(each[-1]) == 1 else max(event['step'] for event in each[-1]),
          'lost_steps': lost_steps, 'wall_seconds': wall, 'goodput': seconds['step'] / wall if wall else 0.0, 'seconds': seconds}


def plot(events: list[dict], path: str) -> None:
  """A bar a run, time to the right, coloured by kind."""
  each = runs(events)
  with picture(path, 9, 1.5 + 0.4 * len(each)) as axes:
    for k, kind in enumerate(kind for kind in KINDS if kind not in ('lost', 'other', 'down')):
      bars = [(i, event['time'] - events[0]['time'], event['seconds']) for i, run in enumerate(each) for event in run if event['kind'] == kind]
      if bars:
        axes.barh([i for i, _, _ in bars], [seconds for *_, seconds in bars], left=[began for _, began, _ in bars], color=f'C{k}', label=kind)
    axes.set(xlabel='seconds', ylabel='run', yticks=range(len(each)))
    axes.invert_yaxis()
    axes.legend(loc='upper left', bbox_to_anchor=(1, 1))
