"""A workdir in a bucket: what a run leaves there is what one on disk leaves, whatever cut it, wherever it went on."""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import buckets
import kills
import pytest
from etils import epath
from experiments import experiment, log_of, same_bits, write_config_file
from test_train import fit_to, state_of

import mtp_jax
from mtp_jax.checkpoint.record import FOLDER, all_folders, folders, state, steps
from mtp_jax.cli.main import main
from mtp_jax.config import BadInput, folder_path
from mtp_jax.config.paths import remove
from mtp_jax.data.progress import quiet
from mtp_jax.report.events import read_events, split_runs
from mtp_jax.report.log import FILE, read_log
from mtp_jax.train.fit import fit
from mtp_jax.train.own_files import OWNER

FIELDS = {'steps': 6, 'checkpoint_every': 2, 'evaluate_every': 2, 'log_every': 1}


@pytest.fixture(scope='module')
def bucket():
  """The address of an empty bucket."""
  with buckets.served() as environment, pytest.MonkeyPatch.context() as patch:
    for name, value in environment.items():
      patch.setenv(name, value)
    yield f'gs://{buckets.BUCKET}'


@pytest.fixture(scope='module')
def on_disk(tmp_path_factory):
  """(config, folder of a run of it)."""
  folder = tmp_path_factory.mktemp('run')
  config = experiment(folder, train=FIELDS)
  fit(config, folder / 'whole', note=quiet)
  return config, folder / 'whole'


def on_another_machine(config) -> None:
  """Nothing of the run is left but what is in the bucket."""
  shutil.rmtree(os.path.join(config.data.cache, 'workdirs'), ignore_errors=True)


def test_a_run_that_is_cut_goes_on_on_another_machine_and_leaves_what_one_on_disk_does(bucket, on_disk):
  config, whole = on_disk
  workdir = f'{bucket}/cut'
  assert fit_to(config, workdir, 4).step == 4
  on_another_machine(config)
  assert fit(config, workdir, note=quiet).step == 6
  assert same_bits(state_of(config, folder_path(workdir)), state_of(config, whole))
  assert log_of(folder_path(workdir)) == log_of(whole)
  assert [run[0]['step'] for run in split_runs(read_events(workdir))] == [0, 4]
  names = {path.name for path in folder_path(workdir).iterdir()}
  assert names == {path.name for path in whole.iterdir()}
  kept = steps(folder_path(workdir))
  assert kept == steps(whole) and {state(folder_path(workdir), step) for step in kept} == {'whole'}
  assert not os.path.exists('gs:')


def test_a_run_in_a_bucket_is_read_as_one_on_disk(bucket, on_disk, tmp_path, capsys):
  config, whole = on_disk
  workdir = f'{bucket}/read'
  fit(config, workdir, note=quiet)
  there, here = (mtp_jax.load(path).generate('def ', max_tokens=4, temperature=0.) for path in (workdir, whole))
  assert there.text == here.text
  assert mtp_jax.load(f'{workdir}/checkpoints/4').step == 4
  for command in ('verify', 'goodput', 'evaluate --rows=2', 'report --max_tokens=2'):
    name, *flags = command.split()
    assert main([name, f'--workdir={workdir}', *flags, '--json']) == 0, command
  values = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert values['output'] == f'{workdir}/report.html'
  assert folder_path(values['output']).read_text().startswith('<!DOCTYPE html>')


def test_a_checkpoint_that_was_never_committed_is_passed_over_and_removed_by_the_run_that_goes_on(bucket, on_disk):
  """A save writes in place there, and its last object makes it a checkpoint."""
  config, whole = on_disk
  workdir = folder_path(f'{bucket}/uncommitted')
  fit(config, workdir, note=quiet)
  for name in ('commit_success.txt', 'manifest-0-of-1.json'):
    (workdir / FOLDER / '6' / name).unlink()
  assert folders(workdir)[-1] == 4
  assert steps(workdir)[-1] == 4 and mtp_jax.load(workdir).step == 4
  assert fit(config, workdir, note=quiet).step == 6
  assert log_of(workdir) == log_of(whole) and state(workdir, 6) == 'whole'


