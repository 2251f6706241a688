"""What a config trains on, and what a resumed run says when that has changed."""
import copy
import dataclasses
import hashlib
import json

import numpy as np
import pytest
from experiments import all_texts

from mtp_jax import tokenizer
from mtp_jax.config import BadInput, Config, DataConfig
from mtp_jax.data.corpus import difference, open_corpus, tokenizer_of
from mtp_jax.data.files import files
from mtp_jax.data.folder import Damaged
from mtp_jax.data.parts import Options
from mtp_jax.data.prepare import prepare

BYTES = tokenizer.load('bytes')


@pytest.fixture
def sets(tmp_path):
  """Two prepared sets, of 30 documents of 'a' and 10 of 'b', all of different lengths."""
  paths = []
  for letter, count in (('a', 30), ('b', 10)):
    (tmp_path / letter).mkdir()
    for i in range(count):
      (tmp_path / letter / f'{i}.txt').write_text(letter * (i + 1))
    paths.append(str(tmp_path / f'set-{letter}'))
    prepare(files((str(tmp_path / letter),), ''), BYTES, Options(validation_share=0.2), paths[-1], 0, '')
  return paths


@pytest.fixture
def config(sets, tmp_path):
  return DataConfig(sources=tuple(sets), length=16, cache=str(tmp_path / 'cache'))


def test_sources_are_mixed_by_weights_or_by_their_tokens(config):
  corpus = open_corpus(config, BYTES)
  a, b = (source.train.tokens for source in corpus.sources)
  assert corpus.weights == (a, b)
  for weights, share in (((), a / (a + b)), ((1.0, 3.0), 0.25)):
    corpus = open_corpus(dataclasses.replace(config, weights=weights), BYTES)
    assert corpus.weights == (weights or (a, b))
    batches = corpus.batches(corpus.rows(2), 8)
    tokens = np.concatenate([next(batches)['tokens'] for _ in range(50)])
    batches.close()
    assert abs((tokens == ord('a')).any(axis=1).mean() - share) < 0.02


