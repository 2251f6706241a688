"""No file is taken for what it is not: content decides together with the name."""
import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from mtp_jax.config import BadInput
from mtp_jax.data.files import files
from mtp_jax.data.kinds import kind, read_as, recognized
from mtp_jax.data.records import Reading

LINES = b'{"text": "a"}\n{"text": "b"}\n'


def parquet() -> bytes:
  out = io.BytesIO()
  pyarrow.parquet.write_table(pyarrow.table({'text': ['a', 'b']}), out)
  return out.getvalue()


def zipped() -> bytes:
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w') as archive:
    archive.writestr('a.txt', 'a')
  return out.getvalue()


def tar() -> bytes:
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w') as archive:
    archive.addfile(tarfile.TarInfo('a.txt'))
  return out.getvalue()


def kinds(folder, contents: dict[str, bytes], **reading) -> dict[str, str]:
  """What each file is read as, by its name in the folder."""
  for name, content in contents.items():
    (folder / name).write_bytes(content)
  inputs = recognized(files((str(folder),), '--input'), Reading(**reading), '--input')
  return {file.name.partition('/')[2]: kind(file) for file in inputs}


def test_content_decides_where_the_name_says_nothing_or_something_else(tmp_path):
  expected = {
      'a.json': (LINES, 'JSON lines'), 'b.json': (b'\n ' + LINES, 'JSON lines'), 'one.json': (LINES[:14], 'JSON lines'),
      'blob': (LINES, 'JSON lines'), 'c.txt': (b'\xef\xbb\xbf' + LINES, 'JSON lines'),
      'wide': (b'{"text": "' + b'x' * 10**5 + b'"}\n' + LINES, 'JSON lines'),
      'd.jsonl': (gzip.compress(LINES, mtime=0), 'JSON lines in gzip'),
      'e.jsonl.bz2': (bz2.compress(LINES), 'JSON lines in bz2'),
      'f.jsonl.xz': (lzma.compress(LINES), 'JSON lines in xz'), 'g.bz2': (lzma.compress(LINES), 'JSON lines in xz'),
      'h.jsonl.gz': (LINES, 'JSON lines'), 'large': (bz2.compress(LINES * 10**5), 'JSON lines in bz2'),
      'broken.jsonl': (b'no JSON\n', 'JSON lines'),
      'p': (parquet(), 'Parquet'), 'q.parquet': (parquet(), 'Parquet'), 'r.bin': (parquet(), 'Parquet'),
      'code.py': (b'{"a": 1}\nx = 2\n', 'text'), 'pretty.json': (b'{\n "text": 1\n}\n', 'text'),
      'other.json': (b'{"name": "x"}\n', 'text'), 'empty': (b'', 'text'), 'latin': (b'caf\xe9 au lait\n' * 9, 'text'),
      'text.gz': (gzip.compress(b'text', mtime=0), 'text in gzip'), 'not.gz': (b'text', 'text'),
      'brackets': (b'[{"text": "a"}]', 'text'), 'colour': (b'\x1b[1mtext\x1b[0m\x07', 'text'),
      'start': (b'BZh, ORC, Obj and PK begin this text', 'text')}
  found = kinds(tmp_path, {name: content for name, (content, _) in expected.items()})
  assert found == {name: what for name, (_, what) in expected.items()}


@pytest.mark.parametrize('name, content, reason', [
    ('a.png', b'\x89PNG\r\n\x1a\n\0\0', 'is a PNG picture'), ('a', b'\xff\xd8\xff\xe0\0', 'is a JPEG picture'),
    ('a.jsonl', b'%PDF-1.7\n\x80', 'is PDF'), ('a.txt', zipped(), 'is a ZIP archive, or a document like .docx'),
    ('a.tar', tar(), 'is a tar archive'), ('a.txt.gz', gzip.compress(tar(), mtime=0), 'is a tar archive'),
    ('a.txt', 'plain words'.encode('utf-16-le'), 'is UTF-16 text without a mark .convert it with iconv'),
    ('a.jsonl', LINES.decode().encode('utf-16-be'), 'is UTF-16 text without a mark .convert it with iconv'),
    ('a.gz', gzip.compress(gzip.compress(b'text', mtime=0), mtime=0), 'is gzip within gzip: decompress it once'),
    ('a.jsonl.xz', lzma.compress(gzip.compress(LINES, mtime=0)), 'is gzip within xz: decompress it once'),
    ('a.so', b'\x7fELF\2\1\1\0', 'is an ELF program'), ('a.txt', 'text'.encode('utf-16'), 'is UTF-16 text'),
    ('a.txt', 'text'.encode('utf-32'), 'is UTF-32 text'), ('a.bin', b'ab\0c' * 99, 'is binary: neither text'),
    ('a.dat', bytes(range(1, 256)) * 9, 'is binary: neither text'), ('a.jsonl', LINES + bytes(512), 'is binary'),
    ('a.jsonl.lz4', b'\x04\x22\x4d\x18\x64\x40', 'is lz4-compressed'),
    ('a.jsonl.Z', b'\x1f\x9d\x90', 'is compress-ed'),
    ('a.jsonl.gz', b'', r'is named \.gz, but does not begin like gzip'),
    ('a.jsonl.zst', b'\0\1\2', r'is named \.zst, but does not begin like zstd'),
    ('a.parquet', b'', 'is no Parquet file: it is damaged'), ('a.parquet', b'<html>', 'is no Parquet file'),
    ('a.parquet', b'version https://git-lfs.github.com/spec/v1\n', 'no Parquet file: it is a Git LFS pointer'),
    ('a.jsonl', b'version https://git-lfs.github.com/spec/v1\n', 'is a Git LFS pointer'),
    ('a.parquet.gz', gzip.compress(parquet(), mtime=0), 'is Parquet in gzip; decompress it'),
    ('a.json', b' [ {"text": "a"},\n{"text": "b"}]', 'is one JSON array; write an object a line'),
    ('a.arrow', b'ARROW1\0\0', 'is an Arrow file'), ('a.npy', b'\x93NUMPY\1\0', 'is a NumPy array')])
