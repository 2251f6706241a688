"""Which tokens of a stream make a row. Either way every token is an input (one of the first L of a row) exactly once an epoch.

    stream     row i is stream[i*L : i*L + L + M]: no padding but in the last row, documents are cut wherever a row ends
    best_fit   a document of up to L tokens is never cut. Of a longer one every L tokens fill a row, and the rest is packed like a short
               document. Pieces go, longest first, each into the fullest row that still has room (best-fit decreasing: Ding et al. 2024,
               arXiv:2404.10830); what stays empty is padding

Best-fit rows are packed shard by shard, so that a shard's documents and the bounds of all rows are what is in memory, and written down once:

    file       int64: (start, length) of each piece of the rows in turn, R+1 bounds, the number of rows R; then the sha256 of all that
"""
import hashlib
import os
import pathlib

import numpy as np

from mtp_jax.data.folder import Damaged, Folder
from mtp_jax.data.shards import Stream

_DIGEST = 32  # bytes of a sha256


class Consecutive:
  """The rows of stream packing: ceil(tokens / L)."""

  def __init__(self, stream: Stream, length: int):
    self._length, self._rows = length, -(-stream.tokens // length)
    self.padding = 1 - stream.tokens / max(1, self._rows * length)

  def __len__(self) -> int:
    return self._rows

  def pieces(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What these rows hold as inputs, side by side, row by row: int64[n] (place in `rows`), int64[n, 2] (start, length) in the stream."""
    return np.arange(len(rows)), np.stack([rows * self._length, np.full(len(rows), self._length)], axis=1)


class BestFit:
  """Best-fit rows, from the file that `pack` wrote, mapped into memory.

  Raises:
    Damaged: the file is not what was written.
  """

  def __init__(self, path: str, stream: Stream, length: int):
    size = os.path.getsize(path) - _DIGEST
    with open(path, 'rb') as file:
      found = hashlib.sha256()
      for start in range(0, size, 2**24):
        found.update(file.read(min(2**24, size - start)))
      intact = found.digest() == file.read()
    if not intact:
      raise Damaged(f'{path}: is damaged; delete that file, it will be made again')
    numbers = np.asarray(np.memmap(path, '<i8', mode='r', shape=(size // 8,)))
    self._rows = int(numbers[-1])
    self._bounds, self._pieces = numbers[-self._rows - 2:-1], numbers[:-self._rows - 2].reshape(-1, 2)
    self.padding = 1 - stream.tokens / max(1, self._rows * length)

  def __len__(self) -> int:
    return self._rows

  def pieces(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = [self._pieces[self._bounds[row]:self._bounds[row + 1]] for row in rows.tolist()]
    return np.repeat(np.arange(len(rows)), [len(part) for part in parts]), np.concatenate([np.zeros((0, 2), np.int64), *parts])


def pack(stream: Stream, length: int, cache: str, fingerprint: str) -> BestFit:
  """Packs a stream, or finds that done in a file of `cache`."""
  folder, name = Folder(pathlib.Path(cache).expanduser() / 'rows', 'config.data.cache'), f'{fingerprint[:16]}-best_fit-{length}'
  if name not in folder.sizes():
    digest, bounds, count = hashlib.sha256(), [np.zeros(1, np.int64)], 0
    with folder.new_file(name) as path, open(path, 'wb') as file:
      def write(numbers: np.ndarray):
        content = numbers.astype('<i8').tobytes()
        digest.update(content)
        file.write(content)
      for s in range(len(stream.shards)):
        shard_bounds, pieces = best_fit(stream.lengths(s), length)
        write(pieces + [stream.start(s), 0])
        bounds.append(shard_bounds[1:] + count)
        count += len(pieces)
      bounds = np.concatenate(bounds)
      write(np.append(bounds, len(bounds) - 1))
      file.write(digest.digest())
  return BestFit(folder.path(name), stream, length)


def best_fit(lengths: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows of documents that lie one after the other.

  Args:
    lengths: int64, of the documents.
    room: L, tokens of a row.

  Returns:
    bounds, int64[R+1], and pieces, int64[P, 2]: row r holds pieces[bounds[r]:bounds[r+1]], each (start, length).

  All pieces of one length are placed at once, so the cost is O(P + distinct lengths x distinct gaps).
  """
  starts = np.cumsum(lengths) - lengths
  full, rest = lengths // room, lengths % room
  within = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)  # a full piece's number within its document
  full_starts = np.repeat(starts, full) + within * room
  short = np.flatnonzero(rest)
  rest, rest_starts = rest[short], (starts + full * room)[short]
  order = np.argsort(-rest, kind='stable')
  rest, rest_starts = rest[order], rest_starts[order]

  rows, opened = np.empty(len(rest), np.int64), len(full_starts)  # rows 0..len(full_starts)-1 hold a full piece each
  gaps = {room: None}  # room left -> the rows with so much of it; rows not yet opened have all of it
  values, counts = np.unique(-rest, return_counts=True)
  place = 0
  for size, count in zip((-values).tolist(), counts.tolist()):
    while count:
      gap = min(g for g in gaps if g >= size)
      each = gap // size  # best fit goes on with a row that it has begun as long as another such piece fits
      wanted = -(-count // each)
      if gap == room:
        taken = np.arange(opened, opened + wanted)
        opened += wanted
      else:
        taken, left = gaps[gap][:wanted], gaps[gap][wanted:]
        if len(left):
          gaps[gap] = left
        else:
          del gaps[gap]
      placed = min(count, each * len(taken))
      rows[place:place + placed] = np.repeat(taken, each)[:placed]
      last = placed - each * (len(taken) - 1)  # pieces in the last of these rows
      for some, number in ((taken[:-1], each), (taken[-1:], last)):
        over = gap - number * size
        if len(some) and over:
          gaps[over] = np.concatenate([gaps[over], some]) if over in gaps else some
      place, count = place + placed, count - placed

  rows = np.concatenate([np.arange(len(full_starts)), rows])
  pieces = np.stack([np.concatenate([full_starts, rest_starts]), np.concatenate([np.full(len(full_starts), room), rest])], axis=1)
  order = np.argsort(rows, kind='stable')
  return np.searchsorted(rows[order], np.arange(opened + 1)), pieces[order]
