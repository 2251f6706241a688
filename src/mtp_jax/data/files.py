"""Paths, directories and globs to files, on this machine or anywhere fsspec reaches.

A file's name, 'folder/file', is as the user gave it: it depends neither on where a corpus is stored
nor on where links lead. Files are ordered by a hash of their names, so that any consecutive files
are a random sample.
"""
import contextlib
import dataclasses
import errno
import functools
import glob
import hashlib
import os
import pathlib
import re
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator

import fsspec

from mtp_jax.config import BadInput
from mtp_jax.config.errors import in_words

# Keys of fsspec's file systems.
_MODIFIED = ('mtime', 'updated', 'LastModified', 'last_modified', 'etag', 'ETag', 'created')
_WILDCARD = re.compile(r'[*?\[]')


@dataclasses.dataclass(frozen=True)
class File:
  """One input file.

  modified: time or tag of the last change, where the file system knows it; interrupted work resumes
    only if it is equal.
  format, compression: how it is read; `recognized` in kinds.py sets them.
  """
  name: str
  url: str
  bytes: int
  modified: str = ''
  format: str = 'text'
  compression: str = ''

  @functools.cached_property
  def hash(self) -> int:
    return name_hash(self.name)


def name_hash(name: str) -> int:
  """Uniform in [0, 2**64): the first 8 bytes of the sha256 of a name."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], 'big')


def files(paths: Iterable[str], where: str) -> list[File]:
  """The files of paths, directories and globs, ordered by the hashes of their names.

  Directories are walked recursively, without hidden files and folders. Links are followed, to files
  and to directories, each directory once. A name begins with the directory given, or with the last
  folder before the first wildcard of a glob. A file reached twice is listed once; a different file
  of the same name gets a '~'.

  Args:
    paths: () is the Python source of the running interpreter's standard library.
    where: the flag or field that gave them, for messages.

  Raises:
    BadInput: there is no file, a directory cannot be listed, or a link leads nowhere.
  """
  by_place, names = {}, set()
  entries = (entry for path in paths for entry in _entries(path, where)) if paths else _library()
  for name, url, size, modified in entries:
    place = url if '://' in url else os.path.realpath(url)
    if place not in by_place:
      while name in names:
        name += '~'
      names.add(name)
      by_place[place] = File(name, url, size, modified)
  return sorted(by_place.values(), key=lambda file: (file.hash, file.name))


def _library() -> Iterator[tuple]:
  root = sysconfig.get_path('stdlib')
  installed = ('site-packages', 'dist-packages')
  for path in _walk(root, lambda folder: folder in installed, 'the standard library'):
    if path.endswith('.py'):
      yield (_name(path, root), path, *_size(path))


def _entries(path: str, where: str) -> Iterator[tuple]:
  """(name, url, bytes, modified) of each file of a path, directory, glob or URL."""
  if not path:
    raise BadInput(f'{where}: holds an empty name; give files, directories or globs')
  path = without_file_scheme(path)
  entries = _remote(path, where) if '://' in path else _local(path, where)
  if not entries:
    raise BadInput(f'{where}: {path!r} holds no file{_why_not(path)}; give text files, JSON lines, Parquet, '
                   'or directories or globs of them')
  yield from entries


def _why_not(path: str) -> str:
  """': there is none' or another reason why a path stands for no file."""
  place = os.path.expanduser(path)
  if '://' in path:
    return ''
  if os.path.isdir(place):
    return ', hidden ones left out' if os.listdir(place) else ': it is empty'
  if path == '-':
    return ': stdin cannot be read twice, so write it to a file'
  if os.path.islink(place) and not os.path.exists(place):
    return f': it is a link to {os.readlink(place)!r}, where nothing is'
  if os.path.exists(place):
    return ': it is a pipe or a device, which cannot be read twice, so write it to a file'
  if _WILDCARD.search(path):
    return ': nothing matches'
  return ': there is none of this name; commas separate names, and ? stands for a comma in one'


def without_file_scheme(path: str) -> str:
  """The path of a file:// or local:// address; anything else as it is."""
  return re.sub('^(file|local)://', '', path)


def _local(given: str, where: str) -> list[tuple]:
  root = os.path.abspath(os.path.expanduser(given))
  _check_readable(root, where)
  if os.path.isdir(root):
    paths = list(_walk(root, _hidden, where))
  elif os.path.isfile(root):  # before globs, since a file may have wildcards in its name
    paths = [root]
  else:
    pattern = os.path.expanduser(given)
    fixed = _before_wildcards(pattern) or '.'
    root = os.path.abspath(fixed)
    matches = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    paths = [os.path.join(root, os.path.relpath(path, fixed)) for path in matches]
  return [(_name(path, os.path.dirname(root)), path, *_size(path)) for path in paths]


