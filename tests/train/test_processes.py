"""Several processes are one run: they find each other, read each row once, stop at one step, and end together."""
import contextlib
import fcntl
import json
import os
import pathlib
import random
import re
import signal
import socket
import sys
import time

import jax
import kills
import pytest
from kills import ANOTHER_ENDED, JOB, ended, losses

import mtp_jax
from mtp_jax import chips
from mtp_jax.checkpoint import store
from mtp_jax.checkpoint.record import COMMITTED, FOLDER, METADATA, steps
from mtp_jax.cli.main import main
from mtp_jax.config import BadInput, MeshConfig
from mtp_jax.mesh import make_mesh
from mtp_jax.model import costs
from mtp_jax.train import processes
from mtp_jax.train import step as training

# ml_collections 1.1.0 loads config files with it
HERE = {'JAX_COORDINATOR_ADDRESS': '10.0.0.1:1234', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '1'}
STEP = {'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_NTASKS': '2'}
# In which a job stops: 2 seconds on an idle machine, and heartbeat_seconds more where a process is dead.
SECONDS = 60


@pytest.mark.parametrize('variables, tpu, where', [
    ({}, False, None),
    (HERE, False, 'variables'),
    (HERE, True, 'variables'),
    (HERE | STEP, False, 'variables'),  # what a user sets goes before what Slurm sets
    (HERE | {'JAX_NUM_PROCESSES': '1', 'JAX_PROCESS_ID': '0'}, False, None),
    (HERE | {'JAX_COORDINATOR_ADDRESS': '[::1]:1234'}, False, 'variables'),
    (STEP, False, 'slurm'),
    (STEP, True, 'slurm'),
    (STEP | {'SLURM_NTASKS': '1'}, False, None),
    ({'SLURM_STEP_NODELIST': 'n1'}, False, None),
    # the batch script itself, which is no task
    ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '2'}, False, None),
    ({}, True, 'tpu'),
    ({'JAX_PLATFORMS': 'tpu,cpu'}, True, 'tpu'),
    ({'JAX_PLATFORMS': 'cpu'}, True, None),
    ({'JAX_PLATFORMS': 'tpu'}, False, None),
])
def test_where_a_job_runs_is_read_from_the_environment(variables, tpu, where):
  assert processes.environment(variables, tpu) == where


@pytest.mark.parametrize('variables, said', [
    ({'JAX_PROCESS_ID': '1'},
     'JAX_PROCESS_ID=1: JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES must be set as well'),
    ({'JAX_NUM_PROCESSES': '2'},
     'JAX_NUM_PROCESSES=2: JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID must be set as well'),
    ({'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_PROCESS_ID': '0'},
     'JAX_COORDINATOR_ADDRESS=a:1: JAX_NUM_PROCESSES must be set as well'),
    (HERE | {'JAX_PROCESS_ID': '2'},
     'JAX_PROCESS_ID=2, JAX_NUM_PROCESSES=2: must be numbers from 0, the first below the second'),
    (HERE | {'JAX_PROCESS_ID': '-1'},
     'JAX_PROCESS_ID=-1, JAX_NUM_PROCESSES=2: must be numbers from 0'),
    (HERE | {'JAX_NUM_PROCESSES': 'two'},
     'JAX_PROCESS_ID=1, JAX_NUM_PROCESSES=two: must be numbers from 0'),
    (HERE | {'JAX_NUM_PROCESSES': '0', 'JAX_PROCESS_ID': '0'},
     'JAX_PROCESS_ID=0, JAX_NUM_PROCESSES=0: must be numbers from 0'),
    *((HERE | {'JAX_COORDINATOR_ADDRESS': address},
       f'JAX_COORDINATOR_ADDRESS={address}: must be host:port of process 0')
       for address in ('', 'host', ':1', 'host:', 'host:x')),
])
def test_half_of_the_variables_or_no_numbers_are_refused_by_name(variables, said):
  with pytest.raises(BadInput, match='^' + re.escape(said)):
    processes.environment(variables, False)


