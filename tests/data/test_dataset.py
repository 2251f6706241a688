"""A dataset of one's own trains as prepared text does: the same tokens, mixed, resumed, refused when it changed."""
import dataclasses
import sys

import grain
import numpy as np
import pytest
from experiments import experiment

from mtp_jax import tokenizer
from mtp_jax.cli.main import main
from mtp_jax.config import BadInput, DataConfig
from mtp_jax.data.corpus import difference, open_corpus
from mtp_jax.data.dataset import dataset_once
from mtp_jax.train.fit import fit

BYTES = tokenizer.load('bytes')
TEXTS = [f'document {i} é ' + 'ab' * i for i in range(40)]


@pytest.fixture
def mine(tmp_path, monkeypatch):
  """A module of the user's, in the current folder, which returns what its `made` holds; all reads are listed."""
  (tmp_path / 'mine.py').write_text('made, reads = None, []\n'
                                    'def exits(data):\n  raise SystemExit(3)\n'
                                    'def documents(data):\n  return made\n')
  monkeypatch.chdir(tmp_path)
  monkeypatch.delitem(sys.modules, 'mine', raising=False)
  monkeypatch.setattr(sys, 'path', [*sys.path])
  monkeypatch.syspath_prepend(str(tmp_path))
  import mine

  def provide(documents, identity=None):
    mine.made = grain.MapDataset.source(documents).map(lambda x: mine.reads.append(1) or x)
    if identity is not None:
      mine.made.identity = identity
    return mine
  yield provide
  sys.modules.pop('mine')


@pytest.fixture
def config(tmp_path):
  return DataConfig(dataset='mine:documents', length=16, validation_share=0.2, cache=str(tmp_path / 'cache'))


def documents_of(stream) -> list[list[int]]:
  tokens = stream.read(0, stream.tokens).tolist()
  ends = [i + 1 for i, token in enumerate(tokens) if token == BYTES.eos]
  return [tokens[start:end] for start, end in zip([0, *ends], ends)]


@pytest.mark.parametrize('given', [TEXTS, [text.encode() for text in TEXTS],
                                   [BYTES.encode(text).tolist() for text in TEXTS],
                                   [BYTES.encode(text) for text in TEXTS]], ids=['str', 'bytes', 'list', 'array'])
def test_every_document_is_on_one_side_whether_given_as_text_or_as_ids(mine, config, given):
  mine([*given[:20], type(given[0])(b'') if isinstance(given[0], bytes) else given[0][:0], *given[20:]], 'v1')
  prepared = dataset_once(config, BYTES)
  found = documents_of(prepared.train) + documents_of(prepared.validation)
  assert sorted(found) == sorted([BYTES.bos, *BYTES.encode(text), BYTES.eos] for text in TEXTS)
  assert prepared.validation.documents > 2 and not prepared.verify()
  assert prepared.index['bad'] == {'empty': {'skipped': 1, 'kept': 0}}
  size = sum(len(text.encode()) for text in TEXTS)
  assert prepared.train.bytes + prepared.validation.bytes == size


def test_documents_that_grain_filtered_are_none(mine, config):
  module = mine(TEXTS, 'odd')
  identity, module.made = module.made.identity, module.made.filter(lambda text: len(text) % 2)
  module.made.identity = identity
  prepared = dataset_once(config, BYTES)
  assert prepared.train.documents + prepared.validation.documents == sum(len(text) % 2 for text in TEXTS)


def test_with_an_identity_documents_are_read_once_and_without_one_each_time_and_that_is_told(mine, config):
  lines = []
  module = mine(TEXTS, 'v1')
  first = dataset_once(config, BYTES, lines.append)
  reads = len(module.reads)
  assert dataset_once(config, BYTES, lines.append).fingerprint == first.fingerprint
  assert len(module.reads) == reads >= len(TEXTS) and not lines
  mine(TEXTS)
  without = [dataset_once(config, BYTES, lines.append) for _ in range(2)]
  assert len(module.reads) >= reads + 2 * len(TEXTS)
  assert [line for line in lines if 'has no identity' in line] == lines and len(lines) == 2
  assert without[0].fingerprint == without[1].fingerprint != first.fingerprint
  mine([*TEXTS[:-1], 'another'])
  assert dataset_once(config, BYTES).fingerprint != without[0].fingerprint


def test_it_is_mixed_with_prepared_sets_as_the_last_source(mine, config, tmp_path):
  prepared = experiment(tmp_path).data
  source = open_corpus(prepared, BYTES).sources[0].folder.url
  mine(['q' * 50 + str(i) for i in range(40)], 'q')
  corpus = open_corpus(dataclasses.replace(config, sources=(source,), weights=(1.0, 3.0)), BYTES)
  batches = corpus.batches(corpus.rows(2), 8)
  tokens = np.concatenate([next(batches)['tokens'] for _ in range(25)])
  batches.close()
  assert abs((tokens == ord('q')).any(axis=1).mean() - 0.75) < 0.02


