"""What each input is, by its first bytes together with its name, so that no file is taken for what
it is not.

    content                                              read as
    begins like gzip, bz2, xz or zstd                    what is inside, whatever the name
    begins with PAR1                                     Parquet
    the first lines are JSON objects, or named .jsonl    JSON lines
    other text                                           text
    a picture, an archive, NUL bytes, ...                refused, with its name and what it is
"""
import codecs
import collections
import concurrent.futures
import dataclasses
import gzip
import importlib
import io
import json
import re
import zlib

from mtp_jax.config import BadInput
from mtp_jax.data.files import File, head

FORMATS = ('auto', 'text', 'jsonl', 'parquet')
BOM = codecs.BOM_UTF8
NAMED = 3  # files that a message names

_HEAD = 2**16  # bytes that decide
_COMPRESSED_HEAD = 2**20  # of which these are needed at most: a block of bz2
_COMPRESSIONS = {'gzip': rb'\x1f\x8b\x08', 'bz2': rb'BZh[1-9](1AY&SY|\x17rE8P\x90)', 'xz': rb'\xfd7zXZ\x00',
                 'zstd': rb'\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18'}
_ENDS = {'.gz': 'gzip', '.bz2': 'bz2', '.xz': 'xz', '.zst': 'zstd'}
_OTHERS = (  # what no reader is for, and how it begins
    ('a Git LFS pointer, not the file itself (git lfs pull)', rb'version https://git-lfs\.github\.com/spec/'),
    ('UTF-32 text (convert it with iconv)', rb'\xff\xfe\x00\x00|\x00\x00\xfe\xff'),
    ('UTF-16 text (convert it with iconv)', rb'\xff\xfe|\xfe\xff'),
    ('PDF', rb'%PDF-'), ('a PNG picture', rb'\x89PNG'), ('a JPEG picture', rb'\xff\xd8\xff'),
    ('a GIF picture', rb'GIF8[79]a'), ('RIFF: sound, video or a picture', rb'RIFF....[A-Z]{3}'),
    ('a video', rb'....ftyp'), ('a sound file', rb'ID3[\x02-\x04]|OggS\x00|fLaC\x00'),
    ('a ZIP archive, or a document like .docx (unpack it)', rb'PK(\x03\x04|\x05\x06|\x07\x08)'),
    ('a tar archive (unpack it)', rb'.{257}ustar'), ('a 7z archive (unpack it)', rb'7z\xbc\xaf\x27\x1c'),
    ('a RAR archive (unpack it)', rb'Rar!\x1a\x07'), ('an ELF program', rb'\x7fELF'),
    ('lz4-compressed (decompress it)', rb'\x04\x22\x4d\x18'), ('lzip-compressed (decompress it)', rb'LZIP[\x00\x01]'),
    ('compress-ed (uncompress it)', rb'\x1f\x9d'), ('an Arrow file (write it as Parquet)', rb'ARROW1\x00'),
    ('Avro (write it as Parquet)', rb'Obj\x01'), ('ORC (write it as Parquet)', rb'ORC[\x00-\x1f]'),
    ('an SQLite database', rb'SQLite format 3\x00'), ('HDF5', rb'\x89HDF'), ('a NumPy array', rb'\x93NUMPY'),
    ('a Python pickle', rb'\x80[\x02-\x05][\x95}\]()cX]'))
_CONTROL = re.compile(rb'[\x01-\x06\x0e-\x19\x1c-\x1f]')  # characters that text in any encoding hardly has


