"""A dataset of the user's own, tokenized once into a prepared set.

config.data.dataset='package.module:function' names a function of config.data that returns a
`grain.MapDataset` of documents, each a str, UTF-8 bytes or token ids without bos and eos; None,
which Grain's filters leave, is no document.

A dataset says what it is by its attribute `identity`, a str: while that, the tokenizer and
validation_share stay, the set in config.data.cache is used again. Without one every document is
read and tokenized again at each start, since nothing else tells whether the data are the same. A
resumed run is compared with its checkpoint by a digest of the tokens.
"""
import contextlib
import hashlib
import importlib
import itertools
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import grain
import numpy as np

from mtp_jax.config import BadInput, DataConfig, local_path
from mtp_jax.config.errors import in_words, one_line
from mtp_jax.data.folder import Folder
from mtp_jax.data.prepare import MODEL, locked
from mtp_jax.data.prepared_set import FORMAT, INDEX, Prepared, open_set, write_index
from mtp_jax.data.progress import quiet
from mtp_jax.data.shards import ShardWriter, dtype_of
from mtp_jax.data.split import Split, better_split, content_hash, why_again
from mtp_jax.tokenizer import Tokenizer

SHARD_TOKENS = 2**26
SAY_EVERY = 100_000  # documents
FIELD = 'config.data.dataset'


def dataset_once(config: DataConfig, tokenizer: Tokenizer, note=quiet, damaged=None,
                 waiting=contextlib.nullcontext) -> Prepared:
  """The set of the documents of config.dataset, in a folder of config.cache.

  Args:
    note: see data/progress.py; told of a dataset without an identity, and while it is read.
    damaged: as the note of `open_set`.
    waiting: see data/progress.py.

  Raises:
    BadInput: there is no such function, it fails, or what it returns is no dataset of documents that
      ends.
  """
  dataset = _opened(config)
  identity = getattr(dataset, 'identity', None)
  if identity is not None and not (isinstance(identity, str) and identity):
    raise BadInput(f'{FIELD}={config.dataset!r}: its identity is {identity!r}; it must be a str that says what it is')
  cache = local_path(config.cache, 'config.data.cache')
  made = {'layout': FORMAT, 'tokenizer': tokenizer.digest, 'validation_share': config.validation_share}
  try:
    cache.mkdir(parents=True, exist_ok=True)
    if identity is None:
      note(f'{FIELD}={config.dataset!r} has no identity, so all documents are read again at each start; '
           "set dataset.identity = 'a name of these very documents' before returning it")
      with tempfile.TemporaryDirectory(prefix='.unfinished-', dir=cache) as unfinished:
        made_here = pathlib.Path(unfinished) / 'set'
        fingerprint = _write(Folder(made_here, 'config.data.cache'), dataset, config, tokenizer, made, note, waiting)
        directory = cache / fingerprint[:16]
        try:
          made_here.rename(directory)  # all of it at once
        except OSError:
          if not (directory / INDEX).exists():  # else another start has made the same set
            raise
    else:
      key = json.dumps(made | {'dataset': identity})
      directory = cache / hashlib.sha256(key.encode()).hexdigest()[:16]
      folder = Folder(directory, 'config.data.cache')
      with locked(folder, note):
        if not (directory / INDEX).exists():
          _write(folder, dataset, config, tokenizer, made | {'dataset': identity}, note, waiting)
  except OSError as error:
    raise BadInput(f'config.data.cache={config.cache!r}: cannot write there ({in_words(error)}); '
                   'give a folder with space') from error
  return open_set(Folder(directory, 'config.data.cache'), config.cache, damaged)


def _opened(config: DataConfig) -> grain.MapDataset:
  where, (module, _, function) = f'{FIELD}={config.dataset!r}', config.dataset.partition(':')
  if not (module and function):
    raise BadInput(f"{where}: must be 'package.module:function'")
  if (here := os.getcwd()) not in sys.path:  # as `python -m` has it; not where a notebook or a script was started
    sys.path.append(here)
  try:
    make = getattr(importlib.import_module(module), function)
    dataset = make(config)
  except (Exception, SystemExit) as error:  # the user's own code
    raise BadInput(f'{where}: {type(error).__name__}: {one_line(error)}') from error
  if not isinstance(dataset, grain.MapDataset):
    raise BadInput(f'{where}: returns {type(dataset).__name__}; it must return a grain.MapDataset of documents')
  if len(dataset) >= sys.maxsize:
    raise BadInput(f'{where}: has no end; leave out repeat(), training does that')
  return dataset


def _write(folder: Folder, dataset: grain.MapDataset, config: DataConfig, tokenizer: Tokenizer, made: dict,
           note, waiting) -> str:
  """Writes the set, its index last; returns its fingerprint, a digest of all tokens and of `made`."""
  first = Split.by_content(config.validation_share)
  report = _write_shards(folder, dataset, config, tokenizer, first, note, waiting)
  split = better_split(first, [_as_of_a_part(report)])
  if split != first:
    note(why_again(split))
    report = _write_shards(folder, dataset, config, tokenizer, split, note, waiting)
  shards = report['shards']
  for side, entries in shards.items():
    if not entries:
      raise BadInput(f'{FIELD}={config.dataset!r}: of {report["documents"]:,} documents none is left for the {side} '
                     'split; give at least two different ones, and check '
                     f'config.data.validation_share={config.validation_share}')
  digests = {side: [entry['sha256'] for entry in entries] for side, entries in shards.items()}
  fingerprint = hashlib.sha256(json.dumps([made, digests]).encode()).hexdigest()
  if tokenizer.model:
    folder.write(MODEL, tokenizer.model)
  size = sum(entry['document_bytes'] for entries in shards.values() for entry in entries)
  bad = {'empty': {'skipped': report['empty'], 'kept': 0}} if report['empty'] else {}
  write_index(folder, {
      'fingerprint': fingerprint, 'identity': made, 'dtype': dtype_of(tokenizer.size),
      'tokenizer': MODEL if tokenizer.model else 'bytes', 'records': report['documents'] + report['empty'],
      'bad': bad, 'splits': shards,
      'inputs': [{'name': config.dataset, 'bytes': size, 'sha256': [], 'kind': 'a dataset'}]})
  return fingerprint


