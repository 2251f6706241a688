"""Files as people really have them, made from nothing, and what `prepare` makes of them.

    python tests/corpus_of_trouble.py

prints a table: input, exit code, outcome. Nothing in it is silent: each input is read right, or
named with the reason. tests/data/test_trouble.py holds every row to what is written here.
"""
import bz2
import contextlib
import gzip
import io
import json
import lzma
import pathlib
import re
import tempfile

import pyarrow
import pyarrow.parquet

from mtp_jax.cli.main import main

HELD_OUT = '--validation_share=0.2'


def lines(*numbers: int, field: str = 'text') -> bytes:
  return b''.join(json.dumps({field: f'doc {number}'}).encode() + b'\n' for number in numbers)


def parquet(column) -> bytes:
  out = io.BytesIO()
  pyarrow.parquet.write_table(pyarrow.table({'text': column}), out)
  return out.getvalue()


def zstd(content: bytes) -> bytes:
  return pyarrow.compress(content, 'zstd', asbytes=True)


def stories(count: int) -> bytes:
  return b'\n<|endoftext|>\n'.join(b'Once upon a time %d.' % i for i in range(count))


FIFTY = lines(*range(50))
DOCS = [f'doc {i}' for i in range(20)]
BOOK = b''.join(b'Line %d of the book.\n' % i for i in range(4000))
# a window of 2 GiB, as `zstd --long=31` declares it, and the rest of a frame
LONG = b'\x28\xb5\x2f\xfd\x04\xa8\x64\x00\x00\x10\x00\x00\x01\x00\xdb\xbf\x8d\x02\xd0\xba'

