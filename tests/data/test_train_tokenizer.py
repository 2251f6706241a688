"""A sample is from all over the inputs; a trained tokenizer is measured on held-out documents."""
import gzip
import json
import random

import pytest

from mtp_jax import tokenizer
from mtp_jax.config import BadInput
from mtp_jax.data.files import files, name_hash
from mtp_jax.data.kinds import recognized
from mtp_jax.data.records import Reading
from mtp_jax.data.split import content_hash
from mtp_jax.data.train_tokenizer import sample, train_tokenizer


def test_a_sample_is_from_all_over_the_inputs(corpus):
  inputs = recognized(files((str(corpus[0]),), ''), Reading(), '')
  whole = [record.text for record in sample(inputs, Reading(), 10**9, '')]
  some = [record.text for record in sample(inputs, Reading(), 5000, '')]
  assert sorted(whole) == corpus[1]
  assert some == whole[:len(some)] and 5000 <= sum(map(len, some)) < 5400


def test_a_sample_takes_no_more_of_a_file_than_its_share(tmp_path):
  for i in range(4):
    lines = b'{"text": "%d%s"}\n' % (i, b'x' * 1000) * 200
    (tmp_path / f'{i}.jsonl.gz').write_bytes(gzip.compress(lines, mtime=0))
  inputs = recognized(files((str(tmp_path),), ''), Reading(), '')
  firsts = [record.text[:1] for record in sample(inputs, Reading(), 300_000, '')]
  assert [firsts.count(b'%d' % i) for i in range(4)] == [75, 75, 75, 75]


@pytest.fixture
def words(tmp_path):
  """Two hundred text files of random words."""
  rng = random.Random(0)
  (tmp_path / 'words').mkdir()
  for i in range(200):
    text = ' '.join(rng.choice(['alpha', 'beta', 'gamma', 'delta', str(i)]) for _ in range(50))
    (tmp_path / 'words' / f'{i}.txt').write_text(text)
  return tmp_path / 'words'


def test_a_tokenizer_is_measured_on_the_documents_it_was_not_trained_on(words):
  lines = []
  trained = train_tokenizer(files((str(words),), ''), Reading(), 300, '--input', note=lines.append)
  held_out, used = {}, {}
  for path in words.iterdir():
    text = path.read_bytes()
    (held_out if content_hash(text) < 0.1 * 2**64 else used)[path.name] = text
  model = tokenizer.SentencePiece(trained.model)
  assert 5 < len(held_out) == trained.held_out_documents < 40
  assert trained.held_out_bytes == sum(map(len, held_out.values()))
  assert trained.held_out_tokens == sum(len(model.encode(text)) for text in held_out.values())
  assert trained.bytes_per_token == trained.held_out_bytes / trained.held_out_tokens > 1.5
  assert trained.bytes_per_second > 0 and trained.tokenizer.digest == model.digest
  in_order = sorted(used, key=lambda name: name_hash(f'words/{name}@0'))
  assert trained.model == tokenizer.train([used[name] for name in in_order], 300)
  size = sum(map(len, used.values())) / 1e6
  assert lines == [f'training bpe on {len(used)} documents, {size:.1f} MB']


def test_one_long_document_is_enough(tmp_path):
  text = ''.join(f'alpha beta gamma {i}\n' for i in range(999))
  (tmp_path / 'book.txt').write_text(text)
  trained = train_tokenizer(files((str(tmp_path / 'book.txt'),), ''), Reading(), 300, '--input')
  assert trained.held_out_documents == 1 and 0.08 < trained.held_out_bytes / len(text) <= 0.1


def test_too_few_documents_for_a_tokenizer_are_one_line(tmp_path):
  (tmp_path / 'one.txt').write_text('only one')
  message = '^--input: 1 documents are too few, since one of ten is held out; give more$'
  with pytest.raises(BadInput, match=message):
    train_tokenizer(files((str(tmp_path),), ''), Reading(), 300, '--input')


def test_too_many_bad_records_in_a_sample_are_one_line(tmp_path):
  lines = [json.dumps({'body' if i < 6 else 'text': f'{i} words'}) for i in range(100)]
  (tmp_path / 'x.jsonl').write_text('\n'.join(lines))
  inputs = files((str(tmp_path / 'x.jsonl'),), '')
  message = (r'^--input: 6 of 100 records are bad, more than --bad_share=0.05; '
             r'the first is missing_field in x.jsonl \(fields: body; --field=text\)$')
  with pytest.raises(BadInput, match=message):
    train_tokenizer(inputs, Reading(), 300, '--input')
  with pytest.raises(BadInput, match='^vocabulary of 300: '):  # the share is allowed; the sample is too small
    train_tokenizer(inputs, Reading(), 300, '--input', bad_share=0.06)
