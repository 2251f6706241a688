"""Which documents a file holds, and what is wrong with its other records."""
import bz2
import gzip
import hashlib
import json
import lzma
import random

import pyarrow
import pyarrow.parquet
import pytest

from mtp_jax.config import BadInput
from mtp_jax.data.files import File
from mtp_jax.data.kinds import recognized
from mtp_jax.data.records import Document, Fault, Piece, Reader, Reading


def read(tmp_path, content: bytes, name: str = 'x.jsonl', **reading):
  """The documents and faults of a file, and its reader."""
  path = tmp_path / name
  path.write_bytes(content)
  file, = recognized([File(name, str(path), len(content))], Reading(**reading), '--input')
  reader = Reader(Piece(file), Reading(**reading), '--input')
  return list(reader), reader


LINES = [  # of a JSON-lines file; the fault of each, and the text if it is kept
    (b'{"text": "good"}', None, b'good'),
    (b'{"text": "na\xc3\xafve \\u00e9 \\ud83d\\ude42"}', None, 'naïve é 🙂'.encode()),
    (b'\xef\xbb\xbf{"text": "after a byte order mark"}', None, b'after a byte order mark'),
    (b'{"other": 1, "text": " \\n"} ', None, b' \n'),
    (b'{"text": ', 'broken_json', None),
    (b'[' * 100_000, 'broken_json', None),
    (b'{"text": 1' + b'0' * 5000 + b'}', 'missing_field', None),
    (b'{"id": -1' + b'0' * 10_000 + b', "text": "numbers of any length"}', None, b'numbers of any length'),
    (b'["text"]', 'missing_field', None),
    (b'{"body": "x"}', 'missing_field', None),
    (b'{"text": null}', 'missing_field', None),
    (b'{"text": ["x"]}', 'missing_field', None),
    (b'{"text": ""}', 'empty', None),
    (b'{"text": "caf\xe9"}', 'invalid_utf8', b'caf\xe9'),
    (b'{"text": "caf\xe9 \\ud800"}', 'invalid_utf8', None),
    (b'{"text": "a\\ud800b"}', 'lone_surrogate', b'a\xed\xa0\x80b'),
    (b'{"text": "a\\u0000b"}', 'nul', b'a\0b'),
    (b'{"text": "' + b'x' * 101 + b'"}', 'too_long', None),
    (b'{"text": "' + b'x' * 2**20 * 2 + b'"}', 'too_long', None),
    (b'{"other": "' + b'x' * 3000 + b'", "text": "short"}', None, b'short'),
    (b'{"text": "' + b'\\u0451' * 50 + b'"}', None, 'ё'.encode() * 50),
    (b'{"text": "' + b'x' * 100 + b'"}', None, b'x' * 100),
]

LIMIT = 100


@pytest.mark.parametrize('end', [b'\n', b'\r\n'])
def test_what_is_wrong_with_each_line_is_reported_and_the_others_are_read(tmp_path, end):
  lines = [line for line, _, _ in LINES]
  content = end.join([lines[0], b'', *lines[1:]]) + end
  records, reader = read(tmp_path, content, max_document_bytes=LIMIT)
  faults = [record for record in records if isinstance(record, Fault)]
  documents = [record for record in records if isinstance(record, Document)]
  numbers = [1, *range(3, len(LINES) + 2)]  # the second line is blank, which is no record
  assert [(f.kind, f.line, f.kept) for f in faults] == [
      (fault, number, False) for number, (_, fault, _) in zip(numbers, LINES) if fault]
  assert [document.text for document in documents] == [text for _, fault, text in LINES if not fault]
  assert reader.lines == len(LINES) + 1 and reader.sha256 == hashlib.sha256(content).hexdigest()
  for document in documents:
    name, _, place = document.name.partition('@')
    line = content[int(place):].split(b'\n')[0]
    assert name == 'x.jsonl' and json.loads(line.decode('utf-8-sig'), parse_int=float)['text'].encode() == document.text


