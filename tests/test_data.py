"""Rows against a double loop, order against the uninterrupted run, the cache against itself."""
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from mtp_jax import data
from mtp_jax import tokenizer as tokenizers
from mtp_jax.config import BadInput, DataConfig

PAD = 999
BYTES = tokenizers.load('bytes')


def split_of(folder: pathlib.Path, lengths) -> data.Split:
  """A stream of documents of the given lengths; its tokens count 0, 1, 2, .."""
  offsets = np.cumsum([0, *lengths])
  folder.mkdir(exist_ok=True)
  np.arange(offsets[-1], dtype='<u2').tofile(folder / 'train.tokens')
  np.save(folder / 'train.offsets.npy', offsets.astype(np.int64))
  return data.Split(str(folder / 'train'), '<u2', len(lengths), 0)


def corpus(folder: pathlib.Path, count: int = 40) -> pathlib.Path:
  folder.mkdir()
  for i in range(count):
    (folder / f'{i:03}.txt').write_bytes(bytes([i]) * (i + 1))
  return folder


def texts(split: data.Split) -> list[bytes]:
  return [BYTES.decode(split.document(i)) for i in range(split.documents)]


def rows_by_hand(lengths, L, M):
  stream = [(document, i) for document, length in enumerate(lengths) for i in range(length)]
  for start in range(0, len(stream), L):
    row = {'tokens': [], 'segments': [], 'positions': []}
    seen = []
    for t in range(start, start + L + M):
      if t < len(stream):
        document, i = stream[t]
        if document not in seen:
          seen.append(document)
          first = i
        row['tokens'].append(t)
        row['segments'].append(len(seen))
        row['positions'].append(i - first)
      else:
        row['tokens'].append(PAD)
        row['segments'].append(0)
        row['positions'].append(0)
    yield row


def test_two_documents_and_the_end_of_the_stream_as_a_table(tmp_path):
  rows = data.Rows(split_of(tmp_path, [3, 1, 4]), length=5, futures=2, pad=PAD)
  assert [{name: row[name].tolist() for name in row} for row in (rows[0], rows[1])] == [
      {'tokens': [0, 1, 2, 3, 4, 5, 6], 'segments': [1, 1, 1, 2, 3, 3, 3], 'positions': [0, 1, 2, 0, 0, 1, 2]},
      {'tokens': [5, 6, 7, PAD, PAD, PAD, PAD], 'segments': [1, 1, 1, 0, 0, 0, 0], 'positions': [0, 1, 2, 0, 0, 0, 0]},
  ]


