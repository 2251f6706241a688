"""Tokens on disk: ArrayRecord files of hash-checked blocks, read from any place as one stream.

    shard       records of BLOCK tokens, the last one shorter, then records of BLOCK document lengths, uint32, bos and eos counted
    stream      the tokens of all shards of a split, one after the other: <bos> ids <eos> of every document
    set         a folder of shards and `index.json`, which tells sizes and digests of all of them, and its own

A block whose bytes are not those that were written does not come back as other tokens: it raises `Damaged`. (ArrayRecord keeps each
record in a chunk of its own, with hashes of header and data. That a whole shard was put in place of another is found by `verify`.)
A folder may lie wherever fsspec reaches; a shard that is not on this machine is fetched when first read, and checked as a whole.
"""
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mtp_jax.config import BadInput
from mtp_jax.data.inputs import filesystem

FORMAT = 3  # fixes the layout, BLOCK included
BLOCK = 4096
INDEX, PLAN = 'index.json', 'plan.json'  # of a set that is complete, and of one that is not
UNFINISHED = '.unfinished-'  # begins the names of files that are being written
OPEN_FILES = 256  # of a stream
CACHE_BYTES = 2**27  # of a stream's blocks, the latest read, in memory: what a row needs is often a small part of them
_WRITER, _READER = 'group_size:1,uncompressed', 'readahead_buffer_size:0,max_parallelism:0'


class Damaged(BadInput):
  """Bytes on disk are not those that were written."""


class Folder:
  """A directory, here or wherever fsspec reaches. What is written appears whole or not at all."""

  def __init__(self, url, where: str):
    self.where, self.here = where, '://' not in str(url)
    self.url = str(pathlib.Path(url).expanduser().absolute()) if self.here else str(url).rstrip('/')
    self._fs, self._path = filesystem(self.url, where)

  def path(self, name: str) -> str:
    return f'{self._path}/{name}'

  def sizes(self) -> dict[str, int]:
    """Of the files in it, not of those in folders below; {} where there is no such directory."""
    if self.here:
      return {entry.name: entry.stat().st_size for entry in os.scandir(self._path) if entry.is_file()} if os.path.isdir(self._path) else {}
    self._fs.invalidate_cache()
    if not self._fs.isdir(self._path):
      return {}
    return {entry['name'].rpartition('/')[2]: entry['size'] for entry in self._fs.ls(self._path, detail=True) if entry['type'] == 'file'}

  def read(self, name: str) -> bytes:
    return self._fs.cat_file(self.path(name))

  def write(self, name: str, content: bytes) -> None:
    with self.aside(name) as path:
      pathlib.Path(path).write_bytes(content)

  @contextlib.contextmanager
  def aside(self, name: str):
    """The path of a new file on this machine, which becomes `name` when the block ends well."""
    if self.here:
      os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
    descriptor, path = tempfile.mkstemp(prefix=UNFINISHED, dir=self._path if self.here else None)
    try:
      os.close(descriptor)
      yield path
      with open(path, 'rb') as file:
        os.fsync(file.fileno())
      if self.here:
        os.chmod(path, 0o666 & ~_umask())
        os.replace(path, self.path(name))
      else:
        self._fs.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        self._fs.put_file(path, self.path(name))
    finally:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(path)

  def remove(self, *names: str) -> None:
    """Files, or folders with all that is in them."""
    for name in names:
      if self._fs.exists(self.path(name)):
        self._fs.rm(self.path(name), recursive=True)

  def fetched(self, name: str, size: int, sha256: str, cache: str) -> str:
    """The path of a file on this machine, copied into `cache` if it lies elsewhere and no copy of that size is there.

    Raises:
      Damaged: the copy has another digest.
    """
    if self.here:
      return self.path(name)
    copies = Folder(pathlib.Path(cache) / 'shards', self.where)
    if copies.sizes().get(sha256) != size:
      with copies.aside(sha256) as path:
        self._fs.get_file(self.path(name), path)
        with open(path, 'rb') as file:
          if hashlib.file_digest(file, 'sha256').hexdigest() != sha256:
            raise Damaged(f'{self.url}/{name}: its digest is not that of the index; {_RESTORE}')
    return copies.path(sha256)


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask


