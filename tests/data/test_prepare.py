"""A prepared set is the same bytes however it was made; nothing is lost, repeated or made up."""
import dataclasses
import itertools
import os
import pathlib
import shutil

import kills
import numpy as np
import pytest
from experiments import all_texts, prepare_bytes, texts

from mtp_jax import tokenizer
from mtp_jax.config import BadInput
from mtp_jax.data import prepare as preparing
from mtp_jax.data.files import files, name_hash
from mtp_jax.data.folder import Folder
from mtp_jax.data.parts import Options
from mtp_jax.data.prepare import prepare, prepare_once
from mtp_jax.data.prepared_set import open_set
from mtp_jax.data.records import Reading

BYTES = tokenizer.load('bytes')


def test_every_document_is_there_once_between_bos_and_eos(corpus, tmp_path):
  found = prepare_bytes(corpus[0], tmp_path / 'set')
  assert all_texts(found) == corpus[1] and found.index['records'] == 200 and found.index['bad'] == {}
  for stream in (found.train, found.validation):
    tokens = stream.read(0, stream.tokens)
    starts, ends = np.flatnonzero(tokens == BYTES.bos), np.flatnonzero(tokens == BYTES.eos)
    assert len(starts) == len(ends) == stream.documents and tokens[0] == BYTES.bos and np.array_equal(starts[1:], ends[:-1] + 1)
    assert stream.bytes == len(tokens) - 2 * stream.documents
  assert len(found.train.shards) > 5


@pytest.mark.parametrize('workers', [1, 2, 5])
def test_the_number_of_workers_does_not_show(corpus, tmp_path, workers):
  one, other = (kills.contents(pathlib.Path(prepare_bytes(corpus[0], tmp_path / name, n).folder.url)) for name, n in (('one', 0), ('other', workers)))
  assert one == other and {'index.json', 'bad_records.jsonl'} < set(one) and not [name for name in one if 'plan' in name or 'parts' in name]


def test_nor_does_where_the_corpus_lies(corpus, tmp_path):
  shutil.copytree(corpus[0], tmp_path / 'elsewhere' / 'corpus')
  one, other = (kills.contents(pathlib.Path(prepare_bytes(folder, tmp_path / name).folder.url))
                for name, folder in (('one', corpus[0]), ('other', tmp_path / 'elsewhere' / 'corpus')))
  assert one == other


def test_a_document_is_held_out_if_the_hash_of_its_name_says_so(tmp_path):
  folder = tmp_path / 'corpus'
  folder.mkdir()
  for i in range(100):
    (folder / f'{i}.txt').write_text(str(i))
  found = prepare_bytes(folder, tmp_path / 'set')
  held_out = sorted(str(i).encode() for i in range(100) if name_hash(f'corpus/{i}.txt') < 0.2 * 2**64)
  assert sorted(texts(found.validation)) == held_out and len(held_out) > 10
  order = sorted(range(100), key=lambda i: name_hash(f'corpus/{i}.txt'))
  assert texts(found.train) == [str(i).encode() for i in order if str(i).encode() not in held_out]
  (folder / 'other.txt').write_text('other')
  assert set(texts(prepare_bytes(folder, tmp_path / 'more').validation)) - {b'other'} == set(held_out)


@pytest.mark.parametrize('kind', ['text', 'lines'])
def test_the_very_first_document_is_held_out_however_small_the_share(tmp_path, kind):
  (tmp_path / 'in').mkdir()
  for i in range(5):
    (tmp_path / 'in' / f'{i}{".jsonl" if kind == "lines" else ""}').write_text(str(i) if kind == 'text' else f'{{"text": "{i}a"}}\n{{"text": "{i}b"}}\n')
  found = prepare_bytes(tmp_path / 'in', tmp_path / 'set', validation_share=1e-9)
  first = min((file.hash, file.name) for file in files((str(tmp_path / 'in'),), ''))[1]
  assert texts(found.validation) == [first.removeprefix('in/').replace('.jsonl', 'a').encode()]
  assert found.train.documents == (4 if kind == 'text' else 9)


@pytest.mark.parametrize('content, share, split', [('', 0.2, 'train'), ('{"text": "one"}', 0.2, 'train'), ('{"text": "one"}\n' * 9, 1 - 1e-9, 'train')])
def test_an_empty_split_is_one_line(tmp_path, content, share, split):
  (tmp_path / 'in.jsonl').write_text(content)
  with pytest.raises(BadInput, match=rf'^--input: of {content.count("one")} records none is left for the {split} split; give at least two documents'):
    prepare_bytes(tmp_path / 'in.jsonl', tmp_path / 'set', validation_share=share)


def test_large_vocabularies_take_four_bytes(corpus, tmp_path):
  class Large(tokenizer.Bytes):
    def encode(self, text):
      return super().encode(text) + 65_500
  found = prepare(files((str(corpus[0]),), ''), Large(size=65_800, digest='large'), Options(validation_share=0.2), tmp_path / 'set', 0, '', note=print)
  assert found.index['dtype'] == '<u4' and found.train.read(0, 1000).max() > 65_535
  assert everything_shifted(found) == corpus[1]


def everything_shifted(found) -> list[bytes]:
  return sorted(bytes((stream.document(i) - 65_500).astype(np.uint8)) for stream in (found.train, found.validation) for i in range(stream.documents))


