"""From documents to batches: tokenized once, sliced by arithmetic, ordered by a seed.

    document            bytes                   a file
    stream              uint16[n] or uint32[n]  <bos> ids <eos> of every document of a split, one after the other
    row i               int32[L+M] each         stream[i*L : i*L + L + M], as {'tokens', 'segments', 'positions'}
    batch               int32[B, L+M] each      rows in an order drawn from (seed, epoch)

Rows overlap by M, so that every future of the L inputs has a target, and every token is an input (one of the first L of a row)
exactly once an epoch. 'segments' counts the documents of a row from 1 and is 0 past the end of the stream; 'positions' counts
from a document's first token in the row.

The split: a document is held out iff h(name) / 2**64 < validation_share, h being the first 8 bytes of the sha256 of its name.
It stands or falls alone: adding files moves no other one across. At least one document is held out (the one of the smallest h)
and at least one is not (that of the largest), so there must be two. Both streams run in the order of h, so any prefix of them
is a fair sample of the files.
"""
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator

import grain
import numpy as np
import rich.console
import rich.progress

from mtp_jax.config import BadInput, DataConfig
from mtp_jax.tokenizer import Tokenizer

FORMAT = 1  # of the cache; another number is another fingerprint


@dataclasses.dataclass(frozen=True)
class Split:
  """A stream on disk, opened when first read. Pickles as paths and numbers."""
  stem: str  # of the paths of its two files
  dtype: str
  documents: int
  bytes: int  # of the documents themselves

  @functools.cached_property
  def tokens(self) -> np.ndarray:
    """The stream, mapped into memory: uint16[n] or uint32[n]."""
    return np.asarray(np.memmap(_tokens(self.stem), self.dtype, mode='r'))

  @functools.cached_property
  def offsets(self) -> np.ndarray:
    """int64[documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]]."""
    return np.load(_offsets(self.stem))

  def document(self, i: int) -> np.ndarray:
    """The ids of one document, int32[n], without bos and eos."""
    start, stop = self.offsets[i:i + 2]
    return self.tokens[start + 1:stop - 1].astype(np.int32)

  def __getstate__(self):
    return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Both streams of a corpus. The fingerprint is a sha256 of the documents, the tokenizer and the split."""
  directory: str
  fingerprint: str
  train: Split
  validation: Split


class Rows:
  """The rows of a split, by index: what Grain calls a random-access source.

  Args:
    split: a stream of n tokens, hence ceil(n / length) rows.
    length: L.
    futures: M.
    pad: the token past the end of the stream.
  """

  def __init__(self, split: Split, length: int, futures: int, pad: int):
    self._split, self._length, self._futures, self._pad = split, length, futures, pad

  def __len__(self) -> int:
    return -(-len(self._split.tokens) // self._length)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    if not 0 <= i < len(self):
      raise IndexError(f'row {i} of {len(self)}')
    row = self.padding()
    start = int(i) * self._length
    tokens = self._split.tokens[start:start + self._length + self._futures]
    stop = start + len(tokens)
    first, last = np.searchsorted(self._split.offsets, (start, stop - 1), side='right')
    bounds = np.concatenate(([start], self._split.offsets[first:last], [stop]))  # of the documents, cut off at the ends of the row
    lengths = np.diff(bounds)
    row['tokens'][:len(tokens)] = tokens
    row['segments'][:len(tokens)] = np.repeat(np.arange(1, len(bounds)), lengths)
    row['positions'][:len(tokens)] = np.arange(start, stop) - np.repeat(bounds[:-1], lengths)
    return row

  def padding(self) -> dict[str, np.ndarray]:
    """A row of no document."""
    row = np.zeros((3, self._length + self._futures), np.int32)
    row[0] = self._pad
    return dict(zip(('tokens', 'segments', 'positions'), row))


def prepare(config: DataConfig, tokenizer: Tokenizer) -> Prepared:
  """Tokenizes the documents, or finds that done: in config.cache there is a folder for each fingerprint.

  Documents are the files of config.paths and of the directories among them, all the way down, in any format, save for empty ones
  and for those whose name, or whose folder's, starts with a dot. A file is named by its path from the directory given, the
  directory's own name first, so that the split does not depend on where a corpus lies. Without paths, they are the Python files
  of the running interpreter's standard library.

  A folder of the cache appears whole or not at all; of two processes that prepare the same one, the later drops its work.
  Reads every document once to take its fingerprint, and once more to tokenize it.

  Raises:
    BadInput: a path is missing, there are fewer than two documents, or the cache cannot be written or is damaged.
  """
  documents = _documents(config)
  if len(documents) < 2:
    raise BadInput(f'config.data.paths={config.paths!r}: {len(documents)} documents, and one must be held out; '
                   'give two files that are not empty, or a directory of them')
  identity = [FORMAT, tokenizer.digest, config.validation_share, [(d.name, d.bytes, d.digest) for d in documents]]
  fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
  directory = pathlib.Path(config.cache).expanduser() / fingerprint[:16]
  if not directory.exists():
    try:
      _write(directory, fingerprint, documents, tokenizer, config.validation_share)
    except OSError as error:
      raise BadInput(f'config.data.cache={config.cache!r}: cannot write there ({error}); give a folder with space') from error
  return _open(directory, fingerprint)


def batches(rows: Rows, batch: int, seed: int, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator:
  """This process's share of every batch, for ever: dicts of int32[batch / process_count, L+M], in a new order each epoch.

  Row r of a batch of B goes to process r % process_count. `get_state()` is {'global_next_index': rows drawn by all}: the same on
  every process, and `set_state` takes it with any process_count. A batch may reach across epochs.
  """
  _check_share(batch, process_count)
  return iter(grain.experimental.ElasticIterator(
      grain.MapDataset.source(rows).seed(seed).shuffle().repeat(),
      batch,
      grain.sharding.ShardOptions(shard_index=process_index, shard_count=process_count),
      read_options=grain.ReadOptions(num_threads=0, prefetch_buffer_size=0),  # a row costs less than handing it to a thread
  ))


def validation_batches(rows: Rows, batch: int, limit: int | None = None, process_index: int = 0,
                       process_count: int = 1) -> Iterator[dict[str, np.ndarray]]:
  """This process's share of all rows in order, or of `limit` of them at even distances; rows of no document fill the last batch."""
  _check_share(batch, process_count)
  chosen = range(len(rows)) if limit is None or limit >= len(rows) else np.arange(limit) * len(rows) // limit
  for start in range(0, len(chosen), batch):
    share = [rows[chosen[i]] if i < len(chosen) else rows.padding() for i in range(start + process_index, start + batch, process_count)]
    yield {name: np.stack([row[name] for row in share]) for name in share[0]}


