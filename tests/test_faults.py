"""The fault matrix, in a small edition: every fault is survived or told."""
import json
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).with_name('faults.py')


def faults(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, PROGRAM, *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_no_fault_of_a_small_matrix_is_silent():
  done = faults('--share=0.03', '--json', '--only=bit_flips,damaged_files,sigterm,typos,hostile_files')
  assert done.returncode == 0, done.stdout + done.stderr
  rows = {row.pop('fault'): row for row in json.loads(done.stdout)['rows']}
  assert len(rows) == 10 and all(row['injected'] == row['survived'] > 0 == row['silent'] for row in rows.values())
  assert rows['bit flipped in parameters']['lost'] == 3 and rows['SIGTERM']['lost'] == 0


@pytest.mark.slow
def test_a_fault_that_does_not_exist_is_refused_in_words():
  done = faults('--only=kills')
  assert done.returncode == 2 and '--only: no fault is called kills; there are bit_flips, ' in done.stderr
