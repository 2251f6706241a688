"""Inputs to a prepared set: read once, tokenized in parallel; the same bytes however often it was
interrupted.

The inputs, in order, are cut into parts of about `shard_bytes`; the cuts depend on names and sizes
alone. A part becomes one shard of each split, so the result depends neither on the number of
workers nor on interruptions:

    plan.json            inputs and options; deleted when the set is complete
    parts/00007.json     report of part 7, written after its shards; deleted when the set is complete
    train-00007.array_record, validation-00007.array_record
    tokenizer.model      of SentencePiece
    bad_records.jsonl    every fault: its kind, file, line, and whether the record was kept
    index.json           written last: the set is complete
"""
import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterator

from mtp_jax.config import BadInput
from mtp_jax.data.files import File, digest, files
from mtp_jax.data.folder import UNFINISHED, Folder
from mtp_jax.data.parts import PARTS, Options, Preparation, cut_into_parts
from mtp_jax.data.prepared_set import FORMAT, INDEX, PLAN, Prepared, open_set, write_index
from mtp_jax.data.progress import NoMeter, quiet
from mtp_jax.data.records import MAY_BE_KEPT, Reading
from mtp_jax.data.workers import tokenize_parts
from mtp_jax.tokenizer import Tokenizer

BAD_RECORDS = 'bad_records.jsonl'
MODEL = 'tokenizer.model'


