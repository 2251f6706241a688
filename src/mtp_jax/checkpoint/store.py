"""Checkpoints: one folder per step with all that a run or a reader needs.

    workdir/checkpoints/STEP/parameters   a nested dict of float32 arrays: {'trunk': {'wq_DHK': ...}, ...}
    workdir/checkpoints/STEP/training     step, skipped, skipped_in_a_row, optimizer: {'adam': {'mu': ...}, ...}
    its JSON metadata                     the record: see record.py
    its manifest                          of all these files: see manifest.py

Orbax writes them in the background; a folder that a crash left incomplete is never read. Nothing
else imports Orbax; what it raises becomes one line here, and what it logs is dropped.
"""
import contextlib
import difflib
import functools
import gc
import itertools
import logging
import math
import pathlib
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterator

import jax
import numpy as np

from mtp_jax.checkpoint import manifest
from mtp_jax.checkpoint.fingerprint import fingerprint
from mtp_jax.checkpoint.record import (
    FOLDER,
    GONE,
    DamagedCheckpoint,
    all_folders,
    digest,
    folders,
    record_of,
    steps,
    unreadable,
)
from mtp_jax.config import BadInput, folder_path
from mtp_jax.config.errors import cannot, in_words
from mtp_jax.config.paths import absolute, remove


@functools.cache
def _orbax():
  """The package, made silent: of an error that it raises, each of its threads prints a traceback."""
  from orbax.checkpoint import v1
  print_unraisable = sys.unraisablehook
  sys.unraisablehook = lambda error: None if not _in_main_thread() and _is_orbax(error) else print_unraisable(error)
  for name in ('absl', 'root'):
    logging.getLogger(name).addFilter(lambda record: '/orbax/' not in record.pathname)
  return v1


def _in_main_thread() -> bool:
  return threading.current_thread() is threading.main_thread()


def _is_orbax(error) -> bool:
  """Whether what Python could not raise is a coroutine of Orbax, or a call through it or the event loop it ran."""
  coroutine = getattr(error.object, 'cr_code', None)
  files = [frame.filename for frame in traceback.extract_tb(error.exc_traceback)]
  files.append(coroutine.co_filename if coroutine else '')
  return any(name in file for file in files for name in ('orbax', 'uvloop', 'asyncio/base_events.py'))


@contextlib.contextmanager
def _reading(workdir, step: int) -> Iterator[None]:
  """Whatever fails in the block is a damaged checkpoint, or one that cannot be read, in one line."""
  what, kind = '', BadInput
  with _silence():
    try:
      yield
    except (BadInput, MemoryError):
      raise
    except Exception as error:
      if 'RESOURCE_EXHAUSTED' in str(error):  # the device's memory
        raise
      causes = _causes(error)
      refused = next((cause for cause in causes if isinstance(cause, OSError) and not isinstance(cause, GONE)), None)
      if refused:  # tells nothing of the checkpoint
        what = unreadable(refused)
      else:
        what, kind = f'is damaged ({_shortened(causes[-1])})', functools.partial(DamagedCheckpoint, step)
      del error, causes, refused
    if what:
      gc.collect()  # coroutines tell of their errors when they are deleted
      raise kind(f'{_folder(workdir)}: checkpoint {step} {what}')


@contextlib.contextmanager
def _silence() -> Iterator[None]:
  """Drops what coroutines print that are deleted in the block, of errors that nobody asked them for."""
  print_unraisable, logger = sys.unraisablehook, logging.getLogger('asyncio')
  sys.unraisablehook = lambda _: None
  logger.addFilter(_none)
  try:
    yield
  finally:
    sys.unraisablehook = print_unraisable
    logger.removeFilter(_none)


def _none(record: logging.LogRecord) -> bool:
  return False


def _causes(error: BaseException) -> list[BaseException]:
  """The error and those it came from, the first one last."""
  causes = [error]
  while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
    causes.append(cause)
  return causes


def _shortened(error: BaseException) -> str:
  """The beginning and the end of an error's text."""
  line = in_words(error)
  return line if len(line) <= 200 else f'{line[:100]} ... {line[-90:]}'


class NotSaved(OSError):
  """A checkpoint could not be written; the next one may be."""


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
  """Whatever fails in the block is NotSaved, which names the folder."""
  try:
    yield
  except MemoryError:
    raise
  except Exception as error:
    raise NotSaved(f'a checkpoint could not be written to {folder} ({_shortened(error)}); make room or give '
                   'permission') from error


def _folder(workdir) -> pathlib.Path:
  return absolute(folder_path(workdir)) / FOLDER