@pytest.mark.parametrize('kind', ['invalid_utf8', 'lone_surrogate', 'nul'])
def test_records_of_a_kind_that_is_to_be_kept_are_kept_byte_for_byte(tmp_path, kind):
  for line, fault, text in LINES:
    if fault == kind:
      kept_fault, document = read(tmp_path, line, keep=(kind,))[0]
      assert kept_fault == Fault(kind, 'x.jsonl', 1, True)
      assert text is None or document.text == text


@pytest.mark.parametrize('line, detail', [
    (b'{"text": ', ''), (b'[' * 100_000, 'brackets nested too deeply'),
    (b'{"text": "x", "tree": ' + b'[' * 99_999 + b']' * 99_999 + b'}', 'brackets nested too deeply')], ids=len)
def test_broken_and_deeply_nested_json_is_a_fault_with_its_reason_not_a_crash(tmp_path, line, detail):
  assert read(tmp_path, line)[0] == [Fault('broken_json', 'x.jsonl', 1, False, detail)]


def test_a_record_without_the_field_reports_those_it_has(tmp_path):
  faults, _ = read(tmp_path, b'{"a": 1, "b\\ud800": "x"}\n[1]\n')
  assert [fault.detail for fault in faults] == ['fields: a, b\\ud800', 'a list, no object']


def test_another_field_may_hold_the_text(tmp_path):
  records, _ = read(tmp_path, b'{"body": "x", "text": "y"}', field='body')
  assert records == [Document('x.jsonl@0', b'x')]


@pytest.mark.parametrize('content, fault', [
    (b'', 'empty'), (b'a\0', 'nul'), (b'\xff', 'invalid_utf8'), (b'\xed\xa0\x80', 'lone_surrogate'),
    (b'x' * 101, 'too_long'), (b'{"text": 1}', None)])
def test_a_text_file_is_a_document_whatever_is_in_it(tmp_path, content, fault):
  records, reader = read(tmp_path, content, 'x.py', max_document_bytes=LIMIT, format='text')
  assert records == ([Fault(fault, 'x.py', 0, False)] if fault else [Document('x.py', content)])
  assert reader.sha256 == hashlib.sha256(content).hexdigest()
  if fault in ('nul', 'invalid_utf8', 'lone_surrogate'):
    records, _ = read(tmp_path, content, 'x.py', keep=(fault,))
    assert records == [Fault(fault, 'x.py', 0, True), Document('x.py', content)]


@pytest.mark.parametrize('ends', ['with', 'without'])
def test_pieces_of_a_file_hold_each_line_once_wherever_it_is_cut(tmp_path, ends):
  lines = [b'{"text": "%d%s"}' % (i, b'x' * (i % 7)) for i in range(12)]
  content = b'\n'.join(lines) + b'\n' * (ends == 'with')
  path = tmp_path / 'x.jsonl'
  path.write_bytes(content)
  file = File('x.jsonl', str(path), len(content), format='jsonl')
  whole = list(Reader(Piece(file), Reading(), ''))
  for step in range(1, len(content)):
    cuts = [*range(0, len(content), step), -1]
    readers = [Reader(Piece(file, a, b), Reading(), '') for a, b in zip(cuts, cuts[1:])]
    assert [d for reader in readers for d in reader] == whole
    assert sum(reader.lines for reader in readers) == 12


def zstd(content: bytes) -> bytes:
  sink = pyarrow.BufferOutputStream()
  with pyarrow.CompressedOutputStream(sink, 'zstd') as out:
    out.write(content)
  return sink.getvalue().to_pybytes()


COMPRESS = {'gz': gzip.compress, 'zst': zstd, 'bz2': bz2.compress, 'xz': lzma.compress}


