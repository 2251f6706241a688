"""The model of failures: its best interval against a search, its goodput against event by event, and its limits."""
import dataclasses
import math

import numpy as np
import pytest

from mtp_jax.config import BadInput
from mtp_jax.report import failures
from mtp_jax.report.failures import CHIPS, Costs, daly_seconds, goodput, simulate, young_seconds

HOUR = 3600
COSTS = Costs(mtbf_hours=6000, save_seconds=10, restart_seconds=600, step_seconds=5, chips_per_host=8)
# (save, restart, MTBF of the job) in seconds: from a save that is nothing to one as long as the MTBF
CASES = [(1, 0, 100 * HOUR), (10, 600, 3 * HOUR), (60, 300, HOUR), (120, 30, 900), (300, 60, 300)]


def slow_run(interval: float, save: float, restart: float, mtbf: float, intervals: int, seed: int) -> float:
  """Goodput of a run until it has kept so many intervals, one attempt after the other."""
  random = np.random.default_rng(seed)
  clock, kept, left = 0.0, 0, random.exponential(mtbf)
  while kept < intervals:
    while left < interval + save:
      clock += left
      left = random.exponential(mtbf)
      while left < restart:
        clock += left
        left = random.exponential(mtbf)
      clock, left = clock + restart, left - restart
    clock, left, kept = clock + interval + save, left - interval - save, kept + 1
  return kept * interval / clock


@pytest.mark.parametrize('save, mtbf', [(save, mtbf) for save, _, mtbf in CASES])
def test_no_interval_is_better_than_dalys(save, mtbf):
  """Its series stops at the third order: what it loses is of the fourth in sqrt(save / 2 mtbf)."""
  tried = mtbf * np.geomspace(1e-4, 10, 20_001)
  best = max(goodput(interval, save, 0, mtbf) for interval in tried)
  half = save / (2 * mtbf)
  assert goodput(daly_seconds(save, mtbf), save, 0, mtbf) >= best * (1 - half**2)


@pytest.mark.parametrize('save, restart, mtbf', CASES)
def test_the_best_interval_does_not_depend_on_the_restart(save, restart, mtbf):
  tried = mtbf * np.geomspace(1e-4, 10, 2001)
  one, other = ([goodput(interval, save, seconds, mtbf) for interval in tried] for seconds in (0, restart))
  assert np.argmax(one) == np.argmax(other)


def test_daly_is_as_in_the_figures_of_the_paper():
  """Figures 3 to 5: a save of 5 minutes; M of 24 h, 6 h and 15 min; minutes."""
  found = [daly_seconds(300, mtbf) / 60 for mtbf in (24 * HOUR, 6 * HOUR, HOUR / 4)]
  assert [round(x) for x in found[:2]] + [round(found[2], 1)] == [117, 57, 9.1]


def test_young_is_dalys_first_order():
  for save in (1, 1e-2, 1e-4):
    assert daly_seconds(save, HOUR) / young_seconds(save, HOUR) == pytest.approx(1, abs=math.sqrt(save / HOUR))


def test_a_save_of_twice_the_mtbf_is_beyond_the_formula_which_meets_it_there():
  assert daly_seconds(7200, HOUR) == daly_seconds(9999, HOUR) == HOUR
  assert daly_seconds(7199.999, HOUR) == pytest.approx(2 * HOUR * (1 + 1 / 3 + 1 / 9) - 7200, rel=1e-6)


@pytest.mark.parametrize('save, restart, mtbf', CASES)
@pytest.mark.parametrize('share', [0.3, 1, 3])
def test_the_simulation_agrees_with_the_formula(save, restart, mtbf, share):
  """Within 4 standard errors, which one seed in 16,000 leaves; 15 seeds here."""
  interval = share * daly_seconds(save, mtbf)
  mean, error = simulate(interval, save, restart, mtbf, seed=1)
  assert 0 < error < 0.01 and abs(mean - goodput(interval, save, restart, mtbf)) < 4 * error


def test_the_standard_error_is_the_spread_over_seeds():
  """Of 400 seeds; a standard deviation of so many is known to 1 / sqrt(800), 4 of which are 0.15."""
  case = 460, 10, 600, 3 * HOUR
  runs = [simulate(*case, seed=seed, failures=1000) for seed in range(400)]
  means, errors = np.array(runs).T
  assert errors.mean() == pytest.approx(means.std(ddof=1), rel=0.15)


def test_a_run_walked_through_attempt_by_attempt_agrees_as_well():
  case = 600, 60, 300, HOUR
  runs = np.array([slow_run(*case, intervals=500, seed=seed) for seed in range(40)])
  assert abs(runs.mean() - goodput(*case)) < 4 * runs.std(ddof=1) / math.sqrt(len(runs))


