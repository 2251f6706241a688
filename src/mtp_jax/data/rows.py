"""Rows to batches: what a row holds, and the order of rows.

    row         int32[L+M] each: {'tokens', 'segments', 'positions'}: L inputs, and M tokens more so
                that every future has a target
    batch       int32[B, L+M] each: rows in an order that is a function of seed and position alone

'segments' numbers the documents of a row from 1 and is 0 in padding; 'positions' counts from a
document's first token in the row. Where attention and futures may cross documents, a row is one
segment.

Several sources are mixed by weights: the weights and k decide which source row k comes from; within
a source rows are shuffled, differently in each source and each epoch of it.

Grain carries the steps: it maps each to a batch, which is read at once, a few ahead in its thread,
and keeps the position. Which rows a step has is computed here, in 2 to 5 microseconds a row;
through Grain's shuffle, mixture, slices and batches of single numbers it takes 34 to 50.
"""
import functools
import hashlib
import sys
import threading
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
SMALL = 2**20  # rows of a source that is shuffled by a permutation; Grain's takes up to 22 ms a row of a few


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
    name: of the source, which chooses the order of its rows and tells it from others after a change.
  """

  def __init__(self, stream: Stream, packing: Consecutive | BestFit, length: int, futures: int,
               bos: int, pad: int, across: bool = False, quarantine: bool = False,
               note: Callable[[str], None] = quiet, name: str = ''):
    self.stream, self.packing, self.length, self.futures = stream, packing, length, futures
    self.name = name
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


class Mixture:
  """Which source row k of all comes from, and which of that source's rows it is.

  Of the first k rows each source has its share, up to a row a source. (Grain's own mixture rounds
  the ratios to about a hundredth.)

  shares: the weights, as integers.
  """

  def __init__(self, weights: Sequence[float]):
    self.shares = [max(1, round(weight / sum(weights) * 2**40)) for weight in weights]

  def counts(self, k: int) -> list[int]:
    """How many of the first k rows come from each source."""
    counts, rest = [], sum(self.shares)
    for share in self.shares:  # takes its part of the rows that those before it left
      left = k * (rest - share) // rest
      counts.append(k - left)
      k, rest = left, rest - share
    return counts

  def __getitem__(self, k: int) -> tuple[int, int]:
    before, after = self.counts(k), self.counts(k + 1)
    s = next(s for s in range(len(before)) if after[s] > before[s])
    return s, before[s]


class _Order:
  """Some ids endlessly, each epoch in another random order, with random access."""

  def __init__(self, ids: range, key: str):
    self._ids, self._seed = ids, int.from_bytes(hashlib.sha256(key.encode()).digest()[:4])
    # RandomState is the one of numpy's generators that no version changes
    draw = lambda epoch: np.random.RandomState([self._seed, epoch]).permutation(len(ids))
    self._permutation = functools.lru_cache(2)(draw)

  def __getitem__(self, k: int) -> int:
    n = len(self._ids)
    epoch, i = divmod(k, n)
    if n <= SMALL:
      return self._ids[self._permutation(epoch)[i]]
    seed = (self._seed + epoch) % 2**32
    return self._ids[grain.experimental.index_shuffle(i, max_index=n - 1, seed=seed, rounds=4)]


class Batches:
  """This process's rows of every batch, endlessly: dicts of int32[B / process_count, L+M], of fewer rows where
  rows_before says so.

  Which rows is a function of the seed, of the rows before and of the sources. The state says how many rows were
  taken of each source; it is the same on all processes, and any number of processes may go on from
  it. A source goes on at its own number after a change of weights, or of the list of sources.

  quarantined: rows of this process's batches so far that were padding because of damage.

  Args:
    weights: of the sources, in rows.
    batch: B.
    seed: of the order.
    rows_before: how many rows the steps before a step read; by default B each.
    ahead: batches that are read before they are asked for, in a thread.
    place: called with each batch in that thread, for example to put it on a device; `next` returns
      its result.
  """

  def __init__(self, rows: SourceRows, weights: Sequence[float], batch: int, seed: int,
               process_index: int = 0, process_count: int = 1, ahead: int = 2,
               place: Callable[[dict[str, np.ndarray]], typing.Any] = lambda batch: batch,
               rows_before: Callable[[int], int] | None = None):
    _check_divides(batch, process_count)
    self._rows, self._process = rows, (process_index, process_count)
    self._rows_before = rows_before or (lambda step: step * batch)
    names = [source.name for source in rows.sources]
    repeated = [names[:s].count(name) for s, name in enumerate(names)]
    self._names = [f'{name} {n + 1}' if n else name for name, n in zip(names, repeated)]
    self._orders = [_Order(rows.ids(s), f'{seed} {name}') for s, name in enumerate(self._names)]
    self._mixture = Mixture(weights)
    self._ahead, self._place, self.quarantined = ahead, place, 0
    self._reading = threading.Lock()
    self._begin([0] * len(names), 0, 0)

  def _begin(self, bases: list[int], mixed: int, step: int) -> None:
    """Goes on at a step, after `mixed` rows of a mixture that began at row bases[s] of each source s."""
    self._bases, self._mixed, self._step = bases, mixed, step
    steps = grain.MapDataset.range(sys.maxsize).map(self._read)
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._ahead)
    self._iterator = iter(steps.to_iter_dataset(reading))

  def _read(self, step: int):
    """The batch of a step since `_begin`, placed, and how many of its rows are quarantined."""
    (index, count), ids = self._process, []
    for k in range(self._mixed_before(step) + index, self._mixed_before(step + 1), count):
      s, n = self._mixture[k]
      ids.append(self._orders[s][self._bases[s] + n])
    with self._reading:  # the thread of an iterator that was closed may still be at work
      before = self._rows.quarantined
      return self._place(self._rows.batch(ids)), self._rows.quarantined - before

  def _mixed_before(self, step: int) -> int:
    """Rows of the mixture that are taken before a step since `_begin`."""
    return self._mixed + self._rows_before(self._step + step) - self._rows_before(self._step)

  def __iter__(self) -> 'Batches':
    return self

  def __next__(self):
    try:
      batch, quarantined = next(self._iterator)
    except BaseException:
      self._iterator.set_state(self._iterator.get_state())  # the next call tries the same batch again
      raise
    self.quarantined += quarantined
    return batch

  def get_state(self) -> dict:
    """JSON: the name, share and number of rows taken of each source; rows since the mixture began."""
    mixed = self._mixed_before(self._iterator.get_state()['next_index'])
    taken = [base + n for base, n in zip(self._bases, self._mixture.counts(mixed))]
    sources = [{'name': name, 'share': share, 'rows': n}
               for name, share, n in zip(self._names, self._mixture.shares, taken)]
    return {'sources': sources, 'mixed': mixed}

  def set_state(self, state: dict, step: int = 0) -> None:
    """Goes on at a state, with the batch of a step, also that of other weights or sources: a source that is still
    there at its number, one that took the place of another at that one's, any other at its beginning.
    """
    self.close()
    if 'global_next_index' in state:  # of a version that kept one number for all sources
      self._begin([0] * len(self._names), state['global_next_index'], step)
      return
    old = {source['name']: source for source in state['sources']}
    rows = [source['rows'] for source in state['sources']]
    gone = {s: n for s, (name, n) in enumerate(zip(old, rows)) if name not in self._names}
    taken = [old[name]['rows'] if name in old else gone.get(s, 0) for s, name in enumerate(self._names)]
    mixture = [(source['name'], source['share']) for source in state['sources']]
    mixed = state['mixed'] if mixture == list(zip(self._names, self._mixture.shares)) else 0
    self._begin([n - m for n, m in zip(taken, self._mixture.counts(mixed))], mixed, step)

  def skip(self, rows: int) -> None:
    """Leaves out the next so many rows."""
    step = self._iterator.get_state()['next_index']
    self.close()
    self._begin(self._bases, self._mixed_before(step) + rows, self._step + step)

  def close(self) -> None:
    self._iterator.close()


def validation_batches(rows: SourceRows, batch: int, limit: int | None = None, process_index: int = 0,
                       process_count: int = 1) -> Iterator[dict[str, np.ndarray]]:
  """This process's share of all rows, in order, or of `limit` of them at even distances.

  Rows of padding fill the last batch.
  """
  _check_divides(batch, process_count)
  ids = validation_ids(rows, batch, limit)
  for start in range(0, len(ids), batch):
    yield rows.batch(ids[start + process_index:start + batch:process_count])


def validation_ids(rows: SourceRows, batch: int, limit: int | None = None) -> np.ndarray:
  """The ids of all rows, or of `limit` at even distances, and then of padding, -1, up to a multiple of the batch."""
  total = len(rows)
  ids = np.arange(total) if limit is None or limit >= total else np.arange(limit) * total // limit
  return np.concatenate([ids, np.full(-len(ids) % batch, -1)])


def _check_divides(batch: int, process_count: int) -> None:
  if batch % process_count:
    raise BadInput(f'config.train.batch={batch}: must be a multiple of the {process_count} processes')
