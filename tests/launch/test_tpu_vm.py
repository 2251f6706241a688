"""The script for Cloud TPU VMs, with a gcloud that the tests wrote."""
import os
import signal
import subprocess

import pytest
from scripts import LAUNCH, program, wait_for

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
  *'tpu-vm ssh'*'uv pip install'*) ;;
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
    given = {'NAME': 'small', 'ZONE': 'z', 'TYPE': 'v5p-16', 'POLL_SECONDS': '0.2'} | environment
    return subprocess.Popen([LAUNCH / 'tpu_vm.sh', *flags],
                            env={'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}', 'FAKE': str(tmp_path)} | given,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
  go.folder = tmp_path
  go.calls = lambda what: [line for line in (tmp_path / 'calls').read_text().splitlines() if what in line]
  return go


def test_a_missing_variable_is_one_line_and_exit_code_2(tpu):
  for name in ('NAME', 'ZONE', 'TYPE'):
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