def recognized(inputs: list[File], reading, where: str) -> list[File]:
  """The inputs with `format` and `compression` set.

  Args:
    reading: `Reading`; its format, unless 'auto', stands for all files, but a file that is
      something else for certain is refused all the same.
    where: the flag or field that names the inputs, for messages.

  Raises:
    BadInput: files are of no kind that can be read, or an option has no effect on any of them.
  """
  with concurrent.futures.ThreadPoolExecutor(16 if any('://' in file.url for file in inputs) else 1) as pool:
    results = list(pool.map(lambda file: _recognized(file, reading, where), inputs))
  refused = [f'{file.name} {reason}' for file, reason in zip(inputs, results) if isinstance(reason, str)]
  if refused:
    more = f'; and {len(refused) - NAMED:,} more' if len(refused) > NAMED else ''
    raise BadInput(f'{where}: {len(refused):,} of {len(inputs):,} files cannot be read: '
                   f'{"; ".join(refused[:NAMED])}{more}; leave them out, such as by a glob like '
                   "'folder/*.txt' that names the others")
  formats, summary = {file.format for file in results}, read_as({file.name: kind(file) for file in results})
  if reading.field != 'text' and formats == {'text'}:
    raise BadInput(f'--field={reading.field}: has no effect: {summary}; '
                   'give JSON lines or Parquet, or leave it out')
  if reading.separator and 'text' not in formats:
    raise BadInput(f'--separator={reading.separator}: has no effect: {summary}; it separates documents of text '
                   'files; leave it out')
  return results


def kind(file: File) -> str:
  """Of a recognized file, such as 'JSON lines in gzip'."""
  name = {'jsonl': 'JSON lines', 'parquet': 'Parquet', 'text': 'text'}[file.format]
  return f'{name} in {file.compression}' if file.compression else name


def read_as(kinds: dict[str, str]) -> str:
  """'read as Parquet: 3 files; as text: README.md', with the names of few files beside others.

  Args:
    kinds: from the names of files to what `kind` says of them.
  """
  groups = collections.defaultdict(list)
  for name, file_kind in kinds.items():
    groups[file_kind].append(name)
  counts = [f'as {file_kind}: ' + (', '.join(names) if len(names) <= NAMED and len(groups) > 1 else
                              f'{len(names):,} file' + 's' * (len(names) > 1))
            for file_kind, names in sorted(groups.items(), key=lambda group: -len(group[1]))]
  return 'read ' + '; '.join(counts)


def _recognized(file: File, reading, where: str) -> File | str:
  """The file with its kind, or why it cannot be read, beginning with a verb."""
  name, _, end = file.name.lower().rpartition('.')
  named = _ENDS.get(f'.{end}', '')
  content = head(file, _HEAD, where)
  is_whole = file.bytes <= _HEAD
  compression = _compression(content)
  if compression:
    content = _first_bytes(head(file, _COMPRESSED_HEAD, where), compression, file.name, where)
    is_whole = file.bytes <= _COMPRESSED_HEAD and len(content) < _HEAD
  elif named and (not content or is_binary(content)):
    return f'is named .{end}, but does not begin like {named}: damaged, or not fetched'
  end = (name if named else file.name.lower()).rpartition('.')[2]

  if compression and (inner := _compression(content)):
    return f'is {inner} within {compression}: decompress it once'
  is_parquet = content.startswith(b'PAR1')
  other = next((what for what, begin in _OTHERS if re.match(begin, content, re.DOTALL)), '')
  if is_parquet and (compression or reading.format not in ('auto', 'parquet')):
    return f'is Parquet in {compression}; decompress it' if compression else 'is Parquet; leave out --format'
  if not is_parquet and (reading.format == 'parquet' or reading.format == 'auto' and end == 'parquet'):
    return f'is no Parquet file: it is {other or "damaged, or something else"}'
  if other:
    return f'is {other}'
  if reading.format != 'auto' or is_parquet:
    format = reading.format if reading.format != 'auto' else 'parquet'
  elif is_binary(content) and 'nul' not in reading.keep:
    if _is_utf16(content):
      return 'is UTF-16 text without a mark (convert it with iconv)'
    return ('is binary: neither text nor anything that can be read (--keep=nul,invalid_utf8 reads texts that hold '
            'such bytes)')
  elif end == 'json' and re.match(rb'\s*\[\s*\{', content.removeprefix(BOM)):
    return ('is one JSON array; write an object a line, such as by jq -c .[] '
            '(--format=text reads the file as one document)')
  else:
    format = 'jsonl' if _is_jsonl(content, is_whole, end, reading.field) else 'text'
  return dataclasses.replace(file, format=format, compression=compression)


