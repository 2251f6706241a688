"""The account of an event log: every second is counted once, lost steps are found."""
import pytest

from mtp_jax.config import BadInput
from mtp_jax.report import goodput


def log(*events: tuple) -> list[dict]:
  """Events of (time, kind, seconds, step)."""
  return [dict(zip(('time', 'kind', 'seconds', 'step'), event)) for event in events]


TWO_RUNS = log(
    (100, 'start', 0, 0), (100, 'setup', 5, 0), (105, 'compile', 10, 0),
    (115, 'data_wait', 1, 10), (115, 'step', 19, 10), (135, 'save', 2, 10),
    (137, 'step', 20, 20), (157, 'evaluation', 3, 20),
    # killed here, at second 160, with a checkpoint of step 14
    (200, 'start', 0, 14), (200, 'setup', 4, 14), (204, 'restore', 6, 14), (210, 'step', 12, 20),
    (222, 'save', 1, 20))


def test_every_second_is_accounted_for_once():
  account = goodput.account(TWO_RUNS)
  assert account['seconds'] == {
      'step': 19 + 20 * 0.4 + 12, 'data_wait': 1, 'evaluation': 3, 'save': 3, 'wait_for_save': 0, 'compile': 10,
      'restore': 6, 'setup': 9,
      'lost': 12, 'other': 0, 'down': 40}
  assert account['wall_seconds'] == 223 - 100 and account['goodput'] == 39 / 123
  assert (account['runs'], account['steps'], account['lost_steps']) == (2, 20, 6)


def test_what_no_event_covers_is_other():
  account = goodput.account(log((0, 'start', 0, 0), (2, 'step', 3, 5), (9, 'a later kind', 1, 5)))
  assert account['seconds']['other'] == 10 - 3
  assert account['wall_seconds'] == 10 and account['goodput'] == 0.3


def test_a_run_can_be_lost_as_a_whole_and_another_can_do_nothing():
  account = goodput.account(log((0, 'start', 0, 0), (0, 'step', 8, 4), (10, 'start', 0, 0),
                                (12, 'start', 0, 0), (12, 'step', 4, 2)))
  assert account['seconds'] | {'lost': 8, 'step': 4, 'down': 4} == account['seconds']
  assert account['lost_steps'] == 4 and account['runs'] == 3


def test_a_picture_is_drawn(tmp_path):
  goodput.plot(TWO_RUNS, str(tmp_path / 'x.png'))
  assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path):
  with pytest.raises(BadInput, match=r"^--plot=.*/nowhere/x.png: .*No such file or directory"):
    goodput.plot(TWO_RUNS, str(tmp_path / 'nowhere' / 'x.png'))
