"""Inputs to a prepared set: read once, tokenized in parallel processes, the same bytes however it went.

The inputs, in order, are cut into parts of about `shard_bytes`; where depends on names and sizes alone. A part becomes a shard of each split, so
that neither the number of workers nor an interruption shows in the result:

    plan.json            inputs and options; there until the set is complete
    parts/00007.json     what part 7 found, written when its shards are there; a part that has one is not done again
    train-00007.array_record, validation-00007.array_record
    tokenizer.model      of SentencePiece
    bad_records.jsonl    every fault: its kind, file, line, and whether the record was kept
    index.json           written last: the set is complete

The split: a document is held out iff hash(name) < validation_share, or it is the very first of all. Save for that one it stands or falls alone:
adding files moves no other one across.
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

from mtp_jax.config import BadInput
from mtp_jax.data.files import File, digest, files
from mtp_jax.data.folder import UNFINISHED, Folder
from mtp_jax.data.parts import PARTS, Options, Work, cut
from mtp_jax.data.prepared_set import FORMAT, INDEX, PLAN, Prepared, open_set, write_index
from mtp_jax.data.progress import NoMeter, quiet
from mtp_jax.data.records import Reading
from mtp_jax.data.workers import tokenized
from mtp_jax.tokenizer import Tokenizer

BAD, MODEL = 'bad_records.jsonl', 'tokenizer.model'


def prepare(inputs: list[File], tokenizer: Tokenizer, options: Options, output, workers: int, where: str,
            note=quiet, progress=NoMeter, cache: str = '') -> Prepared:
  """Prepares a set, goes on where an interrupted one stopped, or finds it complete: of inputs of the same names and sizes and the same options.

  Args:
    inputs: as `files` finds them.
    output: a folder that is empty, or holds this very set, or a part of it.
    workers: processes; 0 works in this one.
    where: the flag or field that names the inputs.
    note, progress: as in data/progress.py.
    cache: for reading a set that does not lie on this machine.

  Raises:
    BadInput: an input is damaged or missing, too many records are bad, a split is empty, or the folder holds something else.
  """
  folder = Folder(output, '--output')
  size = sum(file.bytes for file in inputs)
  options = dataclasses.replace(options, shard_bytes=options.shard_bytes or min(max(size // 64, 4 * 2**20), 256 * 2**20))
  with _alone(folder, note):
    work = Work(folder, tokenizer, options, cut(inputs, options), where)
    if _begin(folder, work, inputs):
      note(f'{folder.url} is complete already, by names, sizes and options; nothing is written')
    else:
      try:
        _run(work, size, workers, note, progress)
        _finish(work, inputs)
      except ChildProcessError:
        raise
      except OSError as error:
        raise OSError(f'--output={folder.url}: cannot write there ({error}); mend that and run the same command, it goes on where it stopped') from error
    return open_set(folder, cache)


def prepare_once(given: tuple[str, ...], tokenizer: Tokenizer, validation_share: float, cache: str, where: str,
                 note=quiet, progress=NoMeter) -> Prepared:
  """A set for text files of moderate size, a document each, in a folder of `cache` named by their content; every one that is not empty is kept.

  Raises:
    BadInput: as `prepare`.
  """
  inputs = files(given, where)
  options = Options(Reading('text', keep=('invalid_utf8', 'lone_surrogate', 'nul'), max_document_bytes=2**62), validation_share, bad_share=1)
  identity = [FORMAT, tokenizer.digest, validation_share, [(file.name, file.bytes, digest(file, where)) for file in inputs]]
  directory = pathlib.Path(cache).expanduser() / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
  try:
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / INDEX).exists():
      return open_set(Folder(directory, 'config.data.cache'), cache)
    inputs = [dataclasses.replace(file, modified='') for file in inputs]
    return prepare(inputs, tokenizer, options, directory, 0, where, note, progress, cache)
  except OSError as error:
    raise BadInput(f'config.data.cache={cache!r}: cannot write there ({error}); give a folder with space') from error


@contextlib.contextmanager
def _alone(folder: Folder, note):
  """Holds a folder of this machine for one process at a time; the system lets go of it however that process ends."""
  if not folder.here:
    yield
    return
  try:
    os.makedirs(folder.url, exist_ok=True)
    descriptor = os.open(folder.url, os.O_RDONLY)
  except OSError as error:
    raise BadInput(f'--output={folder.url}: cannot be a folder ({error.strerror}); choose another') from error
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      note(f'another process prepares {folder.url}; waiting for it')
      fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
  finally:
    os.close(descriptor)


def _begin(folder: Folder, work: Work, inputs: list[File]) -> bool:
  """Whether the set is complete; else there is a plan now, this one.

  Raises:
    BadInput: the folder holds another set, or files that are none.
  """
  plan = {**work.identity, 'inputs': [[file.name, file.bytes, file.modified] for file in inputs]}
  names = folder.sizes()
  unfinished = [name for name in names if name.startswith(UNFINISHED)]
  folder.remove(*unfinished)
  names = {name: size for name, size in names.items() if name not in unfinished}
  if INDEX in names:
    index = open_set(folder, '').index
    _same(plan | {'inputs': [row[:2] for row in plan['inputs']]},
          {**index['identity'], 'inputs': [[file['name'], file['bytes']] for file in index['inputs']]}, folder, 'a set')
    folder.remove(PLAN, PARTS)
    return True
  if PLAN in names:
    _same(plan, json.loads(folder.read(PLAN)), folder, 'unfinished work')
  elif names:
    raise BadInput(f'--output={folder.url}: holds files that are no prepared set, such as {min(names)}; choose an empty folder')
  else:
    folder.write(PLAN, json.dumps(plan).encode())
  return False


def _same(mine: dict, theirs: dict, folder: Folder, what: str) -> None:
  changed = [f'--{key} ({theirs.get(key)} -> {mine[key]})' for key in mine if key != 'inputs' and mine[key] != theirs.get(key)]
  there, here = ({row[0]: row[1:] for row in plan['inputs']} for plan in (theirs, mine))
  if there != here:
    names = sorted(there.keys() ^ here.keys()) or [name for name in here if here[name] != there[name]]
    changed.append(f'the inputs, such as {names[0]}')
  if changed:
    raise BadInput(f'--output={folder.url}: holds {what} that differs in {", ".join(changed)}; choose another folder or delete that one')


def _run(work: Work, size: int, workers: int, note, progress) -> None:
  """Tokenizes every part that has no report yet."""
  complete, todo = work.ready(), []
  records = skipped = ready = 0
  for number, part in enumerate(work.parts):
    if number in complete:
      report = work.done(number)
      records, skipped, ready = records + report['records'], skipped + report['skipped'], ready + sum(piece.bytes for piece in part)
    else:
      todo.append(number)
  if ready:
    note(f'{len(work.parts) - len(todo)} of {len(work.parts)} parts are done already')
  with progress(size, ready) as meter:
    with contextlib.closing(tokenized(work, todo, min(workers, len(todo)), meter)) as found:  # which stops the workers
      for part_records, part_skipped, read in found:
        records, skipped = records + part_records, skipped + part_skipped
        _check_bad(work, records, skipped, records * size / max(1, ready + read))
    _check_bad(work, records, skipped, records)


def _check_bad(work: Work, records: int, skipped: int, expected: float) -> None:
  """Stops when more are bad than may be of all the records to be expected, even if no further one is."""
  if skipped > work.options.bad_share * expected:
    bad = [fault for fault in _write_faults(work) if not fault['kept']]
    kinds, first = collections.Counter(fault['kind'] for fault in bad), bad[0]
    place = (f', line {first["line"]}' if first['line'] else '') + (f' ({first["detail"]}; --field={work.options.reading.field})' if first['detail'] else '')
    raise BadInput(f'{work.where}: {skipped:,} of {records:,} records are bad ({", ".join(f"{n:,} {kind}" for kind, n in kinds.items())}), more than '
                   f'--bad_share={work.options.bad_share}; the first is {first["kind"]} in {first["file"]}{place}; all are listed in '
                   f'{work.folder.url}/{BAD}; mend them, or allow more and run again')


def _faults(work: Work):
  """Of all parts that are done, in order, with lines counted from the beginning of each file; nan where parts before are not done."""
  before, complete = {}, work.ready()
  for number, part in enumerate(work.parts):
    if number not in complete:
      before |= {piece.file.name: math.nan for piece in part}
      continue
    report = work.done(number)
    for fault in report['faults']:
      line = fault['line'] + (before.get(fault['file'], 0) if fault['line'] else 0)
      yield fault | {'line': None if math.isnan(line) else line}
    for piece in report['pieces']:
      before[piece['file']] = before.get(piece['file'], 0) + piece['lines']


def _write_faults(work: Work) -> list[dict]:
  """Lists them in a file of the set."""
  faults = list(_faults(work))
  work.folder.write(BAD, ''.join(json.dumps(fault) + '\n' for fault in faults).encode())
  return faults


def _finish(work: Work, inputs: list[File]) -> None:
  splits, digests, sizes = {'train': [], 'validation': []}, {file.name: [] for file in inputs}, collections.Counter()
  bad, records = {}, 0
  for number in range(len(work.parts)):
    report = work.done(number)
    records += report['records']
    for split, entry in report['splits'].items():
      splits[split].append(entry)
    for piece in report['pieces']:
      digests[piece['file']].append(piece['sha256'])
      sizes[piece['file']] += piece['bytes']
  for file in inputs:
    if sizes[file.name] != file.bytes:
      raise BadInput(f'{work.where}: {file.url!r} had {file.bytes:,} bytes, and {sizes[file.name]:,} when it was read; '
                     f'delete {work.folder.url} and run again when it is at rest')
  for split, entries in splits.items():
    if not entries:
      raise BadInput(f'{work.where}: of {records:,} records none is left for the {split} split; give at least two documents, '
                     f'and mind --validation_share={work.options.validation_share}')
  for fault in _write_faults(work):
    counts = bad.setdefault(fault['kind'], {'skipped': 0, 'kept': 0})
    counts['kept' if fault['kept'] else 'skipped'] += 1
  if work.tokenizer.model:
    work.folder.write(MODEL, work.tokenizer.model)
  listed = [{'name': file.name, 'bytes': file.bytes, 'sha256': digests[file.name]} for file in inputs]
  write_index(work.folder, {
      'fingerprint': hashlib.sha256(json.dumps([work.identity, listed]).encode()).hexdigest(), 'identity': work.identity,
      'dtype': work.dtype, 'tokenizer': MODEL if work.tokenizer.model else 'bytes', 'records': records, 'bad': bad, 'splits': splits,
      'inputs': listed})
  work.folder.remove(PLAN, PARTS)
