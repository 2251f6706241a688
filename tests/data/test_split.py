"""What is held out depends on the documents' contents alone, and both sides have text."""
import os
import random
import shutil

import pytest
from experiments import prepare_bytes, texts

from mtp_jax import tokenizer
from mtp_jax.config import BadInput
from mtp_jax.data import prepare as preparing
from mtp_jax.data.files import files
from mtp_jax.data.parts import Options
from mtp_jax.data.prepare import prepare
from mtp_jax.data.split import GAP, Split, content_hash

BYTES = tokenizer.load('bytes')


@pytest.fixture
def folder(tmp_path):
  """100 text files; the same documents as lines, in an order of their own."""
  path = tmp_path / 'corpus'
  path.mkdir()
  for i in range(100):
    (path / f'{i}.txt').write_text(f'document {i}')
  lines = [f'{{"text": "document {i}"}}\n' for i in random.Random(0).sample(range(100), 100)]
  (tmp_path / 'lines.jsonl').write_text(''.join(lines))
  return path


def held_out(given, output, **options) -> set[bytes]:
  prepared = prepare_bytes(given, output, **options)
  return set(texts(prepared.validation))


def test_a_document_is_held_out_if_the_hash_of_its_content_is_small(folder, tmp_path):
  documents = {f'document {i}'.encode() for i in range(100)}
  expected = {text for text in documents if content_hash(text) < 0.2 * 2**64}
  prepared = prepare_bytes(folder, tmp_path / 'set')
  assert set(texts(prepared.validation)) == expected and 10 < len(expected) < 30
  assert set(texts(prepared.train)) == documents - expected


def test_names_places_formats_and_other_documents_do_not_matter(folder, tmp_path):
  expected = held_out(folder, tmp_path / 'set')
  shutil.copytree(folder, tmp_path / 'renamed')
  assert held_out(tmp_path / 'renamed', tmp_path / '1') == expected
  assert held_out(tmp_path / 'lines.jsonl', tmp_path / '2') == expected  # a file in place of a folder
  lines = (tmp_path / 'lines.jsonl').read_text().splitlines(keepends=True)
  (tmp_path / 'lines.jsonl').write_text(''.join(lines[1:]))  # without its first line
  first = lines[0][10:-3].encode()
  assert held_out(tmp_path / 'lines.jsonl', tmp_path / '3') == expected - {first}
  (folder / 'other').write_text('other')
  assert held_out(folder, tmp_path / '4') - {b'other'} == expected


def test_equal_documents_are_on_one_side(folder, tmp_path):
  shutil.copytree(folder, folder / 'again')
  prepared = prepare_bytes(folder, tmp_path / 'set')
  assert not set(texts(prepared.train)) & set(texts(prepared.validation))
  assert prepared.train.documents + prepared.validation.documents == 200


@pytest.mark.parametrize('share', [1e-9, 1 - 1e-9])
def test_both_sides_have_a_document_however_extreme_the_share(folder, tmp_path, share):
  prepared = prepare_bytes(tmp_path / 'lines.jsonl', tmp_path / 'set', validation_share=share)
  few, many = sorted((prepared.train, prepared.validation), key=lambda stream: stream.documents)
  assert (few.documents, many.documents) == (1, 99) and (few is prepared.validation) == (share < 0.5)


BOOK = ''.join(f'Line {i} of a book.\n' for i in range(5000)).encode()