class ShardWriter:
  """Writes one shard to a path. Documents come whole; `close` returns the shard's entry in the index. Raises OSError where it cannot write."""

  def __init__(self, path: str, dtype: str):
    self._path, self._dtype, self._writer = path, dtype, ArrayRecordWriter(path, _WRITER)
    self._waiting, self._size, self._lengths, self.tokens, self.document_bytes = [], 0, [], 0, 0

  def add(self, ids: np.ndarray, document_bytes: int) -> None:
    """Args:
      ids: bos and eos included.
    """
    self._waiting.append(ids)
    self._size += len(ids)
    self._lengths.append(len(ids))
    self.tokens += len(ids)
    self.document_bytes += document_bytes
    if self._size >= 64 * BLOCK:
      self._flush(self._size - self._size % BLOCK)

  def _flush(self, size: int) -> None:
    tokens = np.concatenate(self._waiting).astype(self._dtype) if self._waiting else np.zeros(0, self._dtype)
    for start in range(0, size, BLOCK):
      self._write(tokens[start:min(start + BLOCK, size)])
    self._waiting, self._size = [tokens[size:]], self._size - size

  def _write(self, numbers: np.ndarray) -> None:
    with _os_errors():
      self._writer.write(numbers.tobytes())

  def close(self) -> dict:
    self._flush(self._size)
    lengths = np.array(self._lengths, '<u4')
    for start in range(0, len(lengths), BLOCK):
      self._write(lengths[start:start + BLOCK])
    with _os_errors():
      self._writer.close()
    with open(self._path, 'rb') as file:
      sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    return {'bytes': os.path.getsize(self._path), 'sha256': sha256, 'tokens': self.tokens, 'documents': len(lengths),
            'document_bytes': self.document_bytes}


@contextlib.contextmanager
def _os_errors():
  """ArrayRecord says RuntimeError when a disk is full."""
  try:
    yield
  except RuntimeError as error:
    raise OSError(str(error).partition(';')[0]) from error


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file of a split: its name in the folder, its size and digest, and what it holds."""
  file: str
  bytes: int
  sha256: str
  tokens: int
  documents: int
  document_bytes: int

  @property
  def blocks(self) -> int:
    return -(-self.tokens // BLOCK)

  @property
  def records(self) -> int:
    return self.blocks + -(-self.documents // BLOCK)


class Stream:
  """The tokens of a split. Opens a shard when it is first read; at most OPEN_FILES of them at a time. For one thread.

  tokens, documents, bytes: how many, bytes being those of the documents themselves.
  """

  def __init__(self, folder: Folder, shards: list[Shard], dtype: str, cache: str):
    self.folder, self.shards, self._dtype, self._cache = folder, shards, np.dtype(dtype), cache
    self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
    self._begins = [0, *self._ends.tolist()]
    self._document_ends = np.cumsum([shard.documents for shard in shards], dtype=np.int64)
    self.tokens, self.documents = (int(ends[-1]) if len(ends) else 0 for ends in (self._ends, self._document_ends))
    self.bytes = sum(shard.document_bytes for shard in shards)
    self._open, self._blocks, self._offsets = collections.OrderedDict(), collections.OrderedDict(), (-1, None)

  @property
  def counts(self) -> dict[str, int]:
    return {'shards': len(self.shards), 'documents': self.documents, 'tokens': self.tokens, 'bytes': self.bytes}

  def start(self, s: int) -> int:
    """Where shard s begins in the stream."""
    return self._begins[s]

  def gather(self, starts: np.ndarray, stops: np.ndarray) -> list[np.ndarray]:
    """tokens[start:stop] for each of them, as far as the stream goes.

    Raises:
      Damaged: naming file and block.
    """
    found = []
    for s, start, stop in zip(np.searchsorted(self._ends, starts, side='right').tolist(), starts.tolist(), stops.tolist()):
      parts = [self._block(t, number)[a:b] for t, number, a, b in self._spans(s, start, stop)]
      found.append(parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, self._dtype), *parts]))
    while len(self._blocks) * BLOCK * self._dtype.itemsize > CACHE_BYTES:
      self._blocks.popitem(last=False)
    return found

  def _block(self, s: int, number: int) -> np.ndarray:
    block = self._blocks.get((s, number))
    if block is None:
      block = self._blocks[s, number] = np.frombuffer(self._record(s, number), self._dtype)
    return block

  def _spans(self, s: int, start: int, stop: int):
    """(shard, block, from, to) of the stream's [start, stop), which begins in shard s."""
    while start < stop and s < len(self.shards):
      begin, end = self._begins[s], self._begins[s + 1]
      while start < min(stop, end):
        number, inside = divmod(start - begin, BLOCK)
        size = min(stop, end, start - inside + BLOCK) - start
        yield s, number, inside, inside + size
        start += size
      s += 1

  def read(self, start: int, stop: int) -> np.ndarray:
    return self.gather(np.array([start]), np.array([stop]))[0]

  def lengths(self, s: int) -> np.ndarray:
    """int64: tokens of each document of shard s, bos and eos counted."""
    shard = self.shards[s]
    records = [self._record(s, number) for number in range(shard.blocks, shard.records)]
    return np.frombuffer(b''.join(records), '<u4').astype(np.int64)

  def document(self, i: int) -> np.ndarray:
    """The ids of one document, int32[n], without bos and eos."""
    s = int(np.searchsorted(self._document_ends, i, side='right'))
    if self._offsets[0] != s:
      self._offsets = s, self.start(s) + np.concatenate([[0], np.cumsum(self.lengths(s))])
    k = i - (int(self._document_ends[s]) - self.shards[s].documents)
    start, stop = self._offsets[1][k:k + 2]
    return self.read(int(start) + 1, int(stop) - 1).astype(np.int32)

  def _record(self, s: int, number: int) -> bytes:
    shard, reader = self.shards[s], self._reader(s)
    try:
      record, = reader.read([number])  # one at a time: ArrayRecord takes longer to hand several to its threads than to read them
    except RuntimeError as error:
      raise Damaged(f'{self.folder.url}/{shard.file}: block {number} is damaged ({str(error).partition(" (")[0]}); {_MEND}') from error
    if len(record) != self._record_bytes(shard, number):
      raise Damaged(f'{self.folder.url}/{shard.file}: block {number} has {len(record)} bytes; {_MEND}')
    return record

  def _record_bytes(self, shard: Shard, number: int) -> int:
    if number < shard.blocks:
      return self._dtype.itemsize * min(BLOCK, shard.tokens - number * BLOCK)
    return 4 * min(BLOCK, shard.documents - (number - shard.blocks) * BLOCK)

  def _reader(self, s: int):
    if s in self._open:
      self._open.move_to_end(s)
      return self._open[s]
    shard = self.shards[s]
    path = self.folder.fetched(shard.file, shard.bytes, shard.sha256, self._cache)
    try:
      reader = ArrayRecordReader(path, _READER)
      records = reader.num_records()
    except (RuntimeError, OSError) as error:
      raise Damaged(f'{self.folder.url}/{shard.file}: cannot be opened ({" ".join(str(error).split())}); {_MEND}') from error
    if records != shard.records:
      raise Damaged(f'{self.folder.url}/{shard.file}: has {records} blocks, the index says {shard.records}; {_MEND}')
    self._open[s] = reader
    if len(self._open) > OPEN_FILES:
      self._open.popitem(last=False)
    return reader