def as_dict(tree) -> dict:
  """A pytree as a nested dict of its arrays, by the names on the path to each."""
  nested = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    *parents, last = _names(path)
    parent = nested
    for name in parents:
      parent = parent.setdefault(name, {})
    parent[last] = leaf
  return nested


def from_dict(like, nested: dict):
  """The inverse of `as_dict`: a tree of the structure of `like` with the arrays of `nested`."""
  def lookup(path, _):
    value = nested
    for name in _names(path):
      value = value[name]
    return value
  return jax.tree_util.tree_map_with_path(lookup, like)


def _names(path) -> list[str]:
  """The name of each key of a path, without the `value` that Flax adds at the end."""
  names = [str(getattr(key, 'name', getattr(key, 'key', getattr(key, 'idx', '')))) for key in path]
  return names[:-1] if names[-1] == 'value' else names


class Writer:
  """Saves checkpoints in the background, one at a time, and keeps the newest `kept`.

  Folders of steps that a crash left incomplete are renamed, and those of the steps `damaged`, so
  that these steps can be saved again.

  Raises:
    BadInput: the folder of checkpoints cannot be written.
  """

  def __init__(self, workdir: pathlib.Path, kept: int, damaged: Collection[int] = ()):
    self.workdir, self.folder, self.kept = workdir, _folder(workdir), kept
    if jax.process_index() == 0:
      with cannot('write', f'--workdir={workdir}', 'give a folder that can be written'):
        _make_folder(self.folder)
        _set_aside(self.folder, set(folders(workdir)) - set(steps(workdir)), 'incomplete')
        _set_aside(self.folder, damaged, 'damaged')
    self._remove_unfinished()
    self.checkpointer = self._open()
    self.pending = None  # the save in progress

  def _open(self):
    training = _orbax().training
    return training.Checkpointer(
        self.folder, cleanup_tmp_directories=False,
        preservation_policy=training.preservation_policies.LatestN(self.kept),
        save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1))

  def _remove_unfinished(self) -> None:
    """What saves that failed have left. Their threads may be writing it still: what is not gone then goes next time."""
    if jax.process_index() != 0:
      return
    unfinished = list(self.folder.glob('*.orbax-checkpoint-tmp'))
    # a bucket cannot rename: there Orbax writes in place, and commits by a last object
    unfinished += [self.folder / str(step) for step in set(all_folders(self.workdir)) - set(folders(self.workdir))]
    for path in unfinished:
      remove(path)

  def save(self, step: int, parameters, training, record: dict) -> dict[str, str]:
    """Starts to write; the arrays may be donated or overwritten at once. Returns the fingerprints of both.

    Args:
      parameters: what a reader loads.
      training: what only a resumed run needs.
      record: JSON, see record.py.

    Raises:
      NotSaved: the save before this one failed, or this one cannot begin.
    """
    self.wait()
    with _writing(self.folder):
      checkpointer, self.checkpointer = self.checkpointer, None  # one that failed would raise the same again
      if jax.process_index() == 0:
        _make_folder(self.folder)
      self._remove_unfinished()
      checkpointer = checkpointer or self._open()
      arrays = {'parameters': as_dict(parameters), 'training': as_dict(training)}
      fingerprints = {name: fingerprint(by_path(tree)) for name, tree in arrays.items()}
      record = record | {'fingerprint': fingerprints}
      record |= {'digest': digest(record)}
      saving = checkpointer.save_checkpointables_async(step, arrays, custom_metadata=record)
      self.pending = _Save(saving, self.folder / str(step))
      self.checkpointer = checkpointer
      return fingerprints

  def failed(self) -> bool:
    """Whether the save in progress has failed; `wait` tells why."""
    return bool(self.pending and self.pending.error)

  def wait(self) -> float:
    """Waits for the save in progress, and tells when it was done, by `time.monotonic`; nan if there is none.

    Raises:
      NotSaved: it failed; another save may follow.
    """
    pending, self.pending = self.pending, None
    if pending is None:
      return math.nan
    with _writing(self.folder):
      checkpointer, self.checkpointer = self.checkpointer, None
      done_at = pending.result()
      self.checkpointer = checkpointer
      return done_at

  def close(self) -> None:
    """Waits for the save in progress. Raises NotSaved when it failed."""
    self.wait()
    if self.checkpointer:
      with _writing(self.folder):
        self.checkpointer.close()
    self._remove_unfinished()


class _Save(threading.Thread):
  """A save in progress: once Orbax has written the files, this process lists its share of them."""

  def __init__(self, saving, folder: pathlib.Path):
    super().__init__(daemon=True)
    self.saving, self.folder, self.error = saving, folder, None
    self.index, self.count = jax.process_index(), jax.process_count()
    self.start()

  def run(self) -> None:
    try:
      self.saving.result()
      manifest.write(self.folder, self.index, self.count)
      self.done_at = time.monotonic()
    except Exception as error:
      self.error = error

  def result(self) -> float:
    """Waits until it is done, and tells when that was. Raises what made it fail."""
    self.join()
    if self.error:
      raise self.error
    return self.done_at


