"""Signals save, whenever they come; telling never ends a run; a job says for whom it waits."""
import os
import signal
import subprocess
import sys

import pytest
from experiments import experiment, log_of, write_config_file

from mtp_jax import chips
from mtp_jax.checkpoint.record import steps
from mtp_jax.train import processes
from mtp_jax.train import run as running
from mtp_jax.train.fit import fit
from mtp_jax.train.watch import Interrupts

SHELL = {'SLURM_STEP_NODELIST': 'n1', 'SLURM_NTASKS': '4'}


@pytest.fixture(autouse=True)
def peak(monkeypatch):
  """The machine's peak is not measured."""
  monkeypatch.setattr(chips, 'peak_flops', lambda: 1e9)


@pytest.mark.parametrize('redirection', ['2>&-', '2>&1 | head -n 1', '>&- 2>&- <&-', '2>/dev/full'])
def test_a_run_whose_lines_nobody_can_read_ends_as_any_other(tmp_path, redirection):
  config = experiment(tmp_path)
  write_config_file(tmp_path / 'config.py', config)
  command = f'{sys.executable} -m mtp_jax train --config=config.py --workdir=run'
  script = f'set -o pipefail; {command} {redirection}'
  done = subprocess.run(['bash', '-c', script], cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert steps(tmp_path / 'run') == [3, 6] and log_of(tmp_path / 'run')[-1]['kind'] == 'validation'


@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step(tmp_path, number):
  note = lambda line: line.startswith('step 3  ') and signal.raise_signal(number)
  outcome = fit(experiment(tmp_path), tmp_path / 'run', note=note)
  assert (outcome.step, outcome.signal) == (4, number) and steps(tmp_path / 'run')[-1] == 4


@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_is_heard_during_a_validation_which_the_next_run_repeats(tmp_path, monkeypatch, number):
  """The validation after step 2, of four batches, ends after the first one."""
  config, seen = experiment(tmp_path), []
  original = running.validation_batches

  def batches(*arguments):
    for batch in original(*arguments):
      seen.append(1)
      if len(seen) == 1:
        signal.raise_signal(number)
      yield batch
  monkeypatch.setattr(running, 'validation_batches', batches)
  outcome = fit(config, tmp_path / 'run', note=lambda line: None)
  assert (outcome.step, outcome.signal, len(seen)) == (2, number, 1) and steps(tmp_path / 'run') == [2]
  fit(config, tmp_path / 'run', note=lambda line: None)
  monkeypatch.undo()
  monkeypatch.setattr(chips, 'peak_flops', lambda: 1e9)
  fit(config, tmp_path / 'whole', note=lambda line: None)
  assert log_of(tmp_path / 'run') == log_of(tmp_path / 'whole')


def test_a_hangup_that_nohup_ignores_stays_ignored():
  old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with Interrupts(processes.STOPS) as interrupts:
      os.kill(os.getpid(), signal.SIGHUP)
      assert interrupts.received == 0
  finally:
    signal.signal(signal.SIGHUP, old)


@pytest.mark.parametrize('variables, where', [
    (SHELL | {'SLURM_STEP_NUM_TASKS': '1'}, None), (SHELL | {'SLURM_STEP_NUM_TASKS': '4'}, 'slurm'), (SHELL, 'slurm'),
    (SHELL | {'SLURM_NTASKS': 'x'}, None)])
def test_the_shell_that_salloc_opens_is_one_process(variables, where):
  assert processes.environment(variables, False) == where


@pytest.mark.parametrize('where, variables, said', [
    ('variables', dict(zip(processes.VARIABLES, ('h:1', '3', '1'))),
     'process 1 of 3 waits for JAX to start on all of them, at h:1'),
    ('slurm', SHELL | {'SLURM_PROCID': '2'}, 'task 2 of 4 waits for the others, on n1'),
    ('tpu', {}, 'waits for the other hosts of this TPU slice')])
def test_a_process_can_say_for_whom_it_waits(where, variables, said):
  assert processes.awaited(where, variables) == said


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_process_that_waits_says_for_whom_and_ends_without_a_traceback(tmp_path, number, code):
  """The other process of the job never comes; the one that waits gets the signal."""
  program = ('import sys\nfrom mtp_jax.train import processes\nprocesses.meeting.SAY_SECONDS = 0.5\n'
             'sys.exit(processes.run(lambda: 0, 10, 300))')
  environment = os.environ | {'JAX_COORDINATOR_ADDRESS': '127.0.0.1:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '1'}
  process = subprocess.Popen([sys.executable, '-c', program], env=environment, stderr=subprocess.PIPE, text=True)
  line = process.stderr.readline()
  while 'waits for' not in line and line:
    line = process.stderr.readline()
  assert 'process 1 of 2 waits for process 0 at 127.0.0.1:1; gives up after 300 seconds' in line
  process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)
  errors = process.communicate(timeout=60)[1]
  assert process.returncode in (code, 143) and 'Traceback' not in errors, errors
