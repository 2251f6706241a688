"""The record of a checkpoint: JSON that tells what its arrays mean, and who may resume from it.

    step          the step it was saved after
    config        as `Config.to_dict` gives it
    conventions   which token a future predicts, what a module reads, ...; see `model.conventions`
    tokenizer     digest of the tokenizer
    identity      of the data; see `Corpus.identity`
    data          position in the data; see `Batches.get_state`
    guard         the steps that spikes are measured by, and counts of skipped steps
    skipped_rows  [step of the checkpoint, rows left out after it] of each roll-back
    run           name of the run, drawn when it began
    fingerprint   {'parameters': of these arrays, 'training': of those}; see fingerprint.py
    digest        of the record without this line

Earlier versions wrote no guard, skipped_rows, run, fingerprint and digest. Nothing here imports JAX or Orbax.
"""
import hashlib
import json
import operator
import pathlib
from collections.abc import Callable, Collection

from mtp_jax.checkpoint import manifest
from mtp_jax.config import BadInput, Config, folder_path, upgraded
from mtp_jax.config.errors import cannot, in_words
from mtp_jax.config.paths import absolute, folders_above, is_local
from mtp_jax.report.display import print_stderr

FOLDER = 'checkpoints'
CONFIG = 'config.json'  # of the newest start, beside the checkpoints
TOKENIZER = 'tokenizer.model'  # a copy in the workdir, so that the run can be moved
RUN = 'run.txt'  # the name of the run, as in the records of its checkpoints
GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)  # such an error shows that a file is not what it was
# Files of Orbax in a complete checkpoint.
METADATA, COMMITTED = '_CHECKPOINT_METADATA', 'commit_success.txt'
TYPES = {'step': int, 'config': dict, 'conventions': dict, 'tokenizer': str, 'identity': dict,
         'data': dict}
LATER_TYPES = {'run': str, 'fingerprint': dict, 'digest': str, 'guard': dict, 'skipped_rows': list}
# The parameters mean the same with any value of these.
MODEL_FIELDS_FREE_TO_CHANGE = {'remat', 'head_batch', 'dtype'}


class DamagedCheckpoint(BadInput):
  """A checkpoint does not hold what was saved, or is of another run; an older one may be used."""

  def __init__(self, step: int, text: str):
    super().__init__(text)
    self.step = step


def steps(workdir: pathlib.Path) -> list[int]:
  """Steps with a complete checkpoint, oldest first. Raises OSError where the folder cannot be read."""
  return [step for step in all_folders(workdir) if is_complete(workdir, step)]


def folders(workdir: pathlib.Path) -> list[int]:
  """Steps with a folder, oldest first; in a bucket, where a save writes in place, those that were once committed:
  they have a manifest, if not the commit marker any more.

  Raises:
    OSError: the folder of all cannot be read.
  """
  found = all_folders(workdir)
  was_committed = lambda step: is_complete(workdir, step) or manifest.exists(folder_of(workdir, step))
  return found if is_local(folder_path(workdir)) else [step for step in found if was_committed(step)]


def all_folders(workdir: pathlib.Path) -> list[int]:
  """Steps with a folder, whatever is in it, oldest first. Raises OSError as `folders`."""
  try:
    names = [path.name for path in (folder_path(workdir) / FOLDER).iterdir()]
  except (FileNotFoundError, NotADirectoryError):
    return []
  return sorted(int(name) for name in names if name.isdecimal())


def folder_of(workdir, step: int) -> pathlib.Path:
  """That of a step's checkpoint."""
  return folder_path(workdir) / FOLDER / str(step)


def is_complete(workdir: pathlib.Path, step: int) -> bool:
  path = folder_of(workdir, step)
  return (path / COMMITTED).exists() and (path / METADATA).exists()


def locate(path, step: int | None = None, where: str = '--workdir') -> tuple[pathlib.Path, int | None]:
  """(workdir, step) of a workdir, or of a path inside one: runs/tiny/checkpoints/700 is step 700 of
  runs/tiny.

  Raises:
    BadInput: the path is none, or it names another step than the one given.
  """
  path = folder_path(path, where)
  with cannot('read', f'{where}={path}', 'make it readable, or give another folder'):
    return _located(path, step, where)


def _located(path: pathlib.Path, step: int | None, where: str) -> tuple[pathlib.Path, int | None]:
  if steps(path):
    return path, step
  whole, is_file = absolute(path), path.is_file()
  for workdir in folders_above(whole):
    inside = whole.relative_to(workdir).parts
    if (inside[0] == FOLDER or is_file) and steps(workdir):
      if len(inside) < 2 or not inside[1].isdecimal():
        return workdir, step
      if step not in (None, int(inside[1])):
        raise BadInput(f'{where}={path}: is step {int(inside[1])}, not {step}; give {workdir}')
      return workdir, int(inside[1])
  return path, step


