"""A workdir belongs to one run at a time; one that cannot be written ends the run in one line, and never hangs."""
import json
import os
import resource
import subprocess
import sys

import pytest
from experiments import experiment, log_of, random_state, write, write_config_file

from mtp_jax.checkpoint.record import FOLDER, steps
from mtp_jax.config import BadInput, Config, upgraded
from mtp_jax.data.progress import quiet
from mtp_jax.report.events import FILE as EVENTS
from mtp_jax.report.log import FILE
from mtp_jax.train.fit import fit
from mtp_jax.train.opening import only_run, open_run
from mtp_jax.train.own_files import OWNER, OwnFiles
from mtp_jax.train.replay import replay
from mtp_jax.train.run import Run


def test_a_second_run_in_a_workdir_is_refused_while_the_first_one_is_there(tmp_path):
  config, workdir = experiment(tmp_path), tmp_path / 'run'
  workdir.mkdir()
  with only_run(OwnFiles(workdir, '', 0), open_run(config, workdir, quiet), 60):
    message = f'^--workdir={workdir}: process {os.getpid()} on .*, since .*, trains there; wait'
    with pytest.raises(BadInput, match=message):
      fit(config, workdir, note=quiet)
    assert [path.name for path in workdir.iterdir()] == [OWNER]
  assert fit(config, workdir, note=quiet).step == 6
  assert len(log_of(workdir)) == 9


def test_a_run_that_was_opened_before_another_one_saved_is_refused(tmp_path):
  config, workdir = experiment(tmp_path), tmp_path / 'run'
  workdir.mkdir()
  opened = open_run(config, workdir, quiet)
  write(workdir, config, random_state(config), step=3, identity=opened.corpus.identity)
  with pytest.raises(BadInput, match='another process has saved a checkpoint there; run the same command again'):
    with only_run(OwnFiles(workdir, '', 0), opened, 60):
      pass


@pytest.mark.parametrize('damage', ['a file', 'an array', 'incomplete'])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_logs_what_it_would_have(tmp_path, damage):
  """Without a manifest, a flipped bit of an array shows only in the arrays that are restored."""
  fields = {'steps': 6, 'checkpoint_every': 2, 'evaluate_every': 0, 'log_every': 1}
  config, workdir, lines = experiment(tmp_path, train=fields), tmp_path / 'run', []
  fit(config, workdir, note=quiet)
  whole, folder = log_of(workdir), workdir / FOLDER / '6'
  if damage == 'incomplete':
    (folder / 'commit_success.txt').unlink()
  else:
    largest = max((path for path in (folder / 'parameters').rglob('*') if path.is_file()),
                  key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)
  if damage == 'an array':
    (folder / 'manifest-0-of-1.json').unlink()
  assert fit(config, workdir, note=lines.append).step == 6
  assert log_of(workdir) == whole
  assert [line for line in lines if line.startswith(str(workdir)) and line.endswith('an older checkpoint is used')]
  names = sorted(path.name for path in (workdir / FOLDER).iterdir())
  assert names == ['2', '4', '6', f'{"incomplete" if damage == "incomplete" else "damaged"}-6']
  assert fit(config, workdir, note=lines.append).step == 6 and len(log_of(workdir)) == len(whole)
  events = [json.loads(line) for line in (workdir / EVENTS).read_text().splitlines()]
  saved = [event for event in events if event['kind'] == 'checkpoint']
  assert [event['step'] for event in saved] == [2, 4, 6, 6]
  assert all(saved[2][part] == saved[3][part] != saved[1][part] for part in ('parameters', 'training'))


def with_a_full_disk(monkeypatch, full_steps, run, limit: int = 200):
  """run() where no file can grow beyond `limit` bytes while these steps begin; that holds for root as well."""
  advance, free = Run.advance, resource.getrlimit(resource.RLIMIT_FSIZE)

  def advance_with_limit(self):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, free[1]) if self.step in full_steps else free)
    advance(self)

  monkeypatch.setattr(Run, 'advance', advance_with_limit)
  try:
    return run()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, free)
    monkeypatch.undo()


def test_a_disk_that_is_full_for_a_while_ends_nothing_and_loses_no_record(tmp_path, monkeypatch):
  fields = {'steps': 12, 'checkpoint_every': 2, 'evaluate_every': 0, 'log_every': 1, 'trackers': ('tensorboard',)}
  config, lines = experiment(tmp_path, train=fields), []
  fit(config, tmp_path / 'whole', note=quiet)
  outcome = with_a_full_disk(monkeypatch, range(4, 8), lambda: fit(config, tmp_path / 'run', note=lines.append))
  assert outcome.step == 12 and log_of(tmp_path / 'run') == log_of(tmp_path / 'whole')
  failed = [line for line in lines if 'a checkpoint could not be written to' in line]
  assert 2 <= len(failed) <= 3 and all('the run goes on, and saves the next one' in line for line in failed)
  for name in (FILE, EVENTS):
    assert any(f'{name}: cannot be written (File too large); the run goes on' in line for line in lines), lines
    assert any(f'{name}: can be written again; no lines are lost' in line for line in lines), lines
  assert any('TensorBoard: gets no more records (File too large)' in line for line in lines), lines
  names = {path.name for path in (tmp_path / 'run' / FOLDER).iterdir()}
  assert {'10', '12'} <= names and all(name.isdecimal() for name in names), names


