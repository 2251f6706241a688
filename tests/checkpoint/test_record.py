"""The record of a checkpoint: whatever stands in it is read right or refused in one line, without a traceback."""
import copy
import json

import pytest

from mtp_jax.checkpoint.record import COMMITTED, FOLDER, METADATA, check_conventions, check_resumes, read_record
from mtp_jax.config import BadInput, Config
from mtp_jax.data.corpus import difference

SOURCE = {'fingerprint': 'f', 'tokenizer': 't', 'files': 1, 'documents': 2, 'tokens': 3, 'held_out_documents': 1}
IDENTITY = {'sources': [SOURCE], 'weights': [], 'length': 16}
PART = {'name': 'a', 'share': 1.0, 'rows': 5}
RECORD = json.loads(json.dumps({
    'step': 3, 'config': Config().to_dict(), 'conventions': {'target': 'next'}, 'tokenizer': 'digest',
    'identity': IDENTITY, 'data': {'sources': [PART], 'mixed': 5}}))
DEEP = json.loads('[' * 500 + ']' * 500)
MISSING = object()
VALUES = [MISSING, None, [], {}, 5, -1, 1.5, 'x', float('nan'), float('inf'), 10**400, True, [[1, 2]], ['ab'],
          {'a\nb': 1}, {'\ud800': 1}, '\ud800', 'a\nb', '\0', ['x'] * 1000, DEEP]
PLACES = [(key,) for key in RECORD] + [('config', section) for section in RECORD['config']] + [
    ('config', 'model', 'layers'), ('config', 'model', 'kind'), ('config', 'train', 'steps'),
    ('config', 'train', 'tensorboard'), ('config', 'optimizer', 'learning_rate'), ('config', 'objective', 'weights'),
    ('config', 'data', 'paths'), ('config', 'mesh', 'data'), ('config', 'a\nb'), ('conventions', 'target'),
    ('identity', 'sources'), ('identity', 'sources', 0), ('identity', 'sources', 0, 'tokens'),
    ('identity', 'sources', 0, 'fingerprint'), ('identity', 'length'), ('data', 'sources'), ('data', 'mixed'),
    ('data', 'sources', 0), ('data', 'sources', 0, 'rows'), ('data', 'sources', 0, 'name'),
    ('data', 'global_next_index')]
TEXTS = {
    'no JSON': b'{', 'empty': b'', 'a list': b'[]', 'null': b'null', 'a number': b'5', 'a string': b'"custom_metadata"',
    'NaN': b'NaN', 'many digits': b'9' * 10_000, 'binary': bytes(range(256)), 'no record': b'{}',
    'deep': b'[' * 100_000 + b']' * 100_000, 'a list as record': b'{"custom_metadata": []}',
    'null as record': b'{"custom_metadata": null}', 'deep in the record': b'{"custom_metadata": ' + b'[' * 100_000,
    'UTF-16': json.dumps({'custom_metadata': RECORD}).encode('utf-16')}


def put(folder, text: bytes):
  """A workdir whose checkpoint of step 3 has this metadata."""
  step = folder / FOLDER / '3'
  step.mkdir(parents=True, exist_ok=True)
  (step / COMMITTED).touch()
  (step / METADATA).write_bytes(text)
  return folder


def refusal(call) -> str:
  """The one line of BadInput, '' without."""
  try:
    call()
  except BadInput as error:
    assert len(str(error).splitlines()) == 1
    return str(error)
  return ''


def test_a_record_is_read_as_it_was_saved(tmp_path):
  assert RECORD.items() <= read_record(put(tmp_path, json.dumps({'custom_metadata': RECORD}).encode())).items()


@pytest.mark.parametrize('text', TEXTS.values(), ids=TEXTS)
def test_metadata_that_hold_no_record_are_one_line(tmp_path, text):
  assert 'lacks the record of config and conventions' in refusal(lambda: read_record(put(tmp_path, text)))


@pytest.mark.parametrize('place', PLACES, ids=lambda place: '.'.join(map(str, place)))
def test_a_record_with_anything_in_one_place_is_read_or_refused_in_one_line(tmp_path, place):
  *way, last = place
  for value in VALUES:
    record = copy.deepcopy(RECORD)
    holder = record
    for key in way:
      holder = holder[key]
    if value is not MISSING:
      holder[last] = value
    elif last in holder or isinstance(holder, list):
      del holder[last]
    put(tmp_path, json.dumps({'custom_metadata': record}).encode())

    def resume():
      found = read_record(tmp_path)
      refusal(lambda: Config.from_dict(found['config']))
      refusal(lambda: check_resumes(Config(), found, tmp_path))
      refusal(lambda: check_conventions({'target': 'next'}, found, tmp_path))
      difference(IDENTITY, found['identity'])
    line = refusal(resume)
    assert line or way or type(value) is type(RECORD[last]), value


@pytest.mark.parametrize('data', [
    {}, {'sources': []}, {'mixed': 1}, {'sources': [5], 'mixed': 1}, {'sources': {'a': 1}, 'mixed': 1},
    {'sources': [PART], 'mixed': -1}, {'sources': [PART | {'rows': '5'}], 'mixed': 1},
    {'sources': [PART | {'name': []}], 'mixed': 1}, {'sources': [{'name': 'a', 'rows': 5}], 'mixed': 1},
    {'global_next_index': 1.5}, {'global_next_index': 2**63}])
def test_a_position_in_the_data_that_is_none_is_one_line(tmp_path, data):
  text = json.dumps({'custom_metadata': RECORD | {'data': data}}).encode()
  assert 'lacks the record of config and conventions' in refusal(lambda: read_record(put(tmp_path, text)))


@pytest.mark.parametrize('sources', [None, 5, 'x', {}, [5], [None], [{}], [SOURCE | {'tokens': 'x'}]])
def test_data_that_a_record_does_not_describe_are_other_data(sources):
  assert difference(IDENTITY, IDENTITY | {'sources': sources})[0] == 'the sources are not known'