def test_what_cannot_be_read_is_refused_with_its_name_and_what_it_is(tmp_path, name, content, reason):
  (tmp_path / 'in').mkdir()
  message = f'^--input: 1 of 2 files cannot be read: in/{name} .*{reason}.*; leave them out, such as by a glob'
  with pytest.raises(BadInput, match=message):
    kinds(tmp_path / 'in', {name: content, 'good.jsonl': LINES})


def test_many_refused_files_are_counted_and_three_are_named(tmp_path):
  with pytest.raises(BadInput, match=r'^--input: 9 of 9 files .*(is a GIF picture.*){3}; and 6 more; leave'):
    kinds(tmp_path, {f'{i}.gif': b'GIF89a' for i in range(9)})


@pytest.mark.parametrize('format', ['text', 'jsonl'])
def test_a_format_that_is_given_holds_for_all_files_but_for_those_that_are_something_else_for_certain(tmp_path, format):
  what = {'text': 'text', 'jsonl': 'JSON lines'}[format]
  contents = {'a.txt': b'a', 'b.jsonl': LINES, 'c': b'a\0', 'd.gz': gzip.compress(b'a', mtime=0)}
  assert set(kinds(tmp_path, contents, format=format).values()) == {what, f'{what} in gzip'}
  for content, reason in ((parquet(), 'is Parquet; leave out --format'), (b'\x89PNG', 'is a PNG picture')):
    with pytest.raises(BadInput, match=reason):
      kinds(tmp_path, {'e': content}, format=format)
  (tmp_path / 'e').unlink()
  with pytest.raises(BadInput, match='is no Parquet file'):
    kinds(tmp_path, {}, format='parquet')


def test_texts_with_a_nul_are_read_where_such_records_are_kept(tmp_path):
  assert kinds(tmp_path, {'a': b'a\0b'}, keep=('nul',)) == {'a': 'text'}


@pytest.mark.parametrize('reading, contents, message', [
    (dict(field='body'), {'a.csv': b'text,body\nx,y\n', 'b.md': b'b'},
     r'^--field=body: has no effect: read as text: 2 files; give JSON lines or Parquet, or leave it out$'),
    (dict(separator='<e>'), {'a.jsonl': LINES, 'p': parquet()},
     r'^--separator=<e>: has no effect: read as JSON lines: in/a.jsonl; as Parquet: in/p; it separates documents of')])
def test_an_option_without_effect_is_an_error(tmp_path, reading, contents, message):
  (tmp_path / 'in').mkdir()
  with pytest.raises(BadInput, match=message):
    kinds(tmp_path / 'in', contents, **reading)


def test_the_summary_names_few_files_beside_others():
  many = {f'{i}.parquet': 'Parquet' for i in range(1200)}
  assert read_as(many) == 'read as Parquet: 1,200 files'
  assert read_as({**many, 'README.md': 'text', 'LICENSE': 'text'}) == (
      'read as Parquet: 1,200 files; as text: README.md, LICENSE')
  assert read_as({'a': 'text'}) == 'read as text: 1 file'


@pytest.mark.parametrize('first', [b'{"text": "broken', b'no JSON', b'[]'])
def test_a_faulty_first_line_does_not_make_json_lines_text(tmp_path, first):
  (tmp_path / 'a.json').write_bytes(first + b'\n' + LINES * 3)
  file, = recognized(files((str(tmp_path / 'a.json'),), ''), Reading(), '')
  assert file.format == 'jsonl'