def _make_folder(folder: pathlib.Path) -> None:
  """Makes the folder if it is not there, and a folder with a file in it for a moment: where Orbax cannot do
  that, its threads wait for minutes.
  """
  folder.mkdir(parents=True, exist_ok=True)
  probe = folder / f'.{secrets.token_hex(8)}'
  try:
    probe.mkdir()
    (probe / 'probe').write_text('.')
  finally:
    remove(probe)


def _set_aside(folder: pathlib.Path, steps: Collection[int], what: str) -> None:
  """Renames the folders of these steps."""
  for path in list(folder.iterdir()) if steps else []:  # a bucket has no folder without files
    if path.name.isdecimal() and int(path.name) in steps:
      names = (f'{what}-{path.name}' + (f'-{n}' if n else '') for n in itertools.count())
      path.rename(next(free for free in map(path.with_name, names) if not free.exists()))


def restore(workdir: pathlib.Path, step: int, **abstract) -> dict:
  """Arrays of a checkpoint, placed on devices as asked.

  Args:
    abstract: 'parameters', 'training' or both: a tree of `jax.ShapeDtypeStruct` with shardings.

  Returns:
    A dict of trees of the same structure.

  Raises:
    DamagedCheckpoint: its arrays are not those that were saved, or of other names, shapes or types.
    BadInput: it cannot be read.
  """
  path = _folder(workdir) / str(step)
  nested = {name: as_dict(tree) for name, tree in abstract.items()}
  fingerprints = record_of(workdir, step).get('fingerprint', {})
  for name in nested:
    if not (path / name).is_dir():
      raise DamagedCheckpoint(step, f'{path}: is incomplete, it has no folder {name}')
  orbax = _orbax()
  with _reading(workdir, step):
    for name, arrays in nested.items():
      saved = orbax.metadata(path, checkpointable_name=name).metadata
      _check_arrays(step, path / name, by_path(saved), by_path(arrays))
    loaded = orbax.load_checkpointables(path, nested)
    for name, arrays in loaded.items():
      if fingerprints.get(name) not in (None, fingerprint(by_path(arrays))):
        raise DamagedCheckpoint(step, f'{path / name}: its arrays are not those that were saved')
    return {name: from_dict(tree, loaded[name]) for name, tree in abstract.items()}


def parameter(workdir: pathlib.Path, step: int, name: str) -> np.ndarray:
  """One array of the parameters alone, such as 'trunk.attention.wq_DHK', in the memory of the host.

  Raises:
    DamagedCheckpoint, BadInput: as `restore`. What the array holds is not compared with its fingerprint.
  """
  path, orbax = _folder(workdir) / str(step), _orbax()
  device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend='cpu')[0])

  def only(at, x):
    is_wanted = '.'.join(_names(at)) == name
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) if is_wanted else orbax.PLACEHOLDER

  with _reading(workdir, step):
    saved = orbax.metadata(path, checkpointable_name='parameters').metadata
    wanted = jax.tree_util.tree_map_with_path(only, saved, is_leaf=lambda x: hasattr(x, 'shape'))
    return np.asarray(by_path(orbax.load_checkpointables(path, {'parameters': wanted})['parameters'])[name])


def by_path(nested) -> dict:
  """{'trunk.wq_DHK': array, ...}"""
  leaves = jax.tree_util.tree_flatten_with_path(nested, is_leaf=lambda x: hasattr(x, 'shape'))[0]
  return {'.'.join(_names(path)): leaf for path, leaf in leaves}


def _check_arrays(step: int, path, saved: dict, expected: dict) -> None:
  for name in sorted(saved.keys() ^ expected.keys()):
    is_left_over = name in saved
    what = 'is in the checkpoint but not in the model' if is_left_over else 'is missing from the checkpoint'
    near = difflib.get_close_matches(name, list(expected if is_left_over else saved), n=1)
    raise DamagedCheckpoint(step, f'{path}: {name} {what}' + (f'; nearest name: {near[0]}' if near else ''))
  for name, array in expected.items():
    old = saved[name]
    if tuple(old.shape) != tuple(array.shape) or np.dtype(old.dtype) != np.dtype(array.dtype):
      raise DamagedCheckpoint(step, f'{path}: {name} is {old.dtype}{list(old.shape)}, '
                              f'but the config asks for {array.dtype}{list(array.shape)}')