_RESTORE = 'restore the file, or delete the folder and prepare it again'
_MEND = f"{_RESTORE}, or go on without such blocks: config.data.on_damage='quarantine'"


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A set of token shards, found complete. index: what its index.json says; fingerprint: of inputs, tokenizer and options."""
  folder: Folder
  index: dict
  train: Stream
  validation: Stream

  @property
  def fingerprint(self) -> str:
    return self.index['fingerprint']

  def verify(self) -> list[str]:
    """Reads every byte; what is wrong, a line each."""
    wrong = []
    for shard in (*self.train.shards, *self.validation.shards):
      try:
        if hashlib.sha256(self.folder.read(shard.file)).hexdigest() != shard.sha256:
          wrong.append(f'{self.folder.url}/{shard.file}: its digest is not that of the index; {_RESTORE}')
      except OSError as error:
        wrong.append(f'{self.folder.url}/{shard.file}: {error.strerror or error}')
    return wrong


def write_index(folder: Folder, index: dict) -> None:
  folder.write(INDEX, _serialized(index))


def _serialized(index: dict) -> bytes:
  """The index as JSON, with its own digest."""
  return json.dumps(index | {'sha256': hashlib.sha256(json.dumps(index).encode()).hexdigest()}, indent=1).encode() + b'\n'


def open_set(folder: Folder, cache: str, note: Callable[[str], None] | None = None) -> Prepared:
  """A prepared set whose files are all there at full length.

  Args:
    note: where given, it is told of shards that are missing or cut off, and they are an error only when they are read.

  Raises:
    BadInput: it is none, or of another format.
    Damaged: its index is not what was written, or a shard is missing or cut off.
  """
  sizes = folder.sizes()
  if INDEX not in sizes:
    mend = ('its preparation has not ended: run the same prepare again' if PLAN in sizes else
            f'make one with: python -m mtp_jax prepare --input=... --output={folder.url}')
    raise BadInput(f'{folder.where}: {folder.url!r} holds no prepared set; {mend}')
  content = folder.read(INDEX)
  try:
    index = {key: value for key, value in json.loads(content).items() if key != 'sha256'}
    intact = _serialized(index) == content
  except (ValueError, AttributeError):
    intact = False
  if not intact:
    raise Damaged(f'{folder.url}/{INDEX}: is damaged; {_RESTORE}')
  if (layout := index.get('identity', {}).get('layout')) != FORMAT:
    raise BadInput(f'{folder.where}: {folder.url!r} has layout {layout}, this version reads {FORMAT}; prepare it again, in another folder')
  if index['tokenizer'] not in ('bytes', *sizes):
    raise Damaged(f'{folder.url}/{index["tokenizer"]}: is missing; {_RESTORE}')
  streams = {}
  for split, entries in index['splits'].items():
    shards = [Shard(**entry) for entry in entries]
    for shard in shards:
      if sizes.get(shard.file) != shard.bytes:
        there = f'has {sizes[shard.file]:,} of {shard.bytes:,} bytes' if shard.file in sizes else 'is missing'
        if not note:
          raise Damaged(f'{folder.url}/{shard.file}: {there}; {_MEND}')
        note(f'quarantined: {folder.url}/{shard.file} {there}')
    streams[split] = Stream(folder, shards, index['dtype'], cache)
  return Prepared(folder, index, streams['train'], streams['validation'])
