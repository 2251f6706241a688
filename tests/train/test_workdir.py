"""A workdir belongs to one run at a time; one that cannot be written ends the run in one line, and never hangs."""
import os
import subprocess
import sys

import pytest
from experiments import experiment, log_of, random_state, write, write_config_file

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
