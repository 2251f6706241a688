"""Checkpoints: one folder a step, written aside and renamed, holding all that a run or a reader needs.

    workdir/checkpoints/STEP/parameters   a nested dict of float32 arrays: {'trunk': {'wq_DHK': ...}, ...}
    workdir/checkpoints/STEP/training     step, skipped, skipped_in_a_row, optimizer: {'adam': {'mu': ...}, ...}
    its JSON metadata                     the record: see record.py

Orbax writes them in the background; a folder that a crash left incomplete is never read. Nothing else imports Orbax.
"""
import difflib
import itertools
import pathlib

import jax
import numpy as np

from mtp_jax.checkpoint.record import FOLDER, steps
from mtp_jax.config import BadInput


def as_dict(tree) -> dict:
  """A pytree of modules, tuples and dicts as a nested dict of arrays, named by the way to each leaf."""
  nested = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    *parents, last = _names(path)
    place = nested
    for parent in parents:
      place = place.setdefault(parent, {})
    place[last] = leaf
  return nested


def from_dict(like, nested: dict):
  """The inverse of `as_dict`, in the structure of `like`."""
  def find(path, _):
    place = nested
    for part in _names(path):
      place = place[part]
    return place
  return jax.tree_util.tree_map_with_path(find, like)


def _names(path) -> list[str]:
  names = [str(getattr(key, 'name', getattr(key, 'key', getattr(key, 'idx', '')))) for key in path]
  return names[:-1] if names[-1] == 'value' else names


class Writer:
  """Saves in the background; at most one save is under way."""

  def __init__(self, workdir: pathlib.Path, kept: int):
    from orbax.checkpoint import v1 as ocp
    self.folder = (pathlib.Path(workdir) / FOLDER).absolute()
    complete = set(steps(workdir))
    for path in self.folder.glob('*') if jax.process_index() == 0 else ():
      if path.name.isdigit() and int(path.name) not in complete:
        aside = (path.with_name(f'incomplete-{path.name}' + (f'-{n}' if n else '')) for n in itertools.count())
        path.rename(next(name for name in aside if not name.exists()))
    self.kept, self.training = kept, ocp.training
    self.pending, self.checkpointer = None, self._open()

  def _open(self):
    return self.training.Checkpointer(
        self.folder, cleanup_tmp_directories=True,
        preservation_policy=self.training.preservation_policies.LatestN(self.kept),
        save_decision_policy=self.training.save_decision_policies.FixedIntervalPolicy(1))

  def save(self, step: int, parameters, training, record: dict) -> None:
    """Starts to write; the arrays may be donated or overwritten at once. Raises OSError when the save before failed.

    Args:
      parameters: what a reader loads.
      training: what only a resumed run needs.
      record: JSON, see record.py.
    """
    self.wait()
    self.checkpointer = self.checkpointer or self._open()
    self.pending = self.checkpointer.save_checkpointables_async(
        step, {'parameters': as_dict(parameters), 'training': as_dict(training)}, custom_metadata=record)

  def wait(self) -> None:
    """Until the save under way is complete. Raises OSError when it failed; a later save then starts afresh."""
    pending, self.pending = self.pending, None
    if pending is None:
      return
    try:
      pending.result()
    except Exception as error:
      self.checkpointer = None  # Orbax would raise the same error again; a new one is opened when its threads have ended
      raise OSError(f'a checkpoint could not be written to {self.folder}: {error}') from error

  def close(self) -> None:
    self.wait()
    if self.checkpointer:
      self.checkpointer.close()


def restore(workdir: pathlib.Path, step: int, **abstract) -> dict:
  """Arrays of a checkpoint, placed as asked.

  Args:
    abstract: 'parameters' and, or, 'training': a tree of `jax.ShapeDtypeStruct` with shardings.

  Returns:
    A dict of trees of the same structure.

  Raises:
    BadInput: when names, shapes or types differ from the checkpoint's.
  """
  from orbax.checkpoint import v1 as ocp
  path = (pathlib.Path(workdir) / FOLDER / str(step)).absolute()
  for name, tree in abstract.items():
    if not (path / name).is_dir():
      raise BadInput(f'{path}: has no folder {name}; it was written by another version of mtp_jax, so use that one')
    held = ocp.metadata(path, checkpointable_name=name).metadata
    _check_arrays(path / name, _flat(held), _flat(as_dict(tree)))
  loaded = ocp.load_checkpointables(path, {name: as_dict(tree) for name, tree in abstract.items()})
  return {name: from_dict(tree, loaded[name]) for name, tree in abstract.items()}


def _flat(nested: dict) -> dict:
  return {'.'.join(_names(path)): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(nested, is_leaf=lambda x: hasattr(x, 'shape'))[0]}


def _check_arrays(path, held: dict, wanted: dict) -> None:
  for name in sorted(held.keys() ^ wanted.keys()):
    there = 'is in the checkpoint but not in the model' if name in held else 'is missing from the checkpoint'
    near = difflib.get_close_matches(name, list(wanted if name in held else held), n=1)
    raise BadInput(f'{path}: {name} {there}' + (f'; nearest name: {near[0]}' if near else ''))
  for name, array in wanted.items():
    if tuple(held[name].shape) != tuple(array.shape) or np.dtype(held[name].dtype) != np.dtype(array.dtype):
      raise BadInput(f'{path}: {name} is {held[name].dtype}{list(held[name].shape)}, but the config asks for {array.dtype}{list(array.shape)}')
