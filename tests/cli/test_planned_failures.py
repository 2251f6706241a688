"""Failures planned for, from the command line: with a run's own seconds, with stated ones, on a topology."""
import re

import pytest

from mtp_jax.report import failures
from mtp_jax.report.events import read_events

STATED = '--mtbf_hours=6300 --save_seconds=10 --restart_seconds=600'


def test_the_failures_of_a_run_are_planned_for_with_its_own_seconds(run, run_json, place):
  """A table with the figures of --json, and a picture of goodput instead of the bars."""
  run('train --config=tiny.py --workdir=planned')
  command = 'goodput --workdir=planned --mtbf_hours=100 --chips_per_host=4'
  values = run_json(f'{command} --plot=failures.png')
  found = values['failures']
  assert 0 < values['goodput'] < 1 and (place / 'failures.png').exists()
  seconds = failures.measured_seconds(read_events(place / 'planned'), '')
  assert {name: found[name] for name in seconds} == seconds and min(seconds.values()) > 0
  assert (found['mtbf_hours'], found['chips_per_host'], found['checkpoint_every']) == (100, 4, 3)
  assert [row['hosts'] for row in found['rows']] == [2, 16, 128, 1024, 4096, 12_500]

  code, out, err = run(command)
  table = [line.split() for line in out if re.match(r'[\d,]+ ', line)]
  assert (code, err) == (0, []) and any('every 3 steps' in line for line in out)
  for cells, row in zip(table, found['rows'], strict=True):
    assert cells[:2] == [f'{row["chips"]:,}', f'{row["hosts"]:,}']
    assert cells[6] == f'{row["best"]["goodput"]:.2%}' and cells[10] == f'{row["config"]["goodput"]:.2%}'


def test_stated_seconds_need_no_run_and_no_topology(run_json):
  row = run_json(f'plan --config=tiny.py {STATED} --step_seconds=5')['failures']['rows'][4]
  assert (row['chips'], row['hosts'], row['best']['steps'], row['config']['steps']) == (16_384, 2048, 93, 3)
  assert row['best']['goodput'] == failures.goodput(465, 10, 600, 6300 * 3600 / 2048)


@pytest.mark.parametrize('flags, step, chips', [('', None, 4), ('--step_seconds=5 --chips_per_host=2', 5, 2)])
def test_a_topology_tells_the_step_and_the_hosts_unless_they_are_stated(run_json, flags, step, chips):
  values = run_json(f'plan --config=tiny.py --topology=cpu:4 {STATED} {flags}')
  found = values['failures']
  assert (found['step_seconds'], found['chips_per_host']) == (step or values['step_seconds'], chips)


def test_a_save_longer_than_failures_are_apart_is_told(run):
  _, out, _ = run('plan --config=tiny.py --mtbf_hours=1 --save_seconds=10 --restart_seconds=0 --step_seconds=1')
  assert out[-1].startswith('from 16,384 chips on a save takes 2 MTBF or longer')
