"""Rows against a double loop, order against the uninterrupted run, any number of processes against one."""
import itertools
import json
import os
import pathlib
import subprocess
import sys

import kills
import numpy as np
import pytest

from mtp_jax.config import BadInput
from mtp_jax.data import shards
from mtp_jax.data.folder import Damaged
from mtp_jax.data.packing import Consecutive, pack
from mtp_jax.data.rows import Batches, Rows, SourceRows, validation_batches

BOS, PAD = 60_000, 999_999
POLICIES = list(itertools.product(['stream', 'best_fit'], ['within', 'across']))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(shards, 'BLOCK', 16)


def make_rows(stream, folder, L, M, packing='stream', boundary='within', **more) -> Rows:
  packed = pack(stream, L, str(folder), 'f' * 16) if packing == 'best_fit' else Consecutive(stream, L)
  return Rows(stream, packed, L, M, BOS, PAD, boundary == 'across', **more)


def by_hand(stream, pieces, L, M, across):
  """One row, token by token: each piece, and beyond a full row what follows in the stream."""
  whole = stream.read(0, stream.tokens).tolist()
  row, segment = [], 0
  for start, size in pieces:
    full = len(row) + size == L
    for k in range(start, min(start + size + (M if full else 0), len(whole))):
      if k == start or whole[k] == BOS:
        segment, first = segment + 1, k
      row.append((whole[k], 1 if across else segment, len(row) if across else k - first))
  return [list(column) for column in zip(*row + [(PAD, 0, 0)] * (L + M - len(row)))]


@pytest.mark.parametrize('packing, boundary', POLICIES)
@pytest.mark.parametrize('M', [1, 2, 5, 8])
def test_rows_are_those_of_a_double_loop(tmp_path, stream_of, packing, boundary, M):
  rng = np.random.default_rng(M)
  cases = [[[1]], [[1] * 30], [[100]], [[16, 16], [16]], [[15, 1, 17]]]
  cases += [[rng.choice([1, 2, 3, 7, 50], size=rng.integers(1, 20)).tolist() for _ in range(3)] for _ in range(3)]
  for case, (layout, L) in enumerate(itertools.product(cases, [1, 5, 16])):
    stream = stream_of(tmp_path / str(case), *layout)
    rows = make_rows(stream, tmp_path / str(case), L, M, packing, boundary)
    batch = rows.batch(range(len(rows)))
    assert all(values.dtype == np.int32 and values.shape == (len(rows), L + M) for values in batch.values())
    for i in range(len(rows)):
      pieces = rows.packing.pieces(np.array([i]))[1].tolist()
      row = [batch[name][i].tolist() for name in ('tokens', 'segments', 'positions')]
      assert row == by_hand(stream, pieces, L, M, boundary == 'across')


def test_two_documents_and_the_end_of_the_stream_as_a_table(tmp_path, stream_of):
  rows = make_rows(stream_of(tmp_path, [3, 1, 4]), tmp_path, L=5, M=2)
  assert {name: values.tolist() for name, values in rows.batch([1, 0, -1]).items()} == {
      'tokens': [[5, 6, 7, PAD, PAD, PAD, PAD], [BOS, 1, 2, BOS, BOS, 5, 6], [PAD] * 7],
      'segments': [[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 2, 3, 3, 3], [0] * 7],
      'positions': [[0, 1, 2, 0, 0, 0, 0], [0, 1, 2, 0, 0, 1, 2], [0] * 7]}


def test_best_fit_rows_as_a_table(tmp_path, stream_of):
  """Documents of 7, 2 and 3 tokens in rows of 5.

  First five tokens of the long one, with two more to predict; then 3 + 2; then its last two.
  """
  rows = make_rows(stream_of(tmp_path, [7, 2, 3]), tmp_path, L=5, M=2, packing='best_fit')
  assert {name: values.tolist() for name, values in rows.batch(range(3)).items()} == {
      'tokens': [[BOS, 1, 2, 3, 4, 5, 6], [BOS, 10, 11, 5, 6, BOS, 8], [BOS, 8, PAD, PAD, PAD, PAD, PAD]],
      'segments': [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 3, 3], [1, 1, 0, 0, 0, 0, 0]],
      'positions': [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 0, 0, 0, 0]]}


