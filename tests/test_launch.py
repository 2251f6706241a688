"""What stands in launch/: each file is held against the rules of its environment; Slurm, where it
is installed, runs a job for real.
"""
import json
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import tomllib

import jsonschema
import pytest
import yaml
from xla_flags import FAST

from mtp_jax.cli.main import main
from mtp_jax.config import TrainConfig

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / 'launch'
SHELL = ['slurm.sbatch', 'tpu_vm.sh']


def wait_for(true, seconds: float, what: str):
  """The first value of true() that counts as one; fails after so many seconds."""
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if value := true():
      return value
    time.sleep(0.1)
  pytest.fail(f'{what}: not within {seconds} seconds')


def program(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(exist_ok=True, parents=True)
  new = path.with_suffix('.new')
  new.write_text(f'#!/bin/bash\n{text}\n')
  new.chmod(0o755)
  new.replace(path)  # bash may still be reading the old one


@pytest.mark.parametrize('name', SHELL)
def test_shell_files_are_well_formed(name):
  subprocess.run(['bash', '-n', LAUNCH / name], check=True, timeout=30)
  if not shutil.which('shellcheck'):
    pytest.skip('needs shellcheck')
  found = subprocess.run(['shellcheck', '--shell=bash', LAUNCH / name], capture_output=True, text=True, timeout=60)
  assert found.returncode == 0, found.stdout


def test_whoever_runs_a_script_by_its_name_can():
  assert (LAUNCH / 'tpu_vm.sh').stat().st_mode & stat.S_IXUSR


# JobSet


@pytest.fixture
def jobset() -> dict:
  return yaml.safe_load((LAUNCH / 'gke_jobset.yaml').read_text())


@pytest.fixture(scope='module')
def schema() -> jsonschema.Draft202012Validator:
  found = json.loads((ROOT / 'tests' / 'jobset_schema.json').read_text())
  jsonschema.Draft202012Validator.check_schema(found)
  return jsonschema.Draft202012Validator(found, format_checker=jsonschema.FormatChecker())


def job(jobset: dict) -> dict:
  return jobset['spec']['replicatedJobs'][0]['template']['spec']


def pod(jobset: dict) -> dict:
  return job(jobset)['template']['spec']


def test_the_jobset_is_one(jobset, schema):
  schema.validate(jobset)


BROKEN = {
    'another version': lambda x: x.update(apiVersion='jobset.x-k8s.io/v1'),
    'policy of the job among those of the set':
        lambda x: x['spec'].update(podFailurePolicy=job(x).pop('podFailurePolicy')),
    'policy misspelt': lambda x: x['spec'].update(failurePolices=x['spec'].pop('failurePolicy')),
    'no such action': lambda x: x['spec']['failurePolicy']['rules'][0].update(action='Restart'),
    'no such reason': lambda x: x['spec']['failurePolicy']['rules'][0].update(onJobFailureReasons=['ExitCode']),
    'no regular expression': lambda x: x['spec']['failurePolicy']['rules'][0].update(onJobFailureMessagePatterns=['(']),
    'pods that Kubernetes restarts itself': lambda x: pod(x).update(restartPolicy='OnFailure'),
    'exit code as text': lambda x: job(x)['podFailurePolicy']['rules'][0]['onExitCodes'].update(values=['143']),
    'codes and conditions in one rule':
        lambda x: job(x)['podFailurePolicy']['rules'][0].update(
            onPodConditions=[{'type': 'DisruptionTarget', 'status': 'True'}]),
    'condition without status': lambda x: job(x)['podFailurePolicy']['rules'][2]['onPodConditions'][0].pop('status'),
    'boolean label': lambda x: pod(x)['nodeSelector'].update({'cloud.google.com/gke-spot': True}),
    'topology as a number of chips':
        lambda x: pod(x)['nodeSelector'].update({'cloud.google.com/gke-tpu-topology': '8'}),
    'no chips': lambda x: pod(x)['containers'][0]['resources'].pop('limits'),
}


@pytest.mark.parametrize('damage', BROKEN)
def test_a_broken_jobset_is_refused(jobset, schema, damage):
  BROKEN[damage](jobset)
  with pytest.raises(jsonschema.ValidationError):
    schema.validate(jobset)


def test_hosts_times_chips_are_the_topology_and_the_mesh_is_all_slices(jobset):
  chips = math.prod(map(int, pod(jobset)['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x')))
  resources = pod(jobset)['containers'][0]['resources']
  assert resources['requests'] == resources['limits']
  assert job(jobset)['parallelism'] == job(jobset)['completions'] == chips / resources['limits']['google.com/tpu']
  slices = jobset['spec']['replicatedJobs'][0]['replicas']
  mesh = {axis: int(size) for axis,
          size in re.findall(r'--config\.mesh\.(\w+)=(\d+)', '\n'.join(pod(jobset)['containers'][0]['args']))}
  assert math.prod(mesh.values()) == slices * chips and mesh['data'] % slices == 0


@pytest.mark.filterwarnings(r'ignore:the load_module\(\) method is deprecated:DeprecationWarning')
def test_the_arguments_of_the_jobset_are_a_config(jobset, monkeypatch, capsys):
  command, *flags = pod(jobset)['containers'][0]['args']
  assert command == 'train'
  monkeypatch.chdir(ROOT)
  monkeypatch.delitem(sys.modules, 'config_config', raising=False)
  code = main(['inspect', *(flag for flag in flags if flag.startswith('--config'))])
  assert code == 0, capsys.readouterr().err


def test_no_two_jobs_share_a_slice_and_no_two_runs_a_workdir(jobset):
  assert jobset['metadata']['annotations'] == {
      'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}
  assert jobset['spec']['failurePolicy']['restartStrategy'] == 'BlockingRecreate' and job(jobset)['backoffLimit'] == 0


def test_there_is_time_to_save(jobset):
  """As much as on Slurm, and more than the others need to notice that a host is gone."""
  on_slurm = int(re.search(r'--signal=TERM@(\d+)', (LAUNCH / 'slurm.sbatch').read_text())[1])
  # Slurm may be a minute early, not late
  assert pod(jobset)['terminationGracePeriodSeconds'] >= on_slurm > 60 + 2 * TrainConfig().heartbeat_seconds


def answer(jobset: dict, code: int | None, container: str = 'train') -> str:
  """What happens when a container exits with this code, or, None, a pod is evicted: Kubernetes' two
  lists of rules, the first match of each.
  """
  reason, message = 'BackoffLimitExceeded', 'Job has reached the specified backoff limit'
  for index, rule in enumerate(job(jobset)['podFailurePolicy']['rules']):
    assert rule['action'] == 'FailJob'
    codes = rule.get('onExitCodes', {})
    if code is not None and code in codes.get('values', ()) and codes.get('containerName', container) == container:
      reason, message = 'PodFailurePolicy', (f'Container {container} for pod default/mtp-jax-slice-0-2-143x2 failed '
                                             f'with exit code {code} matching FailJob rule at index {index}')
      break
    if code is None and {'type': 'DisruptionTarget', 'status': 'True'} in rule.get('onPodConditions', ()):
      reason, message = 'PodFailurePolicy', ('Pod default/mtp-jax-slice-0-1-x has condition DisruptionTarget matching '
                                             f'FailJob rule at index {index}')
      break
  for rule in jobset['spec']['failurePolicy']['rules']:
    if reason in rule['onJobFailureReasons'] and any(re.search(pattern, message)
                                                     for pattern in rule['onJobFailureMessagePatterns']):
      return rule['action']
  return 'RestartJobSet'


@pytest.mark.parametrize('code, wanted',
                         [(143, 'RestartJobSetAndIgnoreMaxRestarts'), (None, 'RestartJobSetAndIgnoreMaxRestarts'),
                          (2, 'FailJobSet'),
                                          (1, 'RestartJobSet'), (137, 'RestartJobSet'), (12, 'RestartJobSet')])
def test_only_restarts_after_a_failure_are_counted_and_bad_input_is_not_tried_again(jobset, code, wanted):
  assert answer(jobset, code) == wanted
  assert jobset['spec']['failurePolicy']['maxRestarts'] > 0


def test_exit_codes_of_containers_beside_the_training_mean_nothing(jobset):
  assert answer(jobset, 143, container='sidecar') == answer(jobset, 2, container='sidecar') == 'RestartJobSet'


# Dockerfile


def instructions(text: str) -> list[tuple[str, str]]:
  lines = re.sub(r'\\\n', ' ', re.sub(r'(?m)^#.*\n', '', text)).splitlines()
  return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


@pytest.fixture(scope='module')
def dockerfile() -> list[tuple[str, str]]:
  return instructions((LAUNCH / 'Dockerfile').read_text())


def test_the_image_holds_all_that_the_package_is_built_from_and_the_configs(dockerfile):
  before, after = set(), set()
  for what, rest in dockerfile:
    if what == 'RUN' and 'pip install' in rest:
      before, after = after, set()
    if what == 'COPY':
      after |= set(rest.split()[:-1])
  assert all((ROOT / source).exists() for source in before | after), before | after
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  named = {'pyproject.toml', project['project']['readme'], *project['project']['license-files'],
           *project['tool']['setuptools']['packages']['find']['where']}
  assert before == named and after == {'configs'}
  offered = re.search(r'tpu \| cuda\)', next(rest for what, rest in dockerfile if what == 'RUN'))
  assert offered and {'tpu', 'cuda', 'data'} <= set(project['project']['optional-dependencies'])


def test_the_image_is_small_runs_the_command_line_and_not_as_root(dockerfile):
  kinds = [what for what, _ in dockerfile]
  assert dockerfile[0] == ('FROM', 'python:3.12-slim')
  assert dockerfile[-1] == ('ENTRYPOINT', '["python", "-m", "mtp_jax"]') and 'CMD' not in kinds
  user = [rest for what, rest in dockerfile if what == 'USER'][-1]
  assert user not in ('root', '0') and any(what == 'RUN' and rest.startswith('useradd') and user in rest.split()
                                           for what, rest in dockerfile)
  assert kinds.index('USER') > max(place for place, what in enumerate(kinds) if what in ('RUN', 'COPY'))


@pytest.mark.parametrize('accelerator, wanted',
                         [('tpu', '.[data,tpu]'), ('cuda', '.[data,cuda]'), ('none', '.[data]'), ('gpu', None)])
def test_the_accelerator_chooses_what_is_installed(dockerfile, tmp_path, accelerator, wanted):
  program(tmp_path / 'pip', 'echo "${@: -1}"')
  script = next(rest for what, rest in dockerfile if what == 'RUN')
  found = subprocess.run(['sh', '-c', script],
                         env={'PATH': f'{tmp_path}:{os.environ["PATH"]}',
                              'ACCELERATOR': accelerator}, capture_output=True, text=True, timeout=30)
  assert (found.returncode, found.stdout.strip()) == ((0, wanted) if wanted else (2, ''))
  assert wanted or found.stderr == 'ACCELERATOR=gpu: must be tpu, cuda or none\n'


# Cloud TPU VMs, as a gcloud of our own writing tells them


GCLOUD = r"""
echo "$*" >>"$FAKE/calls"
case "$*" in
  *'queued-resources describe'*)
    [[ -s $FAKE/state ]] || { echo 'ERROR: NOT_FOUND: Resource was not found' >&2; exit 1; }
    head -n 1 "$FAKE/state"
    if (($(wc -l <"$FAKE/state") > 1)); then sed -i 1d "$FAKE/state"; fi ;;
  *'queued-resources create'*) printf 'PROVISIONING\nACTIVE\n' >"$FAKE/state" ;;
  *'queued-resources delete'*) rm "$FAKE/state" ;;
  *'tpu-vm scp'*) for file in "$@"; do case $file in /*) cp "$file" "$FAKE/host" ;; esac done ;;
  *'tpu-vm ssh'*mountpoint*) ;;
  *'tpu-vm ssh'*) for last; do :; done; cd "$FAKE/host" && mkdir -p mtp_jax && bash -c "${last#--command=}" ;;
esac"""


@pytest.fixture
def tpu(tmp_path):
  """Runs launch/tpu_vm.sh to its end; host/ is the home directory of the only host, where the
  training is the script `train`.
  """
  program(tmp_path / 'bin' / 'gcloud', GCLOUD)
  (tmp_path / 'calls').touch()

  def go(train: str, state: str = '', flags: tuple[str, ...] = ('--config=x.py', "--config.data.paths=('a b',)"),
         **environment) -> subprocess.Popen:
    program(tmp_path / 'host' / 'venv' / 'bin' / 'python', train)
    (tmp_path / 'state').write_text(state)
    given = {'NAME': 'small', 'ZONE': 'z', 'TYPE': 'v5p-16', 'SHARE': '10.0.0.2:/runs',
             'POLL_SECONDS': '0.2'} | environment
    return subprocess.Popen([LAUNCH / 'tpu_vm.sh', *flags],
                            env={'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}', 'FAKE': str(tmp_path)} | given,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
  go.folder = tmp_path
  go.calls = lambda what: [line for line in (tmp_path / 'calls').read_text().splitlines() if what in line]
  return go


def test_a_missing_variable_is_one_line_and_exit_code_2(tpu):
  for name in ('NAME', 'ZONE', 'TYPE', 'SHARE'):
    script = tpu('', **{name: ''})
    out, err = script.communicate(timeout=30)
    assert (script.returncode, out, len(err.splitlines())) == (2, '', 1) and f'{name} is not set; usage: ' in err
  script = tpu('', flags=())
  assert 'no flags of train; usage: ' in script.communicate(timeout=30)[1] and script.returncode == 2
  assert not tpu.calls('')


def test_a_slice_is_asked_for_and_trained_on_with_the_words_given(tpu):
  script = tpu('printf "<%s>" "$@"; exit 0')
  out, err = script.communicate(timeout=60)
  assert script.returncode == 0, err
  assert out.strip() == "<-m><mtp_jax><train><--config=x.py><--config.data.paths=('a b',)>"
  create, = tpu.calls('queued-resources create')
  assert {'--node-id=small', '--zone=z', '--accelerator-type=v5p-16',
          '--runtime-version=v2-alpha-tpuv5'} < set(create.split()) and '--spot' not in create
  assert all('--worker=all' in line for line in tpu.calls('tpu-vm'))


def test_a_preempted_slice_is_made_anew_and_goes_on(tpu):
  train = 'echo run >>runs; if (($(wc -l <runs) == 1)); then printf "SUSPENDED\\n" >"$FAKE/state"; exit 143; fi'
  script = tpu(train, state='SUSPENDED\n', SPOT='1')
  _, err = script.communicate(timeout=60)
  assert script.returncode == 0, err
  deleted = tpu.calls('queued-resources delete small --zone=z --quiet --force')
  assert len(deleted) == len(tpu.calls('queued-resources create')) == 2
  assert all(line.endswith('--spot') for line in tpu.calls('queued-resources create'))
  assert (tpu.folder / 'host' / 'mtp_jax' / 'runs').read_text() == 'run\n' * 2


@pytest.mark.parametrize('code, runs', [(0, 1), (2, 1), (1, 4)])
def test_failures_are_tried_again_a_few_times_and_bad_input_is_not(tpu, code, runs):
  script = tpu(f'echo run >>runs; exit {code}', state='ACTIVE\n')
  _, err = script.communicate(timeout=60)
  assert script.returncode == code, err
  assert (tpu.folder / 'host' / 'mtp_jax' / 'runs').read_text() == 'run\n' * runs
  assert not tpu.calls('queued-resources create')


def test_ctrl_c_saves_on_all_hosts_and_stops(tpu):
  script = tpu('trap "echo saved; exit 143" TERM; echo started; for i in {1..300}; do sleep 0.1; done',
               state='ACTIVE\n')
  log = tpu.folder / 'host' / 'log'
  wait_for(lambda: log.exists() and 'started' in log.read_text(), 30, 'the training')
  os.killpg(script.pid, signal.SIGINT)
  out, err = script.communicate(timeout=30)
  assert script.returncode == 143 and out.split() == ['started', 'saved'], err


def test_a_training_that_runs_already_is_found_again(tpu):
  script = tpu('echo run >>runs; echo started; for i in {1..300}; do test -e ../end && exit; sleep 0.1; done',
               state='ACTIVE\n')
  log = tpu.folder / 'host' / 'log'
  wait_for(lambda: log.exists() and 'started' in log.read_text(), 30, 'the training')
  with script:  # closes its pipes
    script.kill()
  again = tpu('exit 1', state='ACTIVE\n')
  wait_for(lambda: len(tpu.calls('tail -n')) == 2, 30, 'the second look at the log')
  (tpu.folder / 'host' / 'end').touch()
  out, err = again.communicate(timeout=60)
  assert again.returncode == 0 and out.split() == ['started'], err


# Slurm


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
    'train.tensorboard=False', 'optimizer.warmup_steps=0', 'mesh.fsdp=8'))]


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
        XLA_FLAGS=f'--xla_force_host_platform_device_count=4 {FAST}')

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
