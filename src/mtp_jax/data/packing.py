"""Which tokens of a stream make a row.

In both packings every token is an input (one of a row's first L) exactly once an epoch.

    stream     row i is stream[i*L : i*L + L + M]: padding only in the last row; documents are cut
               wherever a row ends
    best_fit   a document of up to L tokens is never cut. Of a longer one every L tokens fill a row,
               and the rest is packed like a short document. Pieces go, longest first, each into the
               fullest row with enough room (best-fit decreasing: Ding et al. 2024, arXiv:2404.10830);
               the room left over is padding

Best-fit rows are packed shard by shard, so memory holds the document lengths of one shard and the
bounds of all rows. The result is written once:

    file       int64: (start, length) of every piece, row by row; the bounds of all rows, one more
               than there are rows; the number of rows; then the sha256 of these
"""
import hashlib
import os
import pathlib

import numpy as np

from mtp_jax.data.folder import Damaged, Folder
from mtp_jax.data.shards import Stream

_DIGEST = 32  # bytes of a sha256


class Consecutive:
  """The rows of stream packing: ceil(tokens / L) of them.

  padding: share of inputs that are padding.
  """

  def __init__(self, stream: Stream, length: int):
    self._length, self._rows = length, -(-stream.tokens // length)
    self.padding = _padding(stream, self._rows, length)

  def __len__(self) -> int:
    return self._rows

  def pieces(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pieces that some rows consist of, row by row, side by side.

    Args:
      rows: int64[r].

    Returns:
      int64[n], which of `rows` a piece belongs to; int64[n, 2], its (start, length) in the stream.
    """
    return np.arange(len(rows)), np.stack([rows * self._length, np.full(len(rows), self._length)], axis=1)


class BestFit:
  """Best-fit rows, mapped into memory from the file that `pack` wrote. The same methods as
  `Consecutive`.

  Raises:
    Damaged: the file is not what was written.
  """

  def __init__(self, path: str, stream: Stream, length: int):
    size = os.path.getsize(path) - _DIGEST
    if not _intact(path, size):
      raise Damaged(f'{path}: is damaged; delete that file, it will be made again')
    numbers = np.asarray(np.memmap(path, '<i8', mode='r', shape=(size // 8,)))
    self._rows = int(numbers[-1])
    self._bounds = numbers[-self._rows - 2:-1]
    self._pieces = numbers[:-self._rows - 2].reshape(-1, 2)
    self.padding = _padding(stream, self._rows, length)

  def __len__(self) -> int:
    return self._rows

  def pieces(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    by_row = [self._pieces[self._bounds[row]:self._bounds[row + 1]] for row in rows.tolist()]
    which = np.repeat(np.arange(len(rows)), [len(pieces) for pieces in by_row])
    return which, np.concatenate([np.zeros((0, 2), np.int64), *by_row])


def _intact(path: str, size: int) -> bool:
  """Whether the sha256 of the first `size` bytes follows them."""
  sha256 = hashlib.sha256()
  with open(path, 'rb') as file:
    for start in range(0, size, 2**24):
      sha256.update(file.read(min(2**24, size - start)))
    return sha256.digest() == file.read()


def _padding(stream: Stream, rows: int, length: int) -> float:
  return 1 - stream.tokens / max(1, rows * length)


def pack(stream: Stream, length: int, cache: str, fingerprint: str) -> BestFit:
  """Best-fit rows of a stream, from a file in `cache` that is written the first time.

  Args:
    length: L, inputs of a row.
    fingerprint: of the prepared set.
  """
  folder = Folder(pathlib.Path(cache).expanduser() / 'rows', 'config.data.cache')
  name = f'{fingerprint[:16]}-best_fit-{length}'
  if name not in folder.sizes():
    with folder.new_file(name) as path:
      _write(path, stream, length)
  return BestFit(folder.path(name), stream, length)


def _write(path: str, stream: Stream, length: int) -> None:
  sha256, bounds, count = hashlib.sha256(), [np.zeros(1, np.int64)], 0
  with open(path, 'wb') as file:
    def write(numbers: np.ndarray):
      content = numbers.astype('<i8').tobytes()
      sha256.update(content)
      file.write(content)
    for s in range(len(stream.shards)):
      shard_bounds, pieces = best_fit(stream.lengths(s), length)
      write(pieces + [stream.start(s), 0])
      bounds.append(shard_bounds[1:] + count)
      count += len(pieces)
    bounds = np.concatenate(bounds)
    write(np.append(bounds, len(bounds) - 1))
    file.write(sha256.digest())


def best_fit(lengths: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
  """Packs documents that follow one another in a stream.

  Args:
    lengths: int64[documents].
    room: L, inputs of a row.

  Returns:
    bounds, int64[R+1], and pieces, int64[n, 2]: row r holds pieces[bounds[r]:bounds[r+1]], each
    (start, length).

  Cost: O(n + distinct lengths x distinct gaps), since all pieces of one length are placed at once.
  """
  starts = np.cumsum(lengths) - lengths
  # Of each document: pieces that fill a row, and tokens left over. Of each full piece: its number.
  full, rest = lengths // room, lengths % room
  number = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
  full_starts = np.repeat(starts, full) + number * room
  short = np.flatnonzero(rest)
  short = short[np.argsort(-rest[short], kind='stable')]
  short_lengths, short_starts = rest[short], (starts + full * room)[short]

  rows, count = _rows_of_short_pieces(short_lengths, room, len(full_starts))
  rows = np.concatenate([np.arange(len(full_starts)), rows])
  pieces = np.stack([np.concatenate([full_starts, short_starts]),
                     np.concatenate([np.full(len(full_starts), room), short_lengths])], axis=1)
  order = np.argsort(rows, kind='stable')
  return np.searchsorted(rows[order], np.arange(count + 1)), pieces[order]


def _rows_of_short_pieces(lengths: np.ndarray, room: int, first_row: int) -> tuple[np.ndarray, int]:
  """The row of each piece, and the number of the row after the last. Lengths descend; rows count from first_row."""
  rows, next_row = np.empty(len(lengths), np.int64), first_row
  gaps = {room: None}  # room left -> the rows with that much; rows not yet begun have all of it
  negative_lengths, counts = np.unique(-lengths, return_counts=True)
  placed = 0
  for size, left in zip((-negative_lengths).tolist(), counts.tolist()):
    while left:
      gap = min(g for g in gaps if g >= size)
      a_row = gap // size  # after one such piece a row is the fullest for the next one, until it has no room
      needed = -(-left // a_row)
      if gap == room:
        chosen = np.arange(next_row, next_row + needed)
        next_row += needed
      else:
        chosen, others = gaps[gap][:needed], gaps[gap][needed:]
        if len(others):
          gaps[gap] = others
        else:
          del gaps[gap]
      now = min(left, a_row * len(chosen))
      rows[placed:placed + now] = np.repeat(chosen, a_row)[:now]
      in_last = now - a_row * (len(chosen) - 1)
      for filled, pieces in ((chosen[:-1], a_row), (chosen[-1:], in_last)):
        remaining = gap - pieces * size
        if len(filled) and remaining:
          gaps[remaining] = np.concatenate([gaps[remaining], filled]) if remaining in gaps else filled
      placed += now
      left -= now
  return rows, next_row