def test_there_is_no_row_outside(tmp_path, stream_of):
  rows = make_rows(stream_of(tmp_path, [7]), tmp_path, 5, 2)
  for i in (-2, 2):
    with pytest.raises(IndexError):
      rows.batch([0, i])


@pytest.fixture(params=POLICIES, ids='-'.join)
def rows(tmp_path, stream_of, request):
  stream = stream_of(tmp_path / 'stream', [1, 90, 3], [40, 2, 44])
  return SourceRows([make_rows(stream, tmp_path, 8, 3, *request.param)])


@pytest.fixture
def mixed(tmp_path, stream_of):
  """Three sources of 23, 7 and 12 rows; their tokens tell them apart."""
  sources = []
  layouts = ('stream', [1, 90, 3, 40, 2, 44]), ('best_fit', [5] * 9), ('stream', [96])
  for i, (packing, lengths) in enumerate(layouts):
    stream = stream_of(tmp_path / str(i), lengths)
    stream.gather = shifted(stream.gather, 1000 * i)
    sources.append(make_rows(stream, tmp_path / str(i), 8, 3, packing))
  return SourceRows(sources)


def shifted(gather, offset: int):
  """The same tokens, but for bos, plus an offset."""
  def gather_shifted(starts, stops):
    return [np.where(tokens == BOS, BOS, tokens + offset) for tokens in gather(starts, stops)]
  return gather_shifted


def take(batches, count):
  taken = [next(batches) for _ in range(count)]
  batches.close()
  return taken


def one_epoch(rows) -> list[dict]:
  return take(Batches(rows, (1,), 1, seed=3), len(rows))


def test_every_token_of_every_document_is_an_input_once_an_epoch(rows):
  epoch = one_epoch(rows)
  inputs = np.concatenate([batch['tokens'][:, :8][batch['segments'][:, :8] > 0] for batch in epoch])
  first_tokens = {0, 1, 91, 94, 134, 136}
  assert sorted(inputs[inputs != BOS]) == sorted(set(range(180)) - first_tokens)
  assert (inputs == BOS).sum() == len(first_tokens)


def test_every_future_of_every_input_is_in_its_row(tmp_path, stream_of):
  """With stream packing, the token m+1 places later in the stream is m+1 places later in the row.

  It is in the same segment iff it is of the same document.
  """
  rows = make_rows(stream_of(tmp_path, [1, 90, 3, 40]), tmp_path, 8, 3)
  batch = rows.batch(range(len(rows)))
  ends = np.cumsum([1, 90, 3, 40])
  for i, t, m in itertools.product(range(len(rows)), range(8), range(3)):
    place = 8 * i + t
    if place < 134:
      same = place + 1 + m < ends[np.searchsorted(ends, place, side='right')]
      assert (batch['segments'][i, t] == batch['segments'][i, t + 1 + m]) == same


def test_epochs_are_permutations_in_another_order(rows):
  n = len(rows)
  epochs = [batch['tokens'].tolist() for batch in take(Batches(rows, (1,), n, seed=3), 4)]
  assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
  assert all(a != b for a, b in itertools.combinations(epochs, 2))


def test_seed_fixes_the_order(rows):
  one, same, other = ([batch['tokens'].tolist() for batch in take(Batches(rows, (1,), 5, seed), 8)]
                      for seed in (1, 1, 2))
  assert one == same != other


WEIGHTS = (0.5, 0.3, 0.2)