def test_a_run_that_can_save_nothing_for_long_ends(tmp_path, monkeypatch):
  fields = {'steps': 12, 'checkpoint_every': 2, 'evaluate_every': 0, 'unsaved_seconds': 0.0}
  config = experiment(tmp_path, train=fields)
  with pytest.raises(OSError, match='a checkpoint could not be written to .*, and run the same command to resume'):
    with_a_full_disk(monkeypatch, range(4, 12), lambda: fit(config, tmp_path / 'run', note=quiet))
  assert steps(tmp_path / 'run')[-1] in (4, 2)
  assert fit(config, tmp_path / 'run', note=quiet).step == 12


def test_a_replay_begins_at_an_older_checkpoint_where_the_one_before_is_damaged(tmp_path):
  fields = {'steps': 6, 'checkpoint_every': 2, 'evaluate_every': 0, 'log_every': 1}
  config, workdir, lines = experiment(tmp_path, train=fields), tmp_path / 'run', []
  fit(config, workdir, note=quiet)
  (workdir / FOLDER / '4' / 'parameters' / '_METADATA').write_text('{}')
  found = replay(config, workdir, 5, lines.append)
  assert (found.start, found.same) == (2, True) and found.loss == found.logged_loss
  assert [line for line in lines if '4: is damaged' in line and line.endswith('; an older checkpoint is used')]


def test_a_run_whose_only_checkpoint_is_incomplete_is_refused_and_nothing_is_lost(tmp_path):
  """A kill leaves no such folder: Orbax renames a checkpoint when it is whole. A copy that was cut off does."""
  fields = {'steps': 4, 'checkpoint_every': 4, 'evaluate_every': 0}
  config, workdir = experiment(tmp_path, train=fields), tmp_path / 'run'
  fit(config, workdir, note=quiet)
  log = log_of(workdir)
  (workdir / FOLDER / '4' / 'commit_success.txt').unlink()
  with pytest.raises(BadInput, match='4: is incomplete, it was never committed; there is no older one: restore'):
    fit(config, workdir, note=quiet)
  assert log_of(workdir) == log and (workdir / FOLDER / '4').exists()


def test_a_run_that_kept_one_checkpoint_still_opens(tmp_path):
  config = experiment(tmp_path)
  record = config.to_dict()
  record['train']['checkpoints_kept'] = 1
  assert Config.from_dict(upgraded(record)).train.checkpoints_kept == 2


@pytest.mark.parametrize('name', ['metrics.jsonl', 'events.jsonl', 'config.json'])
def test_a_folder_in_place_of_a_file_of_the_workdir_is_bad_input(tmp_path, name):
  (tmp_path / 'run' / name).mkdir(parents=True)
  with pytest.raises(BadInput, match=f'^--workdir=.*/run: cannot write .*/run/{name}: Is a directory'):
    fit(experiment(tmp_path), tmp_path / 'run', note=quiet)


@pytest.mark.parametrize('limit, message', [
    (3000, 'events.jsonl: cannot be written (File too large); the run goes on'), (12_000, '')])
def test_a_disk_that_is_full_ends_the_run_in_one_line(tmp_path, limit, message):
  """A limit of the size of a file stands for the disk: it holds for root as well."""
  config = experiment(tmp_path, train={'steps': 30, 'trackers': ('tensorboard',)})
  write_config_file(tmp_path / 'tiny.py', config)
  open_run(config, tmp_path / 'run', quiet)  # prepares the documents
  program = ('import resource, runpy, sys\n'
             f'resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n'
             "runpy.run_module('mtp_jax', run_name='__main__')")
  done = subprocess.run(
      [sys.executable, '-c', program, 'train', f'--config={tmp_path}/tiny.py', f'--workdir={tmp_path}/run'],
      capture_output=True, text=True, timeout=300, env={**os.environ, 'JAX_ENABLE_COMPILATION_CACHE': 'false'})
  lines = done.stderr.splitlines()
  assert done.returncode == 1, done.stderr
  assert message in done.stderr
  assert 'a checkpoint could not be written to ' in lines[-1] and lines[-1].startswith('mtp_jax: ') and lines[
      -1].endswith('run the same command to resume')
  assert 'Traceback' not in done.stderr and '[Errno' not in done.stderr and not done.stdout