@pytest.mark.parametrize('end', COMPRESS)
def test_compressed_files_are_read_through_all_their_frames(tmp_path, end):
  content = b''.join(b'{"text": "%d"}\n' % i for i in range(2000))
  packed = COMPRESS[end](content[:9999]) + COMPRESS[end](content[9999:])
  documents, reader = read(tmp_path, packed, f'x.json.{end}')
  assert [document.text for document in documents] == [b'%d' % i for i in range(2000)]
  assert reader.lines == 2000 and reader.sha256 == hashlib.sha256(packed).hexdigest()
  assert read(tmp_path, packed, f'x.txt.{end}', format='text')[0] == [Document(f'x.txt.{end}', content)]


# Frames of zstd need not hold a checksum, so a flipped bit may stay unnoticed in them.
@pytest.mark.parametrize('end, harm', [
    *((end, 'cut') for end in COMPRESS), ('gz', 'flipped'), ('bz2', 'flipped'), ('xz', 'flipped'),
    *((end, 'followed by other bytes') for end in COMPRESS)])
def test_a_damaged_compressed_file_is_named_never_read_in_part(tmp_path, end, harm):
  packed = bytearray(COMPRESS[end](random.Random(0).randbytes(30_000).hex().encode() + b'\n'))
  if harm == 'cut':
    del packed[-20:]
  elif harm == 'followed by other bytes':
    packed += b'other bytes'
  else:
    packed[len(packed) // 2] ^= 16
  with pytest.raises(BadInput, match=rf"x.txt.{end}' is damaged or cut off .*; fetch it again"):
    read(tmp_path, bytes(packed), f'x.txt.{end}')


def test_parquet_columns_are_read_by_row(tmp_path):
  table = pyarrow.table({
      'text': ['a', None, '', 'naïve', 'nul\0'],
      'raw': [b'\xff', b'b', None, b'', b'ok'],
      'n': [1, 2, 3, 4, 5],
      'large': pyarrow.array(['u', 'v', 'w', 'x', 'y'], pyarrow.large_string())})
  pyarrow.parquet.write_table(table, tmp_path / 'y', row_group_size=2)
  content = (tmp_path / 'y').read_bytes()
  records, reader = read(tmp_path, content, 'x.parquet')
  assert records == [
      Document('x.parquet@0', b'a'),
      Fault('missing_field', 'x.parquet', 2, False),
      Fault('empty', 'x.parquet', 3, False),
      Document('x.parquet@3', 'naïve'.encode()),
      Fault('nul', 'x.parquet', 5, False)]
  assert reader.lines == 5 and reader.sha256 == hashlib.sha256(content).hexdigest()
  documents, _ = read(tmp_path, content, 'x.parquet', field='large')
  assert [document.text for document in documents] == [b'u', b'v', b'w', b'x', b'y']
  records, _ = read(tmp_path, content, 'x.parquet', field='raw')
  kinds = [getattr(record, 'kind', 'good') for record in records]
  assert kinds == ['invalid_utf8', 'good', 'missing_field', 'empty', 'good']
  with pytest.raises(BadInput, match=r"--field=txt: '.*x\.parquet' has no such column; did you mean 'text'\?"):
    read(tmp_path, content, 'x.parquet', field='txt')
  with pytest.raises(BadInput, match=r"--field=n: that column of '.*x\.parquet' holds int64, not text"):
    read(tmp_path, content, 'x.parquet', field='n')
  for damaged in (content[:-20], content[:40], b'', content[:30] + bytes(30) + content[60:]):
    with pytest.raises(BadInput, match=r"x\.parquet('? is damaged or cut off| is no Parquet file)"):
      read(tmp_path, damaged, 'x.parquet')


def test_text_in_parquet_is_text_however_it_is_stored_and_nulls_are_missing(tmp_path):
  values = ['a', None, 'b', 'a']
  table = pyarrow.table({'text': pyarrow.array(values).dictionary_encode(),
                         'view': pyarrow.array(values, pyarrow.string_view()),
                         'raw': pyarrow.array([b'a', None, b'b', b'a']).dictionary_encode(),
                         'nothing': pyarrow.nulls(4)})
  pyarrow.parquet.write_table(table, tmp_path / 'y')
  content = (tmp_path / 'y').read_bytes()
  for field in ('text', 'view', 'raw'):
    records, _ = read(tmp_path, content, 'x.parquet', field=field)
    assert [getattr(record, 'text', None) for record in records] == [b'a', None, b'b', b'a']
  records, _ = read(tmp_path, content, 'x.parquet', field='nothing')
  assert [record.kind for record in records] == 4 * ['missing_field']


STORIES = [b'Once.', b'Twice\nupon.', b'\xc3\xa9', b'x' * 40, b'End.']


@pytest.mark.parametrize('content', [
    b'<|e|>'.join(STORIES), b'\n<|e|>\n'.join(STORIES) + b'\n<|e|>\n', b'<|e|>\r\n<|e|>'.join(STORIES),
    b'\xef\xbb\xbf' + b'<|e|>'.join(STORIES)])
@pytest.mark.parametrize('end', ['', *COMPRESS])
def test_a_separator_parts_the_documents_of_a_text_file(tmp_path, content, end):
  packed = COMPRESS[end](content) if end else content
  records, reader = read(tmp_path, packed, f'x.txt.{end}' if end else 'x.txt', separator='<|e|>')
  assert [record.text for record in records] == STORIES
  assert reader.sha256 == hashlib.sha256(packed).hexdigest() and reader.bytes == len(packed)
  if end:
    return
  file = File('x.txt', str(tmp_path / 'x.txt'), len(content))
  for step in range(6, len(content)):
    cuts = [*range(0, len(content), step), -1]
    readers = [Reader(Piece(file, a, b), Reading(separator='<|e|>'), '') for a, b in zip(cuts, cuts[1:])]
    assert [record.text for reader in readers for record in reader] == STORIES
    assert sum(reader.bytes for reader in readers) == len(content)
  faults = read(tmp_path, content, 'x.txt', separator='<|e|>', max_document_bytes=39)[0]
  assert [(fault.kind, fault.line) for fault in faults if isinstance(fault, Fault)] == [
      ('too_long', 1 + content[:content.index(b'xx')].count(b'<|e|>'))]


@pytest.mark.parametrize('name, content', [
    ('x.txt', b'\xef\xbb\xbfa'), ('x.jsonl', b'\xef\xbb\xbf{"text": "a"}\n'), ('x.jsonl', b'{"text": "\\ufeffa"}'),
    ('x', b'\xef\xbb\xbf{"text": "a"}'), ('x.txt.gz', gzip.compress(b'\xef\xbb\xbfa', mtime=0))])
def test_a_byte_order_mark_belongs_to_no_document(tmp_path, name, content):
  document, = read(tmp_path, content, name)[0]
  assert document.text == b'a'


@pytest.mark.parametrize('format, text', [('auto', b'y'), ('jsonl', b'y'), ('text', b'{"text": "y"}')])
def test_the_format_may_be_given(tmp_path, format, text):
  document, = read(tmp_path, b'{"text": "y"}', 'x.jsonl', format=format)[0]
  assert document.text == text


@pytest.mark.parametrize('change, message', [
    (dict(format='json'), "--format=json: did you mean 'jsonl'?"),
    (dict(keep=('null',)), "--keep=null: did you mean 'nul'?"),
    (dict(keep=('empty',)), '--keep=empty: such a record has no text to keep; '
                            'valid names: invalid_utf8, lone_surrogate, nul'),
    (dict(max_document_bytes=0), '--max_document_bytes=0: must be at least 1')])
def test_bad_options_are_one_line(change, message):
  with pytest.raises(BadInput) as error:
    Reading(**change)
  assert str(error.value) == message


def test_a_file_that_went_away_is_named(tmp_path):
  with pytest.raises(BadInput, match=r"--input: cannot read '.*gone' \(No such file or directory\)"):
    list(Reader(Piece(File('gone', str(tmp_path / 'gone'), 5)), Reading(), '--input'))