def _is_jsonl(content: bytes, is_whole: bool, end: str, field: str) -> bool:
  if end in ('jsonl', 'ndjson'):
    return True  # lines that are no objects are reported one by one
  lines = [line for line in content.removeprefix(BOM).split(b'\n') if line.strip()]
  complete = lines if is_whole else lines[:-1]
  if len(complete) > 1:  # faulty lines, even the first, are reported one by one
    return sum(bool(_object(line)) for line in complete[:100]) > min(len(complete), 100) / 2
  if not lines or not lines[0].lstrip().startswith(b'{'):
    return False
  if len(lines) == 1:
    return field in _object(lines[0]) if is_whole else bool(re.match(rb'\s*\{\s*"', lines[0]))
  return bool(_object(lines[0])) and lines[1].lstrip().startswith(b'{')  # the second is cut off


def _object(line: bytes) -> dict:
  """The JSON object on a line; {} if there is none."""
  try:
    value = json.loads(line, parse_int=float)  # of any number of digits
  except (ValueError, RecursionError):
    return {}
  return value if isinstance(value, dict) else {}


def is_binary(content: bytes) -> bool:
  """Whether the first bytes of a file are no text in any usual encoding that is made of bytes."""
  if b'\0' in content:
    return True
  try:
    codecs.getincrementaldecoder('utf-8')().decode(content)
    return False
  except UnicodeDecodeError:
    return bool(_CONTROL.search(content))


def _compression(content: bytes) -> str:
  """How a file with these first bytes is compressed; '' if it is not."""
  return next((name for name, begin in _COMPRESSIONS.items() if re.match(begin, content)), '')


def _is_utf16(content: bytes) -> bool:
  """Whether every other byte is mostly NUL, as in western text of two bytes a character."""
  shares = sorted(content[start::2].count(0) / max(1, len(content) // 2) for start in (0, 1))
  return shares[0] < 0.05 and shares[1] > 0.5


def _first_bytes(content: bytes, compression: str, name: str, where: str) -> bytes:
  """Up to _HEAD bytes of what the beginning of a compressed file holds; fewer where it is damaged."""
  stream, first = decompressed(io.BytesIO(content), compression, name, where), b''
  try:
    while len(first) < _HEAD and (chunk := stream.read1(_HEAD - len(first))):
      first += chunk
  except (EOFError, OSError, zlib.error):
    pass
  return first


def decompressed(stream, compression: str, name: str, where: str):
  """What a stream of bytes holds, through all its frames; it raises EOFError, OSError or zlib.error
  where that is damaged or cut off.

  Raises:
    BadInput: a package is missing.
  """
  if compression == 'gzip':
    return gzip.GzipFile(fileobj=stream)
  if compression == 'zstd':
    pyarrow = need_package('pyarrow', name, where)
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, 'r'), 'zstd'), 2**20)
  if compression == 'bz2':
    return io.BufferedReader(_Frames(stream, need_package('bz2', name, where).BZ2Decompressor), 2**20)
  if compression == 'xz':
    return io.BufferedReader(_Frames(stream, need_package('lzma', name, where).LZMADecompressor), 2**20)
  return stream


class _Frames(io.RawIOBase):
  """Frames of bz2 or xz, one after the other. Python's own readers end in silence at a damaged one."""

  def __init__(self, stream, new_decoder):
    self._stream, self._new_decoder, self._decoder = stream, new_decoder, new_decoder()

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    data = b''
    while not data:
      compressed = b''
      if self._decoder.eof:
        compressed = self._decoder.unused_data.lstrip(b'\0') or self._stream.read(2**16).lstrip(b'\0')
        if not compressed:
          return 0
        self._decoder = self._new_decoder()
      elif self._decoder.needs_input and not (compressed := self._stream.read(2**16)):
        raise EOFError('it ends in the middle')
      try:
        data = self._decoder.decompress(compressed, len(buffer))
      except Exception as error:  # lzma has a class of its own
        raise OSError(str(error)) from error
    buffer[:len(data)] = data
    return len(data)


def need_package(package: str, name: str, where: str):
  """The imported module.

  Raises:
    BadInput: it is not installed.
  """
  try:
    return importlib.import_module(package)
  except ImportError as error:
    raise BadInput(f"{where}: {name!r} needs {package}; pip install -e '.[data]'") from error
