"""How often to save when hosts fail, and the goodput to expect: a model, and a simulation of it.

Hosts fail independently, each after a time that is exponentially distributed with the mean `mtbf`.
One failure ends the job, so the job's mean is M = mtbf / hosts. After every τ seconds of steps the
job saves for δ; a failure costs what came after the last save, then a restart of R, in which the
next failure may come. The part of the time that is spent in steps which are kept (Daly 2006,
doi:10.1016/j.future.2004.11.016, the complete cost function):

    goodput(τ) = τ / (M exp(R/M) (exp((τ+δ)/M) - 1)),    1 / (1 + δ/τ) without failures

The best τ does not depend on R:

    Young 1974                 sqrt(2δM), the first order in sqrt(δ/M)
    Daly 2006, where δ < 2M    sqrt(2δM) (1 + sqrt(δ/2M)/3 + (δ/2M)/9) - δ;    M elsewhere

A save counts as done when the steps go on; what is still written in the background is not in the
model, nor are planned stops.
"""
import collections
import dataclasses
import math
import statistics

import numpy as np

from mtp_jax.config import BadInput
from mtp_jax.report.events import FILE, split_runs
from mtp_jax.report.plot import picture

CHIPS = (8, 64, 512, 4096, 16_384, 50_000)
FAILURES = 20_000  # simulated ones
LIMITS = {'mtbf_hours': (0.01, 1e9), 'save_seconds': (0, 1e6), 'restart_seconds': (0, 1e6),
          'step_seconds': (1e-6, 1e6), 'chips_per_host': (1, 1e6)}


@dataclasses.dataclass(frozen=True)
class Costs:
  """What the model needs to know of a job.

  mtbf_hours: mean time between failures of one host.
  save_seconds: for which a save keeps the steps waiting.
  restart_seconds: from a failure to the next step.

  Raises:
    BadInput: a number is outside its limits, or nan.
  """
  mtbf_hours: float
  save_seconds: float
  restart_seconds: float
  step_seconds: float
  chips_per_host: int

  def __post_init__(self):
    for name, (least, most) in LIMITS.items():
      value = getattr(self, name)
      if not least <= value <= most:
        raise BadInput(f'{name}={value:g}: must be between {least:g} and {most:g}')


@dataclasses.dataclass(frozen=True)
class Expected:
  """Goodput of a job that saves every `steps` steps, by the formula and simulated."""
  steps: int
  goodput: float
  simulated: float
  standard_error: float


@dataclasses.dataclass(frozen=True)
class Row:
  """A job of so many chips, saving at Daly's interval in whole steps, or as its config says."""
  chips: int
  hosts: int
  mtbf_hours: float
  young_seconds: float
  daly_seconds: float
  best: Expected
  config: Expected


def young_seconds(save: float, mtbf: float) -> float:
  """The interval between saves that is best to first order. All in seconds, `mtbf` of the job."""
  return math.sqrt(2 * save * mtbf)


def daly_seconds(save: float, mtbf: float) -> float:
  """The same to third order; `mtbf` itself where a save takes twice that or longer."""
  if save >= 2 * mtbf:
    return mtbf
  half = save / (2 * mtbf)
  return young_seconds(save, mtbf) * (1 + math.sqrt(half) / 3 + half / 9) - save


def goodput(interval: float, save: float, restart: float, mtbf: float) -> float:
  """Expected part of the time in kept steps; interval: of steps between two saves. All in seconds."""
  x = (interval + save) / mtbf
  return interval / mtbf * math.exp(-restart / mtbf - x) / -math.expm1(-x)


def simulate(interval: float, save: float, restart: float, mtbf: float, seed: int = 0,
             failures: int = FAILURES) -> tuple[float, float]:
  """(goodput, its standard error) of a job over so many failures.

  Between two failures it restarts, if they leave time for it, then keeps every interval that it
  finishes together with its save.
  """
  gaps = np.random.default_rng(seed).exponential(mtbf, failures)
  kept = interval * np.floor(np.maximum(gaps - restart, 0) / (interval + save))
  mean = float(kept.sum() / gaps.sum())
  return mean, float(np.std(kept - mean * gaps) / (math.sqrt(failures) * gaps.mean()))


