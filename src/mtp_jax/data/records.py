"""Files to documents: text files, JSON lines and Parquet, compressed or not.

A document is bytes with a name: 'folder/file', 'folder/file@byte' (where its line, or its part
between separators, begins) or 'folder/file@row' (Parquet). A byte order mark belongs to no document.

What can be wrong with a record:

    broken_json, missing_field, empty, too_long      it is skipped
    invalid_utf8, lone_surrogate, nul                it is skipped, or kept unchanged if in `Reading.keep`
"""
import dataclasses
import hashlib
import json
import re
import zlib
from collections.abc import Iterator

from mtp_jax.config import BadInput, nearest
from mtp_jax.data.files import File, open_file
from mtp_jax.data.kinds import BOM, FORMATS, decompressed, need_package

ALWAYS_SKIPPED = ('broken_json', 'missing_field', 'empty', 'too_long')
MAY_BE_KEPT = ('invalid_utf8', 'lone_surrogate', 'nul')


@dataclasses.dataclass(frozen=True)
class Reading:
  """How files are read. A prepared set depends on all of it.

  format: 'auto' goes by content and name, file by file; see kinds.py.
  field: key of a JSON object, or column of a Parquet file, that holds the text.
  separator: what stands between the documents of a text file, without the line breaks around it;
    '': a file is one document.
  keep: kinds of faulty records that are kept as they are.
  max_document_bytes: longer documents are too_long; so is, unread, a line of more than 6 *
    max_document_bytes + 2**20 bytes.

  Raises:
    BadInput: an unknown format or kind, or a limit below 1.
  """
  format: str = 'auto'
  field: str = 'text'
  separator: str = ''
  keep: tuple[str, ...] = ()
  max_document_bytes: int = 64 * 2**20

  def __post_init__(self):
    if self.format not in FORMATS:
      raise BadInput(f'--format={self.format}: {nearest(self.format, FORMATS)}')
    for kind in self.keep:
      if kind not in MAY_BE_KEPT:
        reason = 'such a record has no text to keep; ' if kind in ALWAYS_SKIPPED else ''
        raise BadInput(f'--keep={kind}: {reason}{nearest(kind, MAY_BE_KEPT)}')
    if self.max_document_bytes < 1:
      raise BadInput(f'--max_document_bytes={self.max_document_bytes}: must be at least 1')


@dataclasses.dataclass(frozen=True)
class Piece:
  """What is read at once: a file, or those of its lines, or of its parts between separators, that
  begin in [start, stop)."""
  file: File
  start: int = 0
  stop: int = -1  # -1: to the end

  @property
  def bytes(self) -> int:
    return (self.file.bytes if self.stop < 0 else self.stop) - self.start


@dataclasses.dataclass(frozen=True)
class Document:
  name: str
  text: bytes


@dataclasses.dataclass(frozen=True)
class Fault:
  """What is wrong with a record.

  line: counted from 1, in the piece while it is read and in the file in the list of a set; of
    Parquet the row, with separators the document; 0 for a file that is one document.
  detail: where the field with the text is missing, the fields that the record has; why JSON is broken.
  """
  kind: str
  file: str
  line: int
  kept: bool
  detail: str = ''


class _HashingFile:
  """A file read from front to back; counts and hashes the bytes read."""

  def __init__(self, file):
    self._file, self.sha256, self.bytes, self.closed = file, hashlib.sha256(), 0, False

  def read(self, size: int = -1) -> bytes:
    return self._count(self._file.read(size))

  def readline(self, size: int = -1) -> bytes:
    return self._count(self._file.readline(size))

  def _count(self, data: bytes) -> bytes:
    self.sha256.update(data)
    self.bytes += len(data)
    return data