def test_inputs_that_change_while_they_are_read_are_refused(corpus, tmp_path):
  inputs = files((str(corpus[0]),), '')
  for name, content in (('a.jsonl', b'{"text": "shorter"}\n'), ('3.txt', b'longer ' * 999)):
    before = (corpus[0] / name).read_bytes()
    (corpus[0] / name).write_bytes(content)
    with pytest.raises(BadInput, match=rf"^--input: '.*/{name}' had {len(before):,} bytes, and {len(content):,} when it was read; delete .* and run again"):
      prepare(inputs, BYTES, Options(validation_share=0.2, shard_bytes=3000), tmp_path / f'set-{name}', 0, '--input', note=print)
    (corpus[0] / name).write_bytes(before)


def test_a_damaged_input_stops_with_its_name(corpus, tmp_path):
  (corpus[0] / 'b.jsonl.gz').write_bytes((corpus[0] / 'b.jsonl.gz').read_bytes()[:-30])
  with pytest.raises(BadInput, match=r"^--input: '.*b.jsonl.gz' is damaged or cut off after line \d+, .*; fetch it again or leave it out$"):
    prepare_bytes(corpus[0], tmp_path / 'set', workers=2)


@pytest.mark.parametrize('where', ['a file', 'full'])
def test_a_folder_that_is_none_of_ours_is_left_alone(corpus, tmp_path, where):
  if where == 'a file':
    (tmp_path / 'set').write_text('mine')
  else:
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set/mine.txt').write_text('mine')
  with pytest.raises(BadInput, match=r'^--output=.*/set: (cannot be a folder|holds files that are no prepared set, such as mine.txt; choose an empty folder)'):
    prepare_bytes(corpus[0], tmp_path / 'set')


@pytest.mark.parametrize('options, message', [
    (dict(validation_share=0.0), '--validation_share=0.0: must be above 0 and below 1'), (dict(bad_share=1.1), '--bad_share=1.1: must be at least 0 and at most 1'),
    (dict(shard_bytes=-1), '--shard_bytes=-1: must not be negative; 0 chooses by the size of the inputs')])
def test_bad_options_are_one_line(options, message):
  with pytest.raises(BadInput) as error:
    Options(**options)
  assert str(error.value) == message


def test_a_set_may_be_written_elsewhere(corpus, tmp_path, memory):
  prepare_bytes(corpus[0], tmp_path / 'here')
  prepare_bytes(corpus[0], 'memory://bucket/set')
  written = {path.rpartition('/')[2]: memory.cat_file(path) for path in memory.find('/bucket/set')}
  assert written == {path.name: path.read_bytes() for path in (tmp_path / 'here').iterdir()}
  assert all_texts(open_set(Folder('memory://bucket/set', ''), str(tmp_path / 'cache'))) == corpus[1]


def test_the_fingerprint_tells_contents_names_tokenizers_and_options_apart(corpus, tmp_path):
  number = itertools.count()
  fingerprint = lambda **options: prepare_bytes(corpus[0], tmp_path / str(next(number)), **options).fingerprint
  found = [fingerprint(), fingerprint(validation_share=0.3), fingerprint(reading=Reading(keep=('nul',)))]
  found.append(prepare(files((str(corpus[0]),), ''), dataclasses.replace(BYTES, digest='x'), Options(validation_share=0.2, shard_bytes=3000),
                       tmp_path / str(next(number)), 0, '', note=print).fingerprint)
  content = (corpus[0] / '3.txt').read_bytes()
  (corpus[0] / '3.txt').write_bytes(content[:-1] + b'\1')  # as long as before
  found.append(fingerprint())
  (corpus[0] / '3.txt').write_bytes(content)
  (corpus[0] / '3.txt').rename(corpus[0] / 'new.txt')
  found.append(fingerprint())
  assert len(set(found)) == 6
  (corpus[0] / 'new.txt').rename(corpus[0] / '3.txt')
  assert fingerprint() == found[0]


def test_text_is_prepared_once_for_each_content(corpus, tmp_path, monkeypatch):
  (corpus[0] / 'a.jsonl').unlink(), (corpus[0] / 'b.jsonl.gz').unlink()
  once = lambda share=0.2: prepare_once((str(corpus[0]),), BYTES, share, str(tmp_path / 'cache'), 'config.data.paths')
  first = once()
  other = once(0.3)
  monkeypatch.setattr(preparing, '_tokenize_missing', None)
  os.utime(corpus[0] / '3.txt')
  again = once()
  assert again.folder.url == first.folder.url != other.folder.url and len(all_texts(again)) == 20
  monkeypatch.undo()
  (corpus[0] / '3.txt').write_bytes(b'changed')
  assert once().folder.url != first.folder.url


def test_a_cache_that_cannot_be_written_is_named(corpus, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(BadInput, match=r"^config\.data\.cache='.*/file': cannot write there .*; give a folder"):
    prepare_once((str(corpus[0]),), BYTES, 0.2, str(tmp_path / 'file'), 'config.data.paths')


def test_sentencepiece_sets_carry_their_model(corpus, tmp_path, sentencepiece_model):
  tokens = tokenizer.SentencePiece(sentencepiece_model)
  inputs, options = files((str(corpus[0]),), ''), Options(validation_share=0.2, shard_bytes=3000)
  one, two = (prepare(inputs, tokens, options, tmp_path / str(n), n, '', note=print) for n in (0, 2))
  assert kills.contents(tmp_path / '0') == kills.contents(tmp_path / '2')
  assert (tmp_path / '0/tokenizer.model').read_bytes() == sentencepiece_model and one.index['tokenizer'] == 'tokenizer.model'
  assert sorted(tokens.decode(s.document(i)) for s in (one.train, one.validation) for i in range(s.documents)) == corpus[1]