def _check_readable(pattern: str, where: str) -> None:
  """Raises BadInput for a folder that may not be read on the way to a path or to a match of a glob: its files would
  be left out in silence.
  """
  folder, name = os.path.split(pattern)
  while name:
    needed = os.R_OK | os.X_OK if _WILDCARD.search(name) else os.X_OK
    for place in glob.glob(folder, recursive=True) if _WILDCARD.search(folder) else [folder]:
      if os.path.isdir(place) and not os.access(place, needed):
        raise _unreadable(place, PermissionError(errno.EACCES, os.strerror(errno.EACCES)), where)
    folder, name = os.path.split(folder)


def _remote(url: str, where: str) -> list[tuple]:
  fs, path = filesystem(url, where)
  with _named(f'{where}: cannot list {url!r}'):
    if is_file := not path.endswith('/') and fs.isfile(path):  # before globs: a '?' may be part of an address
      infos = {path: fs.info(path)}
    else:
      infos = fs.glob(path, detail=True) if _WILDCARD.search(path) else fs.find(path, detail=True)
    if not infos and _is_web(path):
      fs.info(path)  # raises what isfile and find hide, such as that there is no such server
  root = (_before_wildcards(path) if _WILDCARD.search(path) and not is_file else path).rstrip('/')
  above = root.partition('?')[0].rpartition('/')[0]
  entries = []
  for path, info in sorted(infos.items()):
    name = path[len(above):].lstrip('/')
    if info['type'] != 'file' or any(_hidden(part) for part in name.split('/')[1:]):
      continue
    if info.get('size') is None:
      raise BadInput(f'{where}: {path!r}: its server does not say how large it is; fetch it, and name the copy')
    if _is_web(path):
      name = name.partition('?')[0]
    modified = next((info[key] for key in _MODIFIED if info.get(key)), '')
    entries.append((name, fs.unstrip_protocol(path), info['size'], str(modified)))
  return entries


def _is_web(url: str) -> bool:
  return url.startswith(('http://', 'https://'))


@contextlib.contextmanager
def _named(what: str):
  """Errors of a remote file system, of whatever class, become one line that begins with `what`."""
  try:
    yield
  except (BadInput, MemoryError):
    raise
  except Exception as error:
    first = error
    while first.__cause__:
      first = first.__cause__
    raise BadInput(f'{what} ({in_words(first)}); check the address and the credentials') from error


def _hidden(name: str) -> bool:
  return name.startswith('.')


def _before_wildcards(pattern: str) -> str:
  """The folders in front of the first wildcard."""
  return _WILDCARD.split(pattern, maxsplit=1)[0].rpartition('/')[0]


def filesystem(url: str, where: str):
  """(fsspec file system, path in it).

  Raises:
    BadInput: fsspec does not know the protocol, the package for it is not installed, or what the
      address leads through, such as an archive, is not there.
  """
  try:
    return fsspec.core.url_to_fs(url)
  except MemoryError:
    raise
  except Exception as error:  # file systems have classes of their own
    raise BadInput(f'{where}: {url!r}: {in_words(error)}') from error


def _walk(root: str, skip: Callable[[str], bool], where: str) -> Iterator[str]:
  """Regular files, sorted, without those in folders that are skipped."""
  def refuse(error):
    raise _unreadable(error.filename, error, where)
  walked = set()
  for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
    place = os.path.realpath(folder)
    if place in walked:  # links may lead in a circle
      folders.clear()
      continue
    walked.add(place)
    folders[:] = sorted(f for f in folders if not skip(f))
    for path in (os.path.join(folder, name) for name in sorted(names) if not _hidden(name)):
      if os.path.isfile(path):
        yield path
      elif not os.path.lexists(path):  # nor may anything in this folder be looked at
        raise _unreadable(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)), where)
      elif not os.path.exists(path):
        raise BadInput(f'{where}: {path!r} is a link to {os.readlink(path)!r}, where nothing is; '
                       'fetch what it stands for, or leave it out')


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
def open_file(file: File, where: str, only_head: bool = False):
  """The open file, binary. What a web server holds is first copied to a temporary file, since many
  servers cannot send from the middle.

  Args:
    only_head: nothing but its beginning will be read.

  Raises:
    BadInput: it cannot be opened.
  """
  if '://' not in file.url:
    try:
      stream = open(file.url, 'rb')
    except OSError as error:
      raise _unreadable(file.url, error, where) from error
  else:
    fs, path = filesystem(file.url, where)
    with _named(f'{where}: cannot read {file.url!r}'):
      if not _is_web(file.url):
        stream = fs.open(path, 'rb')
      elif only_head:
        stream = fs.open(path, 'rb', block_size=0)
      else:
        stream = tempfile.TemporaryFile()
        fs.get_file(path, stream)
        stream.seek(0)
  with stream:
    yield stream


def head(file: File, size: int, where: str) -> bytes:
  """Its first `size` bytes, or all if there are fewer."""
  with open_file(file, where, only_head=True) as stream:
    return stream.read(size) if file.bytes else b''
