"""What is read from shards is what was written, or an error that names the place."""
import itertools
import pathlib

import numpy as np
import pytest

from mtp_jax.data import shards
from mtp_jax.data.folder import Damaged

B = 16  # tokens of a block in these tests


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(shards, 'BLOCK', B)


def expected(*lengths) -> np.ndarray:
  tokens = np.arange(sum(lengths))
  tokens[np.cumsum([0, *lengths[:-1]])] = 60_000
  return tokens


LAYOUTS = {'one token': [[1]], 'a block': [[B]], 'a block and one': [[B + 1]], 'two shards': [[5, 20], [3]], 'many': [[1] * 40, [B], [7, 90], [1]]}


@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
def test_any_stretch_of_a_stream_is_that_of_the_tokens_written(tmp_path, stream_of, layout):
  stream, whole = stream_of(tmp_path, *layout), expected(*itertools.chain(*layout))
  assert (stream.tokens, stream.documents) == (len(whole), sum(map(len, layout)))
  ends = [(a, b) for a in range(len(whole) + 1) for b in range(a, min(a + 40, len(whole) + 1))]
  found = stream.gather(np.array([a for a, _ in ends]), np.array([b for _, b in ends]))
  assert all(np.array_equal(part, whole[a:b]) for part, (a, b) in zip(found, ends, strict=True))
  assert np.array_equal(stream.read(0, len(whole) + 100), whole)  # as far as it goes


@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
def test_documents_and_their_lengths_are_those_written(tmp_path, stream_of, layout):
  stream, whole = stream_of(tmp_path, *layout), expected(*itertools.chain(*layout))
  assert [stream.lengths(s).tolist() for s in range(len(layout))] == layout
  stop = np.cumsum(list(itertools.chain(*layout)))
  for i, (end, length) in enumerate(zip(stop, itertools.chain(*layout))):
    assert np.array_equal(stream.document(i), whole[end - length + 1:max(end - 1, end - length + 1)]) and stream.document(i).dtype == np.int32


def test_memory_and_open_files_are_bounded(tmp_path, stream_of, monkeypatch):
  monkeypatch.setattr(shards, 'OPEN_FILES', 3)
  monkeypatch.setattr(shards, 'CACHE_BYTES', 4 * B * 2)
  stream = stream_of(tmp_path, *[[2 * B]] * 8)
  for start in np.random.default_rng(0).integers(0, 16 * B, 200):
    stream.read(start, start + 3)
    assert len(stream._open) <= 3 and len(stream._blocks) <= 4
  assert np.array_equal(stream.read(0, 16 * B), expected(*[2 * B] * 8))


def test_a_block_of_another_size_is_no_block_of_this_shard(tmp_path, stream_of):
  stream, other = stream_of(tmp_path / 'one', [B + 3]), stream_of(tmp_path / 'other', [B + 5])
  pathlib.Path(stream.folder.path(stream.shards[0].file)).write_bytes(pathlib.Path(other.folder.path(other.shards[0].file)).read_bytes())
  with pytest.raises(Damaged, match='train-00000.array_record: block 1 has 10 bytes; restore the file'):
    stream.read(0, B + 3)
