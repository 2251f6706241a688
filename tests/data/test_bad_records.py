"""Bad records are counted, listed, and stop the work when they are too many."""
import json

import pytest
from experiments import prepare_bytes

from mtp_jax.config import BadInput
from mtp_jax.data.parts import Preparation
from mtp_jax.data.records import Reading

BAD = b'{"text": \n' + b'{"text": ""}\n' + b'{"text": "a\\u0000"}\n'


def good(*numbers: int) -> bytes:
  """A line for each number, no two alike."""
  return b''.join(b'{"text": "%d"}\n' % number for number in numbers)


LINES = b''.join(good(*range(i, i + 6)) + BAD + good(i + 6) for i in range(0, 210, 7))  # thirty times ten lines
BAD_LINES = {'broken_json': 7, 'empty': 8, 'nul': 9}


@pytest.mark.parametrize('keep', [(), ('nul',)])
def test_bad_records_are_counted_and_listed_with_file_and_line(tmp_path, keep):
  (tmp_path / 'in.jsonl').write_bytes(LINES)
  prepared = prepare_bytes(tmp_path / 'in.jsonl', tmp_path / 'set', shard_bytes=1000, reading=Reading(keep=keep))
  lines = (tmp_path / 'set' / 'bad_records.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
      {'kind': kind, 'file': 'in.jsonl', 'line': 10 * i + line, 'kept': kind in keep, 'detail': ''}
      for i in range(30) for kind, line in BAD_LINES.items()]
  skipped, kept = {'skipped': 30, 'kept': 0}, {'skipped': 0, 'kept': 30}
  assert prepared.index['bad'] == {kind: kept if kind in keep else skipped for kind in BAD_LINES}
  documents = prepared.train.documents + prepared.validation.documents
  assert documents == (240 if keep else 210) and prepared.index['records'] == 300


def test_too_many_bad_records_stop_the_work_which_continues_when_more_are_allowed(tmp_path, monkeypatch):
  (tmp_path / 'in.jsonl').write_bytes(LINES)
  message = (r'^--input: 90 of 300 records are bad \(30 broken_json, 30 empty, 30 nul\), '
             'more than --bad_share=0.29; the first is broken_json in in.jsonl, line 7; '
             'all are listed in .*/set/bad_records.jsonl; fix them, or allow more and run again$')
  with pytest.raises(BadInput, match=message):
    prepare_bytes(tmp_path / 'in.jsonl', tmp_path / 'set', bad_share=0.29)
  assert len((tmp_path / 'set/bad_records.jsonl').read_text().splitlines()) == 90
  assert not (tmp_path / 'set/index.json').exists()
  monkeypatch.setattr(Preparation, 'tokenize', None)  # every part is done
  prepared = prepare_bytes(tmp_path / 'in.jsonl', tmp_path / 'set', bad_share=0.3)
  assert prepared.train.documents > 100


def test_a_wrong_field_is_reported_with_those_that_exist(tmp_path):
  (tmp_path / 'in.jsonl').write_text('{"content": "x", "id": 1}\n' * 9)
  message = r'the first is missing_field in in.jsonl, line 1 \(fields: content, id; --field=text\)'
  with pytest.raises(BadInput, match=message):
    prepare_bytes(tmp_path / 'in.jsonl', tmp_path / 'set', bad_share=0.05)


@pytest.mark.parametrize('workers', [0, 2])
def test_hopeless_inputs_stop_early(tmp_path, workers):
  (tmp_path / 'in.jsonl').write_bytes(b'no JSON\n' * 5000)
  with pytest.raises(BadInput, match=r'^--input: ([\d,]+) of \1 records are bad') as error:
    prepare_bytes(tmp_path / 'in.jsonl', tmp_path / 'set', workers, bad_share=0.5)
  assert 'of 5,000' not in str(error.value)


def test_bad_records_all_in_one_place_do_not_stop_the_work_while_they_are_few_of_all(tmp_path):
  (tmp_path / 'in.jsonl').write_bytes(b'no JSON\n' * 40 + good(*range(1000)))
  prepared = prepare_bytes(tmp_path / 'in.jsonl', tmp_path / 'set', bad_share=0.05, shard_bytes=300)
  assert prepared.index['bad'] == {'broken_json': {'skipped': 40, 'kept': 0}}
