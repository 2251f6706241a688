"""The Slurm script with programs that stand in for Slurm; and, where Slurm is installed, a job for real."""
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest
from scripts import LAUNCH, ROOT, program, wait_for


def sbatch(folder: pathlib.Path, code: int, **environment) -> tuple[int, list[str]]:
  """(exit code, jobs requeued) of the batch script where srun exits with this code."""
  program(folder / 'bin' / 'srun', f'echo "$JAX_LOCAL_DEVICE_IDS: $*" >>srun; exit {code}')
  program(folder / 'bin' / 'scontrol', 'echo "$*" >>scontrol')
  program(folder / 'bin' / 'sleep', '')
  (folder / 'scontrol').write_text('')
  given = {'PATH': f'{folder / "bin"}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '7', 'SLURM_JOB_NAME': 'mtp_jax',
           'SLURM_NTASKS_PER_NODE': '1'} | environment
  found = subprocess.run(['bash', LAUNCH / 'slurm.sbatch', '--config=x.py', 'a b'], cwd=folder, env=given,
                         capture_output=True, text=True, timeout=30)
  assert not found.stderr
  return found.returncode, (folder / 'scontrol').read_text().splitlines()


AGAIN = ['requeue 7']


@pytest.mark.parametrize('codes, wanted',
                         [([0], [[]]), ([2], [[]]), ([143] * 5, [AGAIN] * 5),
                          ([1] * 5, [AGAIN, AGAIN, AGAIN, [], AGAIN]),
                                           ([1, 137, 143, 1, 1, 1, 1], [AGAIN] * 6 + [[]])])
def test_a_job_is_queued_again_unless_it_is_done_has_bad_input_or_fails_too_often(tmp_path, codes, wanted):
  assert [sbatch(tmp_path, code) for code in codes] == list(zip(codes, wanted))


def test_a_single_task_on_a_node_has_all_its_gpus(tmp_path):
  sbatch(tmp_path, 0, SLURM_GPUS_ON_NODE='4')
  sbatch(tmp_path, 0, SLURM_GPUS_ON_NODE='4', SLURM_NTASKS_PER_NODE='4')
  sbatch(tmp_path, 0)
  assert [line.partition(': ')[0] for line in (tmp_path / 'srun').read_text().splitlines()] == ['0,1,2,3', '', '']


TINY = ['--config=configs/tiny.py', *(f'--config.{field}' for field in (
    'model.width=16', 'model.heads=2', 'model.kv_heads=1', 'model.head_width=8', 'model.feed_forward=32',
    'model.layers=2', 'model.futures=1', 'data.length=32',
    'train.batch=8', 'train.steps=60', 'train.log_every=1', 'train.checkpoint_every=1000',
    'train.evaluate_every=0', 'train.evaluate_rows=8',
    'train.trackers=()', 'optimizer.warmup_steps=0', 'mesh.fsdp=8'))]


class Slurm:
  """A cluster of one node, in a folder: munged, slurmctld and slurmd with ports, keys and files of
  their own.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder, self.daemons = folder, []
    ports = [socket.create_server(('127.0.0.1', 0)) for _ in range(2)]
    ctld, node = (port.getsockname()[1] for port in ports)
    for port in ports:
      port.close()
    host = socket.gethostname().partition('.')[0]
    (folder / 'key').write_bytes(os.urandom(128))
    (folder / 'key').chmod(0o600)
    (folder / 'state').mkdir()
    # JAX's port goes by the job's id: others, on clusters like this one, are not to have the same.
    # A job that is queued again waits for cred_expire, 120 seconds unless set: the node refuses it
    # while its old credential lasts.
    (folder / 'slurm.conf').write_text(f"""
        ClusterName=test
        SlurmctldHost={host}(127.0.0.1)
        SlurmctldPort={ctld}
        SlurmUser=root
        SlurmdUser=root
        AuthInfo=socket={folder}/munge.socket,cred_expire=5
        StateSaveLocation={folder}/state
        SlurmdSpoolDir={folder}/spool
        SlurmctldPidFile={folder}/slurmctld.pid
        SlurmdPidFile={folder}/slurmd.pid
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        MpiDefault=none
        SelectType=select/cons_tres
        SelectTypeParameters=CR_Core
        SlurmdParameters=config_overrides
        SchedulerParameters=sched_interval=1
        JobRequeue=1
        KillWait=3
        FirstJobId={os.getpid() % 4000 + 1}
        MailProg=/bin/true
        NodeName=localhost NodeAddr=127.0.0.1 NodeHostname={host} Port={node} CPUs=2
        PartitionName=all Nodes=ALL Default=YES
        """)

  def __enter__(self):
    f = self.folder
    self._daemon('munged', '--force', '--foreground', f'--socket={f}/munge.socket', f'--key-file={f}/key',
                 f'--pid-file={f}/munged.pid',
                 f'--log-file={f}/munged.log', f'--seed-file={f}/seed')
    wait_for(lambda: (f / 'munge.socket').exists(), 20, 'munged')
    self._daemon('slurmctld', '-D', '-f', f / 'slurm.conf')
    self._daemon('slurmd', '-D', '-f', f / 'slurm.conf', '-N', 'localhost')
    wait_for(lambda: self('sinfo', '--noheader', '--format=%T') == 'idle', 40, 'an idle node')
    return self

  def _daemon(self, *arguments):
    with (self.folder / f'{arguments[0]}.out').open('w') as out:
      self.daemons.append(subprocess.Popen(arguments, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                                           env=self.environment(), start_new_session=True))

  def environment(self, **more) -> dict:
    """Without the variables that the machine itself might have from Slurm or JAX."""
    plain = {name: value for name, value in os.environ.items()
             if not name.startswith(('SLURM', 'SBATCH', 'JAX_', 'XLA_'))}
    return plain | {'SLURM_CONF': str(self.folder / 'slurm.conf'), 'PATH': f'{os.environ["PATH"]}:/usr/sbin'} | more

  def __call__(self, *arguments, **environment) -> str:
    """What a command of Slurm says, '' if it fails."""
    found = subprocess.run(arguments, env=self.environment(**environment), cwd=self.folder, capture_output=True,
                           text=True, timeout=30)
    self.said = found.stderr
    return found.stdout.strip() if found.returncode == 0 else ''

  def submit(self, name: str, *flags, **environment) -> str:
    """Two tasks on the only node; the job's id."""
    number = self('sbatch', '--parsable', f'--chdir={ROOT}', f'--output={self.folder}/{name}.log',
                  f'--job-name={self.folder}/{name}', '--nodes=1',
                  '--ntasks-per-node=2', LAUNCH / 'slurm.sbatch', *flags, **environment)
    assert number.isdigit(), self.said
    return number

  def show(self, number: str) -> dict[str, str]:
    """Of a job: JobState, Restarts, ExitCode, ..."""
    return dict(word.split('=', 1) for word in self('scontrol', '--oneliner', 'show', 'job', number).split()
                if '=' in word)

  def finish(self, number: str, seconds: float) -> dict[str, str]:
    """What a job ended as."""
    def ended():
      found = self.show(number)
      return found if found['JobState'] not in ('PENDING', 'RUNNING', 'COMPLETING', 'CONFIGURING', 'REQUEUED') else None
    return wait_for(ended, seconds, f'job {number}')

  def __exit__(self, *_):
    end = time.monotonic() + 20
    self('scancel', '--user=root')  # what a failed test has left; its processes end only when they have told slurmctld
    while self('squeue', '--noheader') and time.monotonic() < end:
      time.sleep(0.2)
    for daemon in reversed(self.daemons):
      daemon.terminate()
    for daemon in self.daemons:
      try:
        daemon.wait(10)
      except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait(10)


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
  path = f'{os.environ["PATH"]}:/usr/sbin'
  missing = [name for name in ('munged', 'slurmctld', 'slurmd', 'sbatch') if not shutil.which(name, path=path)]
  if missing:
    pytest.skip(f'needs {" and ".join(missing)}: apt-get install slurm-wlm munge')
  if os.getuid():
    pytest.skip('starting Slurm needs root')
  with Slurm(tmp_path_factory.mktemp('slurm')) as cluster:
    yield cluster