@pytest.mark.parametrize('others', [{}, {'notes': b'a few notes of mine'}, {'a': b'x' * 40, 'b': b'y' * 30}])
@pytest.mark.parametrize('share, workers', [(0.01, 0), (0.05, 2), (0.3, 0)])
def test_the_end_of_one_long_document_is_held_out_after_a_gap(tmp_path, others, share, workers):
  (tmp_path / 'in').mkdir()
  for name, text in {'book.txt': BOOK, **others}.items():
    (tmp_path / 'in' / name).write_bytes(text)
  prepared = prepare_bytes(tmp_path / 'in', tmp_path / 'set', workers, validation_share=share)
  end, = texts(prepared.validation)
  begin, = (text for text in texts(prepared.train) if text.startswith(b'Line'))
  assert BOOK.startswith(begin) and BOOK.endswith(end) and begin.endswith(b'\n') and end.startswith(b'Line')
  assert 0.7 * share < len(end) / len(BOOK) <= share
  assert 0 < len(BOOK) - len(begin) - len(end) <= 2 * GAP
  assert sorted(texts(prepared.train)) == sorted([begin, *others.values()])


def test_a_split_by_position_cuts_no_character_and_leaves_short_documents_whole():
  split = Split(0.1, 0, by_position=True)
  for size in (700, 701, 999, 5000):
    text = ('é' * size).encode()
    (_, begin), (_, end) = split.sides(text, 0)
    assert set(begin.decode() + end.decode()) == {'é'} and len(begin) + len(end) < len(text)
  assert split.sides(b'short', 0) == [('train', b'short')]


def test_an_interrupted_second_reading_ends_with_the_same_bytes(tmp_path, monkeypatch):
  (tmp_path / 'in').mkdir()
  for i in range(3):
    (tmp_path / 'in' / f'{i}').write_bytes(BOOK + b'%d' % i)
  prepare_bytes(tmp_path / 'in', tmp_path / 'whole', validation_share=0.01)
  contents = lambda name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
  real, calls = preparing._tokenize_missing, []

  def interrupted(*args):
    calls.append(args)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return real(*args)
  monkeypatch.setattr(preparing, '_tokenize_missing', interrupted)
  with pytest.raises(KeyboardInterrupt):
    prepare_bytes(tmp_path / 'in', tmp_path / 'set', validation_share=0.01)
  assert not os.path.exists(tmp_path / 'set/index.json')
  prepare_bytes(tmp_path / 'in', tmp_path / 'set', validation_share=0.01)
  assert len(calls) == 3 and contents('set') == contents('whole')


def test_a_split_with_less_to_train_on_than_to_validate_is_refused(tmp_path):
  (tmp_path / 'in').mkdir()
  long = next(text for text in (b'%040d' % i for i in range(999)) if content_hash(text) < 0.2 * 2**64)
  short = next(text for text in (b'%d' % i for i in range(99)) if content_hash(text) > 0.2 * 2**64)
  (tmp_path / 'in/a').write_bytes(long)
  (tmp_path / 'in/b').write_bytes(short)
  with pytest.raises(BadInput, match=r'^--input: \d tokens would be left to train on, and 42 be held out; give more'):
    prepare_bytes(tmp_path / 'in', tmp_path / 'set')


def test_a_validation_set_of_ones_own_is_held_out_whole_and_not_trained_on(folder, tmp_path):
  (folder / 'own.jsonl').write_text('{"text": "own 1"}\n{"text": "own 2"}\n')
  own = files((str(folder / 'own.jsonl'), str(folder / '7.txt')), '--validation')
  for workers in (0, 2):
    prepared = prepare(files((str(folder),), '--input'), BYTES, Options(shard_bytes=100), tmp_path / str(workers),
                       workers, '--input', validation=own)
    assert sorted(texts(prepared.validation)) == [b'document 7', b'own 1', b'own 2']
    assert sorted(texts(prepared.train)) == sorted(b'document %d' % i for i in range(100) if i != 7)
  again = prepare(files((str(folder),), '--input'), BYTES, Options(shard_bytes=100), tmp_path / '0', 0, '--input',
                  validation=own)
  assert again.fingerprint == prepared.fingerprint
  with pytest.raises(BadInput, match='holds a set'):
    prepare(files((str(folder),), '--input'), BYTES, Options(shard_bytes=100), tmp_path / '0', 0, '--input')