def expect(costs: Costs, chips: int, checkpoint_every: int) -> Row:
  """What the model expects of a job of `chips` chips. checkpoint_every: steps, of its config."""
  hosts = math.ceil(chips / costs.chips_per_host)
  mtbf = 3600 * costs.mtbf_hours / hosts
  daly = daly_seconds(costs.save_seconds, mtbf)

  def expected(steps: int) -> Expected:
    case = steps * costs.step_seconds, costs.save_seconds, costs.restart_seconds, mtbf
    return Expected(steps, goodput(*case), *simulate(*case, seed=chips))

  best = max(1, round(daly / costs.step_seconds))
  return Row(chips, hosts, mtbf / 3600, young_seconds(costs.save_seconds, mtbf), daly, expected(best),
             expected(checkpoint_every))


def measured_seconds(events: list[dict], where: str) -> dict[str, float]:
  """save_seconds, restart_seconds, step_seconds of a run's events (events.py).

  Medians: of its saves, without the wait for the last one's writing at the end of a run; of setup,
  compilation and restoring of its starts, added up; of its steps.

  Raises:
    BadInput: it has saved nothing, or made no step.
  """
  by_start, steps, saves = collections.defaultdict(list), [], []
  for run in split_runs(events):
    seconds, saved, last_step = collections.Counter(), {}, run[0]['step']
    for event in run:
      if event['kind'] == 'step' and event['step'] > last_step:
        steps.append(event['seconds'] / (event['step'] - last_step))
        last_step = event['step']
      elif event['kind'] in ('setup', 'compile', 'restore'):
        seconds[event['kind']] += event['seconds']
      elif event['kind'] == 'save':
        saved.setdefault(event['step'], event['seconds'])
    saves += saved.values()
    for kind, sum_seconds in seconds.items():
      by_start[kind].append(sum_seconds)
  for name, values in (('save', saves), ('step', steps)):
    if not values:
      raise BadInput(f'{where}: {FILE} holds no {name}; give a run that has a checkpoint')
  return {'save_seconds': statistics.median(saves),
          'restart_seconds': sum(map(statistics.median, by_start.values())),
          'step_seconds': statistics.median(steps)}


def plot(costs: Costs, checkpoint_every: int, path: str) -> None:
  """Draws goodput over chips: at the best interval for a save as long, ten times as long and a
  tenth as long, and with the config's interval.
  """
  chips = np.unique(np.geomspace(CHIPS[0], CHIPS[-1], 60).round().astype(int)).tolist()

  def curve(save: float, steps: int | None = None) -> list[float]:
    values = []
    for count in chips:
      mtbf = 3600 * costs.mtbf_hours / math.ceil(count / costs.chips_per_host)
      interval = (steps or max(1, round(daly_seconds(save, mtbf) / costs.step_seconds))) * costs.step_seconds
      values.append(goodput(interval, save, costs.restart_seconds, mtbf))
    return values

  with picture(path, 7, 4) as axes:
    for save in sorted({0.1 * costs.save_seconds, costs.save_seconds, 10 * costs.save_seconds}):
      axes.plot(chips, curve(save), label=f'save {save:.3g} s, best interval')
    axes.plot(chips, curve(costs.save_seconds, checkpoint_every), 'k--',
              label=f'save {costs.save_seconds:.3g} s, every {checkpoint_every:,} steps')
    axes.set(xscale='log', xlabel='chips', ylabel='goodput', xticks=CHIPS,
             xticklabels=[f'{count:,}' for count in CHIPS],
             title=f'a host fails every {costs.mtbf_hours:,.6g} h, {costs.chips_per_host} chips each; '
                   f'restart {costs.restart_seconds:.3g} s, step {costs.step_seconds:.3g} s')
    axes.set_ylim(top=1)
    axes.title.set_fontsize(10)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc='lower left')
