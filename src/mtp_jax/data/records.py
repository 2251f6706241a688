"""Files to documents: text files, JSON lines and Parquet, compressed or not.

A document is bytes with a name, 'folder/file' or 'folder/file@place', place being the byte where its line begins, or its row. The
name, hence the split that hangs from it, does not depend on where a corpus lies.

What can be wrong with a record:

    broken_json, missing_field, empty, too_long      it is skipped
    invalid_utf8, lone_surrogate, nul                it is skipped, or kept as it is where its kind is to be kept
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

SKIPPED = ('broken_json', 'missing_field', 'empty', 'too_long')
CHOICE = ('invalid_utf8', 'lone_surrogate', 'nul')
FORMATS = ('auto', 'text', 'jsonl', 'parquet')


@dataclasses.dataclass(frozen=True)
class Reading:
  """How files are read; part of what fixes a prepared set.

  format: 'auto' goes by the end of the name: .jsonl, .ndjson, .json.gz, .json.zst, .parquet, all else is text; field: of a JSON object, or the
  column of a Parquet file, that holds the text. A line of six times max_document_bytes and a MiB is too_long unread.
  """
  format: str = 'auto'
  field: str = 'text'
  keep: tuple[str, ...] = ()
  max_document_bytes: int = 64 * 2**20

  def __post_init__(self):
    if self.format not in FORMATS:
      raise BadInput(f'--format={self.format}: {nearest(self.format, FORMATS)}')
    for kind in self.keep:
      if kind not in CHOICE:
        raise BadInput(f'--keep={kind}: ' + (f'such a record has no text to keep; {nearest(kind, CHOICE)}' if kind in SKIPPED else nearest(kind, CHOICE)))
    if self.max_document_bytes < 1:
      raise BadInput(f'--max_document_bytes={self.max_document_bytes}: must be at least 1')


@dataclasses.dataclass(frozen=True)
class Piece:
  """What is read in one go: a file, or the lines of a plain JSON-lines file that begin in [start, stop)."""
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
  """What is wrong with a record. line: of the file, or of the piece while it is read, from 1; the row of a Parquet file; 0 for a text file.
  detail: the fields that are there, of a record that lacks the one with the text."""
  kind: str
  file: str
  line: int
  kept: bool
  detail: str = ''


class _Hashed:
  """A file read from front to back, its bytes counted and hashed on the way."""

  def __init__(self, file):
    self._file, self.sha256, self.bytes, self.closed = file, hashlib.sha256(), 0, False

  def read(self, size: int = -1) -> bytes:
    return self._seen(self._file.read(size))

  def readline(self, size: int = -1) -> bytes:
    return self._seen(self._file.readline(size))

  def _seen(self, data: bytes) -> bytes:
    self.sha256.update(data)
    self.bytes += len(data)
    return data

  def up_to(self, limit: int, file=None) -> bytes:
    """What is left, or its first `limit` bytes and some more."""
    parts, size = [], 0
    while size <= limit and (part := (file or self).read(2**20)):
      parts.append(part)
      size += len(part)
    return b''.join(parts)


class Reader:
  """The documents of one piece, in order. After the last one: `sha256` and number of the `bytes` read, `lines` of them.

  Iterating yields `Document` and `Fault`; a record that is kept in spite of its fault gives both, the fault first. Holds one record,
  or one batch of a Parquet file, at a time.

  Raises:
    BadInput: the file cannot be read or is damaged, or its package is missing; naming the file and the place.
  """

  def __init__(self, piece: Piece, reading: Reading, where: str):
    self._piece, self._reading, self._where, self.sha256, self.bytes, self.lines = piece, reading, where, '', 0, 0

  def __iter__(self) -> Iterator[Document | Fault]:
    file = self._piece.file
    read = {'text': self._text, 'jsonl': self._jsonl, 'parquet': self._parquet}[file.kind(self._reading.format)]
    try:
      with open_file(file, self._where) as opened:
        yield from read(opened)
    except (EOFError, OSError, zlib.error) as error:
      raise BadInput(f'{self._where}: {file.url!r} is damaged or cut off after line {self.lines}, or not of the format that its name or --format says '
                     f'({" ".join(str(error).split())}); fetch it again or leave it out') from error

  def _plain(self, hashed: _Hashed):
    """The file without its compression."""
    compression = self._piece.file.compression
    if compression == 'gzip':
      return gzip.GzipFile(fileobj=hashed)
    if compression == 'zstd':
      pyarrow = self._needs('pyarrow')
      return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(hashed, 'r'), 'zstd'), 2**20)
    return hashed

  def _needs(self, package: str):
    try:
      return __import__(package)
    except ImportError as error:
      raise BadInput(f"{self._where}: {self._piece.file.name!r} needs {package}; pip install -e '.[data]'") from error

  def _text(self, opened) -> Iterator[Document | Fault]:
    hashed, limit = _Hashed(opened), self._reading.max_document_bytes
    text = hashed.up_to(limit, self._plain(hashed))
    yield from self._judged(self._piece.file.name, 0, text, _utf8_fault(text) if len(text) <= limit else 'too_long')
    self._end(hashed)

  def _end(self, hashed: _Hashed) -> None:
    while self._piece.stop < 0 and hashed.read(2**20):  # what a long text or a compressed stream left unread
      pass
    self.sha256, self.bytes = hashed.sha256.hexdigest(), hashed.bytes

  def _jsonl(self, opened) -> Iterator[Document | Fault]:
    piece, limit = self._piece, 6 * self._reading.max_document_bytes + 2**20
    if piece.start:  # the line that contains the byte before `start` belongs to the piece before
      opened.seek(piece.start - 1)
    place = piece.start - 1 + _skip_line(opened) if piece.start else 0
    hashed = _Hashed(opened)
    for line, size in _lines(self._plain(hashed), limit) if piece.stop < 0 or place < piece.stop else ():
      self.lines += 1
      name = f'{piece.file.name}@{place}'
      if size > limit:
        yield Fault('too_long', piece.file.name, self.lines, False)
      elif line.strip():
        yield from self._record(name, line)
      place += size
      if 0 <= piece.stop <= place:
        break
    self._end(hashed)

  def _record(self, name: str, line: bytes) -> Iterator[Document | Fault]:
    fault = None
    try:
      string = line.decode('utf-8')
    except UnicodeDecodeError:
      string, fault = line.decode('utf-8', errors='surrogateescape'), 'invalid_utf8'
    try:
      record = json.loads(string.removeprefix('\ufeff'))
    except (ValueError, RecursionError):
      yield Fault('broken_json', self._piece.file.name, self.lines, False)
      return
    text = record.get(self._reading.field) if isinstance(record, dict) else None
    if not isinstance(text, str):
      fields = f'fields: {", ".join(record)[:200]}' if isinstance(record, dict) else f'a {type(record).__name__}, no object'
      yield Fault('missing_field', self._piece.file.name, self.lines, False, fields.encode('utf-8', errors='backslashreplace').decode())
      return
    try:
      content = text.encode('utf-8')
    except UnicodeEncodeError:
      fault = fault or 'lone_surrogate'
      try:
        content = text.encode('utf-8', errors='surrogateescape' if fault == 'invalid_utf8' else 'surrogatepass')
      except UnicodeEncodeError:
        content = text.encode('utf-8', errors='surrogatepass')
    yield from self._judged(name, self.lines, content, fault)

  def _parquet(self, opened) -> Iterator[Document | Fault]:
    self._needs('pyarrow')
    import pyarrow
    from pyarrow import parquet
    file, column = self._piece.file, self._reading.field
    self.sha256, self.bytes = hashlib.file_digest(opened, 'sha256').hexdigest(), opened.tell()
    opened.seek(0)
    try:
      table = parquet.ParquetFile(opened)
      if column not in table.schema_arrow.names:
        raise BadInput(f'--field={column}: {file.url!r} has no such column; {nearest(column, table.schema_arrow.names)}')
      kind = table.schema_arrow.field(column).type
      text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
      if not (text or pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        raise BadInput(f'--field={column}: that column of {file.url!r} holds {kind}, not text')
      for batch in table.iter_batches(batch_size=128, columns=[column]):
        values = batch.column(0)
        for value in (values.cast(pyarrow.large_binary()) if text else values).to_pylist():
          self.lines += 1
          if value is None:
            yield Fault('missing_field', file.name, self.lines, False)
          else:
            yield from self._judged(f'{file.name}@{self.lines - 1}', self.lines, value, _utf8_fault(value))
    except pyarrow.ArrowException as error:
      raise OSError(error) from error

  def _judged(self, name: str, line: int, text: bytes, fault: str | None) -> Iterator[Document | Fault]:
    """The document, or what keeps it out, or both."""
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


def _lines(file, limit: int) -> Iterator[tuple[bytes, int]]:
  """(line, its size with the line end); of a line above `limit` bytes only the size, and never more than `limit` in memory."""
  while line := file.readline(limit + 1):
    size = len(line)
    if size > limit and not line.endswith(b'\n'):
      size += _skip_line(file)
    yield (line if size <= limit else b''), size


def _skip_line(file) -> int:
  """Bytes up to the end of the line."""
  size = 0
  while part := file.readline(2**20):
    size += len(part)
    if part.endswith(b'\n'):
      break
  return size
