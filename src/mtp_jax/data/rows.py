"""Rows to batches: what a row holds, and in which order rows come.

    row         int32[L+M] each: {'tokens', 'segments', 'positions'}: L inputs, and M more so that every future has a target
    batch       int32[B, L+M] each: rows in an order that is a function of (seed, step) alone

'segments' counts the documents of a row from 1 and is 0 in padding; 'positions' counts from a document's first token in the row.
Where attention and futures may go across documents, a row is one segment.

Several sources are mixed by weights: row k comes from a source that the weights and k fix, the next one in that source's own shuffled
order, which is another each epoch of that source. Grain draws these numbers (this is the door to it) and keeps their random access;
reading is left to the rows, a batch at a time.
"""
import collections
import concurrent.futures
import typing
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from mtp_jax.config import BadInput
from mtp_jax.data.folder import Damaged
from mtp_jax.data.packing import BestFit, Consecutive
from mtp_jax.data.progress import quiet
from mtp_jax.data.shards import Stream

NOTED = 10  # damaged places that are named one by one


class Rows:
  """The rows of one stream.

  quarantined: of the rows read so far, those that came back as padding since a block of theirs is damaged.

  Args:
    futures: M.
    bos: the token that begins a document; pad: the token where there is none.
    across: whether a row is one segment.
    quarantine: whether rows with a damaged block become padding, instead of raising `Damaged`. note: told of each new one.
  """

  def __init__(self, stream: Stream, packing: Consecutive | BestFit, length: int, futures: int, bos: int, pad: int, across: bool = False,
               quarantine: bool = False, note: Callable[[str], None] = quiet):
    self.stream, self.packing, self.length, self.futures, self.quarantined = stream, packing, length, futures, 0
    self._bos, self._pad, self._across, self._quarantine, self._note, self._noted = bos, pad, across, quarantine, note, set()

  def __len__(self) -> int:
    return len(self.packing)

  def batch(self, ids: Sequence[int]) -> dict[str, np.ndarray]:
    """int32[len(ids), L+M] each; an id of -1 is a row of padding.

    Raises:
      Damaged: unless such rows are quarantined.
    """
    L, M, ids = self.length, self.futures, np.asarray(ids, np.int64)
    if not ((-1 <= ids) & (ids < len(self))).all():
      raise IndexError(f'rows {ids.tolist()} of {len(self)}')
    there = np.flatnonzero(ids >= 0)
    which, pieces = self.packing.pieces(ids[there])
    row, (start, size) = there[which], pieces.T
    before = np.cumsum(size) - size
    column = before - before[np.searchsorted(row, row)]  # within its row
    stop = start + size + M * (column + size == L)  # futures of a full row look beyond it
    tokens, valid, begins = np.full((len(ids), L + M), self._pad, np.int32), np.zeros((len(ids), L + M), bool), np.zeros((len(ids), L + M), bool)
    begins[row, column] = True
    for r, c, part in zip(row.tolist(), column.tolist(), self._read(row, start, stop)):
      tokens[r, c:c + len(part)] = part
      valid[r, c:c + len(part)] = True
    place = np.arange(L + M, dtype=np.int32)
    if self._across:
      segments, positions = valid.astype(np.int32), place * valid
    else:
      begins = (begins | (tokens == self._bos)) & valid
      segments = np.cumsum(begins, axis=1, dtype=np.int32) * valid
      positions = (place - np.maximum.accumulate(place * begins, axis=1)) * valid
    return {'tokens': tokens, 'segments': segments, 'positions': positions}

  def _read(self, row: np.ndarray, start: np.ndarray, stop: np.ndarray) -> list[np.ndarray]:
    try:
      return self.stream.gather(start, stop)
    except Damaged:
      if not self._quarantine:
        raise
    found, hurt = [], set()
    for i, r in enumerate(row.tolist()):
      try:
        found.append(self.stream.gather(start[i:i + 1], stop[i:i + 1])[0])
      except Damaged as error:
        hurt.add(r)
        found.append(np.zeros(0, np.int32))
        place = str(error).partition(' (')[0]
        if place not in self._noted and len(self._noted) < NOTED:
          self._noted.add(place)
          self._note(f'quarantined: {place}' + ('; further ones are counted only' if len(self._noted) == NOTED else ''))
    self.quarantined += len(hurt)
    return [part[:0] if r in hurt else part for r, part in zip(row.tolist(), found)]


