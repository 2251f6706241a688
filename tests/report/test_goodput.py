"""The account of an event log: every second once, lost steps told, whatever a crash left behind."""
import json

import pytest

from mtp_jax.config import BadInput
from mtp_jax.report import goodput


def log(folder, *events):
  (folder / goodput.FILE).write_text(''.join(json.dumps(dict(zip(('time', 'kind', 'seconds', 'step'), event))) + '\n' for event in events))
  return goodput.read(folder)


TWO_RUNS = [
    (100, 'start', 0, 0), (100, 'setup', 5, 0), (105, 'compile', 10, 0), (115, 'data_wait', 1, 10), (115, 'step', 19, 10), (135, 'save', 2, 10),
    (137, 'step', 20, 20), (157, 'evaluation', 3, 20),  # killed here, at second 160, with a checkpoint of step 14
    (200, 'start', 0, 14), (200, 'setup', 4, 14), (204, 'restore', 6, 14), (210, 'step', 12, 20), (222, 'save', 1, 20)]


def test_every_second_is_accounted_for_once(tmp_path):
  found = goodput.account(log(tmp_path, *TWO_RUNS))
  assert found['seconds'] == {'step': 19 + 20 * 0.4 + 12, 'data_wait': 1, 'evaluation': 3, 'save': 3, 'compile': 10, 'restore': 6, 'setup': 9,
                              'lost': 12, 'other': 0, 'down': 40}
  assert found['wall_seconds'] == 223 - 100 and found['goodput'] == 39 / 123
  assert (found['runs'], found['steps'], found['lost_steps']) == (2, 20, 6)


def test_what_no_event_covers_is_other(tmp_path):
  found = goodput.account(log(tmp_path, (0, 'start', 0, 0), (2, 'step', 3, 5), (9, 'a later kind', 1, 5)))
  assert found['seconds']['other'] == 10 - 3 and found['wall_seconds'] == 10 and found['goodput'] == 0.3


def test_a_run_lost_as_a_whole_and_one_that_did_nothing(tmp_path):
  found = goodput.account(log(tmp_path, (0, 'start', 0, 0), (0, 'step', 8, 4), (10, 'start', 0, 0), (12, 'start', 0, 0), (12, 'step', 4, 2)))
  assert found['seconds'] | {'lost': 8, 'step': 4, 'down': 4} == found['seconds'] and found['lost_steps'] == 4 and found['runs'] == 3


def test_lines_that_a_crash_cut_off_are_passed_over(tmp_path):
  events = log(tmp_path, *TWO_RUNS)
  text = (tmp_path / goodput.FILE).read_text()
  (tmp_path / goodput.FILE).write_text(text[:-20])
  assert goodput.read(tmp_path) == events[:-1]


def test_spans_are_written_even_when_what_they_time_fails(tmp_path):
  events = goodput.Events(tmp_path)
  events.write('start', 5.0, 0.0, 0)
  with pytest.raises(RuntimeError), events.span('save', 3):
    raise RuntimeError
  events.close()
  assert [(event['kind'], event['step']) for event in goodput.read(tmp_path)] == [('start', 0), ('save', 3)]


def test_no_log_and_no_run_are_one_line(tmp_path):
  with pytest.raises(BadInput, match=r'^--workdir=.*: no events.jsonl there \(No such file or directory\); give the workdir of a run$'):
    goodput.read(tmp_path)
  (tmp_path / goodput.FILE).write_text('nothing\n')
  with pytest.raises(BadInput, match='holds no run'):
    goodput.read(tmp_path)


def test_a_picture_is_drawn(tmp_path):
  goodput.plot(log(tmp_path, *TWO_RUNS), str(tmp_path / 'x.png'))
  assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path):
  with pytest.raises(BadInput, match=r"^--plot=.*/nowhere/x.png: .*No such file or directory"):
    goodput.plot(log(tmp_path, *TWO_RUNS), str(tmp_path / 'nowhere' / 'x.png'))