def test_a_copy_that_lost_its_commit_marker_is_kept_under_another_name(bucket, on_disk):
  config, whole = on_disk
  workdir, lines = folder_path(f'{bucket}/incomplete'), []
  fit(config, workdir, note=quiet)
  (workdir / FOLDER / '6' / 'commit_success.txt').unlink()
  assert fit(config, workdir, note=lines.append).step == 6
  assert any('6: is incomplete, it was never committed; an older' in line for line in lines)
  assert (workdir / FOLDER / 'incomplete-6').is_dir() and log_of(workdir) == log_of(whole)


def test_a_run_that_was_cut_in_its_first_save_begins_anew(bucket, on_disk):
  config, whole = on_disk
  workdir = folder_path(f'{bucket}/first')
  (workdir / FOLDER / '2' / '_CHECKPOINT_METADATA').write_text('{}')
  with pytest.raises(BadInput, match='holds no checkpoint; train one with'):
    mtp_jax.load(workdir)
  assert fit(config, workdir, note=quiet).step == 6
  assert log_of(workdir) == log_of(whole) and {state(workdir, step) for step in steps(workdir)} == {'whole'}


@pytest.mark.slow
def test_a_damaged_object_is_found_and_the_checkpoint_before_it_used(bucket, on_disk):
  config, whole = on_disk
  workdir, lines = folder_path(f'{bucket}/damaged'), []
  fit(config, workdir, note=quiet)
  objects = (workdir / FOLDER / '6' / 'parameters' / 'ocdbt.process_0' / 'd').iterdir()
  largest = max(objects, key=lambda path: path.stat().length)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 16
  largest.write_bytes(content)
  assert 'holds other bytes than were saved' in state(workdir, 6)
  assert fit(config, workdir, note=lines.append).step == 6
  assert any('6: is damaged' in line and line.endswith('; an older checkpoint is used') for line in lines)
  assert same_bits(state_of(config, workdir), state_of(config, whole))
  assert {'6', 'damaged-6'} < {path.name for path in (workdir / FOLDER).iterdir()}


def test_a_run_ends_at_its_next_save_once_another_one_has_started(bucket, on_disk):
  config, _ = on_disk
  workdir, other = folder_path(f'{bucket}/taken'), 'process 1 on b, since 2026-01-01 00:00:00,\n'
  def note(line):
    if line.startswith('step 3  '):
      (workdir / OWNER).write_text(other)
  with pytest.raises(BadInput, match='^--workdir=gs://bucket/taken: process 1 on b, since .*, trains there now, so'):
    fit(config, workdir, note=note)
  assert steps(workdir) == [2] and (workdir / OWNER).read_text() == other
  assert {record['step'] for record in read_log(workdir)} == {1, 2}  # and no line of the log was written after that
  assert fit(config, workdir, note=quiet).step == 6


def test_two_runs_of_one_machine_do_not_train_in_one_bucket_folder(bucket, on_disk):
  config, whole = on_disk
  workdir, refused = folder_path(f'{bucket}/twice'), []
  def note(line):
    if line.startswith('step 3  '):
      with pytest.raises(BadInput, match='^--workdir=gs://bucket/twice: process .* trains there; wait for it') as error:
        fit(config, workdir, note=quiet)
      refused.append(error)
  fit(config, workdir, note=note)
  assert refused and log_of(workdir) == log_of(whole)