def _check_share(batch: int, process_count: int) -> None:
  if batch % process_count:
    raise BadInput(f'config.train.batch={batch}: must be a multiple of the {process_count} processes')


@dataclasses.dataclass(frozen=True)
class _Document:
  name: str
  path: str
  bytes: int
  digest: str

  @functools.cached_property
  def hash(self) -> int:
    return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], 'big')


def _documents(config: DataConfig) -> list[_Document]:
  """Those that are not empty, in the order of their hashes."""
  files = list(_user_files(config.paths) if config.paths else _library_files())
  documents = []
  for name, path in _shown(files, 'reading'):
    content = _read(path)
    if content:
      documents.append(_Document(name, path, len(content), hashlib.sha256(content).hexdigest()))
  return sorted(documents, key=lambda d: (d.hash, d.name))


def _library_files() -> Iterator[tuple[str, str]]:
  root = sysconfig.get_path('stdlib')
  for path in _below(root, lambda folder: folder in ('site-packages', 'dist-packages')):
    if path.endswith('.py'):
      yield _name(path, root), path


def _user_files(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
  """A file reached twice is one document; another file of the same name gets a '~'."""
  names, seen = set(), set()
  for given in paths:
    root = os.path.realpath(os.path.expanduser(given))
    if os.path.isdir(root):
      files = [path for path in _below(root, lambda name: name.startswith('.')) if not os.path.basename(path).startswith('.')]
    else:
      files = [root] if os.path.isfile(root) else []
    if not files:
      raise BadInput(f'config.data.paths: {given!r} holds no file; give text files or directories of them')
    for path in files:
      if os.path.realpath(path) not in seen:
        seen.add(os.path.realpath(path))
        name = _name(path, os.path.dirname(root))
        while name in names:
          name += '~'
        names.add(name)
        yield name, path


def _below(root: str, skipped) -> Iterator[str]:
  """Regular files, sorted, without going into the skipped folders."""
  for folder, folders, files in os.walk(root, onerror=_unreadable):
    folders[:] = sorted(f for f in folders if not skipped(f))
    yield from (path for path in (os.path.join(folder, f) for f in sorted(files)) if os.path.isfile(path))


def _name(path: str, root: str) -> str:
  """Relative, with '/', and valid UTF-8 whatever the file system holds."""
  return os.fsencode(pathlib.Path(path).relative_to(root).as_posix()).decode('utf-8', errors='backslashreplace')


def _read(path: str) -> bytes:
  try:
    return pathlib.Path(path).read_bytes()
  except OSError as error:
    _unreadable(error)


def _unreadable(error: OSError):
  raise BadInput(f'config.data.paths: cannot read {error.filename!r} ({error.strerror}); make it readable or leave it out') from error


def _write(directory: pathlib.Path, fingerprint: str, documents: list[_Document], tokenizer: Tokenizer, share: float) -> None:
  """Into a temporary folder beside `directory`, which is then renamed."""
  began = time.monotonic()
  size = sum(d.bytes for d in documents)
  print(f'tokenizing {len(documents):,} documents, {size / 1e6:,.1f} MB, into {directory}', file=sys.stderr, flush=True)
  held_out = sum(d.hash / 2**64 < share for d in documents)
  held_out = min(max(held_out, 1), len(documents) - 1)
  directory.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f'{directory.name}.') as temporary:
    folder = pathlib.Path(temporary) / 'cache'  # made by mkdir, so that it is as readable to others as the user wants
    folder.mkdir()
    splits = {name: _write_split(folder / name, part, tokenizer)
              for name, part in (('validation', documents[:held_out]), ('train', documents[held_out:]))}
    (folder / 'index.json').write_text(json.dumps({
        'format': FORMAT, 'fingerprint': fingerprint, 'tokenizer': tokenizer.digest, 'splits': splits}, indent=2))
    try:
      folder.rename(directory)
    except OSError:
      if not directory.exists():  # else another process was first
        raise
  tokens = ', '.join(f'{split["tokens"]:,} {name}' for name, split in splits.items())
  print(f'tokenized: {tokens} tokens in {time.monotonic() - began:.1f} s', file=sys.stderr, flush=True)