@pytest.mark.parametrize('M', range(1, 9))
def test_rows_are_those_of_a_double_loop(tmp_path, M):
  random = np.random.default_rng(M)
  cases = [[1], [1] * 30, [100], [16, 16, 16], [15, 1, 17]]
  cases += [random.choice([1, 2, 3, 7, 50], size=random.integers(1, 20)) for _ in range(8)]
  for case, (lengths, L) in enumerate(itertools.product(cases, [1, 5, 16])):
    rows = data.Rows(split_of(tmp_path / str(case), lengths), L, M, PAD)
    expected = list(rows_by_hand(lengths, L, M))
    assert len(rows) == len(expected) == -(-sum(lengths) // L)
    for row, by_hand in zip(rows, expected, strict=True):
      assert {name: values.tolist() for name, values in row.items()} == by_hand
      assert all(values.dtype == np.int32 and values.shape == (L + M,) for values in row.values())


def test_there_is_no_row_outside(tmp_path):
  rows = data.Rows(split_of(tmp_path, [7]), 5, 2, PAD)
  for i in (-1, 2):
    with pytest.raises(IndexError):
      rows[i]


@pytest.fixture
def rows(tmp_path):
  """23 rows of which the last is cut short."""
  return data.Rows(split_of(tmp_path / 'stream', [1, 90, 3, 40, 2, 44]), length=8, futures=3, pad=PAD)


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def firsts(batch):
  """Which rows: the first token of each, which counts from 0, over L."""
  return (batch['tokens'][:, 0] // 8).tolist()


def test_every_token_is_an_input_once_an_epoch(rows):
  inputs = np.concatenate([batch['tokens'][:, :8].ravel() for batch in take(data.batches(rows, 1, seed=3), len(rows))])
  assert sorted(inputs[inputs != PAD]) == list(range(180))


def test_epochs_are_permutations_in_another_order(rows):
  drawn = sum([firsts(batch) for batch in take(data.batches(rows, 4, seed=3), 23)], [])  # 4 epochs of 23
  epochs = [drawn[i:i + 23] for i in range(0, 92, 23)]
  assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
  assert all(a != b for a, b in itertools.combinations([*epochs, list(range(23))], 2))


def test_seed_fixes_the_order(rows):
  one, same, other = ([firsts(b) for b in take(data.batches(rows, 5, seed), 8)] for seed in (1, 1, 2))
  assert one == same != other


def test_a_batch_may_be_larger_than_the_corpus(rows):
  batch = next(data.batches(rows, 50, seed=0))
  assert batch['tokens'].shape == batch['segments'].shape == batch['positions'].shape == (50, 11)
  assert sorted(firsts(batch)[:46]) == sorted(list(range(23)) * 2)


def whole(rows, count, steps, state=None):
  """The global batches that `count` processes draw together, their rows put back in order, and the state they agree on."""
  processes = [data.batches(rows, 8, seed=5, process_index=p, process_count=count) for p in range(count)]
  for process in processes if state else []:
    process.set_state(state)
  shares = [take(process, steps) for process in processes]
  states = [process.get_state() for process in processes]
  assert all(s == states[0] for s in states) and all(len(firsts(b)) == 8 // count for share in shares for b in share)
  together = [{name: np.stack([b[name] for b in step], axis=1).reshape(8, -1) for name in step[0]} for step in zip(*shares)]
  return [{name: values.tolist() for name, values in batch.items()} for batch in together], json.loads(json.dumps(states[0]))


def test_any_number_of_processes_draws_the_same_batches(rows):
  one, two, four = (whole(rows, count, steps=10)[0] for count in (1, 2, 4))
  assert one == two == four


def test_resuming_at_every_point_continues_as_if_uninterrupted(rows):
  uninterrupted, _ = whole(rows, 1, steps=12)
  for point in range(12):
    before, state = whole(rows, 1, point)
    after, _ = whole(rows, 1, 12 - point, state)
    assert before + after == uninterrupted


def test_the_number_of_processes_may_change_on_the_way(rows):
  uninterrupted, _ = whole(rows, 1, steps=12)
  a, state = whole(rows, 2, 3)
  b, state = whole(rows, 1, 4, state)
  c, state = whole(rows, 8, 2, state)
  d, state = whole(rows, 4, 3, state)
  assert a + b + c + d == uninterrupted and state == {'global_next_index': 12 * 8}


def test_a_share_must_come_out_even(rows):
  with pytest.raises(BadInput, match=r'^config\.train\.batch=9: must be a multiple of the 2 processes$'):
    data.batches(rows, 9, 0, process_count=2)
  with pytest.raises(BadInput, match='multiple of the 2 processes'):
    next(data.validation_batches(rows, 9, process_count=2))


@pytest.mark.parametrize('limit', [None, 1, 8, 10, 22, 23, 24])
@pytest.mark.parametrize('count', [1, 2, 4])
def test_validation_sees_each_row_once_or_an_even_sample_in_order_then_padding(rows, limit, count):
  processes = [data.validation_batches(rows, 8, limit, p, count) for p in range(count)]
  together = [np.stack(step, axis=1).reshape(8, -1) for step in zip(*([b['tokens'] for b in p] for p in processes), strict=True)]
  segments = [b['segments'] for b in data.validation_batches(rows, 8, limit)]
  n = min(limit or 23, 23)
  tokens = np.concatenate(together)
  assert tokens.shape == (-(-n // 8) * 8, 11)
  assert np.array_equal(tokens[:n], np.stack([rows[i * 23 // n]['tokens'] for i in range(n)]))
  assert (tokens[n:] == PAD).all() and not np.concatenate(segments)[n:].any() and np.concatenate(segments)[:n, 0].all()


@pytest.fixture
def config(tmp_path):
  return DataConfig(paths=(str(corpus(tmp_path / 'corpus')),), cache=str(tmp_path / 'cache'), validation_share=0.2)


def test_streams_hold_every_document_between_bos_and_eos(config):
  prepared = data.prepare(config, BYTES)
  for split in (prepared.train, prepared.validation):
    documents = np.split(split.tokens, split.offsets[1:-1])
    assert len(documents) == split.documents and split.tokens.dtype == np.uint16
    for i, ids in enumerate(documents):
      assert ids[0] == BYTES.bos and ids[-1] == BYTES.eos and np.array_equal(split.document(i), ids[1:-1])
    assert split.document(0).dtype == np.int32
    assert split.bytes == sum(map(len, texts(split))) == len(split.tokens) - 2 * split.documents
  assert sorted(texts(prepared.train) + texts(prepared.validation)) == [bytes([i]) * (i + 1) for i in range(40)]


def test_the_split_and_the_order_are_those_of_the_hashed_names(config):
  share = {i: int(hashlib.sha256(f'corpus/{i:03}.txt'.encode()).hexdigest()[:16], 16) / 2**64 for i in range(40)}
  order = sorted(share, key=share.get)
  prepared = data.prepare(config, BYTES)
  assert [text[0] for text in texts(prepared.validation)] == [i for i in order if share[i] < 0.2]
  assert [text[0] for text in texts(prepared.train)] == [i for i in order if share[i] >= 0.2]


def test_adding_a_file_moves_no_other_across_the_split(config, tmp_path):
  before = data.prepare(config, BYTES)
  (tmp_path / 'other.txt').write_bytes(b'other')
  after = data.prepare(dataclasses.replace(config, paths=(*config.paths, str(tmp_path / 'other.txt'))), BYTES)
  assert set(texts(before.train)) <= set(texts(after.train)) and set(texts(before.validation)) <= set(texts(after.validation))


@pytest.mark.parametrize('share', [1e-9, 1 - 1e-9])
def test_both_splits_hold_a_document_whatever_the_share(config, share):
  prepared = data.prepare(dataclasses.replace(config, validation_share=share), BYTES)
  assert [prepared.validation.documents, prepared.train.documents] == ([1, 39] if share < 0.5 else [39, 1])


def test_large_vocabularies_take_four_bytes(config):
  class Large(tokenizers.Bytes):
    def encode(self, text):
      return super().encode(text) + 65_500
  split = data.prepare(config, Large(size=65_536, digest='large')).train
  assert split.tokens.dtype == np.uint32 and split.tokens.max() > 65_500
  assert all(len(set(split.document(i))) == 1 for i in range(split.documents))


def test_preparing_twice_reads_the_cache(config, monkeypatch):
  first = data.prepare(config, BYTES)
  monkeypatch.setattr(data, '_write', None)
  second = data.prepare(config, BYTES)
  assert first == second and np.array_equal(first.train.tokens, second.train.tokens)


def test_preparing_again_from_nothing_gives_identical_files(config):
  folder = pathlib.Path(data.prepare(config, BYTES).directory)
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  shutil.rmtree(folder)
  data.prepare(config, BYTES)
  assert before == {path.name: path.read_bytes() for path in folder.iterdir()} and len(before) == 5
  index = json.loads(before['index.json'])
  for name, written in itertools.chain(*(split['files'].items() for split in index['splits'].values())):
    assert written == {'bytes': len(before[name]), 'sha256': hashlib.sha256(before[name]).hexdigest()}


def test_the_fingerprint_does_not_depend_on_where_the_corpus_lies(config, tmp_path):
  before = data.prepare(config, BYTES)
  shutil.copytree(tmp_path / 'corpus', tmp_path / 'elsewhere' / 'corpus')
  assert data.prepare(dataclasses.replace(config, paths=(str(tmp_path / 'elsewhere' / 'corpus') + '/',)), BYTES) == before


def test_another_document_name_tokenizer_or_share_is_another_fingerprint(config, tmp_path):
  folder = tmp_path / 'corpus'
  fingerprints = [data.prepare(config, BYTES).fingerprint]
  fingerprints.append(data.prepare(config, dataclasses.replace(BYTES, digest='another')).fingerprint)
  fingerprints.append(data.prepare(dataclasses.replace(config, validation_share=0.3), BYTES).fingerprint)
  (folder / '000.txt').write_bytes(b'\1')  # as long as before
  fingerprints.append(data.prepare(config, BYTES).fingerprint)
  (folder / '000.txt').rename(folder / 'new.txt')
  fingerprints.append(data.prepare(config, BYTES).fingerprint)
  (folder / 'new.txt').unlink()
  fingerprints.append(data.prepare(config, BYTES).fingerprint)
  assert len(set(fingerprints)) == 6


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_preparation_leaves_nothing(config, error):
  class Failing(tokenizers.Bytes):
    def encode(self, text):
      if len(text) == 40:
        raise error
      return super().encode(text)
  with pytest.raises(error):
    data.prepare(config, Failing())
  assert not list(pathlib.Path(config.cache).iterdir())
  assert len(data.prepare(config, BYTES).train.tokens)


def test_a_killed_preparation_is_never_used(config):
  code = f'''
import os, signal
from mtp_jax import data, tokenizer
from mtp_jax.config import DataConfig
class Killed(tokenizer.Bytes):
  def encode(self, text):
    if len(text) == 40:
      os.kill(os.getpid(), signal.SIGKILL)
    return super().encode(text)
data.prepare({config!r}, Killed())
'''
  environment = os.environ | {'PYTHONPATH': str(pathlib.Path(data.__file__).parents[1])}
  killed = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, timeout=60)
  assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
  left, = pathlib.Path(config.cache).iterdir()
  prepared = data.prepare(config, BYTES)
  assert prepared.directory != str(left) and sorted(texts(prepared.train) + texts(prepared.validation))[-1] == bytes([39]) * 40


def test_the_later_of_two_preparations_drops_its_work(config, monkeypatch):
  write = data._write_split

  def overtaken(folder, *arguments):
    monkeypatch.setattr(data, '_write_split', write)
    data.prepare(config, BYTES)
    return write(folder, *arguments)

  monkeypatch.setattr(data, '_write_split', overtaken)
  prepared = data.prepare(config, BYTES)
  assert [str(path) for path in pathlib.Path(config.cache).iterdir()] == [prepared.directory]
  assert len(texts(prepared.train) + texts(prepared.validation)) == 40


def test_a_document_that_changes_while_it_is_read_is_refused(config, tmp_path):
  class Slow(tokenizers.Bytes):
    def encode(self, text):
      for path in (tmp_path / 'corpus').iterdir():
        path.write_bytes(b'changed')
      return super().encode(text)
  with pytest.raises(BadInput, match=r'^config\.data\.paths: .* changed while it was read; run again'):
    data.prepare(config, Slow())
  assert not list(pathlib.Path(config.cache).iterdir())


@pytest.mark.parametrize('name', ['train.tokens', 'validation.tokens', 'train.offsets.npy', 'index.json'])
@pytest.mark.parametrize('harm', ['truncate', 'delete'])
def test_a_damaged_cache_is_refused_with_the_folder_to_delete(config, name, harm):
  folder = pathlib.Path(data.prepare(config, BYTES).directory)
  if harm == 'delete':
    (folder / name).unlink()
  else:
    os.truncate(folder / name, (folder / name).stat().st_size - 2)
  with pytest.raises(BadInput, match=rf"^config\.data\.cache: '{folder}' is damaged .*; delete that folder"):
    data.prepare(config, BYTES)
  shutil.rmtree(folder)
  data.prepare(config, BYTES)


def test_a_cache_that_cannot_be_written_is_named(config, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(BadInput, match=r"^config\.data\.cache='.*/file': cannot write there .*; give a folder"):
    data.prepare(dataclasses.replace(config, cache=str(tmp_path / 'file')), BYTES)


def test_a_split_pickles_without_its_tokens(config):
  split = data.prepare(config, BYTES).train
  tokens = split.tokens
  pickled = pickle.dumps(split)
  assert len(pickled) < 500 and np.array_equal(pickle.loads(pickled).tokens, tokens)


def test_files_and_directories_are_found_once_and_hidden_ones_are_not(tmp_path, monkeypatch):
  for name in ('a/one.txt', 'a/deep/two.bin', 'a/.hidden', 'a/.git/config', 'a/empty.txt', 'b/a/one.txt', 'single.txt', '.given/x.txt'):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('' if 'empty' in name else name)
  os.mkfifo(tmp_path / 'a/pipe')
  os.symlink(tmp_path / 'nowhere', tmp_path / 'a/broken')
  monkeypatch.setenv('HOME', str(tmp_path))
  given = ('~/a', str(tmp_path / 'a/one.txt'), str(tmp_path / 'single.txt'), '~/b/a', '~/.given')
  prepared = data.prepare(DataConfig(paths=given, cache='~/cache'), BYTES)
  found = sorted(texts(prepared.train) + texts(prepared.validation))
  assert found == [b'.given/x.txt', b'a/deep/two.bin', b'a/one.txt', b'b/a/one.txt', b'single.txt']
  assert prepared.directory.startswith(str(tmp_path / 'cache'))
  names = [d.name for d in data._documents(DataConfig(paths=given))]
  assert sorted(names) == ['.given/x.txt', 'a/deep/two.bin', 'a/one.txt', 'a/one.txt~', 'single.txt']


@pytest.mark.parametrize('given', ['missing', 'nothing', 'only hidden'])
def test_paths_without_files_are_refused(tmp_path, given):
  (tmp_path / 'nothing').mkdir()
  (tmp_path / 'only hidden').mkdir()
  (tmp_path / 'only hidden/.x').write_text('x')
  with pytest.raises(BadInput, match=rf"^config\.data\.paths: '.*/{given}' holds no file; give text files or directories of them$"):
    data.prepare(DataConfig(paths=(str(tmp_path / given),), cache=str(tmp_path / 'cache')), BYTES)


def test_one_document_is_too_few(tmp_path):
  (tmp_path / 'one.txt').write_text('one')
  (tmp_path / 'empty.txt').write_text('')
  with pytest.raises(BadInput, match=r'^config\.data\.paths=.*: 1 documents, and one must be held out; give two files'):
    data.prepare(DataConfig(paths=(str(tmp_path / 'one.txt'), str(tmp_path / 'empty.txt')), cache=str(tmp_path / 'cache')), BYTES)


def test_names_that_are_not_utf8_do_no_harm(tmp_path):
  corpus(tmp_path / 'corpus', 2)
  with open(os.fsencode(tmp_path / 'corpus') + b'/\xff.txt', 'wb') as file:
    file.write(b'x')
  prepared = data.prepare(DataConfig(paths=(str(tmp_path / 'corpus'),), cache=str(tmp_path / 'cache')), BYTES)
  assert prepared.train.documents + prepared.validation.documents == 3


@pytest.fixture(scope='module')
def library(tmp_path_factory):
  return data.prepare(DataConfig(cache=str(tmp_path_factory.mktemp('library'))), BYTES)


def test_without_paths_the_corpus_is_the_standard_library(library):
  train, validation = library.train, library.validation
  documents = train.documents + validation.documents
  assert documents > 1000 and 10e6 < train.bytes + validation.bytes < 100e6
  assert 0.03 < validation.documents / documents < 0.07
  assert sum(text.startswith(b'"""Random variable generators.') for text in texts(train) + texts(validation)) == 1  # random.py


def test_the_library_has_no_installed_packages_and_no_document_twice(library):
  names = [d.name for d in data._documents(DataConfig())]
  assert len(set(names)) == len(names) == library.train.documents + library.validation.documents
  assert names == sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
  assert {'random.py', 'json/decoder.py'} <= set(names) and all(name.endswith('.py') for name in names)
  assert not [name for name in names if 'site-packages' in name or 'dist-packages' in name]
