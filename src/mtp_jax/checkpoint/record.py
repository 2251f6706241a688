"""checkpoint/record."""
import json
import pathlib

from mtp_jax.config import BadInput, Config

FOLDER = 'checkpoints'
RECORD = {'step': int, 'config': dict, 'conventions': dict, 'tokenizer': str, 'identity': dict, 'data': dict}


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
