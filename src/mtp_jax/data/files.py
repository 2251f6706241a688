"""The files of paths, directories and globs, on this machine or wherever fsspec reaches.

A file is named 'folder/file'. The name does not depend on where a corpus lies. Files are ordered by a hash of their names, so that any
run of them is a fair sample.
"""
import contextlib
import dataclasses
import functools
import glob
import hashlib
import os
import pathlib
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator

import fsspec

from mtp_jax.config import BadInput

_JSONL = re.compile(r'\.(jsonl|ndjson|json(?=\.(gz|zst)$))(\.gz|\.zst)?$', re.IGNORECASE)
_MODIFIED = ('mtime', 'updated', 'LastModified', 'last_modified', 'etag', 'ETag', 'created')  # as the file systems of fsspec spell it
_COMPRESSED = {'.gz': 'gzip', '.zst': 'zstd'}


@dataclasses.dataclass(frozen=True)
class File:
  """One input. modified: when, as far as the file system tells; it decides only whether interrupted work may go on."""
  name: str
  url: str
  bytes: int
  modified: str = ''

  def kind(self, format: str) -> str:
    if format != 'auto':
      return format
    return 'jsonl' if _JSONL.search(self.name) else 'parquet' if self.name.lower().endswith('.parquet') else 'text'

  @property
  def compression(self) -> str | None:
    return _COMPRESSED.get(os.path.splitext(self.name)[1].lower())

  @functools.cached_property
  def hash(self) -> int:
    return name_hash(self.name)


def name_hash(name: str) -> int:
  """Uniform in [0, 2**64): the first 8 bytes of the sha256 of a name."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], 'big')


def files(given: Iterable[str], where: str) -> list[File]:
  """The files of paths, directories and globs, in the order of their names' hashes.

  Directories are walked all the way down, without what begins with a dot and without links to directories. A file is named by
  its path from the directory given, or from the part of a glob before its first wildcard, that folder's own name first. A file reached
  twice is one; another file of the same name gets a '~'.

  Args:
    given: () is the Python files of the running interpreter's standard library.
    where: the flag or field that gave them, for messages.

  Raises:
    BadInput: nothing is found, or it cannot be listed.
  """
  found, names = {}, set()
  for name, url, size, modified in _library() if not given else (entry for path in given for entry in _given(path, where)):
    if url not in found:
      while name in names:
        name += '~'
      names.add(name)
      found[url] = File(name, url, size, modified)
  return sorted(found.values(), key=lambda file: (file.hash, file.name))


def _library() -> Iterator[tuple]:
  root = sysconfig.get_path('stdlib')
  for path in _below(root, lambda folder: folder in ('site-packages', 'dist-packages'), 'the standard library'):
    if path.endswith('.py'):
      yield (_name(path, root), path, *_size(path))


def _given(given: str, where: str) -> Iterator[tuple]:
  if '://' in given:
    found = _remote(given, where)
  else:
    root = os.path.realpath(os.path.expanduser(given))
    hidden = lambda name: name.startswith('.')
    if os.path.isdir(root):
      paths = [path for path in _below(root, hidden, where) if not hidden(os.path.basename(path))]
    elif os.path.isfile(root):
      paths = [root]
    else:  # a file may have wildcards in its name, so the name itself comes first
      pattern = os.path.expanduser(given)
      fixed = _before_wildcards(pattern) or '.'
      root = os.path.realpath(fixed)
      paths = [os.path.join(root, os.path.relpath(path, fixed)) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    found = [(_name(path, os.path.dirname(root)), os.path.realpath(path), *_size(path)) for path in paths]
  if not found:
    raise BadInput(f'{where}: {given!r} holds no file; give text files, JSON lines, Parquet, or directories or globs of them')
  yield from found


def _before_wildcards(pattern: str) -> str:
  """The folders in front of the first wildcard."""
  plain = re.split(r'[*?\[]', pattern, maxsplit=1)[0]
  return plain.rpartition('/')[0]


def _remote(url: str, where: str) -> list[tuple]:
  fs, path = filesystem(url, where)
  try:
    magic = re.search(r'[*?\[]', path)
    entries = fs.glob(path, detail=True) if magic else fs.find(path, detail=True)
  except OSError as error:
    raise BadInput(f'{where}: cannot list {url!r} ({error}); mend the address or the credentials') from error
  root = (_before_wildcards(path) if magic else path).rstrip('/')
  above = root.rpartition('/')[0]
  found = []
  for path, info in sorted(entries.items()):
    inner = path[len(above):].lstrip('/')
    if info['type'] == 'file' and not any(part.startswith('.') for part in inner.split('/')[1:]):
      found.append((inner, fs.unstrip_protocol(path), info['size'], str(next((info[key] for key in _MODIFIED if info.get(key)), ''))))
  return found


def filesystem(url: str, where: str):
  """(fsspec file system, path in it).

  Raises:
    BadInput: fsspec does not know the protocol, or lacks the package for it.
  """
  try:
    return fsspec.core.url_to_fs(url)
  except (ValueError, ImportError) as error:
    raise BadInput(f'{where}: {url!r}: {" ".join(str(error).split())}') from error


def _below(root: str, skipped: Callable, where: str) -> Iterator[str]:
  """Regular files, sorted, without going into the skipped folders."""
  def refuse(error):
    raise _unreadable(error.filename, error, where)
  for folder, folders, names in os.walk(root, onerror=refuse):
    folders[:] = sorted(f for f in folders if not skipped(f))
    yield from (path for path in (os.path.join(folder, name) for name in sorted(names)) if os.path.isfile(path))


def _size(path: str) -> tuple[int, str]:
  stat = os.stat(path)
  return stat.st_size, str(stat.st_mtime_ns)


def _name(path: str, root: str) -> str:
  """Relative, with '/', and valid UTF-8 whatever the file system holds."""
  return os.fsencode(pathlib.Path(path).relative_to(root).as_posix()).decode('utf-8', errors='backslashreplace')


def _unreadable(path: str, error: OSError, where: str) -> BadInput:
  return BadInput(f'{where}: cannot read {path!r} ({error.strerror or error}); make it readable or leave it out')


def digest(file: File, where: str) -> str:
  """The sha256 of a file's bytes."""
  with open_file(file, where) as opened:
    return hashlib.file_digest(opened, 'sha256').hexdigest()


@contextlib.contextmanager
def open_file(file: File, where: str):
  try:
    if '://' in file.url:
      fs, path = filesystem(file.url, where)
      opened = fs.open(path, 'rb')
    else:
      opened = open(file.url, 'rb')
  except OSError as error:
    raise _unreadable(file.url, error, where) from error
  with opened:
    yield opened
