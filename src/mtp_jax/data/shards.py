"""Tokens on disk: ArrayRecord files of checksummed blocks, read from any position as one stream.

    shard       records of BLOCK tokens, the last one shorter; then records of BLOCK document
                lengths, uint32, bos and eos counted
    stream      the tokens of all shards of a split in turn: <bos> ids <eos> of every document

A damaged block never comes back as other tokens: reading it raises `Damaged`. (ArrayRecord keeps
each record in a chunk of its own, with hashes of header and data.) Nor is an intact one called
damaged: where ArrayRecord fails, the digest of the whole shard decides. A remote shard is copied to
this machine when it is first read, and checked whole.
"""
import collections
import contextlib
import dataclasses
import errno
import hashlib
import os
import resource
import threading
import weakref
from collections.abc import Iterator

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mtp_jax.data.folder import RESTORE, Damaged, Folder, Unreadable

BLOCK = 4096  # tokens
OPEN_FILES = 1024  # of all streams; fewer where the machine allows this process few
CACHE_BYTES = 2**27  # of a stream's latest blocks in memory; a row often needs a small part of one
REMEDY = f"{RESTORE}, or go on without such blocks: config.data.on_damage='quarantine'"
_WRITER = 'group_size:1,uncompressed'
_READER = 'readahead_buffer_size:0,max_parallelism:0'


def dtype_of(ids: int) -> str:
  """The type of the tokens of a tokenizer of so many ids, on disk."""
  return '<u2' if ids < 2**16 else '<u4'


class ShardWriter:
  """Writes one shard, document by document.

  Raises:
    OSError: it cannot write, such as on a full disk.
  """

  def __init__(self, path: str, dtype: str):
    self._path, self._dtype, self._writer = path, dtype, ArrayRecordWriter(path, _WRITER)
    self._waiting, self._waiting_tokens, self._lengths = [], 0, []
    self.tokens = self.document_bytes = 0

  def add(self, ids: np.ndarray, document_bytes: int) -> None:
    """ids: int[n], with bos and eos; document_bytes: size of the text."""
    self._waiting.append(ids)
    self._waiting_tokens += len(ids)
    self._lengths.append(len(ids))
    self.tokens += len(ids)
    self.document_bytes += document_bytes
    if self._waiting_tokens >= 64 * BLOCK:
      self._flush(self._waiting_tokens - self._waiting_tokens % BLOCK)

  def _flush(self, size: int) -> None:
    tokens = np.concatenate(self._waiting).astype(self._dtype) if self._waiting else np.zeros(0, self._dtype)
    for start in range(0, size, BLOCK):
      self._write(tokens[start:min(start + BLOCK, size)])
    self._waiting, self._waiting_tokens = [tokens[size:]], self._waiting_tokens - size

  def _write(self, numbers: np.ndarray) -> None:
    with _as_os_error():
      self._writer.write(numbers.tobytes())

  def close(self) -> dict:
    """Finishes the file; returns the shard's entry in the index, without its name."""
    self._flush(self._waiting_tokens)
    lengths = np.array(self._lengths, '<u4')
    for start in range(0, len(lengths), BLOCK):
      self._write(lengths[start:start + BLOCK])
    with _as_os_error():
      self._writer.close()
    with open(self._path, 'rb') as file:
      sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    return {'bytes': os.path.getsize(self._path), 'sha256': sha256, 'tokens': self.tokens,
            'documents': len(lengths), 'document_bytes': self.document_bytes}