@pytest.mark.parametrize('back', [5, 7])
def test_logs_that_cannot_be_copied_end_no_run_and_are_copied_later(bucket, on_disk, monkeypatch, back):
  """Before the end of the run, or when it is resumed on the machine that has them."""
  config, whole = on_disk
  workdir, lines, write = folder_path(f'{bucket}/logs{back}'), [], epath.Path.write_bytes
  def failing(self, content):
    if self.name == FILE and not any(line.startswith(f'step {back}  ') for line in lines):
      raise OSError('the network is down')
    return write(self, content)
  monkeypatch.setattr(type(workdir), 'write_bytes', failing, raising=False)
  assert fit_to(config, workdir, 4, lines.append).step == 4
  told = [line for line in lines if line.startswith(f'{workdir}: the logs ')]
  assert len(told) == 1 and 'cannot be copied there (the network is down); the run goes on' in told[0]
  if back > 6:
    monkeypatch.undo()
  assert fit(config, workdir, note=lines.append).step == 6
  assert log_of(workdir) == log_of(whole)


@pytest.mark.slow
def test_killed_in_its_saves_a_run_in_a_bucket_loses_and_repeats_nothing(bucket, on_disk, tmp_path):
  config, whole = on_disk
  write_config_file(tmp_path / 'tiny.py', config)
  command = [sys.executable, '-m', 'mtp_jax', 'train', f'--config={tmp_path}/tiny.py', f'--workdir={bucket}/killed']
  workdir, kills = folder_path(f'{bucket}/killed'), 0
  for known in (0, 2, 4):  # in the save after that step, which writes in place
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not max([0, *set(all_folders(workdir)) - set(steps(workdir))]) > known:
      time.sleep(0.01)
    kills += process.poll() is None
    process.kill()
    process.communicate()
    on_another_machine(config)
  assert kills >= 2
  assert fit(config, workdir, note=quiet).step == 6
  assert same_bits(state_of(config, workdir), state_of(config, whole))
  assert log_of(workdir) == log_of(whole)


@pytest.mark.slow
def test_two_processes_train_in_a_bucket_as_on_disk(bucket, tmp_path):
  expected, workdir = kills.undisturbed_job(tmp_path), folder_path(f'{bucket}/job')
  for _ in range(2):  # the second time to resume
    with kills.job(tmp_path / 'programs', *[kills.train(workdir, tmp_path / 'cache', kills.JOB)] * 2) as processes:
      codes = kills.ended(processes, kills.PATIENCE_SECONDS)
    assert codes == [0, 0], [process.output for process in processes]
    assert kills.losses(workdir) == kills.losses(workdir / 'process-1') == expected
    kept = steps(workdir)
    assert {state(workdir, step) for step in kept} == {'whole'} and kept[-1] == kills.JOB['train.steps']
    assert sum(path.name.startswith('manifest') for path in (workdir / FOLDER / str(kept[-1])).iterdir()) == 2
    remove(workdir / FOLDER / str(kept[-1]))
    shutil.rmtree(tmp_path / 'cache' / 'workdirs')


def test_other_addresses_are_refused_in_one_line(bucket, on_disk, monkeypatch):
  with pytest.raises(BadInput, match='^--workdir=gs://nowhere/run: the bucket cannot be read or written .*; create it'):
    fit(on_disk[0], 'gs://nowhere/run', note=quiet)
  with pytest.raises(BadInput, match='^--workdir=s3://b/run: must be a path on this machine or gs://BUCKET/FOLDER'):
    folder_path('s3://b/run')
  for path in ('gs:/bucket/run', pathlib.Path('gs://bucket/run')):  # pathlib merges slashes
    assert str(folder_path(path)) == 'gs://bucket/run'
  with pytest.raises(BadInput, match='^--workdir=gs://b: a bucket without a folder; write gs://BUCKET/FOLDER$'):
    folder_path('gs://b')

  def unreachable(self):
    raise OSError('no credentials')
  monkeypatch.setattr(epath.Path, 'exists', unreachable, raising=False)
  monkeypatch.setattr(type(epath.Path('gs://b/run')), 'exists', unreachable)
  with pytest.raises(BadInput, match=r'^--workdir=gs://b/no: the bucket cannot be reached \(no credentials\); see to'):
    folder_path('gs://b/no')
