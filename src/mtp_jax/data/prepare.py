"""Inputs to a prepared set: read once, tokenized in parallel; the same bytes however often it was
interrupted.

The inputs, in order, are cut into parts of about `shard_bytes`; the cuts depend on names, kinds and
sizes alone. A part becomes one shard of each split, so the result depends neither on the number of
workers nor on interruptions. If the split by content turns out to be a bad one, all parts are made
again with a better one (see split.py); only sets of few documents need that.

    plan.json            inputs, options and split; deleted when the set is complete
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
from collections.abc import Iterator, Sequence

from mtp_jax.config import BadInput, local_path
from mtp_jax.config.errors import in_words
from mtp_jax.data.files import File, digest, files
from mtp_jax.data.folder import UNFINISHED, Folder
from mtp_jax.data.kinds import kind, read_as, recognized
from mtp_jax.data.parts import PARTS, Options, Preparation, cut_into_parts
from mtp_jax.data.prepared_set import FORMAT, INDEX, PLAN, Prepared, open_set, write_index
from mtp_jax.data.progress import NoMeter, quiet
from mtp_jax.data.records import MAY_BE_KEPT, Reading
from mtp_jax.data.split import Split, better_split, why_again
from mtp_jax.data.workers import tokenize_parts
from mtp_jax.tokenizer import Tokenizer

BAD_RECORDS = 'bad_records.jsonl'
MODEL = 'tokenizer.model'


def prepare(inputs: list[File], tokenizer: Tokenizer, options: Options, output, workers: int, where: str,
            note=quiet, progress=NoMeter, cache: str = '', validation: Sequence[File] = ()) -> Prepared:
  """Prepares a set, resumes an interrupted preparation, or finds the set complete.

  Args:
    inputs: from `files`.
    output: a folder that is empty, or holds this very set or an unfinished part of it: the same
      names and sizes of inputs, and the same options.
    workers: processes; 0 works in this one.
    where: the flag or field that names the inputs, for messages.
    note, progress: see data/progress.py.
    cache: folder on this machine for copies of the shards of a remote set.
    validation: from `files`: what is held out, instead of a share of the inputs; those of the inputs
      that are among them are not trained on.

  Raises:
    BadInput: an input is damaged, missing or of no kind that can be read, too many records are bad,
      a split is empty or absurd, or the folder holds something else.
    ChildProcessError: a worker was killed.
    OSError: the folder cannot be written.
  """
  folder = Folder(output, '--output')
  inputs, validation = _recognized(inputs, validation, options.reading, where)
  size = sum(file.bytes for file in (*inputs, *validation))
  if not options.shard_bytes:
    options = dataclasses.replace(options, shard_bytes=min(max(size // 64, 4 * 2**20), 256 * 2**20))
  parts, held_out = (cut_into_parts(files, options.reading.separator, options.shard_bytes)
                     for files in (inputs, validation))
  inputs = [*inputs, *validation]
  first_split = Split.by_content(options.validation_share)
  preparation = Preparation(folder, tokenizer, options, parts + held_out, where, first_split, len(held_out))
  with locked(folder, note):
    if _begin_or_resume(preparation, inputs):
      note(f'{folder.url} is complete already, by names, sizes and options; nothing is written')
    else:
      try:
        preparation = dataclasses.replace(preparation, split=Split(**json.loads(folder.read(PLAN))['split']))
        _tokenize_missing(preparation, size, workers, note, progress)
        if preparation.split == first_split and not validation:
          split = better_split(first_split, map(preparation.report, range(len(preparation.parts))))
          if split != first_split:
            note(why_again(split))
            preparation = _start_over(preparation, inputs, split)
            _tokenize_missing(preparation, size, workers, note, progress)
        _finish(preparation, inputs)
        note(read_as({file.name: kind(file) for file in inputs}))
      except ChildProcessError:
        raise
      except OSError as error:
        raise OSError(f'--output={folder.url}: cannot write there ({in_words(error)}); fix that and '
                      'run the same command, it goes on where it stopped') from error
    return open_set(folder, cache)


def _recognized(inputs: list[File], validation: Sequence[File], reading: Reading,
                where: str) -> tuple[list[File], list[File]]:
  """Both with their kinds; a file of both is only in the second, whose names begin with 'validation:'."""
  held_out = {os.path.realpath(file.url) for file in validation}
  inputs = [file for file in inputs if os.path.realpath(file.url) not in held_out]
  validation = [dataclasses.replace(file, name=f'validation:{file.name}') for file in validation]
  files = recognized([*inputs, *validation], reading, where)
  return files[:len(inputs)], files[len(inputs):]


def prepare_once(paths: tuple[str, ...], tokenizer: Tokenizer, validation_share: float, cache: str,
                 where: str, note=quiet, progress=NoMeter, validation: tuple[str, ...] = ()) -> Prepared:
  """The set of some files, prepared once in a folder of `cache`.

  The name of that folder depends on names and contents of the files, the tokenizer and
  validation_share. Meant for moderate sizes. Files are read as `prepare` reads them by default;
  empty ones are left out. Of the standard library (no paths) everything is read as it is.

  Args:
    validation: paths of what is held out, instead of a share.

  Raises:
    BadInput: as `prepare`.
  """
  inputs, held_out = ([dataclasses.replace(file, modified='') for file in found if file.bytes] for found in (
      files(paths, where), files(validation, 'config.data.validation') if validation else []))
  if paths:
    options = Options(Reading(), validation_share)
  else:
    options = Options(Reading('text', keep=MAY_BE_KEPT, max_document_bytes=2**62), validation_share, bad_share=1)
  contents = [[(file.name, file.bytes, digest(file, where)) for file in found] for found in (inputs, held_out)]
  key = json.dumps([FORMAT, tokenizer.digest, validation_share, bool(paths), contents])
  directory = local_path(cache, 'config.data.cache') / hashlib.sha256(key.encode()).hexdigest()[:16]
  try:
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / INDEX).exists():
      return open_set(Folder(directory, 'config.data.cache'), cache)
    return prepare(inputs, tokenizer, options, directory, 0, where, note, progress, cache, held_out)
  except OSError as error:
    raise BadInput(f'config.data.cache={cache!r}: cannot write there ({in_words(error)}); '
                   'give a folder with space') from error


@contextlib.contextmanager
def locked(folder: Folder, note) -> Iterator[None]:
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
  plan = _plan(preparation, inputs)
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
    _write_plan(preparation, inputs)
  return False


def _plan(preparation: Preparation, inputs: list[File]) -> dict:
  return {**preparation.identity, 'inputs': [[file.name, file.bytes, file.modified] for file in inputs]}


def _write_plan(preparation: Preparation, inputs: list[File]) -> None:
  plan = _plan(preparation, inputs) | {'split': dataclasses.asdict(preparation.split)}
  preparation.folder.write(PLAN, json.dumps(plan).encode())


def _start_over(preparation: Preparation, inputs: list[File], split: Split) -> Preparation:
  """The same work with another split, in a folder without parts. Killed at any point, it is done again."""
  folder = preparation.folder
  folder.remove(PARTS)
  folder.remove(*(name for name in folder.sizes() if name.endswith('.array_record')))
  preparation = dataclasses.replace(preparation, split=split)
  _write_plan(preparation, inputs)
  return preparation


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
  field = f'; --field={options.reading.field}' if first['kind'] == 'missing_field' else ''
  detail = f' ({first["detail"]}{field})' if first['detail'] else ''
  fix = 'fix them, or allow more and run again'
  if not preparation.where.startswith('--'):
    fix = 'fix them, or use the command prepare, which has such options, and config.data.sources'
  raise BadInput(f'{preparation.where}: {skipped:,} of {records:,} records are bad ({kinds}), '
                 f'more than --bad_share={options.bad_share}; '
                 f'the first is {first["kind"]} in {first["file"]}{line}{detail}; '
                 f'all are listed in {preparation.folder.url}/{BAD_RECORDS}; '
                 f'{fix}')


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
  digests, sizes, separators = {file.name: [] for file in inputs}, collections.Counter(), collections.Counter()
  for number in range(len(preparation.parts)):
    report = preparation.report(number)
    records += report['records']
    for split, entry in report['splits'].items():
      splits[split].append(entry)
    for piece in report['pieces']:
      digests[piece['file']].append(piece['sha256'])
      sizes[piece['file']] += piece['bytes']
      separators[piece['file']] += piece['separators']
  for file in inputs:
    if sizes[file.name] != file.bytes:
      raise BadInput(f'{preparation.where}: {file.url!r} had {file.bytes:,} bytes, and '
                     f'{sizes[file.name]:,} when it was read; delete {folder.url} and run again '
                     'when nothing writes to that file')
  separator = preparation.options.reading.separator
  if separator and not any(separators[file.name] for file in inputs if file.format == 'text'):
    raise BadInput(f'--separator={separator}: occurs in no text file; give what does stand between the documents '
                   "(in bash a line break is $'\\n'), or leave it out")
  for split, entries in splits.items():
    if not entries:
      share = preparation.options.validation_share
      raise BadInput(f'{preparation.where}: of {records:,} records none is left for the {split} split; '
                     f'give at least two different documents, and check --validation_share={share}')
  train, held_out = (sum(entry['tokens'] for entry in splits[split]) for split in ('train', 'validation'))
  if held_out > train and preparation.options.validation_share < 0.5 and not preparation.validation_parts:
    raise BadInput(f'{preparation.where}: {train:,} tokens would be left to train on, and {held_out:,} be held out; '
                   'give more documents, or a validation set of their own')
  bad = {}
  for fault in _write_faults(preparation):
    counts = bad.setdefault(fault['kind'], {'skipped': 0, 'kept': 0})
    counts['kept' if fault['kept'] else 'skipped'] += 1
  if model:
    folder.write(MODEL, model)
  identity = preparation.identity
  listed = [{'name': f.name, 'bytes': f.bytes, 'sha256': digests[f.name], 'kind': kind(f)} for f in inputs]
  write_index(folder, {
      'fingerprint': hashlib.sha256(json.dumps([identity, listed]).encode()).hexdigest(),
      'identity': identity, 'dtype': preparation.dtype, 'tokenizer': MODEL if model else 'bytes',
      'records': records, 'bad': bad, 'splits': splits, 'inputs': listed})
  folder.remove(PLAN, PARTS)