def choose(workdir, step: int | None, use: Callable[[int], object], note: Callable[[str], None] = print_stderr,
           passed_over: Collection[int] = ()):
  """use(step) of the checkpoint asked for, or of the newest one that is not damaged.

  While it looks, the run may save new checkpoints and remove old ones.

  Args:
    use: raises DamagedCheckpoint.
    note: gets a line for each one that is damaged or incomplete.
    passed_over: steps known to be damaged.

  Raises:
    BadInput: there is no such checkpoint, or no good one.
  """
  if step is not None:
    step = existing_step(workdir, step)
    try:
      return use(step)
    except DamagedCheckpoint as error:
      raise BadInput(f'{error}; {_other_steps(workdir, step)}') from None
  tried, failure = set(passed_over), None
  while True:
    with cannot('read', f'--workdir={workdir}', 'make it readable, or give another folder'):
      left = [step for step in folders(workdir) if step not in tried]
    if not left:
      break
    tried.add(left[-1])
    try:
      if not is_complete(workdir, left[-1]):
        raise DamagedCheckpoint(left[-1], f'{folder_of(workdir, left[-1])}: is incomplete, it was never committed')
      return use(left[-1])
    except DamagedCheckpoint as error:
      if folder_of(workdir, left[-1]).exists():  # else the run has removed it
        failure = error
        if left[:-1]:
          note(f'{error}; an older checkpoint is used')
  if failure:
    raise BadInput(f'{failure}; there is no older one: restore the folder {failure.step} from a copy, or train in '
                   'another --workdir')
  if passed_over:
    raise BadInput(f'--workdir={workdir}: holds no checkpoint that is whole; restore one from a copy, or choose '
                   'another --workdir')
  raise _no_checkpoint(workdir)


def _no_checkpoint(workdir) -> BadInput:
  return BadInput(f'--workdir={workdir}: holds no checkpoint; '
                  f'train one with: python -m mtp_jax train --config=configs/tiny.py --workdir={workdir}')


def read_record(workdir: pathlib.Path, step: int | None = None, note: Callable[[str], None] = print_stderr) -> dict:
  """The record of a checkpoint: that of the newest one whose record is whole, unless a step is given.

  Raises:
    BadInput: there is no such checkpoint; or DamagedCheckpoint, its record is not what was saved.
  """
  if step is None:
    return choose(workdir, None, lambda step: record_of(workdir, step), note)
  return record_of(workdir, existing_step(workdir, step))


def record_of(workdir: pathlib.Path, step: int) -> dict:
  """The record of a checkpoint that was there.

  Raises:
    DamagedCheckpoint: its record is not what was saved, or it is gone.
    BadInput: it cannot be read.
  """
  path = folder_of(workdir, step) / METADATA
  try:
    record = json.loads(path.read_text())['custom_metadata']
    expected = record.get('digest')
    _check_types(record)
  except GONE as error:
    raise DamagedCheckpoint(step, f'{path}: is no file ({in_words(error)})') from None
  except OSError as error:
    raise BadInput(f'{path}: {unreadable(error)}') from None
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise DamagedCheckpoint(step, f'{path}: lacks the record of config and conventions ({error!r})') from None
  if expected not in (None, digest(record)):
    raise DamagedCheckpoint(step, f'{path}: the record is not the one that was saved')
  if record['step'] != step:
    raise DamagedCheckpoint(step, f'{path.parent}: holds the checkpoint of step {record["step"]}; '
                            'rename the folder to that')
  try:
    return record | {'config': upgraded(record['config'])}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise DamagedCheckpoint(step, f'{path}: lacks the record of config and conventions ({error!r})') from None


def unreadable(error: OSError) -> str:
  """What it tells of a checkpoint, which is nothing of its bytes; in words."""
  return f'cannot be read ({in_words(error)}); it may be whole: make it readable, and run again'