def test_without_failures_only_saves_cost():
  for interval, save in [(100, 1), (7, 700), (1e5, 0)]:
    assert goodput(interval, save, 600, 1e15) == pytest.approx(1 / (1 + save / interval), rel=1e-9)


def test_with_nothing_but_failures_no_step_is_kept():
  assert goodput(100, 1, 600, 1e-3) == 0 and simulate(100, 1, 600, 1e-3) == (0, 0)


def test_goodput_rises_with_the_mtbf_and_falls_with_the_costs():
  for save, restart, mtbf in CASES:
    interval = daly_seconds(save, mtbf)
    rising = [goodput(interval, save, restart, factor * mtbf) for factor in np.geomspace(0.1, 100, 50)]
    assert (np.diff(rising) > 0).all()
    assert goodput(interval, 1.1 * save, restart, mtbf) < goodput(interval, save, restart, mtbf)
    assert goodput(interval, save, restart + 1, mtbf) < goodput(interval, save, restart, mtbf)


def test_a_job_fails_as_often_as_its_hosts_together():
  rows = [failures.expect(COSTS, chips, checkpoint_every=200) for chips in (8, 9, 16, 16_384)]
  assert [row.hosts for row in rows] == [1, 2, 2, 2048]
  assert [row.mtbf_hours for row in rows] == [6000, 3000, 3000, 6000 / 2048]
  last = rows[-1]
  assert last.best.steps == round(daly_seconds(10, 6000 * HOUR / 2048) / 5) == 91
  assert last.config.steps == 200 and last.config.goodput == goodput(1000, 10, 600, 6000 * HOUR / 2048)
  assert last.best.goodput > last.config.goodput


def test_an_interval_has_a_step_at_least():
  costs = dataclasses.replace(COSTS, save_seconds=0)
  assert failures.expect(costs, 50_000, 200).best.steps == 1


@pytest.mark.parametrize('field', ['mtbf_hours', 'save_seconds', 'restart_seconds', 'step_seconds', 'chips_per_host'])
@pytest.mark.parametrize('value', [math.nan, math.inf, -1, 1e10])
def test_a_number_that_cannot_be_is_refused(field, value):
  with pytest.raises(BadInput, match=f'^{field}={value:g}: must be between '.replace('+', r'\+')):
    dataclasses.replace(COSTS, **{field: value})


def test_all_that_is_allowed_has_a_goodput():
  for mtbf_hours in failures.LIMITS['mtbf_hours']:
    for seconds in (0, 1e6):
      for step_seconds in failures.LIMITS['step_seconds']:
        costs = Costs(mtbf_hours, seconds, seconds, step_seconds, 1)
        for chips in CHIPS:
          row = failures.expect(costs, chips, 2**31)
          assert 0 <= row.best.goodput <= 1 and 0 <= row.config.simulated <= 1


def log(*events: tuple) -> list[dict]:
  """Events of (kind, seconds, step)."""
  return [dict(zip(('kind', 'seconds', 'step'), event)) for event in events]


RUNS = log(('start', 0, 0), ('setup', 5, 0), ('compile', 4, 0), ('compile', 6, 0), ('step', 20, 10), ('save', 2, 10),
           ('step', 30, 20), ('save', 3, 20),
           ('start', 0, 10), ('setup', 7, 10), ('restore', 8, 10), ('compile', 2, 10), ('step', 50, 20),
           ('save', 90, 20), ('save', 0.1, 20))


def test_the_seconds_are_the_medians_of_the_log():
  """Steps of 2, 3 and 5 seconds; starts of 5 and 7 of setup, 10 and 2 of compilation, one of 8 of restoring;
  saves of 2, 3 and 90, the last of which is still written at the end.
  """
  assert failures.measured_seconds(RUNS, '') == {'save_seconds': 3, 'step_seconds': 3, 'restart_seconds': 6 + 6 + 8}


@pytest.mark.parametrize('kind', ['save', 'step'])
def test_a_log_without_saves_or_steps_is_refused(kind):
  with pytest.raises(BadInput, match=f'^--workdir=x: events.jsonl holds no {kind}; '):
    failures.measured_seconds([event for event in RUNS if event['kind'] != kind], '--workdir=x')


def test_a_picture_is_drawn(tmp_path):
  for name, begin in (('x.png', b'\x89PNG'), ('x.svg', b'<?xml')):
    failures.plot(COSTS, 200, str(tmp_path / name))
    assert (tmp_path / name).read_bytes().startswith(begin)
