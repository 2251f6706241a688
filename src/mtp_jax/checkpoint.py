"""Checkpoints: one folder a step, written aside and renamed, holding all that a run or a reader needs.

    workdir/checkpoints/STEP/parameters   a plain nested dict of float32 arrays: {'trunk': {'wq_DHK': ...}, ...}
    workdir/checkpoints/STEP/optimizer    moments, counters
    its JSON metadata                     step, config, conventions, tokenizer digest, identity of the data and position in them

Orbax writes them asynchronously; a folder that a crash left incomplete is never read. This is the only door to Orbax.
"""
import difflib
import itertools
import json
import pathlib

import jax
import numpy as np

from mtp_jax.config import BadInput, Config

FOLDER = 'checkpoints'
RECORD = {'step': int, 'config': dict, 'conventions': dict, 'tokenizer': str, 'identity': dict, 'data': dict}


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


def steps(workdir: pathlib.Path) -> list[int]:
  """Steps with a complete checkpoint, oldest first. Touches neither JAX nor Orbax."""
  folder = pathlib.Path(workdir) / FOLDER
  complete = lambda path: (path / 'commit_success.txt').exists() and (path / '_CHECKPOINT_METADATA').exists()
  return sorted(int(path.name) for path in folder.glob('*') if path.name.isdigit() and complete(path))


def metadata(workdir: pathlib.Path, step: int | None = None) -> dict:
  """What a checkpoint says of itself: step, config, conventions, tokenizer, identity, data. The newest unless a step is given.

  Raises:
    BadInput: when there is no such checkpoint, or it lacks its record.
  """
  found = steps(workdir)
  if not found:
    raise BadInput(f'--workdir={workdir}: holds no checkpoint; train one with: python -m mtp_jax train --config=configs/tiny.py --workdir={workdir}')
  if step is not None and step not in found:
    raise BadInput(f'step {step}: {workdir} holds the steps {", ".join(map(str, found))}')
  chosen = found[-1] if step is None else step
  path = pathlib.Path(workdir) / FOLDER / str(chosen) / '_CHECKPOINT_METADATA'
  try:
    record = json.loads(path.read_text())['custom_metadata']
    return record | {key: kind(record[key]) for key, kind in RECORD.items()}
  except (ValueError, KeyError, TypeError) as error:
    raise BadInput(f'{path}: lacks the record of config and conventions ({error!r}); remove the folder {chosen} to fall back to an older step') from None


# What a resumed run may not change, because the checkpoint's arrays would mean something else. (Its data are told by their identity.)
FREE = {'model': {'remat', 'head_batch', 'dtype'}, 'data': None, 'train': None, 'optimizer': None, 'objective': None, 'mesh': None}


def check_resumes(config: Config, record: dict, workdir) -> list[str]:
  """Compares a config with that of a checkpoint; returns the harmless differences, one line each.

  Raises:
    BadInput: for a field that a checkpoint fixes.
  """
  if config.train.steps < record['step']:
    raise BadInput(f'config.train.steps={config.train.steps}: the checkpoint in {workdir} is of step {record["step"]}; set at least that')
  changes = []
  for section, fields in config.to_dict().items():
    for field, value in fields.items():
      old = record['config'].get(section, {}).get(field, value)
      old = tuple(old) if isinstance(old, list) else old
      if old == value:
        continue
      if FREE[section] is not None and field not in FREE[section]:
        raise BadInput(f'config.{section}.{field}={value!r}: the checkpoint in {workdir} has {old!r}; set that, or choose another --workdir')
      changes.append(f'config.{section}.{field}: {old!r} -> {value!r}')
  return changes


def check_same(what: str, mine: str, record: dict, key: str, fix: str) -> None:
  """Raises BadInput unless a digest equals the checkpoint's."""
  if record[key] != mine:
    raise BadInput(f'{what}: digest {mine[:12]} differs from the checkpoint\'s {record[key][:12]}; {fix}')


def check_conventions(mine: dict, record: dict, workdir) -> None:
  """Raises BadInput unless the checkpoint's weights mean what this version takes them for."""
  theirs = record['conventions']
  wrong = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
  if wrong:
    raise BadInput(f"{workdir}: the checkpoint's conventions contradict this version in {', '.join(wrong)}; its weights would be misread, "
                   'so use the version that wrote it')


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

  def save(self, step: int, parameters, optimizer, record: dict) -> None:
    """Starts to write; the arrays may be donated or overwritten at once. Raises OSError when the save before this one failed."""
    self.wait()
    self.checkpointer = self.checkpointer or self._open()
    self.pending = self.checkpointer.save_checkpointables_async(
        step, {'parameters': as_dict(parameters), 'optimizer': as_dict(optimizer)}, custom_metadata=record)

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
    abstract: 'parameters' and, or, 'optimizer': a tree of `jax.ShapeDtypeStruct` with shardings.

  Returns:
    A dict of trees of the same structure.

  Raises:
    BadInput: when names, shapes or types differ from the checkpoint's.
  """
  from orbax.checkpoint import v1 as ocp
  path = (pathlib.Path(workdir) / FOLDER / str(step)).absolute()
  for name, tree in abstract.items():
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
