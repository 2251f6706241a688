"""A prepared set is the same bytes however it was made; nothing is lost, repeated or made up."""
import dataclasses
import itertools
import os
import shutil

import kills
import numpy as np
import pytest
from experiments import all_texts, prepare_bytes

from mtp_jax import tokenizer
from mtp_jax.config import BadInput
from mtp_jax.data import prepare as preparing
from mtp_jax.data.files import files
from mtp_jax.data.folder import Folder
from mtp_jax.data.parts import Options
from mtp_jax.data.prepare import prepare, prepare_once
from mtp_jax.data.prepared_set import open_set
from mtp_jax.data.records import Reading

BYTES = tokenizer.load('bytes')
OPTIONS = Options(validation_share=0.2, shard_bytes=3000)


def test_every_document_is_there_once_between_bos_and_eos(corpus, tmp_path):
  prepared = prepare_bytes(corpus[0], tmp_path / 'set')
  assert all_texts(prepared) == corpus[1]
  assert prepared.index['records'] == 200 and prepared.index['bad'] == {}
  for stream in (prepared.train, prepared.validation):
    tokens = stream.read(0, stream.tokens)
    starts, ends = np.flatnonzero(tokens == BYTES.bos), np.flatnonzero(tokens == BYTES.eos)
    assert len(starts) == len(ends) == stream.documents
    assert tokens[0] == BYTES.bos and np.array_equal(starts[1:], ends[:-1] + 1)
    assert stream.bytes == len(tokens) - 2 * stream.documents
  assert len(prepared.train.shards) > 5


@pytest.mark.parametrize('workers', [1, 2, 5])
def test_the_number_of_workers_does_not_show(corpus, tmp_path, workers):
  prepare_bytes(corpus[0], tmp_path / 'one')
  prepare_bytes(corpus[0], tmp_path / 'other', workers)
  names = set(kills.contents(tmp_path / 'one'))
  assert kills.contents(tmp_path / 'one') == kills.contents(tmp_path / 'other')
  assert {'index.json', 'bad_records.jsonl'} < names
  assert not [name for name in names if 'plan' in name or 'parts' in name]


def test_nor_does_the_place_of_the_corpus(corpus, tmp_path):
  shutil.copytree(corpus[0], tmp_path / 'elsewhere' / 'corpus')
  prepare_bytes(corpus[0], tmp_path / 'one')
  prepare_bytes(tmp_path / 'elsewhere' / 'corpus', tmp_path / 'other')
  assert kills.contents(tmp_path / 'one') == kills.contents(tmp_path / 'other')


@pytest.mark.parametrize('records, share', [(0, 0.2), (1, 0.2), (9, 1 - 1e-9)])
def test_an_empty_split_is_one_line(tmp_path, records, share):
  (tmp_path / 'in.jsonl').write_text('{"text": "one"}\n' * records)
  message = (f'^--input: of {records} records none is left for the train split; '
             f'give at least two different documents, and check --validation_share={share}$')
  with pytest.raises(BadInput, match=message):
    prepare_bytes(tmp_path / 'in.jsonl', tmp_path / 'set', validation_share=share)


def test_large_vocabularies_take_four_bytes(corpus, tmp_path):
  class Large(tokenizer.Bytes):
    def encode(self, text):
      return super().encode(text) + 65_500

    def decode(self, ids):
      return super().decode(ids - 65_500)
  large = Large(size=65_800, digest='large')
  prepared = prepare(files((str(corpus[0]),), ''), large, OPTIONS, tmp_path / 'set', 0, '')
  assert prepared.index['dtype'] == '<u4' and prepared.train.read(0, 1000).max() > 65_535
  assert decoded(prepared, large) == corpus[1]


def decoded(prepared, tokens) -> list[bytes]:
  streams = prepared.train, prepared.validation
  return sorted(tokens.decode(stream.document(i)) for stream in streams for i in range(stream.documents))


