"""Events are read back as they were written, whatever a crash left behind."""
import pytest

from mtp_jax.config import BadInput
from mtp_jax.report.events import FILE, Events, read_events


def test_events_are_read_back_and_a_line_that_a_crash_cut_off_is_skipped(tmp_path):
  events = Events(tmp_path)
  for step, kind in enumerate(('start', 'setup', 'step')):
    events.write(kind, 100.0 + step, 0.5, step)
  events.close()
  expected = [{'time': 100.0, 'kind': 'start', 'seconds': 0.5, 'step': 0},
              {'time': 101.0, 'kind': 'setup', 'seconds': 0.5, 'step': 1},
              {'time': 102.0, 'kind': 'step', 'seconds': 0.5, 'step': 2}]
  assert read_events(tmp_path) == expected
  text = (tmp_path / FILE).read_text()
  (tmp_path / FILE).write_text(text[:-20])
  assert read_events(tmp_path) == expected[:-1]


def test_spans_are_written_even_when_what_they_time_fails(tmp_path):
  events = Events(tmp_path)
  events.write('start', 5.0, 0.0, 0)
  with pytest.raises(RuntimeError), events.span('save', 3):
    raise RuntimeError
  events.close()
  assert [(event['kind'], event['step']) for event in read_events(tmp_path)] == [('start', 0),
                                                                                 ('save', 3)]


def test_no_log_and_no_run_are_one_line(tmp_path):
  missing = r'^--workdir=.*: no events.jsonl there \(No such file or directory\); give the workdir of a run$'
  with pytest.raises(BadInput, match=missing):
    read_events(tmp_path)
  (tmp_path / FILE).write_text('nothing\n')
  with pytest.raises(BadInput, match='holds no run'):
    read_events(tmp_path)


def test_a_line_that_a_full_disk_cut_off_swallows_no_event_of_the_next_run(tmp_path):
  (tmp_path / FILE).write_text('{"time": 1.0, "kind": "start", "seconds": 0.0, "step": 0}\n{"time": 2.0, "ki')
  events = Events(tmp_path)
  events.write('start', 100.0, 0.5, 3)
  events.close()
  assert [(event['kind'], event['step']) for event in read_events(tmp_path)] == [('start', 0), ('start', 3)]
