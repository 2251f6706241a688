"""Evaluation of one's own text: as if it were held out, from whatever it is given in."""
import json
import pathlib

import numpy as np
import pytest
from experiments import random_lm

import mtp_jax
from mtp_jax.config import BadInput
from mtp_jax.report import display


@pytest.fixture(scope='module')
def lm(tmp_path_factory):
  return random_lm(tmp_path_factory.mktemp('own'), model={'layers': 4, 'futures': 3})


@pytest.fixture(scope='module')
def documents(lm):
  """The held-out ones, as ids."""
  stream = lm.corpus.validation[0]
  return [stream.document(i) for i in range(stream.documents)]


def test_held_out_documents_handed_in_give_the_held_out_figures(lm, documents):
  texts, same = [lm.tokenizer.decode(ids) for ids in documents], json.dumps  # in which nan is nan
  held_out = lm.evaluate(by='kind')
  assert same(lm.evaluate(documents, by='kind')) == same(lm.evaluate(texts, by='kind')) == same(held_out)
  assert same(lm.evaluate(documents, rows=2)) == same(lm.evaluate(rows=2)) != same(lm.evaluate())


def test_text_bytes_ids_and_files_are_the_same_documents(lm, tmp_path):
  texts = ['é one', 'two\n' * 9]
  expected = lm.evaluate(texts)
  (tmp_path / 'lines.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  (tmp_path / 'one.txt').write_text(texts[0])
  (tmp_path / 'empty.txt').write_text('')
  for same in ([text.encode() for text in texts], [list(text.encode()) for text in texts], tmp_path / 'lines.jsonl',
               [tmp_path / 'one.txt', texts[1]], [tmp_path / 'one.txt', tmp_path / 'empty.txt', texts[1].encode()]):
    assert lm.evaluate(same) == expected
  assert expected['count'][0] == sum(len(text.encode()) + 1 for text in texts)
  assert expected['bits_per_byte'] == pytest.approx(
      expected['nats_sum'][0] / np.log(2) / sum(len(text.encode()) for text in texts))


def test_own_text_needs_no_held_out_documents(lm, tmp_path):
  moved = mtp_jax.load(pathlib.Path(lm.config.data.paths[0]).parent / 'run', data=tmp_path / 'nowhere')
  assert moved.evaluate('some text') == lm.evaluate('some text')


def test_the_sum_of_scores_is_the_nats_of_texts_that_fill_their_rows(lm):
  """Of 16 inputs: bos, 14 bytes, and eos, so that no document is cut; all but their ends are scored."""
  texts = ['0123456789abcd', 'the 12 é the ']
  evaluated = lm.evaluate(texts)
  ends = lm.score([[*text.encode(), lm.tokenizer.eos] for text in texts])
  assert sum(-score.logprob for score in ends) == pytest.approx(evaluated['nats_sum'][0], rel=1e-5)


@pytest.mark.parametrize('texts, message', [
    ([], r'texts=\[\]: there is no document'), (3, 'texts=3: must be'), ([[1, 999]], 'is neither text nor'),
    (pathlib.Path('nowhere'), "texts: 'nowhere' holds no file"), (pathlib.Path('~nobody-here'), 'no home directory')])
def test_what_is_no_document_is_bad_input(lm, texts, message):
  with pytest.raises(BadInput, match=message):
    lm.evaluate(texts)


def test_the_name_of_a_file_is_not_taken_for_a_text(lm, tmp_path):
  (tmp_path / 'mine.txt').write_text('abc')
  with pytest.raises(BadInput, match='is a file; pass pathlib.Path'):
    lm.evaluate(str(tmp_path / 'mine.txt'))


def test_a_record_that_cannot_be_read_is_named(lm, tmp_path):
  (tmp_path / 'bad.jsonl').write_text('{"text": "x"}\n{"text\n')
  with pytest.raises(BadInput, match='bad.jsonl, record 2: broken_json'):
    lm.evaluate(tmp_path / 'bad.jsonl')


def test_progress_is_a_line_every_ten_seconds_and_nothing_of_what_takes_less(monkeypatch):
  """The clock begins after the first batch, which compiles, and is advanced by hand."""
  lines, now = [], [0.0]
  monkeypatch.setattr(display.time, 'perf_counter', lambda: now[0])
  with display.Count('evaluate', 8, 'batches', lines.append) as count:
    for done, seconds in enumerate((60, 4, 4, 4, 4, 20, 1, 30), 1):
      now[0] += seconds
      count.show(done)
  assert lines == ['evaluate: 4 of 8 batches  eta 16 s', 'evaluate: 6 of 8 batches  eta 14 s']
  quiet = display.Count('', 8, 'batches', lines.append)
  for done in range(8):
    now[0] += 60
    quiet.show(done)
  assert len(lines) == 2