# what it is: (files, further flags, what the outcome must hold)
CASES = {
    'JSON lines named .json': ({'a.json': FIFTY}, '', 'read as JSON lines: 1 file; 50 documents'),
    'JSON lines without a suffix': ({'4f2a': FIFTY}, '', 'read as JSON lines: 1 file; 50 documents'),
    'JSON lines named .txt': ({'a.txt': FIFTY}, '', 'read as JSON lines: 1 file; 50 documents'),
    'one JSON array': ({'a.json': b'[{"text": "a"}, {"text": "b"}]'}, '', 'is one JSON array; write an object a line'),
    'a CSV with --field': ({'a.csv': b'text,x\na,b\n' * 50}, '--field=text2', '--field=text2: has no effect'),
    'the field is another one': ({'a.jsonl': lines(1, 2, field='body')}, '',
         'missing_field in in/a.jsonl, line 1 (fields: b'),
    'bz2 beside plain ones': ({'a.jsonl': FIFTY, 'b.jsonl.bz2': bz2.compress(lines(*range(50, 99)))}, '',
         '99 documents'),
    'xz': ({'a.jsonl.xz': lzma.compress(FIFTY)}, '', 'read as JSON lines in xz: 1 file; 50 documents'),
    'gzip without its suffix': (
        {'a.jsonl': gzip.compress(FIFTY, mtime=0)}, '', 'JSON lines in gzip: 1 file; 50 documents'),
    'plain, named .gz': ({'a.jsonl.gz': FIFTY}, '', 'read as JSON lines: 1 file; 50 documents'),
    'an empty .gz': ({'a.jsonl.gz': b'', 'b.jsonl': FIFTY}, '', 'is named .gz, but does not begin like gzip'),
    'gzip cut off': ({'a.jsonl.gz': gzip.compress(FIFTY, mtime=0)[:-9]}, '', 'is damaged or cut off after line'),
    'lz4': ({'a.jsonl.lz4': b'\x04\x22\x4d\x18\x64\x40\xa7'}, '', 'a.jsonl.lz4 is lz4-compressed'),
    'zstd, two frames': ({'a.jsonl.zst': zstd(FIFTY) + zstd(lines(50))}, '', 'in zstd: 1 file; 51 documents'),
    'zstd --long=31': ({'a.jsonl.zst': LONG}, '', 'was compressed with a window above 128 MiB'),
    'README beside Parquet': ({'a.parquet': parquet(DOCS), 'README.md': b'# Data'}, '',
         'text: in/README.md; 21 documents'),
    'Parquet without its suffix': ({'blob': parquet(DOCS)}, '', 'read as Parquet: 1 file; 20 documents'),
    'Parquet, a dictionary column': ({'a.parquet': parquet(pyarrow.array(DOCS).dictionary_encode())}, '',
         '20 documents'),
    'Parquet, a column of nulls': ({'a.parquet': parquet(pyarrow.nulls(9))}, '',
         '9 of 9 records are bad (9 missing_field)'),
    'Parquet read as text': ({'a.parquet': parquet(DOCS)}, '--format=text', 'is Parquet; leave out --format'),
    'HTML named .parquet': ({'a.parquet': b'<html>not found</html>'}, '', 'is no Parquet file'),
    'a Git LFS pointer': ({'a.parquet': b'version https://git-lfs.github.com/spec/v1\n'}, '', 'is a Git LFS pointer'),
    'a picture beside text': ({'a.txt': b'a', 'b.png': b'\x89PNG\r\n\x1a\n\0'}, '', 'in/b.png is a PNG picture'),
    'a PDF': ({'a.pdf': b'%PDF-1.7\n\x80'}, '', 'in/a.pdf is PDF'),
    'unknown binary': ({'a.dat': bytes(range(256)) * 9}, '', 'in/a.dat is binary'),
    'UTF-16': ({'a.txt': 'text'.encode('utf-16')}, '', 'is UTF-16 text (convert it with iconv)'),
    'a byte order mark': ({'a.jsonl': b'\xef\xbb\xbf' + FIFTY}, '', '50 documents'),
    'a link into a cache': ({'a.jsonl': '../blobs/4f2a', '../blobs/4f2a': FIFTY}, '',
         'JSON lines: 1 file; 50 documents'),
    'links in file://': ({'a.jsonl': '../blobs/4f2a', '../blobs/4f2a': FIFTY, 'b.jsonl': lines(50)},
                         '--input=file://{folder}', '51 documents'),
    'a link to nowhere': ({'a.jsonl': FIFTY, 'b.jsonl': '../annex/8d1f'}, '', 'where nothing is'),
    'notes and a book': ({'notes': b'some notes of mine', 'book.txt': BOOK}, '', '3 documents'),
    'one book': ({'book.txt': BOOK}, '--validation_share=0.01', '2 documents'),
    'stories in one file': ({'s.txt': stories(50)}, '--separator=<|endoftext|>', '50 documents'),
    'one story a file': ({f'{i}.txt': b'story %d<|endoftext|>' % i for i in range(50)}, '--separator=<|endoftext|>',
                         '50 documents'),
    'a separator that is not there': ({'s.txt': BOOK}, '--separator=<eot>',
         '--separator=<eot>: occurs in no text file'),
    'a separator for JSON lines': ({'a.jsonl': FIFTY}, '--separator=<eot>', '--separator=<eot>: has no effect'),
    'a validation set of its own': ({'a.jsonl': FIFTY, 'v.txt': b'held out'}, '--validation={folder}/v.txt',
         '51 documents'),
    'the same document everywhere': ({'a.jsonl': lines(1) * 50}, '', 'give at least two different documents'),
}


def outcome(name: str) -> tuple[int, str]:
  """The exit code of `prepare`, and what was read, or the reason why not."""
  contents, flags, _ = CASES[name]
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder, 'in')
    for file, content in contents.items():
      path = root / file
      path.parent.mkdir(parents=True, exist_ok=True)
      if isinstance(content, bytes):
        path.write_bytes(content)
      else:
        path.symlink_to(content)
    given = flags.format(folder=root).split()
    names = [flag.partition('=')[0] for flag in given]
    usual = [flag for flag in (f'--input={root}', HELD_OUT) if flag.partition('=')[0] not in names]
    command = ['prepare', f'--output={folder}/set', '--workers=0', *usual, *given]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      code = main(command)
    if code:
      return code, err.getvalue().splitlines()[-1].replace(folder, '')
    read, *counts = out.getvalue().splitlines()[:3]
    documents = sum(int(re.search(r'([\d,]+) documents', line)[1].replace(',', '')) for line in counts)
    return code, f'{read}; {documents} documents ({"; ".join(line.partition(",")[0] for line in counts)})'


if __name__ == '__main__':
  for name in CASES:
    code, text = outcome(name)
    print(f'{name:30} {code}  {text}', flush=True)