def test_inputs_that_change_while_they_are_read_are_refused(corpus, tmp_path):
  inputs = files((str(corpus[0]),), '')
  for name, content in (('a.jsonl', b'{"text": "shorter"}\n'), ('3.txt', b'longer ' * 999)):
    before = (corpus[0] / name).read_bytes()
    (corpus[0] / name).write_bytes(content)
    message = (rf"^--input: '.*/{name}' had {len(before):,} bytes, and {len(content):,} when it was read; "
               'delete .* and run again when nothing writes to that file$')
    with pytest.raises(BadInput, match=message):
      prepare(inputs, BYTES, OPTIONS, tmp_path / f'set-{name}', 0, '--input')
    (corpus[0] / name).write_bytes(before)


def test_a_damaged_input_stops_with_its_name(corpus, tmp_path):
  (corpus[0] / 'b.jsonl.gz').write_bytes((corpus[0] / 'b.jsonl.gz').read_bytes()[:-30])
  message = (r"^--input: '.*b.jsonl.gz' is damaged or cut off after line \d+, .*; "
             'fetch it again or leave it out$')
  with pytest.raises(BadInput, match=message):
    prepare_bytes(corpus[0], tmp_path / 'set', workers=2)


def test_a_file_in_place_of_the_folder_is_left_alone(corpus, tmp_path):
  (tmp_path / 'set').write_text('mine')
  with pytest.raises(BadInput, match=r'^--output=.*/set: cannot be a folder .*; choose another$'):
    prepare_bytes(corpus[0], tmp_path / 'set')
  assert (tmp_path / 'set').read_text() == 'mine'


def test_a_folder_of_other_files_is_left_alone(corpus, tmp_path):
  (tmp_path / 'set').mkdir()
  (tmp_path / 'set/mine.txt').write_text('mine')
  message = r'^--output=.*/set: holds files that are no prepared set, such as mine.txt; choose an empty folder$'
  with pytest.raises(BadInput, match=message):
    prepare_bytes(corpus[0], tmp_path / 'set')
  assert [path.name for path in (tmp_path / 'set').iterdir()] == ['mine.txt']


@pytest.mark.parametrize('options, message', [
    (dict(validation_share=0.0), '--validation_share=0.0: must be above 0 and below 1'),
    (dict(bad_share=1.1), '--bad_share=1.1: must be at least 0 and at most 1'),
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

  def fingerprint(**options):
    return prepare_bytes(corpus[0], tmp_path / str(next(number)), **options).fingerprint
  original = fingerprint()
  others = {fingerprint(validation_share=0.3), fingerprint(reading=Reading(keep=('nul',)))}
  other = dataclasses.replace(BYTES, digest='x')
  others.add(prepare(files((str(corpus[0]),), ''), other, OPTIONS, tmp_path / 'other', 0, '').fingerprint)
  content = (corpus[0] / '3.txt').read_bytes()
  (corpus[0] / '3.txt').write_bytes(content[:-1] + b'\1')  # as long as before
  others.add(fingerprint())
  (corpus[0] / '3.txt').write_bytes(content)
  (corpus[0] / '3.txt').rename(corpus[0] / 'new.txt')
  others.add(fingerprint())
  assert len(others) == 5 and original not in others
  (corpus[0] / 'new.txt').rename(corpus[0] / '3.txt')
  assert fingerprint() == original


def test_text_is_prepared_once_for_each_content(corpus, tmp_path, monkeypatch):
  (corpus[0] / 'a.jsonl').unlink()
  (corpus[0] / 'b.jsonl.gz').unlink()

  def once(share=0.2):
    return prepare_once((str(corpus[0]),), BYTES, share, str(tmp_path / 'cache'), 'config.data.paths')
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
  inputs = files((str(corpus[0]),), '')
  prepared, _ = (prepare(inputs, tokens, OPTIONS, tmp_path / str(n), n, '') for n in (0, 2))
  assert kills.contents(tmp_path / '0') == kills.contents(tmp_path / '2')
  assert (tmp_path / '0/tokenizer.model').read_bytes() == sentencepiece_model
  assert prepared.index['tokenizer'] == 'tokenizer.model'
  assert decoded(prepared, tokens) == corpus[1]