def prepare(inputs: list[File], tokenizer: Tokenizer, options: Options, output, workers: int, where: str,
            note=quiet, progress=NoMeter, cache: str = '') -> Prepared:
  """Prepares a set, resumes an interrupted preparation, or finds the set complete.

  Args:
    inputs: from `files`.
    output: a folder that is empty, or holds this very set or an unfinished part of it: the same
      names and sizes of inputs, and the same options.
    workers: processes; 0 works in this one.
    where: the flag or field that names the inputs, for messages.
    note, progress: see data/progress.py.
    cache: folder on this machine for copies of the shards of a remote set.

  Raises:
    BadInput: an input is damaged or missing, too many records are bad, a split is empty, or the
      folder holds something else.
    ChildProcessError: a worker was killed.
    OSError: the folder cannot be written.
  """
  folder = Folder(output, '--output')
  size = sum(file.bytes for file in inputs)
  if not options.shard_bytes:
    options = dataclasses.replace(options, shard_bytes=min(max(size // 64, 4 * 2**20), 256 * 2**20))
  parts = cut_into_parts(inputs, options.reading.format, options.shard_bytes)
  preparation = Preparation(folder, tokenizer, options, parts, where)
  with _locked(folder, note):
    if _begin_or_resume(preparation, inputs):
      note(f'{folder.url} is complete already, by names, sizes and options; nothing is written')
    else:
      try:
        _tokenize_missing(preparation, size, workers, note, progress)
        _finish(preparation, inputs)
      except ChildProcessError:
        raise
      except OSError as error:
        raise OSError(f'--output={folder.url}: cannot write there ({error}); fix that and '
                      'run the same command, it goes on where it stopped') from error
    return open_set(folder, cache)


def prepare_once(paths: tuple[str, ...], tokenizer: Tokenizer, validation_share: float, cache: str,
                 where: str, note=quiet, progress=NoMeter) -> Prepared:
  """The set of some text files, a document each, prepared once in a folder of `cache`.

  The name of that folder depends on names and contents of the files, the tokenizer and
  validation_share. Meant for moderate sizes. Only empty files are skipped.

  Raises:
    BadInput: as `prepare`.
  """
  inputs = [dataclasses.replace(file, modified='') for file in files(paths, where)]
  reading = Reading('text', keep=MAY_BE_KEPT, max_document_bytes=2**62)
  options = Options(reading, validation_share, bad_share=1)
  contents = [(file.name, file.bytes, digest(file, where)) for file in inputs]
  key = json.dumps([FORMAT, tokenizer.digest, validation_share, contents])
  directory = pathlib.Path(cache).expanduser() / hashlib.sha256(key.encode()).hexdigest()[:16]
  try:
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / INDEX).exists():
      return open_set(Folder(directory, 'config.data.cache'), cache)
    return prepare(inputs, tokenizer, options, directory, 0, where, note, progress, cache)
  except OSError as error:
    raise BadInput(f'config.data.cache={cache!r}: cannot write there ({error}); '
                   'give a folder with space') from error


@contextlib.contextmanager
def _locked(folder: Folder, note) -> Iterator[None]:
  """Lets one process at a time work in a folder of this machine.

  The lock ends with the process, even if that is killed.
  """
  if not folder.is_local:
    yield
    return
  try:
    os.makedirs(folder.url, exist_ok=True)
    descriptor = os.open(folder.url, os.O_RDONLY)
  except OSError as error:
    raise BadInput(f'--output={folder.url}: cannot be a folder ({error.strerror}); '
                   'choose another') from error
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      note(f'another process prepares {folder.url}; waiting for it')
      fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
  finally:
    os.close(descriptor)


def _begin_or_resume(preparation: Preparation, inputs: list[File]) -> bool:
  """Whether the set is complete already; if not, the folder holds its plan now.

  Raises:
    BadInput: the folder holds another set, or other files.
  """
  folder = preparation.folder
  plan = {**preparation.identity, 'inputs': [[file.name, file.bytes, file.modified] for file in inputs]}
  names = folder.sizes().keys()
  unfinished = {name for name in names if name.startswith(UNFINISHED)}
  folder.remove(*unfinished)
  names -= unfinished
  if INDEX in names:
    index = open_set(folder, '').index
    complete = index['identity'] | {'inputs': [[f['name'], f['bytes']] for f in index['inputs']]}
    _check_same(plan | {'inputs': [row[:2] for row in plan['inputs']]}, complete, folder, 'a set')
    folder.remove(PLAN, PARTS)
    return True
  if PLAN in names:
    _check_same(plan, json.loads(folder.read(PLAN)), folder, 'unfinished work')
  elif names:
    raise BadInput(f'--output={folder.url}: holds files that are no prepared set, such as {min(names)}; '
                   'choose an empty folder')
  else:
    folder.write(PLAN, json.dumps(plan).encode())
  return False


def _check_same(plan: dict, old: dict, folder: Folder, what: str) -> None:
  changes = [f'--{key} ({old.get(key)} -> {value})' for key, value in plan.items()
             if key != 'inputs' and value != old.get(key)]
  old_inputs, new_inputs = ({row[0]: row[1:] for row in rows} for rows in (old['inputs'], plan['inputs']))
  if old_inputs != new_inputs:
    names = sorted(old_inputs.keys() ^ new_inputs.keys())
    names = names or [name for name in new_inputs if new_inputs[name] != old_inputs[name]]
    changes.append(f'the inputs, such as {names[0]}')
  if changes:
    raise BadInput(f'--output={folder.url}: holds {what} that differs in {", ".join(changes)}; '
                   'choose another folder or delete that one')


def _tokenize_missing(preparation: Preparation, size: int, workers: int, note, progress) -> None:
  """Tokenizes every part that has no report yet."""
  done, missing = preparation.parts_done(), []
  records = skipped = ready_bytes = 0
  for number, part in enumerate(preparation.parts):
    if number in done:
      report = preparation.report(number)
      records += report['records']
      skipped += report['skipped']
      ready_bytes += sum(piece.bytes for piece in part)
    else:
      missing.append(number)
  if ready_bytes:
    note(f'{len(done)} of {len(preparation.parts)} parts are done already')
  with progress(size, ready_bytes) as meter:
    parts = tokenize_parts(preparation, missing, min(workers, len(missing)), meter)
    with contextlib.closing(parts):
      for part_records, part_skipped, read_bytes in parts:
        records += part_records
        skipped += part_skipped
        _check_bad_share(preparation, records, skipped, records * size / max(1, ready_bytes + read_bytes))
    _check_bad_share(preparation, records, skipped, records)


def _check_bad_share(preparation: Preparation, records: int, skipped: int, expected: float) -> None:
  """Stops as soon as more records are skipped than bad_share allows of all records expected."""
  options = preparation.options
  if skipped <= options.bad_share * expected:
    return
  bad = [fault for fault in _write_faults(preparation) if not fault['kept']]
  counts = collections.Counter(fault['kind'] for fault in bad)
  kinds = ', '.join(f'{n:,} {kind}' for kind, n in counts.items())
  first = bad[0]
  line = f', line {first["line"]}' if first['line'] else ''
  detail = f' ({first["detail"]}; --field={options.reading.field})' if first['detail'] else ''
  raise BadInput(f'{preparation.where}: {skipped:,} of {records:,} records are bad ({kinds}), '
                 f'more than --bad_share={options.bad_share}; '
                 f'the first is {first["kind"]} in {first["file"]}{line}{detail}; '
                 f'all are listed in {preparation.folder.url}/{BAD_RECORDS}; '
                 'fix them, or allow more and run again')


def _faults(preparation: Preparation) -> Iterator[dict]:
  """Faults of all parts that are done, in order.

  A line counts from the start of its file; it is None where an earlier part of the file is not done.
  """
  lines_before, done = collections.defaultdict(int), preparation.parts_done()
  for number, part in enumerate(preparation.parts):
    if number not in done:
      lines_before |= {piece.file.name: math.nan for piece in part}
      continue
    report = preparation.report(number)
    for fault in report['faults']:
      line = fault['line'] + (lines_before[fault['file']] if fault['line'] else 0)
      yield fault | {'line': None if math.isnan(line) else line}
    for piece in report['pieces']:
      lines_before[piece['file']] += piece['lines']


def _write_faults(preparation: Preparation) -> list[dict]:
  """Lists the faults in a file of the set."""
  faults = list(_faults(preparation))
  lines = ''.join(json.dumps(fault) + '\n' for fault in faults)
  preparation.folder.write(BAD_RECORDS, lines.encode())
  return faults


def _finish(preparation: Preparation, inputs: list[File]) -> None:
  """Writes the list of faults, the tokenizer and the index, from the reports of all parts."""
  folder, model = preparation.folder, preparation.tokenizer.model
  splits, records = {'train': [], 'validation': []}, 0
  digests, sizes = {file.name: [] for file in inputs}, collections.Counter()
  for number in range(len(preparation.parts)):
    report = preparation.report(number)
    records += report['records']
    for split, entry in report['splits'].items():
      splits[split].append(entry)
    for piece in report['pieces']:
      digests[piece['file']].append(piece['sha256'])
      sizes[piece['file']] += piece['bytes']
  for file in inputs:
    if sizes[file.name] != file.bytes:
      raise BadInput(f'{preparation.where}: {file.url!r} had {file.bytes:,} bytes, and '
                     f'{sizes[file.name]:,} when it was read; delete {folder.url} and run again '
                     'when nothing writes to that file')
  for split, entries in splits.items():
    if not entries:
      share = preparation.options.validation_share
      raise BadInput(f'{preparation.where}: of {records:,} records none is left for the {split} split; '
                     f'give at least two documents, and check --validation_share={share}')
  bad = {}
  for fault in _write_faults(preparation):
    counts = bad.setdefault(fault['kind'], {'skipped': 0, 'kept': 0})
    counts['kept' if fault['kept'] else 'skipped'] += 1
  if model:
    folder.write(MODEL, model)
  identity = preparation.identity
  listed = [{'name': f.name, 'bytes': f.bytes, 'sha256': digests[f.name]} for f in inputs]
  write_index(folder, {
      'fingerprint': hashlib.sha256(json.dumps([identity, listed]).encode()).hexdigest(),
      'identity': identity, 'dtype': preparation.dtype, 'tokenizer': MODEL if model else 'bytes',
      'records': records, 'bad': bad, 'splits': splits, 'inputs': listed})
  folder.remove(PLAN, PARTS)
