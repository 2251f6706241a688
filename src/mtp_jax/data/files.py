"""Paths, directories and globs to files, on this machine or anywhere fsspec reaches.

A file's name, 'folder/file', does not depend on where a corpus is stored. Files are ordered by a
hash of their names, so that any consecutive files are a random sample.
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
_COMPRESSED = {'.gz': 'gzip', '.zst': 'zstd'}
# Keys of fsspec's file systems.
_MODIFIED = ('mtime', 'updated', 'LastModified', 'last_modified', 'etag', 'ETag', 'created')
_WILDCARD = re.compile(r'[*?\[]')


@dataclasses.dataclass(frozen=True)
class File:
  """One input file.

  modified: time or tag of the last change, where the file system knows it; interrupted work resumes
    only if it is equal.
  """
  name: str
  url: str
  bytes: int
  modified: str = ''

  def kind(self, format: str) -> str:
    """'text', 'jsonl' or 'parquet': the given format; for 'auto' by the end of the name."""
    if format != 'auto':
      return format
    if _JSONL.search(self.name):
      return 'jsonl'
    return 'parquet' if self.name.lower().endswith('.parquet') else 'text'

  @property
  def compression(self) -> str | None:
    """'gzip', 'zstd' or None, by the end of the name."""
    return _COMPRESSED.get(os.path.splitext(self.name)[1].lower())

  @functools.cached_property
  def hash(self) -> int:
    return name_hash(self.name)


def name_hash(name: str) -> int:
  """Uniform in [0, 2**64): the first 8 bytes of the sha256 of a name."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], 'big')


def files(paths: Iterable[str], where: str) -> list[File]:
  """The files of paths, directories and globs, ordered by the hashes of their names.

  Directories are walked recursively, without hidden files and folders, and without links to
  directories. A name begins with the directory given, or with the last folder before the first
  wildcard of a glob. A file reached twice is listed once; a different file of the same name gets a
  '~'.

  Args:
    paths: () is the Python source of the running interpreter's standard library.
    where: the flag or field that gave them, for messages.

  Raises:
    BadInput: there is no file, or a directory cannot be listed.
  """
  by_url, names = {}, set()
  entries = (entry for path in paths for entry in _entries(path, where)) if paths else _library()
  for name, url, size, modified in entries:
    if url not in by_url:
      while name in names:
        name += '~'
      names.add(name)
      by_url[url] = File(name, url, size, modified)
  return sorted(by_url.values(), key=lambda file: (file.hash, file.name))


def _library() -> Iterator[tuple]:
  root = sysconfig.get_path('stdlib')
  installed = ('site-packages', 'dist-packages')
  for path in _walk(root, lambda folder: folder in installed, 'the standard library'):
    if path.endswith('.py'):
      yield (_name(path, root), path, *_size(path))


def _entries(path: str, where: str) -> Iterator[tuple]:
  """(name, url, bytes, modified) of each file of a path, directory, glob or URL."""
  entries = _remote(path, where) if '://' in path else _local(path, where)
  if not entries:
    raise BadInput(f'{where}: {path!r} holds no file; give text files, JSON lines, Parquet, '
                   'or directories or globs of them')
  yield from entries


def _local(given: str, where: str) -> list[tuple]:
  root = os.path.realpath(os.path.expanduser(given))
  if os.path.isdir(root):
    paths = [path for path in _walk(root, _hidden, where) if not _hidden(os.path.basename(path))]
  elif os.path.isfile(root):  # before globs, since a file may have wildcards in its name
    paths = [root]
  else:
    pattern = os.path.expanduser(given)
    fixed = _before_wildcards(pattern) or '.'
    root = os.path.realpath(fixed)
    matches = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    paths = [os.path.join(root, os.path.relpath(path, fixed)) for path in matches]
  return [(_name(path, os.path.dirname(root)), os.path.realpath(path), *_size(path)) for path in paths]


def _remote(url: str, where: str) -> list[tuple]:
  fs, path = filesystem(url, where)
  is_glob = _WILDCARD.search(path)
  try:
    infos = fs.glob(path, detail=True) if is_glob else fs.find(path, detail=True)
  except OSError as error:
    raise BadInput(f'{where}: cannot list {url!r} ({error}); '
                   'check the address and the credentials') from error
  root = (_before_wildcards(path) if is_glob else path).rstrip('/')
  above = root.rpartition('/')[0]
  entries = []
  for path, info in sorted(infos.items()):
    name = path[len(above):].lstrip('/')
    if info['type'] == 'file' and not any(_hidden(part) for part in name.split('/')[1:]):
      modified = next((info[key] for key in _MODIFIED if info.get(key)), '')
      entries.append((name, fs.unstrip_protocol(path), info['size'], str(modified)))
  return entries


def _hidden(name: str) -> bool:
  return name.startswith('.')


def _before_wildcards(pattern: str) -> str:
  """The folders in front of the first wildcard."""
  return _WILDCARD.split(pattern, maxsplit=1)[0].rpartition('/')[0]


def filesystem(url: str, where: str):
  """(fsspec file system, path in it).

  Raises:
    BadInput: fsspec does not know the protocol, or the package for it is not installed.
  """
  try:
    return fsspec.core.url_to_fs(url)
  except (ValueError, ImportError) as error:
    raise BadInput(f'{where}: {url!r}: {" ".join(str(error).split())}') from error


def _walk(root: str, skip: Callable[[str], bool], where: str) -> Iterator[str]:
  """Regular files, sorted, without those in folders that are skipped."""
  def refuse(error):
    raise _unreadable(error.filename, error, where)
  for folder, folders, names in os.walk(root, onerror=refuse):
    folders[:] = sorted(f for f in folders if not skip(f))
    paths = [os.path.join(folder, name) for name in sorted(names)]
    yield from (path for path in paths if os.path.isfile(path))


def _size(path: str) -> tuple[int, str]:
  stat = os.stat(path)
  return stat.st_size, str(stat.st_mtime_ns)


def _name(path: str, root: str) -> str:
  """The path below root, with '/', as valid UTF-8 whatever the file system holds."""
  relative = pathlib.Path(path).relative_to(root).as_posix()
  return os.fsencode(relative).decode('utf-8', errors='backslashreplace')


def _unreadable(path: str, error: OSError, where: str) -> BadInput:
  return BadInput(f'{where}: cannot read {path!r} ({error.strerror or error}); '
                  'make it readable or leave it out')


def digest(file: File, where: str) -> str:
  """The sha256 of a file's bytes."""
  with open_file(file, where) as stream:
    return hashlib.file_digest(stream, 'sha256').hexdigest()


@contextlib.contextmanager
def open_file(file: File, where: str):
  """The open file, binary.

  Raises:
    BadInput: it cannot be opened.
  """
  try:
    if '://' in file.url:
      fs, path = filesystem(file.url, where)
      stream = fs.open(path, 'rb')
    else:
      stream = open(file.url, 'rb')
  except OSError as error:
    raise _unreadable(file.url, error, where) from error
  with stream:
    yield stream