def test_the_command_refuses_half_of_the_variables_too(monkeypatch, tmp_path, capfd):
  monkeypatch.setenv('JAX_NUM_PROCESSES', '2')
  assert main(kills.train(tmp_path / 'run', tmp_path / 'cache', JOB)[3:]) == 2
  assert 'JAX_NUM_PROCESSES=2: JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID must be set as well' in capfd.readouterr().err


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """folder / 'whole' is a finished run of two processes of four devices each; made once for all test workers."""
  base = tmp_path_factory.getbasetemp()
  made = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base) / 'processes'
  made.mkdir(exist_ok=True)
  with (made / 'lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    kills.undisturbed_job(made)
  return made


@pytest.fixture
def job(folder):
  """start(workdirs, fields): two processes of one job, with one workdir or two, and changes of JOB for each."""
  @contextlib.contextmanager
  def start(*workdirs: pathlib.Path, fields=({}, {})):
    with kills.job(folder / 'programs',
                   *(kills.train(workdir, folder / 'cache', JOB | more)
                     for workdir, more in zip(workdirs * (2 // len(workdirs)), fields))) as two:
      yield two
  return start


@pytest.fixture
def alone(folder, monkeypatch):
  """The losses of one process with all eight devices, compiled with the same flags."""
  def run(workdir: pathlib.Path, **fields) -> dict[int, float]:
    monkeypatch.setattr(chips, 'peak_flops', lambda: 1e9)
    assert main(kills.train(workdir, folder / 'cache', JOB | fields)[3:]) == 0
    return {step: float(loss) for step, loss in losses(workdir).items()}
  return run


def reached(workdir: pathlib.Path, step: int, two) -> None:
  """Waits until the log has that step."""
  until = time.monotonic() + 200
  while step not in losses(workdir):
    both_run = [process.poll() for process in two] == [None, None]
    assert both_run and time.monotonic() < until, [process.communicate(timeout=SECONDS) for process in two]
    time.sleep(0.02)


def stopped(two, number: int, index: int) -> tuple[list[int], float]:
  """Sends the signal to one of two processes; the exit codes of both, and the seconds until both had ended."""
  start = time.monotonic()
  two[index].send_signal(number)
  codes = ended(two, 2 * SECONDS)
  return codes, time.monotonic() - start


def close(found: dict[int, str], wanted: dict[int, float]) -> bool:
  """To 1e-6: float32 sums over devices, in another order than in one process; 2e-7 after a dozen steps."""
  return found.keys() <= wanted.keys() and all(abs(float(loss) / wanted[step] - 1) < 1e-6
                                               for step, loss in found.items())


def test_two_processes_train_as_one_does_and_both_log_it(folder, alone, tmp_path, capfd):
  found = losses(folder / 'whole')
  assert list(found) == list(range(1, JOB['train.steps'] + 1))
  assert steps(folder / 'whole')[-1] == JOB['train.steps']
  assert close(found, alone(tmp_path / 'alone'))
  records = [[json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
             for path in (folder / 'whole', folder / 'whole' / 'process-1')]
  speeds = {'tokens_per_second', 'mfu', 'data_wait', 'eta_seconds'}
  one, other = ([{key: value for key, value in record.items() if key not in speeds}
                 for record in log] for log in records)
  assert one == other and one[-1]['kind'] == 'validation'
  assert {path.name for path in (folder / 'whole' / 'process-1').iterdir()} == {
      'metrics.jsonl', 'events.jsonl', 'config.json'}


LOAD = '''
import json, sys
from mtp_jax.train import processes
def work():
  import jax
  from jax.experimental import multihost_utils
  import mtp_jax
  from mtp_jax.model import costs
  lm = mtp_jax.load(sys.argv[1])
  whole = multihost_utils.process_allgather(lm.model, tiled=True)
  found = {'sha256': costs.parameters_sha256(whole), 'devices': lm.mesh.size, 'here': len(jax.local_devices()),
           'total': processes.total(jax.process_index() + 5, 60)}
  processes.check_same(60, a='x', b='y')
  try:
    processes.check_same(60, same='', mine=f'I am {jax.process_index()}')
  except Exception as error:
    found['refused'] = f'{type(error).__name__}: {error}'
  print(json.dumps(found))
  return 0
sys.exit(processes.run(work, 10, 300))
'''


def test_what_two_processes_saved_and_load_is_bit_for_bit_what_one_loads_on_any_mesh(folder):
  lm = mtp_jax.load(folder / 'whole')
  assert lm.mesh.size == 8
  wanted = costs.parameters_sha256(lm.model)
  for sizes in (MeshConfig(), MeshConfig(context=8), MeshConfig(data=2, fsdp=2, tensor=2)):
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
      assert costs.parameters_sha256(store.restore(folder / 'whole', lm.step,
                                                   parameters=training.abstract(
                                                       lm.config,
                                                       mesh).model)['parameters']) == wanted
  with kills.job(folder / 'programs',
                 *[[sys.executable, '-c', LOAD, str(folder / 'whole')]] * 2) as two:
    assert ended(two, 200) == [0, 0], [process.output for process in two]
  for index, process in enumerate(two):
    found = json.loads(next(line for line in process.output.splitlines() if line.startswith('{')))
    refused = (f'BadInput: mine: process {index} and process {1 - index} of this job differ in it '
               f'(here I am {index}); start all with the same command, on the same files')
    assert found == {'sha256': wanted, 'devices': 8, 'here': 4, 'total': 11, 'refused': refused}


VERIFY = '''
import json, os, pathlib, sys
from mtp_jax.checkpoint.record import DamagedCheckpoint
from mtp_jax.config import BadInput
from mtp_jax.train import opening, processes
# by step: what process 0 and process 1 find
FOUND = {9: ('damaged', 'whole'), 8: ('whole', 'damaged'), 7: ('damaged', 'damaged'), 6: ('whole', 'whole')}
FOUND |= {5: ('damaged', 'unreadable'), 4: ('unreadable', 'whole'), 3: ('unreadable', 'damaged')}
def work():
  import jax
  def whole_record(workdir, step, index, count):
    kind = FOUND[step][index]
    if kind != 'whole':
      raise {'damaged': lambda text: DamagedCheckpoint(step, text), 'unreadable': BadInput}[kind](f'{step} {kind}')
    return step
  opening.whole_record = whole_record
  decided = {}
  for newest in sorted(FOUND):
    passed_over = {step for step in FOUND if step > newest}
    try:
      decided[newest] = opening._newest_record(pathlib.Path(sys.argv[1]), lambda line: None, passed_over, 60)
    except BadInput as error:
      decided[newest] = f'{type(error).__name__} {newest}'
      assert str(newest) in str(error)
  print(json.dumps(decided))
  return 0
sys.exit(processes.run(work, 10, 300))
'''


def test_all_processes_decide_alike_on_a_checkpoint_that_each_finds_in_another_state(tmp_path):
  for step in range(3, 10):
    (tmp_path / FOLDER / str(step)).mkdir(parents=True)
    for name in (METADATA, COMMITTED):
      (tmp_path / FOLDER / str(step) / name).write_text('')
  with kills.job(tmp_path / 'programs', *[[sys.executable, '-c', VERIFY, str(tmp_path)]] * 2) as two:
    assert ended(two, 200) == [0, 0], [process.output for process in two]
  wanted = dict.fromkeys((6, 7, 8, 9), 6) | {step: f'BadInput {step}' for step in (3, 4, 5)}
  for process in two:
    found = json.loads(next(line for line in process.output.splitlines() if line.startswith('{')))
    assert found == {str(step): decided for step, decided in wanted.items()}


def test_a_sequence_over_two_processes_is_that_of_one_and_ctrl_c_to_one_stops_both_at_one_step(
    job, alone, tmp_path, capfd):
  """Both hold part of every row, so that both read all of them."""
  over_both = {'mesh.fsdp': 1, 'mesh.tensor': 1, 'mesh.context': 8, 'model.layers': 1,
               'model.futures': 1, 'train.steps': 30}
  with job(tmp_path / 'run', fields=[over_both] * 2) as two:
    reached(tmp_path / 'run', 3, two)
    codes, seconds = stopped(two, signal.SIGINT, 0)
  assert codes == [130, 143] and seconds < SECONDS, [process.output for process in two]
  found = losses(tmp_path / 'run')
  assert [max(found)] == [max(losses(tmp_path / 'run/process-1'))] == steps(tmp_path / 'run')[-1:]
  assert found == losses(tmp_path / 'run/process-1')
  assert 'stopped by signal 2, run the same command to resume' in two[0].out.splitlines()[-1]
  assert len(found) >= 3 and close(found, alone(tmp_path / 'alone', **over_both))


def test_sigterm_to_one_stops_both_at_one_step_and_the_resumed_job_equals_an_uninterrupted_one(
    folder, job, tmp_path):
  workdir, wanted = tmp_path / 'run', losses(folder / 'whole')
  with job(workdir) as two:
    reached(workdir, 2, two)
    codes, seconds = stopped(two, signal.SIGTERM, 1)
  assert codes == [143, 143] and seconds < SECONDS, [process.output for process in two]
  last = steps(workdir)[-1]
  assert 2 <= last < JOB['train.steps']
  assert [max(losses(path)) for path in (workdir, workdir / 'process-1')] == [last, last]
  assert (f'step {last} of {JOB["train.steps"]}, checkpoint in {workdir}; '
          'stopped by signal 15, run the same command to resume') in two[0].output
  with job(workdir) as two:
    assert ended(two, 200) == [0, 0], [process.output for process in two]
  assert wanted == losses(workdir) == losses(workdir / 'process-1')


def test_a_port_that_another_program_has_is_told_before_jax_starts(monkeypatch):
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
    variables = {'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0'}
    for name, value in variables.items():
      monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match=f'process 0 cannot listen at port {port} .*; end what listens there'):
      processes.run(lambda: 0, 10, 300)


def test_processes_with_different_commands_are_all_refused(folder, job, tmp_path):
  for workdirs, fields, said in (((tmp_path / 'run',), ({}, {'train.seed': 1}), 'config'),
                                 ((folder / 'whole', tmp_path / 'empty'), ({}, {}), 'checkpoint')):
    with job(*workdirs, fields=fields) as two:
      assert ended(two, SECONDS) == [2, 2], [process.output for process in two]
    for index, process in enumerate(two):
      message = (rf'mtp_jax: {said}: process {index} and process {1 - index} of this job differ in it \(here .*\); '
                 'start all with the same command, on the same files')
      assert re.fullmatch(message, process.output.splitlines()[-1]), process.output
  assert not (tmp_path / 'run').exists() and not (tmp_path / 'empty').exists()


def test_a_process_that_is_refused_ends_the_other_too(job, tmp_path):
  (tmp_path / 'file').write_text('')
  start = time.monotonic()
  with job(tmp_path / 'run', tmp_path / 'file') as two:
    assert ended(two, 2 * SECONDS) == [1, 2], [process.output for process in two]
  message = f'mtp_jax: --workdir={tmp_path / "file"}: cannot be a folder, it is a file; choose another'
  assert two[1].output.splitlines()[-1] == message
  assert re.fullmatch(ANOTHER_ENDED, two[0].output.splitlines()[-1])
  assert 'Traceback' not in two[0].output and time.monotonic() - start < SECONDS


def test_ctrl_c_twice_ends_a_process_whose_peer_hangs_without_waiting_for_it(job, tmp_path):
  """It waits within JAX, where Python hears no signal; the heartbeats that would tell are far apart."""
  patient = {'train.heartbeat_seconds': 300, 'train.steps': 100_000}
  with job(tmp_path / 'run', fields=[patient] * 2) as two:
    reached(tmp_path / 'run', 2, two)
    for pid in kills.workers(two[1]):
      os.kill(pid, signal.SIGSTOP)
    time.sleep(1)
    while two[0].poll() is None:  # signals that come at once are one
      two[0].send_signal(signal.SIGINT)
      time.sleep(1)
    assert ended(two[:1], SECONDS) == [130], two[0].output
  assert two[0].output.splitlines()[-1] == 'mtp_jax: interrupted' and 'Traceback' not in two[0].output


@pytest.mark.slow
def test_when_one_process_is_killed_the_other_ends_with_a_message_and_nothing_is_lost_or_repeated(folder):
  lines = []
  assert kills.kill_job(folder, 3, random.Random(0), lines.append), lines
  seconds = [float(re.search(r'exit codes .* after (.*?) s;', line)[1]) for line in lines
             if 'killed' in line]
  assert len(seconds) == 3 and max(seconds) < SECONDS, lines