class SourceRows:
  """The rows of several sources, one after the other."""

  def __init__(self, sources: Sequence[Rows]):
    self.sources = tuple(sources)
    self._ends = np.cumsum([len(rows) for rows in sources])

  def __len__(self) -> int:
    return int(self._ends[-1])

  @property
  def quarantined(self) -> int:
    return sum(rows.quarantined for rows in self.sources)

  def ids(self, s: int) -> range:
    """Of the rows of source s."""
    return range(int(self._ends[s]) - len(self.sources[s]), int(self._ends[s]))

  def batch(self, ids: Sequence[int]) -> dict[str, np.ndarray]:
    if len(self.sources) == 1:
      return self.sources[0].batch(ids)
    ids = np.asarray(ids)
    chosen = np.where(ids < 0, 0, np.searchsorted(self._ends, ids, side='right'))
    together = {}
    for s in np.unique(chosen).tolist():
      there = np.flatnonzero(chosen == s)
      part = self.sources[s].batch([i if i < 0 else i - self.ids(s).start for i in ids[there].tolist()])
      for name, values in part.items():
        together.setdefault(name, np.zeros((len(ids), values.shape[1]), np.int32))[there] = values
    return together


class Batches:
  """This process's share of every batch, for ever: dicts of int32[B / process_count, L+M].

  Row r of a batch goes to process r % process_count. `get_state()` is {'global_next_index': rows drawn by all}: the same on every process, and
  `set_state` takes it with any process_count and any B. A batch may reach across epochs. The next `ahead` batches are read in a thread
  while the caller works; the state, and `quarantined`, the rows that came back as padding, are those of the last one handed out.

  Args:
    rows: of the sources.
    weights: of the sources, in rows; Grain rounds their ratios to about a hundredth.
    seed: of the order.
    place: called with each batch in that thread, such as to put it on a device; what it returns is handed out.
  """

  def __init__(self, rows: SourceRows, weights: Sequence[float], batch: int, seed: int, process_index: int = 0, process_count: int = 1, ahead: int = 2,
               place: Callable[[dict[str, np.ndarray]], typing.Any] = lambda batch: batch):
    _check_share(batch, process_count)
    orders = [grain.MapDataset.range(rows.ids(s).start, rows.ids(s).stop).seed(seed).shuffle() for s in range(len(rows.sources))]
    self._order = orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, list(weights))
    self._rows, self._batch, self._mine, self._ahead, self._place = rows, batch, (process_index, process_count), ahead, place
    self._drawn = self._next = self.quarantined = 0  # rows drawn by all processes: in the thread, and handed out
    self._reader, self._coming = concurrent.futures.ThreadPoolExecutor(1, 'batches'), collections.deque()

  def __iter__(self) -> 'Batches':
    return self

  def __next__(self):
    while len(self._coming) <= self._ahead:
      self._coming.append(self._reader.submit(self._draw))
    try:
      batch, self.quarantined = self._coming.popleft().result()
    except BaseException:
      self.set_state(self.get_state())  # the next call tries the same batch again
      raise
    self._next += self._batch
    return batch

  def _draw(self):
    index, count = self._mine
    ids = [int(self._order[k]) for k in range(self._drawn + index, self._drawn + self._batch, count)]
    self._drawn += self._batch
    return self._place(self._rows.batch(ids)), self._rows.quarantined

  def get_state(self) -> dict[str, int]:
    return {'global_next_index': self._next}

  def set_state(self, state: dict[str, int]) -> None:
    self._drop()
    self._drawn = self._next = state['global_next_index']

  def _drop(self) -> None:
    for future in self._coming:
      future.cancel()
    concurrent.futures.wait(self._coming)
    self._coming.clear()

  def close(self) -> None:
    self._drop()
    self._reader.shutdown()


def validation_batches(rows: SourceRows, batch: int, limit: int | None = None, process_index: int = 0,
                       process_count: int = 1) -> Iterator[dict[str, np.ndarray]]:
  """This process's share of all rows in order, or of `limit` of them at even distances; rows of no document fill the last batch."""
  _check_share(batch, process_count)
  chosen = np.arange(len(rows)) if limit is None or limit >= len(rows) else np.arange(limit) * len(rows) // limit
  chosen = np.concatenate([chosen, np.full(-len(chosen) % batch, -1)])
  for start in range(0, len(chosen), batch):
    yield rows.batch(chosen[start + process_index:start + batch:process_count])


def _check_share(batch: int, process_count: int) -> None:
  if batch % process_count:
    raise BadInput(f'config.train.batch={batch}: must be a multiple of the {process_count} processes')