def stands_in(folder: pathlib.Path, text: str) -> str:
  """A PATH on which `python` is this script."""
  program(folder / 'python', text)
  return f'{folder}:{os.environ["PATH"]}'


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_slurm_does_not_repeat_what_has_bad_input_or_was_cancelled(slurm, tmp_path):
  # the others notice, and fail
  bad = slurm.submit('bad', PATH=stands_in(tmp_path / 'bad', '((SLURM_PROCID)) && exit 2; sleep 5; exit 1'))
  found = slurm.finish(bad, 60)
  assert (found['JobState'], found['ExitCode'], found['Restarts']) == ('FAILED', '2:0', '0')

  started = tmp_path / 'started'
  long = f'trap "exit 143" TERM; touch {started}; for i in {{1..600}}; do sleep 0.1; done'
  cancelled = slurm.submit('cancelled', PATH=stands_in(tmp_path / 'long', long))
  wait_for(started.exists, 60, 'the training')
  slurm('scancel', cancelled)
  found = slurm.finish(cancelled, 60)
  time.sleep(3)
  assert slurm.show(cancelled)['JobState'] == found['JobState'] == 'CANCELLED' and found['Restarts'] == '0'


@pytest.mark.slow
@pytest.mark.timeout(590)
def test_a_job_told_to_stop_saves_is_queued_again_and_ends_with_the_losses_of_one_left_alone(slurm, tmp_path):
  def submit(name):
    return slurm.submit(
        name, *TINY, f'--config.data.cache={tmp_path / "cache"}', f'--workdir={tmp_path / name}',
        PATH=f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}',
        PYTHONPATH=str(ROOT / 'src'), JAX_PLATFORMS='cpu', JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'programs'),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
        XLA_FLAGS='--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 '
                  '--xla_llvm_disable_expensive_passes=true')

  def losses(name) -> dict[int, float]:
    log = tmp_path / name / 'metrics.jsonl'
    records = [json.loads(line) for line in log.read_text().splitlines(keepends=True)
               if line.endswith('\n')] if log.exists() else []
    return {record['step']: record['loss'] for record in records if record['kind'] == 'train'}

  said = lambda name: (slurm.folder / f'{name}.log').read_text()
  found = slurm.finish(submit('alone'), 250)
  assert (found['JobState'], found['Restarts']) == ('COMPLETED', '0'), said('alone')
  wanted = losses('alone')
  assert list(wanted) == list(range(1, 61))

  stopped = submit('stopped')
  wait_for(lambda: len(losses('stopped')) >= 5, 150, 'five steps')
  assert slurm('scancel', '--signal=TERM', stopped) == ''
  wait_for(lambda: slurm.show(stopped)['Restarts'] == '1', 60, 'queued again')
  saved = max(losses('stopped'))
  assert 5 <= saved < 60 and 'slurm.sbatch: stopped and saved; queued again' in said('stopped')
  assert [path.name for path in (tmp_path / 'stopped' / 'checkpoints').iterdir()] == [str(saved)]
  found = slurm.finish(stopped, 150)
  assert (found['JobState'], found['Restarts']) == ('COMPLETED', '1'), said('stopped')
  assert losses('stopped') == wanted
