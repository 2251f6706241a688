"""Files to documents: text files, JSON lines and Parquet, compressed or not.

A document is bytes with a name: 'folder/file', 'folder/file@byte' (where its line begins) or
'folder/file@row' (Parquet).

What can be wrong with a record:

    broken_json, missing_field, empty, too_long      it is skipped
    invalid_utf8, lone_surrogate, nul                it is skipped, or kept unchanged if in `Reading.keep`
"""
import dataclasses
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator

from mtp_jax.config import BadInput, nearest
from mtp_jax.data.files import File, open_file

ALWAYS_SKIPPED = ('broken_json', 'missing_field', 'empty', 'too_long')
MAY_BE_KEPT = ('invalid_utf8', 'lone_surrogate', 'nul')
FORMATS = ('auto', 'text', 'jsonl', 'parquet')


@dataclasses.dataclass(frozen=True)
class Reading:
  """How files are read. A prepared set depends on all of it.

  format: 'auto' goes by the end of the name: .jsonl, .ndjson, .json.gz, .json.zst, .parquet;
    everything else is text.
  field: key of a JSON object, or column of a Parquet file, that holds the text.
  keep: kinds of faulty records that are kept as they are.
  max_document_bytes: longer documents are too_long; so is, unread, a line of more than 6 *
    max_document_bytes + 2**20 bytes.

  Raises:
    BadInput: an unknown format or kind, or a limit below 1.
  """
  format: str = 'auto'
  field: str = 'text'
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
  """What is read at once: a file, or those lines of a JSON-lines file that begin in [start, stop)."""
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
    Parquet the row; 0 for text.
  detail: where the field with the text is missing, the fields that the record has.
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
    self.sha256, self.bytes, self.lines = '', 0, 0

  def __iter__(self) -> Iterator[Document | Fault]:
    file = self._piece.file
    readers = {'text': self._text, 'jsonl': self._jsonl, 'parquet': self._parquet}
    read = readers[file.kind(self._reading.format)]
    try:
      with open_file(file, self._where) as stream:
        yield from read(stream)
    except (EOFError, OSError, zlib.error) as error:
      reason = ' '.join(str(error).split())
      raise BadInput(f'{self._where}: {file.url!r} is damaged or cut off after line {self.lines}, '
                     f'or not in the format of its name or of --format ({reason}); '
                     'fetch it again or leave it out') from error

  def _text(self, stream) -> Iterator[Document | Fault]:
    hashing, limit = _HashingFile(stream), self._reading.max_document_bytes
    text = _read_beyond(self._decompressed(hashing), limit)
    fault = _utf8_fault(text) if len(text) <= limit else 'too_long'
    yield from self._checked(self._piece.file.name, 0, text, fault)
    self._end(hashing)

  def _jsonl(self, stream) -> Iterator[Document | Fault]:
    piece, limit = self._piece, 6 * self._reading.max_document_bytes + 2**20
    place = 0
    if piece.start:  # the line that contains the byte before `start` belongs to the piece before
      stream.seek(piece.start - 1)
      place = piece.start - 1 + _skip_line(stream)
    hashing = _HashingFile(stream)
    is_empty = 0 <= piece.stop <= place
    for line, size in () if is_empty else _lines(self._decompressed(hashing), limit):
      self.lines += 1
      if size > limit:
        yield self._fault('too_long')
      elif line.strip():
        yield from self._record(f'{piece.file.name}@{place}', line)
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
      record = json.loads(string.removeprefix('\ufeff'))
    except (ValueError, RecursionError):
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
    self._import('pyarrow')
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
      is_string = pyarrow.types.is_string(type_) or pyarrow.types.is_large_string(type_)
      if not (is_string or pyarrow.types.is_binary(type_) or pyarrow.types.is_large_binary(type_)):
        raise BadInput(f'--field={column}: that column of {file.url!r} holds {type_}, not text')
      for batch in table.iter_batches(batch_size=128, columns=[column]):
        values = batch.column(0)
        for value in (values.cast(pyarrow.large_binary()) if is_string else values).to_pylist():
          self.lines += 1
          if value is None:
            yield self._fault('missing_field')
          else:
            name = f'{file.name}@{self.lines - 1}'
            yield from self._checked(name, self.lines, value, _utf8_fault(value))
    except pyarrow.ArrowException as error:
      raise OSError(error) from error

  def _decompressed(self, hashing: _HashingFile):
    compression = self._piece.file.compression
    if compression == 'gzip':
      return gzip.GzipFile(fileobj=hashing)
    if compression == 'zstd':
      pyarrow = self._import('pyarrow')
      decompressed = pyarrow.CompressedInputStream(pyarrow.PythonFile(hashing, 'r'), 'zstd')
      return io.BufferedReader(decompressed, 2**20)
    return hashing

  def _import(self, package: str):
    try:
      return __import__(package)
    except ImportError as error:
      raise BadInput(f"{self._where}: {self._piece.file.name!r} needs {package}; "
                     "pip install -e '.[data]'") from error

  def _end(self, hashing: _HashingFile) -> None:
    while self._piece.stop < 0 and hashing.read(2**20):  # the rest of a long text or compressed stream
      pass
    self.sha256, self.bytes = hashing.sha256.hexdigest(), hashing.bytes

  def _fault(self, kind: str, detail: str = '') -> Fault:
    return Fault(kind, self._piece.file.name, self.lines, False, detail)

  def _checked(self, name: str, line: int, text: bytes, fault: str | None) -> Iterator[Document | Fault]:
    """The document, or its fault, or both where such records are kept."""
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


def _lines(file, limit: int) -> Iterator[tuple[bytes, int]]:
  """(line, its size with the line end); of a line above `limit` bytes only the size, without holding it."""
  while line := file.readline(limit + 1):
    size = len(line)
    if size > limit and not line.endswith(b'\n'):
      size += _skip_line(file)
    yield (line if size <= limit else b''), size


def _skip_line(file) -> int:
  """Bytes up to the end of the line."""
  size = 0
  while chunk := file.readline(2**20):
    size += len(chunk)
    if chunk.endswith(b'\n'):
      break
  return size