def _write_split(stem: pathlib.Path, documents: list[_Document], tokenizer: Tokenizer) -> dict:
  """Its entry in the index."""
  dtype = '<u2' if tokenizer.size < 2**16 else '<u4'
  offsets = np.zeros(len(documents) + 1, np.int64)
  with open(_tokens(stem), 'wb') as file:
    for i, document in enumerate(_shown(documents, f'tokenizing {stem.name}')):
      content = _read(document.path)
      if hashlib.sha256(content).hexdigest() != document.digest:
        raise BadInput(f'config.data.paths: {document.path!r} changed while it was read; run again when it is at rest')
      ids = np.concatenate(([tokenizer.bos], tokenizer.encode(content), [tokenizer.eos])).astype(dtype)
      file.write(ids.tobytes())
      offsets[i + 1] = offsets[i] + len(ids)
  np.save(_offsets(stem), offsets)
  files = {os.path.basename(path): {'bytes': os.path.getsize(path), 'sha256': _sha256(path)} for path in (_tokens(stem), _offsets(stem))}
  return {'dtype': dtype, 'documents': len(documents), 'tokens': int(offsets[-1]), 'bytes': sum(d.bytes for d in documents), 'files': files}


def _open(directory: pathlib.Path, fingerprint: str) -> Prepared:
  try:
    index = json.loads((directory / 'index.json').read_text())
    if index['fingerprint'] != fingerprint:
      raise ValueError('index.json is of other documents')
    splits = {}
    for name, split in index['splits'].items():
      for file, written in split['files'].items():
        if (there := os.path.getsize(directory / file)) != written['bytes']:
          raise ValueError(f'{file} has {there} of {written["bytes"]} bytes')
      splits[name] = Split(str(directory / name), split['dtype'], split['documents'], split['bytes'])
  except (OSError, ValueError, KeyError) as error:
    raise BadInput(f'config.data.cache: {str(directory)!r} is damaged ({error}); delete that folder, it will be made again') from error
  return Prepared(str(directory), fingerprint, splits['train'], splits['validation'])


def _tokens(stem) -> str:
  return f'{stem}.tokens'


def _offsets(stem) -> str:
  return f'{stem}.offsets.npy'


def _sha256(path: str) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _shown(items: list, verb: str) -> Iterable:
  """The items, with a bar where there is a terminal."""
  if not sys.stderr.isatty():
    return items
  return rich.progress.track(items, verb, console=rich.console.Console(stderr=True), transient=True)