def digest(record: dict) -> str:
  """SHA-256 of a record, but for its own digest."""
  text = json.dumps({key: value for key, value in record.items() if key != 'digest'}, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def existing_step(workdir, step) -> int:
  """The step as an int. Raises BadInput when it is none, or there is no complete checkpoint of it."""
  try:
    step = operator.index(step)
  except TypeError:
    raise BadInput(f'step={step!r}: must be an int, not {type(step).__name__}') from None
  with cannot('read', f'--workdir={workdir}', 'make it readable, or give another folder'):
    available = steps(workdir)
  if not available:
    raise _no_checkpoint(workdir)
  if step not in available:
    raise BadInput(f'step {step}: {workdir} holds the steps {", ".join(map(str, available))}')
  return step


def check_whole(workdir, step: int, index: int = 0, count: int = 1, without: str = '') -> None:
  """Compares share number `index` of `count` of a checkpoint's files with its manifest, if it has one.

  Args:
    without: a folder of the checkpoint whose files do not matter.

  Raises:
    DamagedCheckpoint: a file is not what was saved, or the checkpoint is of another run.
    BadInput: a file cannot be read.
  """
  folder = folder_of(workdir, step)
  try:
    problem = manifest.problem(folder, index, count, without)
  except GONE as error:
    problem = in_words(error)
  except OSError as error:
    raise BadInput(f'{folder}: {unreadable(error)}') from None
  if problem:
    raise DamagedCheckpoint(step, f'{folder}: is damaged, {problem}')


def whole_record(workdir, step: int, index: int = 0, count: int = 1, without: str = '') -> dict:
  """The record of a checkpoint of this run, whose files are what was saved. Arguments and errors as `check_whole`."""
  check_whole(workdir, step, index, count, without)
  record = record_of(workdir, step)
  check_run(workdir, record)
  return record


def state(workdir, step: int) -> str:
  """What is known of a checkpoint without loading it: 'whole', or without a manifest 'whole as far
  as its record tells', or why it would not be used. Reads all its files.
  """
  if not is_complete(workdir, step):
    return 'incomplete, it was never committed'
  try:
    whole_record(workdir, step)
    has_manifest = manifest.read(folder_of(workdir, step)) is not None
    return 'whole' if has_manifest else 'whole as far as its record tells: it has no manifest'
  except BadInput as error:
    return str(error).removeprefix(f'{folder_of(workdir, step)}: ')


def check_run(workdir, record: dict) -> None:
  """Raises DamagedCheckpoint for a checkpoint of another run."""
  name = run_name(workdir)
  if name and record.get('run', name) != name:
    raise DamagedCheckpoint(record['step'], f'{folder_of(workdir, record["step"])}: is of another run, '
                            f'{record["run"]}; that of {workdir} is {name}')


def run_name(workdir) -> str:
  """The name of the run of a workdir; '' if it has none."""
  try:
    return (folder_path(workdir) / RUN).read_bytes().decode(errors='replace').strip()
  except OSError:
    return ''


def _other_steps(workdir, step: int) -> str:
  """What to do about a checkpoint that cannot be used, in words."""
  others = [other for other in steps(workdir) if other != step]
  if not others:
    return f'there is no other one: restore the folder {step} from a copy, or train in another --workdir'
  return f'other checkpoints are of the steps {", ".join(map(str, others))}'


def _check_types(record: dict) -> None:
  """Raises KeyError or TypeError unless the record has all entries, each as it is saved."""
  for key, kind in TYPES.items():
    if type(record[key]) is not kind:
      raise TypeError(f'{key}: must be of type {kind.__name__}')
  for key, kind in LATER_TYPES.items():
    if key in record and type(record[key]) is not kind:
      raise TypeError(f'{key}: must be of type {kind.__name__}')
  for section, fields in record['config'].items():
    if type(fields) is not dict:
      raise TypeError(f'config.{section}: must be a section')
  _check_position(record['data'])
  guard, numbers = record.get('guard', {'recent': [], 'skipped': {}}), (int, float)
  if not (all(type(rows) is list and [type(x) for x in rows] == [int, int] for rows in record.get('skipped_rows', []))
          and all(type(rows) is list and len(rows) == 3 and all(type(x) in numbers for x in rows)
                  for rows in guard['recent'])
          and all(type(count) is int for count in guard['skipped'].values())):
    raise TypeError('guard, skipped_rows: must be what a run saves')


def _check_position(data: dict) -> None:
  """Raises KeyError or TypeError unless `Batches.set_state` can read it."""
  of_one_number = 'global_next_index' in data  # of a version that kept one number for all sources
  sources = [] if of_one_number else data['sources']
  rows = [data['global_next_index' if of_one_number else 'mixed'], *(source['rows'] for source in sources)]
  names = [source['name'] for source in sources if 'share' in source]
  if not (all(type(number) is int and 0 <= number < 2**63 for number in rows)
          and len(names) == len(sources) and all(type(name) is str for name in names)):
    raise TypeError('data: must be a position')


def check_resumes(config: Config, record: dict, workdir) -> list[str]:
  """Fields that differ from the checkpoint's and may, one line each.

  Only fields of the model are fixed; whether the data are the same is decided by their identity,
  not by the config. A field that the checkpoint lacks had its default: a new field's default is
  what earlier versions did.

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