def _as_of_a_part(report: dict) -> dict:
  """The report as `better_split` reads one: a split without shards is not named in it."""
  totals = {side: {name: sum(entry[name] for entry in entries) for name in ('tokens', 'document_bytes')}
            for side, entries in report['shards'].items() if entries}
  return report | {'splits': totals}


class _Shards:
  """The shards of one split, the last of them not full; entries: of the index."""

  def __init__(self, folder: Folder, split: str, dtype: str):
    self._folder, self._split, self._dtype = folder, split, dtype
    self._file, self._writer, self.entries = contextlib.ExitStack(), None, []

  def __enter__(self) -> '_Shards':
    return self

  def add(self, ids: np.ndarray, document_bytes: int) -> None:
    if self._writer is None:
      path = self._file.enter_context(self._folder.new_file(self._name()))
      self._writer = ShardWriter(path, self._dtype)
    self._writer.add(ids, document_bytes)
    if self._writer.tokens >= SHARD_TOKENS:
      self._finish()

  def _name(self) -> str:
    return f'{self._split}-{len(self.entries):05}.array_record'

  def _finish(self) -> None:
    if self._writer:
      self.entries.append({'file': self._name(), **self._writer.close()})
      self._writer = None
      self._file.close()

  def __exit__(self, *error) -> None:
    if any(error):
      self._file.__exit__(*error)
    else:
      self._finish()


def _write_shards(folder: Folder, dataset: grain.MapDataset, config: DataConfig, tokenizer: Tokenizer, split: Split,
                  note, waiting) -> dict:
  """Writes the shards of both splits; returns what `better_split` and the index ask of them."""
  folder.remove(*folder.sizes())
  t, dtype, hashes, long_bytes, documents, empty = tokenizer, dtype_of(tokenizer.size), [2**64, -1], 0, 0, 0
  with _Shards(folder, 'train', dtype) as train, _Shards(folder, 'validation', dtype) as validation:
    for text, ids in _documents(dataset, config, tokenizer, waiting):
      if not text:
        empty += 1
        continue
      documents += 1
      hash = content_hash(text)
      hashes = [min(hashes[0], hash), max(hashes[1], hash)]
      if ids is not None and split.by_position:  # stays whole
        sides = [('train', text)]
      else:
        sides = split.sides(text, hash)
        long_bytes += len(text) if ids is None and split.held_out_bytes(text) else 0
      for side, part in sides:
        part_ids = t.encode(part) if ids is None else ids
        shards = train if side == 'train' else validation
        shards.add(np.concatenate(([t.bos], part_ids, [t.eos])), len(part))
      if not documents % SAY_EVERY:
        note(f'{FIELD}: {documents:,} of {len(dataset):,} documents')
  return {'documents': documents, 'empty': empty, 'lowest': hashes[0], 'highest': hashes[1], 'long_bytes': long_bytes,
          'shards': {'train': train.entries, 'validation': validation.entries}}


def _documents(dataset: grain.MapDataset, config: DataConfig, tokenizer: Tokenizer,
               waiting) -> Iterator[tuple[bytes, np.ndarray | None]]:
  """Each document as (text, None) or, if it was given as token ids, as (what they stand for, ids)."""
  where = f'{FIELD}={config.dataset!r}'
  documents = iter(dataset.to_iter_dataset())
  for number in itertools.count():
    try:
      with waiting(f'document {number} of {where}'):
        document = next(documents)
    except StopIteration:
      return
    except (Exception, SystemExit) as error:  # the user's own code
      raise BadInput(f'{where}: document {number}: {type(error).__name__}: {one_line(error)}') from error
    if isinstance(document, str | bytes):
      try:
        text = document.encode() if isinstance(document, str) else document
        text.decode()
      except UnicodeError as error:
        raise BadInput(f'{where}: document {number}: is no UTF-8: {one_line(error)}') from error
      yield text, None
      continue
    try:
      ids = np.asarray(document)
    except ValueError:  # rows of unequal length
      ids = np.array(None)
    if ids.ndim != 1 or not (ids.size == 0 or np.issubdtype(ids.dtype, np.integer)):
      raise BadInput(f'{where}: document {number} is {type(document).__name__}; '
                     'it must be a str, bytes, or a list or array of token ids')
    if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.size:
      raise BadInput(f'{where}: document {number} has ids from {ids.min()} to {ids.max()}; '
                     f'config.data.tokenizer={config.tokenizer!r} has {tokenizer.size:,}')
    if np.isin(ids, (tokenizer.bos, tokenizer.eos, tokenizer.pad)).any():
      raise BadInput(f'{where}: document {number} holds bos {tokenizer.bos}, eos {tokenizer.eos} or pad '
                     f'{tokenizer.pad}; give the ids between them, a document at a time')
    yield tokenizer.decode(ids.tolist()), ids.astype(np.int32)
