"""A workdir belongs to one run at a time; one that cannot be written ends the run in one line, and never hangs."""
import os
import subprocess
import sys

import pytest
from experiments import experiment, log_of, random_state, write, write_config_file

from mtp_jax.checkpoint.record import FOLDER
from mtp_jax.config import BadInput
from mtp_jax.data.progress import quiet
from mtp_jax.train.fit import fit
from mtp_jax.train.opening import only_run, open_run


def test_a_second_run_in_a_workdir_is_refused_while_the_first_one_is_there(tmp_path):
  config, workdir = experiment(tmp_path), tmp_path / 'run'
  workdir.mkdir()
  with only_run(workdir, open_run(config, workdir, quiet)):
    with pytest.raises(BadInput, match=f'^--workdir={workdir}: another process trains there; wait'):
      fit(config, workdir, note=quiet)
    assert not list(workdir.iterdir())
  assert fit(config, workdir, note=quiet).step == 6
  assert len(log_of(workdir)) == 9


def test_a_run_that_was_opened_before_another_one_saved_is_refused(tmp_path):
  config, workdir = experiment(tmp_path), tmp_path / 'run'
  workdir.mkdir()
  opened = open_run(config, workdir, quiet)
  write(workdir, config, random_state(config), step=3, identity=opened.corpus.identity)
  with pytest.raises(BadInput, match='another process has saved a checkpoint there; run the same command again'):
    with only_run(workdir, opened):
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


@pytest.mark.parametrize('name', ['metrics.jsonl', 'events.jsonl', 'config.json'])
def test_a_folder_in_place_of_a_file_of_the_workdir_is_bad_input(tmp_path, name):
  (tmp_path / 'run' / name).mkdir(parents=True)
  with pytest.raises(BadInput, match=f'^--workdir=.*/run: cannot write .*/run/{name}: Is a directory'):
    fit(experiment(tmp_path), tmp_path / 'run', note=quiet)


@pytest.mark.parametrize('limit, message', [
    (3000, 'cannot write there (File too large)'), (12_000, 'a checkpoint could not be written to ')])
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
  assert message in lines[-1] and lines[-1].startswith('mtp_jax: ') and lines[-1].endswith(
      'run the same command to resume')
  assert 'Traceback' not in done.stderr and '[Errno' not in done.stderr and not done.stdout
