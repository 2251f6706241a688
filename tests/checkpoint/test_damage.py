"""A checkpoint whose files are damaged or missing is read right or refused in one line, which says how to go on."""
import contextlib
import re
import shutil
import sys
import threading

import jax
import pytest
from experiments import experiment, random_state, same_bits, write

from mtp_jax.checkpoint import store
from mtp_jax.checkpoint.record import FOLDER, read_record, steps
from mtp_jax.config import BadInput
from mtp_jax.mesh import make_mesh
from mtp_jax.train import step as training


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A config, its states of the steps 3 and 6, and the folder where both were saved."""
  folder = tmp_path_factory.mktemp('saved')
  config = experiment(folder)
  states = {step: random_state(config, seed=step) for step in (3, 6)}
  writer = store.Writer(folder / 'run', 3)
  for step, state in states.items():
    write(folder / 'run', config, state, step, writer=writer)
  writer.close()
  return config, states, folder / 'run'


def remove(path):
  shutil.rmtree(path) if path.is_dir() else path.unlink()


def as_the_other_kind(path):
  """A folder becomes a file, a file a folder."""
  is_folder = path.is_dir()
  remove(path)
  path.write_bytes(b'x') if is_folder else path.mkdir()


DAMAGES = {
    'removed': remove,
    'cut off': lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
    'empty': lambda path: path.write_bytes(b''),
    'zeros': lambda path: path.write_bytes(bytes(path.stat().st_size)),
    'of another kind': as_the_other_kind,
}


@pytest.mark.parametrize('name', DAMAGES)
def test_whatever_is_damaged_a_checkpoint_is_read_right_or_refused_in_one_line(saved, tmp_path, capfd, name):
  config, states, workdir = saved
  newest = workdir / FOLDER / '6'
  paths = [path for path in sorted(newest.rglob('*')) if path.is_file() or name in ('removed', 'of another kind')]
  mesh, refused = make_mesh(config.mesh), 0
  for number, path in enumerate(paths):
    copy = tmp_path / str(number)
    shutil.copytree(workdir, copy)
    DAMAGES[name](copy / path.relative_to(workdir))
    try:
      step = read_record(copy)['step']
      with jax.set_mesh(mesh):
        assert same_bits(training.restore(config, copy, step, mesh), states[step]), path
    except BadInput as error:
      assert re.search(r'remove the folder 6 to fall back to step 3$', str(error)), (path, error)
      assert len(str(error).splitlines()) == 1 and len(str(error)) < 600
      refused += 1
    shutil.rmtree(copy)
  assert refused > 8
  assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('error', [PermissionError(13, 'Permission denied', 'a/file'), OSError(5, 'a disk', 'a/file')])
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(saved, monkeypatch, error):
  config, _, workdir = saved
  mesh = make_mesh(config.mesh)

  def refuse(*_, **__):
    raise error
  monkeypatch.setattr(store._orbax(), 'load_checkpointables', refuse)
  with jax.set_mesh(mesh), pytest.raises(BadInput, match='6 cannot be read .a/file: .*; it may be whole'):
    training.restore(config, workdir, 6, mesh)


def test_a_renamed_folder_is_named_with_the_step_that_it_holds(saved, tmp_path):
  shutil.copytree(saved[2], tmp_path / 'run')
  (tmp_path / 'run' / FOLDER / '6').rename(tmp_path / 'run' / FOLDER / '600')
  with pytest.raises(BadInput, match='checkpoints/600: holds the checkpoint of step 6; rename the folder to that'):
    read_record(tmp_path / 'run')


def fill(folder):
  """A file stands where the folder was."""
  shutil.rmtree(folder)
  folder.write_bytes(b'')


def dangle(folder):
  """A link to nowhere stands there."""
  shutil.rmtree(folder)
  folder.symlink_to('nowhere/at all')


@pytest.mark.parametrize('break_folder', [fill, dangle])
def test_a_save_that_cannot_begin_is_an_oserror_in_one_line_and_leaves_no_thread_that_waits(
    tmp_path, capfd, break_folder):
  config = experiment(tmp_path)
  state, workdir = random_state(config), tmp_path / 'run'
  writer = store.Writer(workdir, 3)
  break_folder(workdir / FOLDER)
  before = set(threading.enumerate())
  with pytest.raises(OSError, match=r'^a checkpoint could not be written to .*checkpoints \(.*\); make room') as raised:
    write(workdir, config, state, 4, writer=writer)
    writer.wait()
  assert '[Errno' not in str(raised.value) and not {*threading.enumerate()} - before
  assert capfd.readouterr() == ('', '')
  (workdir / FOLDER).unlink()
  with contextlib.closing(writer):
    write(workdir, config, state, 5, writer=writer)
  assert steps(workdir) == [5]


def test_after_a_save_that_could_not_begin_the_next_one_is_written(tmp_path, monkeypatch):
  """Orbax's own clean-up, of when the folder was opened, raises in every save of the same checkpointer."""
  config = experiment(tmp_path)
  state, writer = random_state(config), store.Writer(tmp_path / 'run', 3)

  def refuse(*_, **__):
    raise OSError(5, 'a disk', 'a/file')
  monkeypatch.setattr(writer.checkpointer, 'save_checkpointables_async', refuse)
  with pytest.raises(OSError, match='a/file: a disk'):
    write(tmp_path / 'run', config, state, 4, writer=writer)
  with contextlib.closing(writer):
    write(tmp_path / 'run', config, state, 5, writer=writer)
  assert steps(tmp_path / 'run') == [5]


@pytest.mark.parametrize('break_folder', [fill, dangle])
def test_a_folder_that_cannot_be_written_is_bad_input_before_training(tmp_path, break_folder):
  (tmp_path / FOLDER).mkdir()
  break_folder(tmp_path / FOLDER)
  with pytest.raises(BadInput, match=f'^--workdir={tmp_path}: cannot write .*checkpoints: .*; give a folder'):
    store.Writer(tmp_path, 3)


def test_an_error_that_another_thread_of_the_program_could_not_raise_is_still_told(monkeypatch):
  told = []
  monkeypatch.setattr(sys, 'unraisablehook', told.append)
  store._orbax.cache_clear()
  store._orbax()

  class Broken:
    def __del__(self):
      raise ValueError('of the program')

  thread = threading.Thread(target=lambda: Broken() and None)
  thread.start()
  thread.join()
  assert [str(error.exc_value) for error in told] == ['of the program']