class Reader:
  """The documents of one piece, in order. Afterwards: `sha256` and the number of `bytes` read, and
  of `lines` in them.

  Iterating yields `Document` and `Fault`. A faulty record that is kept yields both, the fault
  first. Memory holds one record, or one batch of a Parquet file.

  Raises:
    BadInput: the file cannot be read or is damaged, or its package is missing; names file and line.
  """

  def __init__(self, piece: Piece, reading: Reading, where: str):
    self._piece, self._reading, self._where = piece, reading, where
    self.sha256, self.bytes, self.lines, self.separators = '', 0, 0, 0

  def __iter__(self) -> Iterator[Document | Fault]:
    file = self._piece.file
    readers = {'text': self._text, 'parquet': self._parquet}
    read = readers[file.format] if not self.separator else self._records
    try:
      with open_file(file, self._where) as stream:
        yield from read(stream)
    except (EOFError, OSError, zlib.error) as error:
      reason = ' '.join(str(error).split())
      if 'too much memory' in reason:  # what zstd says of its window
        raise BadInput(f'{self._where}: {file.url!r} was compressed with a window above 128 MiB; make a smaller one: '
                       f'zstd -dc --long=31 {file.name} | zstd > new.zst') from error
      raise BadInput(f'{self._where}: {file.url!r} is damaged or cut off after line {self.lines}, '
                     f'or not in the format of --format ({reason}); '
                     'fetch it again or leave it out') from error

  @property
  def separator(self) -> bytes:
    """What ends a record of the piece; b'' where files are not made of such records."""
    if self._piece.file.format == 'jsonl':
      return b'\n'
    return self._reading.separator.encode() if self._piece.file.format == 'text' else b''

  def _text(self, stream) -> Iterator[Document | Fault]:
    hashing, limit = _HashingFile(stream), self._reading.max_document_bytes
    text = _read_beyond(self._decompressed(hashing), limit)
    yield from self._checked(self._piece.file.name, 0, text, _utf8_fault(text) if len(text) <= limit else None)
    self._end(hashing)

  def _records(self, stream) -> Iterator[Document | Fault]:
    piece, separator, is_json = self._piece, self.separator, self._piece.file.format == 'jsonl'
    limit = 6 * self._reading.max_document_bytes + 2**20 if is_json else self._reading.max_document_bytes + 2**10
    place = max(0, piece.start - len(separator))
    stream.seek(place)
    if not is_json and not piece.file.compression:
      stream = _Separated(stream, separator)
    if piece.start:  # the record that contains the byte before `start` belongs to the piece before
      place += _skip_line(stream, separator)
    hashing = _HashingFile(stream)
    content = self._decompressed(hashing)
    if not is_json and piece.file.compression:
      content = _Separated(content, separator)
    is_empty = 0 <= piece.stop <= place
    for record, size in () if is_empty else _lines(content, separator, limit):
      self.lines += 1
      self.separators += record.endswith(separator)
      if size > limit:
        yield self._fault('too_long')
      elif is_json and record.strip():
        yield from self._record(f'{piece.file.name}@{place}', record)
      elif not is_json and (text := _between(record, separator, is_first=not place)):
        yield from self._checked(f'{piece.file.name}@{place}', self.lines, text, _utf8_fault(text))
      place += size
      if 0 <= piece.stop <= place:
        break
    self._end(hashing)

  def _record(self, name: str, line: bytes) -> Iterator[Document | Fault]:
    fault = None
    try:
      string = line.decode('utf-8')
    except UnicodeDecodeError:
      string, fault = line.decode('utf-8', errors='surrogateescape'), 'invalid_utf8'
    try:
      record = json.loads(string.removeprefix('\ufeff'), parse_int=float)  # of any number of digits
    except RecursionError:
      yield self._fault('broken_json', 'brackets nested too deeply')
      return
    except ValueError:
      yield self._fault('broken_json')
      return
    text = record.get(self._reading.field) if isinstance(record, dict) else None
    if not isinstance(text, str):
      if isinstance(record, dict):
        detail = f'fields: {", ".join(record)[:200]}'
      else:
        detail = f'a {type(record).__name__}, no object'
      yield self._fault('missing_field', detail.encode('utf-8', errors='backslashreplace').decode())
      return
    try:
      content = text.encode('utf-8')
    except UnicodeEncodeError:
      fault = fault or 'lone_surrogate'
      errors = 'surrogateescape' if fault == 'invalid_utf8' else 'surrogatepass'
      try:
        content = text.encode('utf-8', errors)
      except UnicodeEncodeError:
        content = text.encode('utf-8', errors='surrogatepass')
    yield from self._checked(name, self.lines, content, fault)

  def _parquet(self, stream) -> Iterator[Document | Fault]:
    need_package('pyarrow', self._piece.file.name, self._where)
    import pyarrow
    from pyarrow import parquet
    file, column = self._piece.file, self._reading.field
    self.sha256, self.bytes = hashlib.file_digest(stream, 'sha256').hexdigest(), stream.tell()
    stream.seek(0)
    try:
      table = parquet.ParquetFile(stream)
      if column not in table.schema_arrow.names:
        columns = nearest(column, table.schema_arrow.names)
        raise BadInput(f'--field={column}: {file.url!r} has no such column; {columns}')
      type_ = table.schema_arrow.field(column).type
      kind = type_.value_type if pyarrow.types.is_dictionary(type_) else type_
      is_text = re.fullmatch('(large_)?(string|binary)(_view)?|null', str(kind))
      if not is_text:
        raise BadInput(f'--field={column}: that column of {file.url!r} holds {type_}, not text')
      for batch in table.iter_batches(batch_size=128, columns=[column]):
        values = batch.column(0)
        if pyarrow.types.is_dictionary(type_):
          values = values.dictionary_decode()
        for value in values.cast(pyarrow.large_binary()).to_pylist():
          self.lines += 1
          if value is None:
            yield self._fault('missing_field')
          else:
            name = f'{file.name}@{self.lines - 1}'
            yield from self._checked(name, self.lines, value, _utf8_fault(value))
    except pyarrow.ArrowException as error:
      raise OSError(error) from error

  def _decompressed(self, hashing: _HashingFile):
    return decompressed(hashing, self._piece.file.compression, self._piece.file.name, self._where)

  def _end(self, hashing: _HashingFile) -> None:
    while self._piece.stop < 0 and hashing.read(2**20):  # the rest of a long text or compressed stream
      pass
    self.sha256, self.bytes = hashing.sha256.hexdigest(), hashing.bytes

  def _fault(self, kind: str, detail: str = '') -> Fault:
    return Fault(kind, self._piece.file.name, self.lines, False, detail)

  def _checked(self, name: str, line: int, text: bytes, fault: str | None) -> Iterator[Document | Fault]:
    """The document, or its fault, or both where such records are kept."""
    text = text.removeprefix(BOM)
    if not text:
      fault = 'empty'
    elif len(text) > self._reading.max_document_bytes:
      fault = 'too_long'
    elif fault is None and b'\0' in text:
      fault = 'nul'
    kept = fault in self._reading.keep
    if fault:
      yield Fault(fault, self._piece.file.name, line, kept)
    if kept or not fault:
      yield Document(name, text)


