"""Rows to batches: what a row holds, and the order of rows.

    row         int32[L+M] each: {'tokens', 'segments', 'positions'}: L inputs, and M tokens more so
                that every future has a target
    batch       int32[B, L+M] each: rows in an order that is a function of (seed, step) alone

'segments' numbers the documents of a row from 1 and is 0 in padding; 'positions' counts from a
document's first token in the row. Where attention and futures may cross documents, a row is one
segment.

Several sources are mixed by weights: the weights and k decide which source row k comes from; within
a source rows are shuffled, differently each epoch of that source. Grain draws this order, with
random access; the rows themselves are read here, a batch at a time.
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

NOTED = 10  # damaged places that are reported one by one


class Rows:
  """The rows of one stream.

  quarantined: how many rows were padding because a block of theirs is damaged.

  Args:
    length, futures: L and M.
    bos: the token that begins a document.
    pad: the token of padding.
    across: whether a row is one segment.
    quarantine: whether rows with a damaged block become padding, instead of raising `Damaged`.
    note: called with a line for each new damaged place.
  """

  def __init__(self, stream: Stream, packing: Consecutive | BestFit, length: int, futures: int,
               bos: int, pad: int, across: bool = False, quarantine: bool = False,
               note: Callable[[str], None] = quiet):
    self.stream, self.packing, self.length, self.futures = stream, packing, length, futures
    self.quarantined = 0
    self._bos, self._pad, self._across = bos, pad, across
    self._quarantine, self._note, self._noted = quarantine, note, set()

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
    real = np.flatnonzero(ids >= 0)
    which, pieces = self.packing.pieces(ids[real])
    row, (start, size) = real[which], pieces.T
    before = np.cumsum(size) - size
    column = before - before[np.searchsorted(row, row)]  # where a piece begins in its row
    stop = start + size + M * (column + size == L)  # the futures of a full row read M tokens beyond it

    tokens = np.full((len(ids), L + M), self._pad, np.int32)
    valid, begins = np.zeros_like(tokens, bool), np.zeros_like(tokens, bool)
    begins[row, column] = True
    for r, c, piece in zip(row.tolist(), column.tolist(), self._read(row, start, stop)):
      tokens[r, c:c + len(piece)] = piece
      valid[r, c:c + len(piece)] = True

    place = np.arange(L + M, dtype=np.int32)
    if self._across:
      return {'tokens': tokens, 'segments': valid.astype(np.int32), 'positions': place * valid}
    begins = (begins | (tokens == self._bos)) & valid
    return {'tokens': tokens, 'segments': np.cumsum(begins, axis=1, dtype=np.int32) * valid,
            'positions': (place - np.maximum.accumulate(place * begins, axis=1)) * valid}

  def _read(self, row: np.ndarray, start: np.ndarray, stop: np.ndarray) -> list[np.ndarray]:
    """The tokens of each piece; none for all pieces of a quarantined row."""
    try:
      return self.stream.gather(start, stop)
    except Damaged:
      if not self._quarantine:
        raise
    pieces, damaged_rows = [], set()
    for i, r in enumerate(row.tolist()):
      try:
        pieces.append(self.stream.gather(start[i:i + 1], stop[i:i + 1])[0])
      except Damaged as error:
        damaged_rows.add(r)
        pieces.append(np.zeros(0, np.int32))
        self._report(str(error).partition(' (')[0])
    self.quarantined += len(damaged_rows)
    return [piece[:0] if r in damaged_rows else piece for r, piece in zip(row.tolist(), pieces)]

  def _report(self, place: str) -> None:
    if place not in self._noted and len(self._noted) < NOTED:
      self._noted.add(place)
      more = '; further ones are only counted' if len(self._noted) == NOTED else ''
      self._note(f'quarantined: {place}{more}')


class SourceRows:
  """The rows of several sources, one source after the other."""

  def __init__(self, sources: Sequence[Rows]):
    self.sources = tuple(sources)
    self._ends = np.cumsum([len(rows) for rows in sources])

  def __len__(self) -> int:
    return int(self._ends[-1])

  @property
  def quarantined(self) -> int:
    return sum(rows.quarantined for rows in self.sources)

  def ids(self, s: int) -> range:
    """Ids of the rows of source s."""
    return range(int(self._ends[s]) - len(self.sources[s]), int(self._ends[s]))

  def batch(self, ids: Sequence[int]) -> dict[str, np.ndarray]:
    """As `Rows.batch`."""
    if len(self.sources) == 1:
      return self.sources[0].batch(ids)
    ids = np.asarray(ids)
    source = np.where(ids < 0, 0, np.searchsorted(self._ends, ids, side='right'))
    batch = {}
    for s in np.unique(source).tolist():
      places = np.flatnonzero(source == s)
      first = self.ids(s).start
      rows = self.sources[s].batch([i if i < 0 else i - first for i in ids[places].tolist()])
      for name, values in rows.items():
        batch.setdefault(name, np.zeros((len(ids), values.shape[1]), np.int32))[places] = values
    return batch


class Batches:
  """This process's rows of every batch, endlessly: dicts of int32[B / process_count, L+M].

  Row r of a batch goes to process r % process_count. `get_state()` is {'global_next_index': rows
  drawn by all processes}: equal on all of them; `set_state` takes it with any process_count and any
  B. A batch may span two epochs. A thread reads the next `ahead` batches; the state and
  `quarantined`, the rows that became padding, are those of the batch returned last.

  Args:
    weights: of the sources, in rows; Grain rounds their ratios to about a hundredth.
    batch: B.
    seed: of the order.
    place: called with each batch in that thread, for example to put it on a device; `next` returns
      its result.
  """

  def __init__(self, rows: SourceRows, weights: Sequence[float], batch: int, seed: int,
               process_index: int = 0, process_count: int = 1, ahead: int = 2,
               place: Callable[[dict[str, np.ndarray]], typing.Any] = lambda batch: batch):
    _check_divides(batch, process_count)
    ids = [rows.ids(s) for s in range(len(rows.sources))]
    orders = [grain.MapDataset.range(i.start, i.stop).seed(seed).shuffle() for i in ids]
    self._order = orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, list(weights))
    self._rows, self._batch, self._process = rows, batch, (process_index, process_count)
    self._ahead, self._place, self.quarantined = ahead, place, 0
    self._drawn = self._returned = 0  # rows of all processes: in the thread, and returned
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'batches')
    self._pending = collections.deque()

  def __iter__(self) -> 'Batches':
    return self

  def __next__(self):
    while len(self._pending) <= self._ahead:
      self._pending.append(self._thread.submit(self._draw))
    try:
      batch, self.quarantined = self._pending.popleft().result()
    except BaseException:
      self.set_state(self.get_state())  # the next call tries the same batch again
      raise
    self._returned += self._batch
    return batch

  def _draw(self):
    index, count = self._process
    ids = [int(self._order[k]) for k in range(self._drawn + index, self._drawn + self._batch, count)]
    self._drawn += self._batch
    return self._place(self._rows.batch(ids)), self._rows.quarantined

  def get_state(self) -> dict[str, int]:
    return {'global_next_index': self._returned}

  def set_state(self, state: dict[str, int]) -> None:
    self._cancel()
    self._drawn = self._returned = state['global_next_index']

  def _cancel(self) -> None:
    for future in self._pending:
      future.cancel()
    concurrent.futures.wait(self._pending)
    self._pending.clear()

  def close(self) -> None:
    self._cancel()
    self._thread.shutdown()


def validation_batches(rows: SourceRows, batch: int, limit: int | None = None, process_index: int = 0,
                       process_count: int = 1) -> Iterator[dict[str, np.ndarray]]:
  """This process's share of all rows, in order, or of `limit` of them at even distances.

  Rows of padding fill the last batch.
  """
  _check_divides(batch, process_count)
  total = len(rows)
  ids = np.arange(total) if limit is None or limit >= total else np.arange(limit) * total // limit
  ids = np.concatenate([ids, np.full(-len(ids) % batch, -1)])
  for start in range(0, len(ids), batch):
    yield rows.batch(ids[start + process_index:start + batch:process_count])


def _check_divides(batch: int, process_count: int) -> None:
  if batch % process_count:
    raise BadInput(f'config.train.batch={batch}: must be a multiple of the {process_count} processes')
