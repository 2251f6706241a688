"""Of a checkpoint whose files are damaged or missing nothing wrong is loaded: the one before it is, with a line."""
import contextlib
import random
import shutil
import sys
import threading

import jax
import numpy as np
import pytest
from experiments import experiment, random_state, same_bits, write

from mtp_jax.checkpoint import store
from mtp_jax.checkpoint.record import (
    FOLDER,
    RUN,
    check_run,
    check_whole,
    choose,
    is_complete,
    read_record,
    record_of,
    steps,
)
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


def restore(config, workdir, mesh, step=None):
  """(step, state) of the newest checkpoint that is whole, and the lines that tell why newer ones are not used."""
  lines = []

  def of_step(step):
    check_whole(workdir, step)
    with jax.set_mesh(mesh):
      return step, training.restore(config, workdir, step, mesh)

  return choose(workdir, step, of_step, lines.append), lines


@pytest.mark.parametrize('name', DAMAGES)
def test_whatever_is_damaged_what_was_saved_is_restored_or_the_checkpoint_before_it(saved, tmp_path, capfd, name):
  config, states, workdir = saved
  newest = workdir / FOLDER / '6'
  paths = [path for path in sorted(newest.rglob('*')) if path.is_file() or name in ('removed', 'of another kind')]
  mesh, fell_back = make_mesh(config.mesh), 0
  for number, path in enumerate(paths):
    copy = tmp_path / str(number)
    shutil.copytree(workdir, copy)
    DAMAGES[name](copy / path.relative_to(workdir))
    (step, state), lines = restore(config, copy, mesh)
    assert same_bits(state, states[step]), path
    assert len(lines) == (step == 3) and all(len(line.splitlines()) == 1 and len(line) < 600 for line in lines), path
    assert all(line.endswith('; an older checkpoint is used') for line in lines), lines
    fell_back += step == 3
    if step == 3 and is_complete(copy, 6):
      with pytest.raises(BadInput, match='; other checkpoints are of the steps 3$'):
        restore(config, copy, mesh, step=6)
    elif step == 6:  # a manifest, or a folder of nothing
      assert path.name.startswith('manifest') or not any(path.rglob('*')), path
    shutil.rmtree(copy)
  assert fell_back > 8
  assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('part', ['parameters', 'training'])
@pytest.mark.parametrize('listed', [True, False], ids=['manifest', 'no manifest'])
def test_no_flipped_bit_of_an_array_is_ever_loaded(saved, tmp_path, capfd, part, listed):
  """Without a manifest, as after a kill between commit and manifest, the fingerprint tells; or the read is refused."""
  config, states, workdir = saved
  mesh, random_bit = make_mesh(config.mesh), random.Random(part)
  for number in range(4 if listed else 12):
    copy = tmp_path / str(number)
    shutil.copytree(workdir, copy)
    newest = copy / FOLDER / '6'
    if not listed:
      for path in newest.glob('manifest*'):
        path.unlink()
    data = max((path for path in (newest / part).rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[random_bit.randrange(len(content))] ^= 1 << random_bit.randrange(8)
    data.write_bytes(content)
    (step, state), lines = restore(config, copy, mesh)
    assert same_bits(state, states[step]) and len(lines) == (step == 3)
    assert step == 3 or not listed
    shutil.rmtree(copy)
  assert capfd.readouterr() == ('', '')


def test_a_flipped_bit_in_memory_is_told_by_the_fingerprint(saved, tmp_path, monkeypatch):
  """The files are whole; what was read is not."""
  config, states, workdir = saved
  mesh, read = make_mesh(config.mesh), store._orbax().load_checkpointables

  def flipped(path, nested):
    arrays = read(path, nested)
    name, x = max(arrays['parameters'].items(), key=lambda item: getattr(item[1], 'size', 0))
    table = np.array(x)
    table.view(np.uint32)[5, 3] ^= path.name == '6'
    arrays['parameters'][name] = jax.device_put(table, x.sharding)
    return arrays

  monkeypatch.setattr(store._orbax(), 'load_checkpointables', flipped)
  (step, state), (line,) = restore(config, workdir, mesh)
  assert step == 3 and same_bits(state, states[3])
  assert '6/parameters: its arrays are not those that were saved' in line


@pytest.mark.parametrize('removed', ['before its files are read', 'before its record', 'before its arrays'])
def test_a_checkpoint_that_the_run_removes_meanwhile_is_passed_over_in_silence(saved, tmp_path, removed):
  config, states, workdir = saved
  shutil.copytree(workdir, tmp_path / 'run')
  mesh, lines = make_mesh(config.mesh), []

  def remove_if(moment):
    if moment == removed:
      shutil.rmtree(tmp_path / 'run' / FOLDER / '6', ignore_errors=True)

  def of_step(step):
    remove_if('before its files are read')
    check_whole(tmp_path / 'run', step)
    remove_if('before its record')
    record_of(tmp_path / 'run', step)
    remove_if('before its arrays')
    with jax.set_mesh(mesh):
      return training.restore(config, tmp_path / 'run', step, mesh)

  assert same_bits(choose(tmp_path / 'run', None, of_step, lines.append), states[3]) and not lines


def test_a_checkpoint_of_another_run_is_not_used(saved, tmp_path):
  config, states, workdir = saved
  writer = store.Writer(tmp_path, 3)
  for step, run in ((3, 'ours'), (6, 'theirs')):
    write(tmp_path, config, states[step], step, writer=writer, run=run)
  writer.close()
  (tmp_path / RUN).write_text('ours\n')
  lines = []
  choose(tmp_path, None, lambda step: check_run(tmp_path, read_record(tmp_path, step)), lines.append)
  assert len(lines) == 1 and '6: is of another run, theirs; that of' in lines[0]


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
    read_record(tmp_path / 'run', 600)


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