def whole(rows, count, steps, state=None, batch=8, weights=WEIGHTS):
  """Global batches drawn by `count` processes, rows in order, and the state they agree on."""
  processes = [Batches(rows, weights, batch, 5, p, count) for p in range(count)]
  for process in processes if state else []:
    process.set_state(state)
  shares = [[next(process) for _ in range(steps)] for process in processes]
  states = [process.get_state() for process in processes]
  for process in processes:
    process.close()
  assert all(s == states[0] for s in states)
  assert all(len(b['tokens']) == batch // count for share in shares for b in share)
  batches = [{name: together([b[name] for b in step]).tolist() for name in step[0]} for step in zip(*shares)]
  return batches, json.loads(json.dumps(states[0]))


def together(shares) -> np.ndarray:
  """The rows of all processes in order: row r is of process r % count."""
  return np.stack(shares, axis=1).reshape(-1, np.shape(shares)[-1])


def test_any_number_of_processes_draws_the_same_batches(mixed):
  one, two, four, eight = (whole(mixed, count, steps=6)[0] for count in (1, 2, 4, 8))
  assert one == two == four == eight


def test_resuming_at_every_point_continues_as_if_uninterrupted(mixed):
  uninterrupted, _ = whole(mixed, 1, steps=8)
  for point in range(8):
    before, state = whole(mixed, 1, point)
    after, _ = whole(mixed, 1, 8 - point, state)
    assert before + after == uninterrupted


def test_the_number_of_processes_may_change_on_the_way(mixed):
  uninterrupted, _ = whole(mixed, 1, steps=9)
  drawn, state = [], None
  for count, steps in ((2, 2), (1, 3), (8, 1), (4, 3)):
    batches, state = whole(mixed, count, steps, state)
    drawn += batches
  assert drawn == uninterrupted and state['mixed'] == 9 * 8


def test_the_batch_size_may_change_on_the_way(mixed):
  flat = lambda batches: [row for batch in batches for row in batch['tokens']]
  one, state = whole(mixed, 1, 3, batch=8)
  two, _ = whole(mixed, 1, 2, state, batch=12)
  assert flat(one + two) == flat(whole(mixed, 1, 6)[0])


def test_sources_are_drawn_by_their_weights_and_each_row_once_an_epoch_of_its_source(mixed):
  tokens = np.concatenate([batch['tokens'] for batch in take(Batches(mixed, WEIGHTS, 10, 0), 40)])
  source = np.where(tokens >= BOS, 0, tokens).max(axis=1) // 1000
  counts = np.bincount(source, minlength=3)
  assert (np.abs(counts / 400 - WEIGHTS) <= 0.01).all()
  for s, rows in enumerate(mixed.sources):
    drawn = [tuple(row) for row in tokens[source == s].tolist()]
    for epoch in range(len(drawn) // len(rows)):
      assert len(set(drawn[epoch * len(rows):(epoch + 1) * len(rows)])) == len(rows)


def test_real_processes_draw_what_one_draws(tmp_path, stream_of):
  """Each opens the shards on its own; their shares, put together, are the batches of this one."""
  code = f'''
import json, sys
from mtp_jax.data.packing import Consecutive
from mtp_jax.data.rows import Batches, SourceRows, Rows
from mtp_jax.data.folder import Folder
from mtp_jax.data.shards import Shard, Stream
shards = json.loads(sys.argv[3])
folder = Folder({str(tmp_path / "real")!r}, '')
stream = Stream(folder, [Shard(**shard) for shard in shards], '<u2', '')
from mtp_jax.data import shards as module
module.BLOCK = 16
rows = SourceRows([Rows(stream, Consecutive(stream, 8), 8, 3, {BOS}, {PAD})])
batches = Batches(rows, (1,), 8, 5, int(sys.argv[1]), int(sys.argv[2]))
print(json.dumps([next(batches)['tokens'].tolist() for _ in range(6)]))
batches.close()
'''
  stream = stream_of(tmp_path / 'real', [50, 20, 900])
  entries = json.dumps([vars(shard) for shard in stream.shards])
  environment = os.environ | {'PYTHONPATH': str(kills.ROOT / 'src')}

  def start(p: int, n: int):
    arguments = [sys.executable, '-c', code, str(p), str(n), entries]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)
  alone = Batches(SourceRows([make_rows(stream, tmp_path, 8, 3)]), (1,), 8, 5)
  expected = [batch['tokens'].tolist() for batch in take(alone, 6)]
  for n in (2, 4):
    processes = [start(p, n) for p in range(n)]
    shares = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert [together(step).tolist() for step in zip(*shares)] == expected


def test_a_share_must_come_out_even(rows):
  with pytest.raises(BadInput, match=r'^config\.train\.batch=9: must be a multiple of the 2 processes$'):
    Batches(rows, (1,), 9, 0, process_count=2)
  with pytest.raises(BadInput, match='multiple of the 2 processes'):
    next(validation_batches(rows, 9, process_count=2))


@pytest.mark.parametrize('limit', [None, 1, 8, 10, 41, 42, 43])
@pytest.mark.parametrize('count', [1, 2, 4])
def test_validation_reads_each_row_once_or_an_even_sample_in_order_then_padding(mixed, limit, count):
  processes = [validation_batches(mixed, 8, limit, p, count) for p in range(count)]
  steps = zip(*([batch['tokens'] for batch in process] for process in processes), strict=True)
  tokens = np.concatenate([together(step) for step in steps])
  total = len(mixed)
  n = min(limit or total, total)
  assert tokens.shape == (-(-n // 8) * 8, 11)
  assert np.array_equal(tokens[:n], mixed.batch([i * total // n for i in range(n)])['tokens'])
  assert (tokens[n:] == PAD).all()


def damage(stream, s: int, number: int):
  """Flips a bit inside block `number` of shard s."""
  path = pathlib.Path(stream.folder.path(stream.shards[s].file))
  content = bytearray(path.read_bytes())
  content[content.find(stream._record(s, number)) + 3] ^= 1
  path.write_bytes(content)
  shards._READERS.close()


def test_a_damaged_block_stops_the_batches_and_names_itself(tmp_path, stream_of):
  stream = stream_of(tmp_path, [100], [200])
  damage(stream, 1, 4)
  batches = Batches(SourceRows([make_rows(stream, tmp_path, 8, 3)]), (1,), 4, 0)
  message = (r'train-00001.array_record: block 4 is damaged .*; '
             'restore the file, or delete the folder and prepare it again, or go on without')
  with pytest.raises(Damaged, match=message):
    for _ in range(10):
      next(batches)
  batches.close()


@pytest.mark.parametrize('packing', ['stream', 'best_fit'])
def test_quarantined_rows_become_padding_are_counted_and_no_other_row_changes(tmp_path, stream_of, packing):
  stream, lines = stream_of(tmp_path, [5] * 12 + [3] * 12 + [4], [3] * 25 + [5] * 25), []
  rows = make_rows(stream, tmp_path, 8, 3, packing, quarantine=True, note=lines.append)
  before = rows.batch(range(len(rows)))
  damage(stream, 1, 4)
  stream._blocks.clear()
  after = rows.batch(range(len(rows)))
  first, last = 100 + 4 * 16, 100 + 5 * 16  # the tokens of that block
  place, pieces = rows.packing.pieces(np.arange(len(rows)))
  is_full = np.bincount(place, pieces[:, 1])[place] == 8
  ends_row = np.append(np.diff(place), 1) > 0
  ends = pieces.sum(axis=1) + 3 * (is_full & ends_row)  # the futures of full rows read on
  damaged = np.unique(place[(pieces[:, 0] < last) & (ends > first)])
  for name, blank in (('tokens', PAD), ('segments', 0), ('positions', 0)):
    assert (after[name][damaged] == blank).all()
    assert np.array_equal(np.delete(after[name], damaged, axis=0), np.delete(before[name], damaged, axis=0))
  assert rows.quarantined == len(damaged) > 2
  line, = lines
  assert 'train-00001.array_record: block 4 is damaged' in line
  batches = Batches(SourceRows([rows]), (1,), len(rows), 0)
  next(batches)
  assert batches.quarantined == len(damaged)
  batches.close()


def test_a_batch_that_failed_is_tried_again_and_none_is_lost(rows):
  expected, failures_left = take(Batches(rows, (1,), 4, 0), 5), [1]

  def place(batch):
    if np.array_equal(batch['tokens'], expected[2]['tokens']) and failures_left:
      failures_left.pop()
      raise OSError('for once')
    return batch['tokens'].tolist()
  batches, drawn = Batches(rows, (1,), 4, 0, place=place), []
  while len(drawn) < 5:
    try:
      drawn.append(next(batches))
    except OSError:
      assert batches.get_state()['mixed'] == 8
  batches.close()
  assert drawn == [batch['tokens'].tolist() for batch in expected] and not failures_left


def test_batches_are_placed_ahead_and_the_state_is_that_of_the_one_handed_out(rows):
  placed = []
  batches = Batches(rows, (1,), 4, 0, ahead=3, place=lambda batch: placed.append(batch) or len(placed))
  assert batches.get_state()['mixed'] == 0 and next(batches) == 1 and next(batches) == 2
  assert batches.get_state()['mixed'] == 8
  batches.set_state(batches.get_state() | {'sources': [{'name': '', 'share': 2**40, 'rows': 4}], 'mixed': 4})
  number = next(batches)
  assert np.array_equal(placed[number - 1]['tokens'], placed[1]['tokens'])
  batches.close()
