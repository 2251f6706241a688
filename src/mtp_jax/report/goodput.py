"""Where the time of a run went, over all its restarts: an account of the event log (events.py).

A run that was killed and began again lost the steps after its checkpoint: their time is counted as
`lost`. `down` is the time between two runs; it includes the steps since the last record of a run
that was killed, which nothing recorded. `other` is time within a run that no event covers. Goodput
is the fraction of the time in kept steps.
"""
from mtp_jax.report.events import KINDS, split_runs
from mtp_jax.report.plot import picture

ACCOUNTS = (*KINDS, 'lost', 'other', 'down')


def account(events: list[dict]) -> dict:
  """Seconds by kind, which sum to wall_seconds; and runs, steps, lost_steps, goodput."""
  seconds, lost_steps, runs = dict.fromkeys(ACCOUNTS, 0.0), 0, split_runs(events)
  for run, later in zip(runs, [*runs[1:], None]):
    began, ended = run[0]['time'], max(event['time'] + event['seconds'] for event in run)
    last_step = run[0]['step']
    for event in run[1:]:
      if event['kind'] == 'step':
        steps, last_step = event['step'] - last_step, event['step']
        lost = _lost_steps(steps, last_step, later)
        lost_seconds = event['seconds'] * lost / max(1, steps)
        lost_steps += lost
        seconds['lost'] += lost_seconds
        seconds['step'] += event['seconds'] - lost_seconds
      else:
        seconds[event['kind'] if event['kind'] in KINDS else 'other'] += event['seconds']
    covered = sum(event['seconds'] for event in run[1:])
    seconds['other'] += max(0.0, ended - began - covered)
    if later:
      seconds['down'] += max(0.0, later[0]['time'] - ended)
  wall = sum(seconds.values())
  return {'runs': len(runs), 'steps': max(event['step'] for event in runs[-1]),
          'lost_steps': lost_steps,
          'wall_seconds': wall, 'goodput': seconds['step'] / wall if wall else 0.0,
          'seconds': seconds}


def _lost_steps(steps: int, last_step: int, later: list[dict] | None) -> int:
  """How many of the `steps` steps up to `last_step` the later run repeats."""
  return max(0, min(steps, last_step - later[0]['step'])) if later else 0


def plot(events: list[dict], path: str) -> None:
  """Draws one bar per run, time to the right, coloured by kind."""
  runs = split_runs(events)
  with picture(path, 9, 1.5 + 0.4 * len(runs)) as axes:
    for k, kind in enumerate(KINDS):
      bars = [(i, event['time'] - events[0]['time'], event['seconds'])
              for i, run in enumerate(runs) for event in run if event['kind'] == kind]
      if bars:
        rows, begins, widths = zip(*bars)
        axes.barh(rows, widths, left=begins, color=f'C{k}', label=kind)
    axes.set(xlabel='seconds', ylabel='run', yticks=range(len(runs)))
    axes.invert_yaxis()
    axes.legend(loc='upper left', bbox_to_anchor=(1, 1))