@pytest.mark.parametrize('packing', ['stream', 'best_fit'])
@pytest.mark.parametrize('boundary', ['within', 'across'])
def test_rows_are_packed_and_bounded_as_the_config_says(config, packing, boundary):
  lines = []
  corpus = open_corpus(dataclasses.replace(config, packing=packing, boundary=boundary), BYTES)
  rows = corpus.rows(2, lines.append)
  batch = rows.batch(range(len(rows)))
  assert len(lines) == (packing == 'best_fit') and batch['segments'].shape == (len(rows), 18)
  assert (batch['segments'].max() > 1) == (boundary == 'within')
  if packing == 'best_fit':
    padding = (batch['segments'][:, :16] == 0).mean()
    sizes = [f'{len(source):,} rows, {source.packing.padding:.2%} padding' for source in rows.sources]
    assert 0 < padding < 0.1 and lines == ['best_fit: ' + ', '.join(sizes)]
  held_out = corpus.held_out(2)
  assert len(held_out) == sum(-(-source.validation.tokens // 16) for source in corpus.sources)


def test_without_sources_the_corpus_is_the_standard_library(tmp_path):
  corpus = open_corpus(DataConfig(cache=str(tmp_path)), BYTES)
  source, = corpus.sources
  documents = source.train.documents + source.validation.documents
  assert documents > 1000 and 10e6 < source.train.bytes + source.validation.bytes < 100e6
  assert 0.03 < source.validation.documents / documents < 0.07
  assert sum(text.startswith(b'"""Random variable generators.') for text in all_texts(source)) == 1  # random.py
  names = [file.name for file in files((), '') if file.bytes]
  assert len(names) == documents
  assert names == sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


@pytest.fixture
def pieces(config, tmp_path, sentencepiece_model):
  """The config of a set of SentencePiece tokens, and its tokenizer."""
  tokens = tokenizer.SentencePiece(sentencepiece_model)
  inputs = files((str(tmp_path / 'a'),), '')
  prepare(inputs, tokens, Options(validation_share=0.2), tmp_path / 'pieces', 0, '')
  return dataclasses.replace(config, sources=(str(tmp_path / 'pieces'),)), tokens


def test_a_set_of_another_tokenizer_is_refused_with_the_one_to_use(config, pieces):
  config_of_pieces, tokens = pieces
  message = (r"^config.data.sources: '.*/set-a' was prepared with another tokenizer than "
             r"config.data.tokenizer='x'; set config.data.tokenizer='bytes'$")
  with pytest.raises(BadInput, match=message):
    open_corpus(dataclasses.replace(config, tokenizer='x'), tokens)
  with pytest.raises(BadInput, match=r"set config.data.tokenizer='.*/pieces/tokenizer.model'$"):
    open_corpus(config_of_pieces, BYTES)


def test_the_tokenizer_of_a_set_is_its_own_or_an_error(config, pieces, tmp_path):
  config_of_pieces, tokens = pieces
  source, = open_corpus(config_of_pieces, tokens).sources
  assert tokenizer_of(source).digest == tokens.digest
  assert tokenizer_of(open_corpus(config, BYTES).sources[0]).digest == BYTES.digest
  model = tmp_path / 'pieces/tokenizer.model'
  model.write_bytes(tokenizer.train([b'other words ' * 50, bytes(range(32, 127))] * 9, 380))
  with pytest.raises(Damaged, match='model: is not the tokenizer of this set; restore the file'):
    tokenizer_of(source)
  model.unlink()
  with pytest.raises(Damaged, match='model: is missing; restore the file, or delete the folder'):
    open_corpus(config_of_pieces, tokens)


def test_the_identity_is_json_and_each_change_is_reported(config):
  mine = open_corpus(config, BYTES).identity
  assert json.loads(json.dumps(mine)) == mine and difference(mine, copy.deepcopy(mine)) == []

  def mutated(change):
    theirs = copy.deepcopy(mine)
    change(theirs)
    return difference(mine, theirs)
  a = mine['sources'][0]
  assert mutated(lambda x: x.update(length=32)) == ['length 32 -> 16']
  assert mutated(lambda x: x.update(seed=7)) == ['seed 7 -> 0']
  assert mutated(lambda x: x.update(packing='best_fit')) == ['packing best_fit -> stream']
  assert mutated(lambda x: x.update(boundary='across')) == ['boundary across -> within']
  assert mutated(lambda x: x.update(weights=[1.0, 2.0])) == ['weights [1.0, 2.0] -> []']
  assert mutated(lambda x: x.pop('order')) == ['order 1 -> 2']
  assert mutated(lambda x: x['sources'].pop()) == ['1 -> 2 sources']
  assert mutated(lambda x: x['sources'][0].update(fingerprint='f', documents=20, tokens=1000)) == [
      f'source 0: documents 20 -> {a["documents"]}, tokens 1,000 -> {a["tokens"]:,}']
  tokenizer_changed = mutated(lambda x: x['sources'][1].update(fingerprint='f', tokenizer='t'))
  assert tokenizer_changed == ['source 1: its tokenizer']
  assert mutated(lambda x: x['sources'][1].update(fingerprint='f')) == [
      'source 1: the same numbers of documents and tokens, but different ones, or different options']


@pytest.mark.parametrize('share, rows, undrawn', [(1e-3, 100, True), (1e-5, 50_000, True), (0.1, 100, False)])
def test_a_source_of_which_a_run_draws_no_row_is_told(config, share, rows, undrawn):
  lines = open_corpus(dataclasses.replace(config, weights=(1 - share, share)), BYTES).left_out(rows)
  url = config.sources[1]
  line = (f'config.data.weights: source 1, {url}, has a share of {share:.2g}: '
          f'none of the {rows:,} rows of this run comes from it')
  assert lines == [line] * undrawn


@pytest.mark.parametrize('change, message', [
    (dict(sources=('a',), paths=('b',)),
     "config.data.paths=('b',): give either paths or sources; prepare the paths to have them as a source"),
    (dict(sources=('a', 'b'), weights=(1.0,)),
     'config.data.weights=(1.0,): must be 2 numbers, one per source, or () for their sizes'),
    (dict(weights=(1.0,)),
     'config.data.weights=(1.0,): must be 0 numbers, one per source, or () for their sizes'),
    (dict(sources=('a', 'b'), weights=(1.0, 0.0)),
     'config.data.weights=(1.0, 0.0): must be positive; leave out a source that has no weight'),
    (dict(seed=2**32), 'config.data.seed=4294967296: must be at least 0 and below 2**32'),
    (dict(packing='bestfit'), "config.data.packing='bestfit': did you mean 'best_fit'?"),
    (dict(boundary='document'), "config.data.boundary='document': valid names: within, across"),
    (dict(on_damage='skip'), "config.data.on_damage='skip': valid names: stop, quarantine")])
def test_bad_fields_are_one_line(change, message):
  with pytest.raises(BadInput) as error:
    Config(data=DataConfig(**change))
  assert str(error.value) == message


def test_a_source_that_is_no_set_is_one_line(config, tmp_path):
  message = (r"^config.data.sources: '.*/a' holds no prepared set; "
             'make one with: python -m mtp_jax prepare')
  with pytest.raises(BadInput, match=message):
    open_corpus(dataclasses.replace(config, sources=(str(tmp_path / 'a'),)), BYTES)


def test_every_set_of_ones_own_for_validation_is_held_out_whole(config, sets):
  for chosen, own in ((sets[:1], sets[1:]), (sets[1:], sets), (sets, sets[:1])):
    corpus = open_corpus(dataclasses.replace(config, sources=tuple(chosen), validation=tuple(own)), BYTES)
    streams = [stream for s in corpus.validation_sets for stream in (s.train, s.validation)]
    assert sum(stream.tokens for stream in streams) == sum(stream.tokens for stream in corpus.validation)
    assert len(corpus.held_out(2)) == sum(-(-stream.tokens // 16) for stream in streams)
    assert difference(corpus.identity, open_corpus(dataclasses.replace(config, sources=tuple(chosen)), BYTES).identity)


@pytest.mark.parametrize('field', ['paths', 'validation'])
def test_an_empty_name_is_refused(config, field):
  with pytest.raises(BadInput, match=f'config.data.{field}: holds an empty name'):
    open_corpus(dataclasses.replace(config, **{'sources': (), 'paths': ('tests',), field: ('',)}), BYTES)