def test_a_run_resumes_on_it_and_is_refused_when_its_tokens_changed(mine, tmp_path):
  config = experiment(tmp_path, data={'paths': (), 'dataset': 'mine:documents'}, train={'steps': 3})
  longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4))
  mine(TEXTS)
  identity = open_corpus(config.data, BYTES).identity
  fit(config, tmp_path / 'run')
  assert fit(longer, tmp_path / 'run').step == 4
  mine([*TEXTS, 'one more'])
  assert difference(open_corpus(config.data, BYTES).identity, identity)
  with pytest.raises(BadInput, match='documents 3. -> 3.|accept_changed'):
    fit(dataclasses.replace(longer, train=dataclasses.replace(config.train, steps=6)), tmp_path / 'run')


def test_a_single_long_text_is_split_by_position_and_ids_stay_whole(mine, config):
  book = '\n'.join(f'line {i} of a long book' for i in range(2000))
  mine([book], 'book')
  lines = []
  prepared = dataset_once(config, BYTES, lines.append)
  assert prepared.train.documents == prepared.validation.documents == 1 and 'the end of each' in lines[0]
  assert abs(prepared.validation.bytes / len(book) - 0.2) < 0.01
  mine([BYTES.encode(book)], 'book as ids')
  with pytest.raises(BadInput, match='of 1 documents none is left for the'):
    dataset_once(config, BYTES)


def test_beside_long_texts_a_document_of_ids_stays_whole_on_the_side_of_training(mine, config):
  book, ids = '\n'.join(f'line {i} of a long book' for i in range(2000)), BYTES.encode('as ids ' * 100)
  module = mine([])
  module.made = grain.MapDataset.source([0, 1]).map(lambda i: (book, ids)[i])
  prepared = dataset_once(config, BYTES)
  assert [BYTES.bos, *ids, BYTES.eos] in documents_of(prepared.train)
  assert prepared.validation.documents == 1 and prepared.train.documents == 2


def test_shards_are_closed_when_they_are_full(mine, config, monkeypatch):
  monkeypatch.setattr('mtp_jax.data.dataset.SHARD_TOKENS', 300)
  mine(TEXTS, 'v1')
  prepared = dataset_once(config, BYTES)
  assert len(prepared.train.shards) > 2 and not prepared.verify()
  assert len(documents_of(prepared.train)) + len(documents_of(prepared.validation)) == len(TEXTS)


class Failing:
  def __init__(self, error: BaseException):
    self.error = error

  def __len__(self):
    return 9

  def __getitem__(self, i):
    raise self.error


@pytest.mark.parametrize('dataset, documents, words', [
    ('mine', TEXTS, "must be 'package.module:function'"),
    ('nowhere.at_all:documents', TEXTS, 'ModuleNotFoundError'),
    ('mine:nothing', TEXTS, 'AttributeError'),
    ('mine:documents', [1.5] * 9, 'document 0 is float'),
    ('mine:documents', [[1.5]] * 9, 'document 0 is list'),
    ('mine:documents', [[[1], [2, 3]]] * 9, 'document 0 is list'),
    ('mine:documents', [{'text': 'a'}] * 9, 'document 0 is dict'),
    ('mine:documents', [[3], [259]] * 9, 'document 1 has ids from 259 to 259'),
    ('mine:documents', [[3], [3, 257]] * 9, 'document 1 holds bos 256, eos 257'),
    ('mine:documents', ['a', '\ud800'] * 9, 'document 1: is no UTF-8: .*surrogates'),
    ('mine:documents', ['a', b'caf\xe9'] * 9, 'document 1: is no UTF-8: .*0xe9'),
    ('mine:documents', [b'\xff\xfea\0'] * 9, 'document 0: is no UTF-8: .*0xff'),
    ('mine:documents', ['a'] * 9, r'none is left for the .*, and check config\.data\.validation_share=0\.2$'),
    ('mine:documents', Failing(KeyError('no 0')), 'document 0: KeyError'),
    ('mine:documents', Failing(SystemExit(3)), 'document 0: SystemExit: 3'),
    ('mine:exits', TEXTS, 'SystemExit: 3'),
    ('mine:documents', Failing(OSError(13, 'Permission denied', 'a.txt')), 'document 0: PermissionError: '),
    ('mine:documents', None, 'returns NoneType'),
    ('mine:documents', 'endless', 'has no end'),
    ('mine:documents', 'identity', 'its identity is 7')])
def test_what_is_no_dataset_of_documents_is_refused_in_a_line(mine, config, dataset, documents, words):
  module = mine(TEXTS if documents is None or isinstance(documents, str) else documents)
  if documents is None:
    module.made = None
  elif isinstance(documents, str):
    module.made = module.made.repeat() if documents == 'endless' else module.made
    module.made.identity = 7 if documents == 'identity' else 'x'
  with pytest.raises(BadInput, match=words) as refused:
    dataset_once(dataclasses.replace(config, dataset=dataset), BYTES)
  assert str(refused.value).startswith('config.data.dataset=') and '\n' not in str(refused.value)


def test_inspect_data_shows_it(mine, monkeypatch, capsys, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  mine(TEXTS, 'v1')
  assert main(['inspect-data', '--dataset=mine:documents', '--length=16', '--verify']) == 0
  out = capsys.readouterr().out
  assert 'read as a dataset' in out and 'every byte of every shard is what was written' in out
  assert main(['inspect-data']) == 2 and main(['inspect-data', '--data=a', '--dataset=mine:documents']) == 2