@contextlib.contextmanager
def _as_os_error():
  """ArrayRecord raises RuntimeError when a disk is full."""
  try:
    yield
  except RuntimeError as error:
    raise OSError(str(error).partition(';')[0]) from error


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file of a split: its name in the folder, size, digest and contents."""
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


class _Readers:
  """Open files of all streams, the latest last. Closes the one that was read longest ago when there
  are more than OPEN_FILES, or than half of what this process may open. Thread-safe.
  """

  def __init__(self):
    self._open, self._lock = collections.OrderedDict(), threading.RLock()

  def __len__(self) -> int:
    return len(self._open)

  def get(self, key: tuple[int, int]):
    """The reader of a stream's id and shard; None if it is not open."""
    with self._lock:
      if key in self._open:
        self._open.move_to_end(key)
      return self._open.get(key)

  def add(self, key: tuple[int, int], reader) -> None:
    with self._lock:
      self._open[key] = reader
      while len(self) > max(1, min(OPEN_FILES, _files_allowed() // 2)):
        self._open.popitem(last=False)

  def close(self, stream: int | None = None) -> None:
    """Those of a stream's id, or all."""
    with self._lock:
      for key in [key for key in self._open if stream in (None, key[0])]:
        del self._open[key]


_READERS = _Readers()


def _files_allowed() -> int:
  """Files that this process may have open. Raises its soft limit to 4 * OPEN_FILES, or as near as
  the hard limit lets it.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  unlimited, wanted = resource.RLIM_INFINITY, 4 * OPEN_FILES
  if soft != unlimited and soft < wanted:
    raised = wanted if hard == unlimited else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):
      resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
      soft = raised
  return wanted if soft == unlimited else soft


class Stream:
  """The tokens of a split. Opens a shard when it is first read. Not thread-safe.

  tokens, documents, bytes: how many; bytes are those of the text.
  """

  def __init__(self, folder: Folder, shards: list[Shard], dtype: str, cache: str):
    self.folder, self.shards, self._dtype, self._cache = folder, shards, np.dtype(dtype), cache
    self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
    self._begins = [0, *self._ends.tolist()]
    self._document_ends = np.cumsum([shard.documents for shard in shards], dtype=np.int64)
    self.tokens, self.documents = self._begins[-1], sum(shard.documents for shard in shards)
    self.bytes = sum(shard.document_bytes for shard in shards)
    self._blocks = collections.OrderedDict()  # latest last
    self._damaged_shards = set()
    weakref.finalize(self, _READERS.close, id(self))
    self._document_starts = (-1, None)  # a shard, and where its documents begin in the stream

  @property
  def counts(self) -> dict[str, int]:
    return {'shards': len(self.shards), 'documents': self.documents, 'tokens': self.tokens,
            'bytes': self.bytes}

  def start(self, s: int) -> int:
    """Position in the stream of shard s's first token."""
    return self._begins[s]

  def gather(self, starts: np.ndarray, stops: np.ndarray) -> list[np.ndarray]:
    """tokens[start:stop] of each pair, shorter where the stream ends.

    Raises:
      Damaged: names file and block.
      Unreadable: the shard cannot be read now.
    """
    slices = []
    first_shards = np.searchsorted(self._ends, starts, side='right')
    for s, start, stop in zip(first_shards.tolist(), starts.tolist(), stops.tolist()):
      parts = [self._block(t, number)[a:b] for t, number, a, b in self._spans(s, start, stop)]
      slices.append(parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, self._dtype), *parts]))
    while len(self._blocks) * BLOCK * self._dtype.itemsize > CACHE_BYTES:
      self._blocks.popitem(last=False)
    return slices

  def _block(self, s: int, number: int) -> np.ndarray:
    block = self._blocks.get((s, number))
    if block is None:
      block = self._blocks[s, number] = np.frombuffer(self._record(s, number), self._dtype)
    return block

  def _spans(self, s: int, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
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
    """tokens[start:stop], shorter where the stream ends."""
    return self.gather(np.array([start]), np.array([stop]))[0]

  def lengths(self, s: int) -> np.ndarray:
    """int64[documents]: tokens of each document of shard s, bos and eos counted."""
    shard = self.shards[s]
    records = [self._record(s, number) for number in range(shard.blocks, shard.records)]
    return np.frombuffer(b''.join(records), '<u4').astype(np.int64)

  def document(self, i: int) -> np.ndarray:
    """The ids of one document, int32[n], without bos and eos."""
    s = int(np.searchsorted(self._document_ends, i, side='right'))
    k = i - self._documents_before(s)
    start, stop = self._starts_in(s)[k:k + 2]
    return self.read(int(start) + 1, int(stop) - 1).astype(np.int32)

  def document_at(self, position: int) -> tuple[int, int]:
    """(the document that holds the token at a position, the position of its bos)."""
    s = int(np.searchsorted(self._ends, position, side='right'))
    starts = self._starts_in(s)
    k = int(np.searchsorted(starts, position, side='right')) - 1
    return self._documents_before(s) + k, int(starts[k])

  def _documents_before(self, s: int) -> int:
    return int(self._document_ends[s]) - self.shards[s].documents

  def _starts_in(self, s: int) -> np.ndarray:
    """Where in the stream the documents of shard s begin, and where the last one ends."""
    if self._document_starts[0] != s:
      self._document_starts = s, self.start(s) + np.concatenate([[0], np.cumsum(self.lengths(s))])
    return self._document_starts[1]

  def _record(self, s: int, number: int) -> bytes:
    shard, reader = self.shards[s], self._reader(s)
    try:
      record, = reader.read([number])  # one at a time: ArrayRecord's threads cost more than reading
    except RuntimeError as error:
      raise self._failure(s, f'block {number} is damaged ({str(error).partition(" (")[0]})') from error
    if len(record) != self._record_bytes(shard, number):
      raise self._damage(shard, f'block {number} has {len(record)} bytes')
    return record

  def _record_bytes(self, shard: Shard, number: int) -> int:
    if number < shard.blocks:
      return self._dtype.itemsize * min(BLOCK, shard.tokens - number * BLOCK)
    return 4 * min(BLOCK, shard.documents - (number - shard.blocks) * BLOCK)

  def _reader(self, s: int):
    reader = _READERS.get((id(self), s))
    if reader:
      return reader
    shard = self.shards[s]
    try:
      path = self.folder.local_copy(shard.file, shard.bytes, shard.sha256, self._cache)
      reader, reason = _open(path, shard.records)
      if not reader and os.path.exists(path):  # perhaps too many files are open, which ArrayRecord does not tell
        _READERS.close()
        reader, reason = _open(path, shard.records)
    except FileNotFoundError:
      raise self._damage(shard, 'is missing') from None
    except OSError as error:
      raise self._unreadable(shard, error) from error
    if not reader:
      raise self._failure(s, reason)
    _READERS.add((id(self), s), reader)
    return reader

  def _failure(self, s: int, reason: str) -> Damaged | Unreadable:
    """What to raise where ArrayRecord fails: a shard is damaged only if its bytes have changed."""
    shard = self.shards[s]
    if s not in self._damaged_shards:
      try:
        path = self.folder.local_copy(shard.file, shard.bytes, shard.sha256, self._cache)
        with open(path, 'rb') as file:
          intact = hashlib.file_digest(file, 'sha256').hexdigest() == shard.sha256
      except FileNotFoundError:
        return self._damage(shard, 'is missing')
      except OSError as error:
        if error.errno != errno.EIO:
          return self._unreadable(shard, error)
        intact, reason = False, f'cannot be read ({error.strerror})'
      if intact:
        return Unreadable(f'{self.folder.url}/{shard.file}: every byte is what was written, but {reason}; '
                          'perhaps this machine is short of memory or open files: try again')
      self._damaged_shards.add(s)
    return self._damage(shard, reason)

  def _damage(self, shard: Shard, reason: str) -> Damaged:
    return Damaged(f'{self.folder.url}/{shard.file}: {reason}; {REMEDY}')

  def _unreadable(self, shard: Shard, error: OSError) -> Unreadable:
    fix = '; allow more, such as: ulimit -n 4096' if error.errno in (errno.EMFILE, errno.ENFILE) else ''
    return Unreadable(f'{self.folder.url}/{shard.file}: cannot be read ({error.strerror or error}){fix}')


def _open(path: str, records: int):
  """A reader of a file of so many records, or None; and what is wrong."""
  try:
    reader = ArrayRecordReader(path, _READER)
    found = reader.num_records()
  except (RuntimeError, OSError) as error:
    return None, f'cannot be opened ({" ".join(str(error).split())})'
  return (reader, '') if found == records else (None, f'has {found} blocks, but {records} in the index')
