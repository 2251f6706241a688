"""What is read from shards is what was written, or an error that names the place."""
import contextlib
import errno
import gc
import itertools
import os
import pathlib
import resource
import types

import numpy as np
import pytest

from mtp_jax.data import shards
from mtp_jax.data.folder import Damaged, Unreadable

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


@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
def test_every_token_is_found_in_its_document(tmp_path, stream_of, layout):
  stream, lengths = stream_of(tmp_path, *layout), [*itertools.chain(*layout)]
  starts = np.cumsum([0, *lengths])
  expected = [(i, starts[i]) for i, length in enumerate(lengths) for _ in range(length)]
  assert [stream.document_at(position) for position in range(stream.tokens)] == expected


def test_memory_and_open_files_are_bounded(tmp_path, stream_of, monkeypatch):
  monkeypatch.setattr(shards, 'OPEN_FILES', 3)
  monkeypatch.setattr(shards, 'CACHE_BYTES', 4 * BLOCK * 2)
  stream = stream_of(tmp_path, *[[2 * BLOCK]] * 8)
  for start in np.random.default_rng(0).integers(0, 16 * BLOCK, 200):
    stream.read(start, start + 3)
    assert len(shards._READERS) <= 3 and len(stream._blocks) <= 4
  assert np.array_equal(stream.read(0, 16 * BLOCK), expected(*[2 * BLOCK] * 8))


@pytest.fixture
def few_files():
  """Leaves only so many files that this process may open; the hard limit stays as it is."""
  old, held = resource.getrlimit(resource.RLIMIT_NOFILE), []
  shards._READERS.close()

  def leave(count: int):
    highest = max(map(int, os.listdir('/proc/self/fd')))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + count + 1, old[1]))
    with contextlib.suppress(OSError):
      while True:
        held.append(os.open(os.devnull, os.O_RDONLY))
    for _ in range(count):
      os.close(held.pop())
  yield leave
  shards._READERS.close()
  for descriptor in held:
    os.close(descriptor)
  resource.setrlimit(resource.RLIMIT_NOFILE, old)


@pytest.mark.parametrize('streams, more', [(1, 5), (8, 5), (8, 1), (3, 20)])
def test_any_number_of_streams_is_read_with_few_files(tmp_path, stream_of, few_files, monkeypatch, streams, more):
  """The soft limit cannot be raised here: many shards of many streams share what is left."""
  monkeypatch.setattr(shards, '_files_allowed', lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0])
  all_of_them = [stream_of(tmp_path / str(i), *[[2 * BLOCK]] * 16) for i in range(streams)]
  few_files(more)
  for start in range(0, 32 * BLOCK, 2 * BLOCK):
    for stream in all_of_them:
      assert len(stream.read(start, start + 3)) == 3


def test_the_soft_limit_of_open_files_is_raised_as_far_as_the_hard_one(tmp_path, stream_of, few_files, monkeypatch):
  few_files(2)
  stream = stream_of(tmp_path, *[[2 * BLOCK]] * 40)
  stream.read(0, 80 * BLOCK)
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  assert soft == min(hard, 4 * shards.OPEN_FILES) and len(shards._READERS) == 40
  del stream
  gc.collect()
  assert not len(shards._READERS)


@pytest.mark.parametrize('cause', ['no file left', 'no permission', 'a failure of the reader'])
def test_what_cannot_be_read_now_is_never_called_damaged(tmp_path, stream_of, few_files, monkeypatch, cause):
  stream, whole = stream_of(tmp_path, [3 * BLOCK], [20]), expected(3 * BLOCK, 20)
  with monkeypatch.context() as patch:
    patch.setattr(shards, '_files_allowed', lambda: 4)
    if cause == 'no file left':
      few_files(0)
      message = r'train-00001.*: cannot be read \(Too many open files\); allow more, such as: ulimit -n 4096$'
    elif cause == 'no permission':
      def refuse(*args):
        raise PermissionError(errno.EACCES, 'Permission denied')
      patch.setattr(stream.folder, 'local_copy', refuse)
      message = r'train-00001.array_record: cannot be read \(Permission denied\)$'
    else:
      patch.setattr(shards, 'ArrayRecordReader', lambda *args: types.SimpleNamespace(num_records=lambda: 0))
      message = 'train-00001.array_record: every byte is what was written, but has 0 blocks, but 3 in the index'
    with pytest.raises(Unreadable, match=message):
      stream.read(3 * BLOCK, 3 * BLOCK + 20)
  resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
  assert np.array_equal(stream.read(0, len(whole)), whole)


def test_a_shard_that_is_gone_or_changed_is_damaged(tmp_path, stream_of):
  stream = stream_of(tmp_path, [20], [3 * BLOCK])
  paths = [pathlib.Path(stream.folder.path(shard.file)) for shard in stream.shards]
  paths[0].unlink()
  paths[1].write_bytes(paths[1].read_bytes()[:-100])
  with pytest.raises(Damaged, match='train-00000.array_record: is missing; restore the file'):
    stream.read(0, 3)
  with pytest.raises(Damaged, match='train-00001.array_record: (has 0 blocks|cannot be opened)'):
    stream.read(20, 23)


def test_a_block_of_another_size_is_no_block_of_this_shard(tmp_path, stream_of):
  stream, other = stream_of(tmp_path / 'one', [BLOCK + 3]), stream_of(tmp_path / 'other', [BLOCK + 5])
  path, other_path = (pathlib.Path(s.folder.path(s.shards[0].file)) for s in (stream, other))
  path.write_bytes(other_path.read_bytes())
  with pytest.raises(Damaged, match='train-00000.array_record: block 1 has 10 bytes; restore the file'):
    stream.read(0, BLOCK + 3)