def _utf8_fault(text: bytes) -> str | None:
  try:
    text.decode('utf-8')
  except UnicodeDecodeError:
    try:
      text.decode('utf-8', errors='surrogatepass')
      return 'lone_surrogate'
    except UnicodeDecodeError:
      return 'invalid_utf8'


def _read_beyond(file, limit: int) -> bytes:
  """The rest of a file, or somewhat more than its next `limit` bytes."""
  chunks, size = [], 0
  while size <= limit and (chunk := file.read(2**20)):
    chunks.append(chunk)
    size += len(chunk)
  return b''.join(chunks)


def _between(record: bytes, separator: bytes, is_first: bool) -> bytes:
  """The text of a record that ends with the separator, or with the file; b'' if it is blank."""
  text = record.removesuffix(separator).removeprefix(BOM if is_first else b'').strip(b'\r\n')
  return text if text.strip() else b''


class _Separated:
  """A file whose `readline` reads up to any separator, as that of other files does up to a line end."""

  def __init__(self, file, separator: bytes):
    self._file, self._separator, self._buffer, self._at = file, separator, b'', 0

  def readline(self, size: int) -> bytes:
    """Up to `size` bytes, or a few more that end with the separator."""
    size, length = max(size, 2), len(self._separator)
    while (found := self._buffer.find(self._separator, self._at, self._at + size + length)) < 0:
      left = len(self._buffer) - self._at
      if left >= size + length or not (chunk := self._file.read(max(2**20, left))):
        break
      self._buffer, self._at = self._buffer[self._at:] + chunk, 0
    start = self._at
    if found < 0:
      self._at = min(len(self._buffer), start + size)
    else:
      self._at = found + length if found + length <= start + size or found == start else found
    return self._buffer[start:self._at]

  def read(self, size: int) -> bytes:
    rest, self._buffer, self._at = self._buffer[self._at:], b'', 0
    return rest or self._file.read(size)


def _lines(file, separator: bytes, limit: int) -> Iterator[tuple[bytes, int]]:
  """(line, its size with its end); of a line above `limit` bytes only the size, without holding it."""
  while line := file.readline(limit + 1):
    size = len(line)
    if size > limit and not line.endswith(separator):
      size += _skip_line(file, separator)
    yield (line if size <= limit else b''), size


def _skip_line(file, separator: bytes) -> int:
  """Bytes up to the end of the line."""
  size = 0
  while chunk := file.readline(2**20):
    size += len(chunk)
    if chunk.endswith(separator):
      break
  return size
