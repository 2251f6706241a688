"""The record of a checkpoint: JSON that tells what its arrays mean, and who may resume from it.

    step          the step it was saved after
    config        as `Config.to_dict` gives it
    conventions   which token a future predicts, what a module reads, ...; see `model.conventions`
    tokenizer     digest of the tokenizer
    identity      of the data; see `Corpus.identity`
    data          position in the data; see `Batches.get_state`

Nothing here imports JAX or Orbax.
"""
import json
import operator
import os
import pathlib

from mtp_jax.config import BadInput, Config, local_path, upgraded
from mtp_jax.config.errors import cannot, in_words

FOLDER = 'checkpoints'
CONFIG = 'config.json'  # of the newest start, beside the checkpoints
TOKENIZER = 'tokenizer.model'  # a copy in the workdir, so that the run can be moved
# Files of Orbax in a complete checkpoint.
METADATA, COMMITTED = '_CHECKPOINT_METADATA', 'commit_success.txt'
TYPES = {'step': int, 'config': dict, 'conventions': dict, 'tokenizer': str, 'identity': dict,
         'data': dict}
# The parameters mean the same with any value of these.
MODEL_FIELDS_FREE_TO_CHANGE = {'remat', 'head_batch', 'dtype'}


def steps(workdir: pathlib.Path) -> list[int]:
  """Steps with a complete checkpoint, oldest first. Raises OSError where the folder cannot be read."""
  folder = pathlib.Path(workdir) / FOLDER
  try:
    names = os.listdir(folder)
  except (FileNotFoundError, NotADirectoryError):
    return []
  return sorted(int(name) for name in names if name.isdecimal() and _is_complete(folder / name))


def _is_complete(path: pathlib.Path) -> bool:
  return (path / COMMITTED).exists() and (path / METADATA).exists()


def locate(path, step: int | None = None, where: str = '--workdir') -> tuple[pathlib.Path, int | None]:
  """(workdir, step) of a workdir, or of a path inside one: runs/tiny/checkpoints/700 is step 700 of
  runs/tiny.

  Raises:
    BadInput: the path is none, or it names another step than the one given.
  """
  path = local_path(path, where)
  with cannot('read', f'{where}={path}', 'make it readable, or give another folder'):
    return _located(path, step, where)


def _located(path: pathlib.Path, step: int | None, where: str) -> tuple[pathlib.Path, int | None]:
  for workdir in path.absolute().parents:
    inside = path.absolute().relative_to(workdir).parts
    if not steps(path) and (inside[0] == FOLDER or path.is_file()) and steps(workdir):
      if len(inside) < 2 or not inside[1].isdecimal():
        return workdir, step
      if step not in (None, int(inside[1])):
        raise BadInput(f'{where}={path}: is step {int(inside[1])}, not {step}; give {workdir}')
      return workdir, int(inside[1])
  return path, step


def read_record(workdir: pathlib.Path, step: int | None = None) -> dict:
  """The record of a checkpoint: the newest one unless a step is given.

  Raises:
    BadInput: when there is no such checkpoint, or its record is incomplete.
  """
  with cannot('read', f'--workdir={workdir}', 'make it readable, or give another folder'):
    available = steps(workdir)
  if not available:
    raise BadInput(f'--workdir={workdir}: holds no checkpoint; '
                   f'train one with: python -m mtp_jax train --config=configs/tiny.py --workdir={workdir}')
  if step is not None:
    try:
      step = operator.index(step)
    except TypeError:
      raise BadInput(f'step={step!r}: must be an int, not {type(step).__name__}') from None
  if step not in (None, *available):
    raise BadInput(f'step {step}: {workdir} holds the steps {", ".join(map(str, available))}')
  chosen = available[-1] if step is None else step
  path = pathlib.Path(workdir) / FOLDER / str(chosen) / METADATA
  try:
    record = json.loads(path.read_text())['custom_metadata']
    record |= {key: kind(record[key]) for key, kind in TYPES.items()}
    record |= {'config': upgraded(record['config'])}
  except OSError as error:
    raise BadInput(f'{path}: cannot be read ({in_words(error)}); {older_step(workdir, chosen)}') from None
  except (ValueError, KeyError, TypeError) as error:
    raise BadInput(f'{path}: lacks the record of config and conventions ({error!r}); '
                   f'{older_step(workdir, chosen)}') from None
  if record['step'] != chosen:
    raise BadInput(f'{path.parent}: holds the checkpoint of step {record["step"]}; rename the folder to that')
  return record


def older_step(workdir, step: int) -> str:
  """What to do about a checkpoint that cannot be used, in words."""
  older = [other for other in steps(workdir) if other < step]
  if not older:
    return f'there is no older one: restore the folder {step} from a copy, or train in another --workdir'
  return f'remove the folder {step} to fall back to step {older[-1]}'


def check_resumes(config: Config, record: dict, workdir) -> list[str]:
  """Fields that differ from the checkpoint's and may, one line each.

  Only fields of the model are fixed; whether the data are the same is decided by their identity, not
  by the config. A field that the checkpoint lacks had its default: a new field's default is what
  earlier versions did.

  Raises:
    BadInput: for a field that a checkpoint fixes.
  """
  if config.train.steps < record['step']:
    raise BadInput(f'config.train.steps={config.train.steps}: the checkpoint in {workdir} is of step {record["step"]}; '
                   'set at least that')
  changes, defaults = [], Config().to_dict()
  for section, fields in config.to_dict().items():
    for field, value in fields.items():
      old = record['config'].get(section, {}).get(field, defaults[section][field])
      old = tuple(old) if isinstance(old, list) else old
      if old == value:
        continue
      if section == 'model' and field not in MODEL_FIELDS_FREE_TO_CHANGE:
        raise BadInput(f'config.{section}.{field}={value!r}: the checkpoint in {workdir} has {old!r}; '
                       'set that, or choose another --workdir')
      changes.append(f'config.{section}.{field}: {old!r} -> {value!r}')
  return changes


def check_tokenizer(where: str, digest: str, record: dict, fix: str) -> None:
  """Raises BadInput unless the checkpoint was trained with this tokenizer.

  Args:
    where: the field or flag that chose the tokenizer, with its value.
    fix: what the user can do.
  """
  if record['tokenizer'] != digest:
    raise BadInput(f'{where}: digest {digest[:12]} differs from the checkpoint\'s {record["tokenizer"][:12]}; {fix}')


def check_conventions(conventions: dict, record: dict, workdir) -> None:
  """Raises BadInput unless the checkpoint's weights mean what this version assumes."""
  theirs = record['conventions']
  wrong = [key for key in conventions | theirs if conventions.get(key) != theirs.get(key)]
  if wrong:
    raise BadInput(f"{workdir}: the checkpoint's conventions contradict this version in {', '.join(wrong)}; "
                   'its weights would be misread, so use the version that wrote it')
