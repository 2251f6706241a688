"""Tokens on disk: ArrayRecord files of hash-checked blocks, read from any place as one stream.

    shard       records of BLOCK tokens, the last one shorter, then records of BLOCK document lengths, uint32, bos and eos counted
    stream      the tokens of all shards of a split, one after the other: <bos> ids <eos> of every document

A block whose bytes are not those that were written does not come back as other tokens: it raises `Damaged`. (ArrayRecord keeps each
record in a chunk of its own, with hashes of header and data.) A shard that is not on this machine is fetched when first read, and checked as a whole.
"""
import collections
import contextlib
import dataclasses
import hashlib
import os

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mtp_jax.data.folder import RESTORE, Damaged, Folder

BLOCK = 4096
OPEN_FILES = 256  # of a stream
CACHE_BYTES = 2**27  # of a stream's blocks, the latest read, in memory: what a row needs is often a small part of them
_WRITER, _READER = 'group_size:1,uncompressed', 'readahead_buffer_size:0,max_parallelism:0'
REMEDY = f"{RESTORE}, or go on without such blocks: config.data.on_damage='quarantine'"


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
      raise Damaged(f'{self.folder.url}/{shard.file}: block {number} is damaged ({str(error).partition(" (")[0]}); {REMEDY}') from error
    if len(record) != self._record_bytes(shard, number):
      raise Damaged(f'{self.folder.url}/{shard.file}: block {number} has {len(record)} bytes; {REMEDY}')
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
      raise Damaged(f'{self.folder.url}/{shard.file}: cannot be opened ({" ".join(str(error).split())}); {REMEDY}') from error
    if records != shard.records:
      raise Damaged(f'{self.folder.url}/{shard.file}: has {records} blocks, the index says {shard.records}; {REMEDY}')
    self._open[s] = reader
    if len(self._open) > OPEN_FILES:
      self._open.popitem(last=False)
    return reader
