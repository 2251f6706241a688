"""Checkpoints: one folder per step with all that a run or a reader needs.

    workdir/checkpoints/STEP/parameters   a nested dict of float32 arrays: {'trunk': {'wq_DHK': ...}, ...}
    workdir/checkpoints/STEP/training     step, skipped, skipped_in_a_row, optimizer: {'adam': {'mu': ...}, ...}
    its JSON metadata                     the record: see record.py

Orbax writes them in the background; a folder that a crash left incomplete is never read. Nothing
else imports Orbax.
"""
import difflib
import itertools
import pathlib

import jax
import numpy as np

from mtp_jax.checkpoint.record import FOLDER, steps
from mtp_jax.config import BadInput


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
  """Saves checkpoints in the background, one at a time, and keeps the newest `kept`."""

  def __init__(self, workdir: pathlib.Path, kept: int):
    self.folder, self.kept = (pathlib.Path(workdir) / FOLDER).absolute(), kept
    if jax.process_index() == 0:
      _set_incomplete_aside(self.folder, steps(workdir))
    self.checkpointer = self._open()
    self.pending = None  # Orbax's future of the save in progress

  def _open(self):
    from orbax.checkpoint import v1 as orbax
    return orbax.training.Checkpointer(
        self.folder, cleanup_tmp_directories=True,
        preservation_policy=orbax.training.preservation_policies.LatestN(self.kept),
        save_decision_policy=orbax.training.save_decision_policies.FixedIntervalPolicy(1))

  def save(self, step: int, parameters, training, record: dict) -> None:
    """Starts to write; the arrays may be donated or overwritten at once.

    Args:
      parameters: what a reader loads.
      training: what only a resumed run needs.
      record: JSON, see record.py.

    Raises:
      OSError: the save before this one failed.
    """
    self.wait()
    self.checkpointer = self.checkpointer or self._open()
    arrays = {'parameters': as_dict(parameters), 'training': as_dict(training)}
    self.pending = self.checkpointer.save_checkpointables_async(
        step, arrays, custom_metadata=record)

  def wait(self) -> None:
    """Waits for the save in progress. Raises OSError when it failed; another save may follow."""
    pending, self.pending = self.pending, None
    if pending is None:
      return
    try:
      pending.result()
    except Exception as error:
      self.checkpointer = None  # it would raise the same error again; the next save opens a new one
      raise OSError(f'a checkpoint could not be written to {self.folder}: {error}') from error

  def close(self) -> None:
    """Waits for the save in progress. Raises OSError when it failed."""
    self.wait()
    if self.checkpointer:
      self.checkpointer.close()


def _set_incomplete_aside(folder: pathlib.Path, complete: list[int]) -> None:
  """Renames folders of steps that a crash left incomplete, so that the step can be saved again."""
  for path in folder.glob('*'):
    if path.name.isdigit() and int(path.name) not in complete:
      names = (f'incomplete-{path.name}' + (f'-{n}' if n else '') for n in itertools.count())
      path.rename(next(free for free in map(path.with_name, names) if not free.exists()))


def restore(workdir: pathlib.Path, step: int, **abstract) -> dict:
  """Arrays of a checkpoint, placed on devices as asked.

  Args:
    abstract: 'parameters', 'training' or both: a tree of `jax.ShapeDtypeStruct` with shardings.

  Returns:
    A dict of trees of the same structure.

  Raises:
    BadInput: when names, shapes or types differ from the checkpoint's.
  """
  from orbax.checkpoint import v1 as orbax
  path = (pathlib.Path(workdir) / FOLDER / str(step)).absolute()
  for name, tree in abstract.items():
    if not (path / name).is_dir():
      raise BadInput(f'{path}: has no folder {name}; it was written by another version of mtp_jax, so use that one')
    saved = orbax.metadata(path, checkpointable_name=name).metadata
    _check_arrays(path / name, _by_path(saved), _by_path(as_dict(tree)))
  loaded = orbax.load_checkpointables(path,
                                      {name: as_dict(tree) for name, tree in abstract.items()})
  return {name: from_dict(tree, loaded[name]) for name, tree in abstract.items()}


def _by_path(nested: dict) -> dict:
  """{'trunk.wq_DHK': array, ...}"""
  leaves = jax.tree_util.tree_flatten_with_path(nested, is_leaf=lambda x: hasattr(x, 'shape'))[0]
  return {'.'.join(_names(path)): leaf for path, leaf in leaves}


def _check_arrays(path, saved: dict, expected: dict) -> None:
  for name in sorted(saved.keys() ^ expected.keys()):
    is_left_over = name in saved
    what = 'is in the checkpoint but not in the model' if is_left_over else 'is missing from the checkpoint'
    near = difflib.get_close_matches(name, list(expected if is_left_over else saved), n=1)
    raise BadInput(f'{path}: {name} {what}' + (f'; nearest name: {near[0]}' if near else ''))
  for name, array in expected.items():
    old = saved[name]
    if tuple(old.shape) != tuple(array.shape) or np.dtype(old.dtype) != np.dtype(array.dtype):
      raise BadInput(f'{path}: {name} is {old.dtype}{list(old.shape)}, '
                     f'but the config asks for {array.dtype}{list(array.shape)}')
