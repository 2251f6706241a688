"""Best fit against a loop over documents and rows; every token in one row."""
import numpy as np
import pytest

from mtp_jax.data import packing
from mtp_jax.data.folder import Damaged
from mtp_jax.data.packing import BestFit, Consecutive, best_fit, pack


def by_hand(lengths, room):
  """How full each row is: full pieces alone; the rest, longest first, in the fullest row with room."""
  rows, rests = [], []
  for length in lengths:
    rows += [room] * (length // room)
    rests += [length % room] if length % room else []
  bins = []
  for rest in sorted(rests, reverse=True):
    fitting = [filled for filled in bins if filled + rest <= room]
    if fitting:
      bins[bins.index(max(fitting))] += rest
    else:
      bins.append(rest)
  return sorted(rows + bins)


def random_case(seed: int):
  rng = np.random.default_rng(seed)
  return rng.choice([1, 2, 3, 5, 9, 30, 40], rng.integers(1, 200)).tolist(), int(rng.integers(2, 33))


CASES = [  # lengths of documents, room of a row
    ([5], 8), ([8], 8), ([9], 8), ([24], 8), ([1] * 30, 8), ([3] * 7, 8), ([7, 6, 5, 4, 3, 2, 1], 8),
    ([16, 17, 1, 1], 8), ([2, 2, 3, 5, 5, 6], 1), *map(random_case, range(30))]


@pytest.mark.parametrize('lengths, room', CASES, ids=range(len(CASES)))
def test_rows_are_as_full_as_a_loop_over_documents_fills_them(lengths, room):
  bounds, pieces = best_fit(np.array(lengths, np.int64), room)
  fills = [pieces[a:b, 1].sum() for a, b in zip(bounds, bounds[1:])]
  assert sorted(fills) == by_hand(lengths, room)


@pytest.mark.parametrize('seed', range(10))
def test_every_token_is_in_one_row_and_no_document_that_fits_is_cut(seed):
  rng = np.random.default_rng(seed)
  lengths, room = rng.integers(1, 60, rng.integers(1, 300)), int(rng.integers(1, 50))
  bounds, pieces = best_fit(lengths, room)
  assert bounds[0] == 0 and bounds[-1] == len(pieces)
  assert (np.diff(bounds) > 0).all() and (pieces[:, 1] > 0).all()
  tokens = np.concatenate([np.arange(start, start + length) for start, length in pieces.tolist()])
  assert np.array_equal(np.sort(tokens), np.arange(lengths.sum()))
  held = set(map(tuple, pieces.tolist()))
  stops = np.cumsum(lengths)
  short = lengths <= room
  assert set(zip((stops - lengths)[short].tolist(), lengths[short].tolist())) <= held
  ends = set(stops.tolist())
  assert all(length == room for start, length in held if start + length not in ends)  # a cut piece fills its row


def test_many_documents_fill_their_rows_almost_wholly():
  lengths = np.random.default_rng(0).geometric(1 / 300, 300_000)
  bounds, pieces = best_fit(lengths, 2048)
  assert lengths.sum() / ((len(bounds) - 1) * 2048) > 0.998 and len(pieces) >= 300_000


@pytest.fixture
def stream(tmp_path, stream_of):
  rng = np.random.default_rng(0)
  return stream_of(tmp_path / 'set', *[rng.integers(1, 50, 40).tolist() for _ in range(3)])


def test_a_packing_is_made_once_and_covers_the_stream(stream, tmp_path, monkeypatch):
  made = pack(stream, 32, str(tmp_path), 'f' * 64)
  rows = np.arange(len(made))
  place, pieces = made.pieces(rows)
  tokens = np.concatenate([np.arange(start, start + length) for start, length in pieces.tolist()])
  assert np.array_equal(np.sort(tokens), np.arange(stream.tokens))
  assert set(place.tolist()) == set(rows.tolist())
  assert made.padding == pytest.approx(1 - stream.tokens / (32 * len(made)))
  assert 0 < made.padding < 0.2
  monkeypatch.setattr(packing, 'best_fit', None)
  assert np.array_equal(pack(stream, 32, str(tmp_path), 'f' * 64).pieces(rows)[1], pieces)
  which, some = made.pieces(np.array([5, 2, 5]))
  for i, row in enumerate((5, 2, 5)):
    assert np.array_equal(some[which == i], pieces[place == row])


def test_a_damaged_packing_is_named(stream, tmp_path):
  pack(stream, 32, str(tmp_path), 'f' * 64)
  path, = (tmp_path / 'rows').iterdir()
  content = path.read_bytes()
  for place in np.random.default_rng(0).integers(0, len(content), 20):
    path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1:])
    with pytest.raises(Damaged, match=rf'{path.name}: is damaged; delete that file'):
      pack(stream, 32, str(tmp_path), 'f' * 64)
  path.write_bytes(content[:-8])
  with pytest.raises(Damaged):
    BestFit(str(path), stream, 32)


def test_rows_in_a_row_leave_padding_only_in_the_last(stream):
  rows = Consecutive(stream, 32)
  assert len(rows) == -(-stream.tokens // 32)
  assert rows.padding == 1 - stream.tokens / (32 * len(rows))
  assert rows.pieces(np.array([3, 0]))[1].tolist() == [[96, 32], [0, 32]]
