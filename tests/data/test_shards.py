"""What is read from shards is what was written, or an error that names the place."""
import itertools
import pathlib

import numpy as np
import pytest

from mtp_jax.data import shards
from mtp_jax.data.folder import Damaged

BLOCK = 16  # tokens of a block in these tests


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(shards, 'BLOCK', BLOCK)


def expected(*lengths) -> np.ndarray:
  tokens = np.arange(sum(lengths))
  tokens[np.cumsum([0, *lengths[:-1]])] = 60_000
  return tokens


LAYOUTS = {  # lengths of the documents of each shard
    'one token': [[1]],
    'a block': [[BLOCK]],
    'a block and one': [[BLOCK + 1]],
    'two shards': [[5, 20], [3]],
    'many': [[1] * 40, [BLOCK], [7, 90], [1]],
}


@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
def test_any_slice_of_a_stream_is_that_of_the_tokens_written(tmp_path, stream_of, layout):
  stream, whole = stream_of(tmp_path, *layout), expected(*itertools.chain(*layout))
  assert (stream.tokens, stream.documents) == (len(whole), sum(map(len, layout)))
  bounds = [(a, b) for a in range(len(whole) + 1) for b in range(a, min(a + 40, len(whole) + 1))]
  slices = stream.gather(*np.array(bounds).T)
  assert all(np.array_equal(tokens, whole[a:b]) for tokens, (a, b) in zip(slices, bounds, strict=True))
  assert np.array_equal(stream.read(0, len(whole) + 100), whole)  # as far as it goes


@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
def test_documents_and_their_lengths_are_those_written(tmp_path, stream_of, layout):
  stream, whole = stream_of(tmp_path, *layout), expected(*itertools.chain(*layout))
  assert [stream.lengths(s).tolist() for s in range(len(layout))] == layout
  start = 0
  for i, length in enumerate(itertools.chain(*layout)):
    document = stream.document(i)
    assert document.dtype == np.int32
    assert np.array_equal(document, whole[start:start + length][1:-1])
    start += length


def test_memory_and_open_files_are_bounded(tmp_path, stream_of, monkeypatch):
  monkeypatch.setattr(shards, 'OPEN_FILES', 3)
  monkeypatch.setattr(shards, 'CACHE_BYTES', 4 * BLOCK * 2)
  stream = stream_of(tmp_path, *[[2 * BLOCK]] * 8)
  for start in np.random.default_rng(0).integers(0, 16 * BLOCK, 200):
    stream.read(start, start + 3)
    assert len(stream._open) <= 3 and len(stream._blocks) <= 4
  assert np.array_equal(stream.read(0, 16 * BLOCK), expected(*[2 * BLOCK] * 8))


def test_a_block_of_another_size_is_no_block_of_this_shard(tmp_path, stream_of):
  stream, other = stream_of(tmp_path / 'one', [BLOCK + 3]), stream_of(tmp_path / 'other', [BLOCK + 5])
  path, other_path = (pathlib.Path(s.folder.path(s.shards[0].file)) for s in (stream, other))
  path.write_bytes(other_path.read_bytes())
  with pytest.raises(Damaged, match='train-00000.array_record: block 1 has 10 bytes; restore the file'):
    stream.read(0, BLOCK + 3)
