"""A folder, on this machine or anywhere fsspec reaches, whose files appear complete or not at all."""
import contextlib
import hashlib
import os
import pathlib
import tempfile

from mtp_jax.config import BadInput, local_path
from mtp_jax.data.files import filesystem

UNFINISHED = '.unfinished-'  # begins the names of files that are being written
RESTORE = 'restore the file, or delete the folder and prepare it again'


class Damaged(BadInput):
  """Bytes on disk are not those that were written."""


class Unreadable(OSError):
  """Bytes cannot be read now, which tells nothing of what they are: too many files are open, no
  permission, a network that failed.
  """


class Folder:
  """A directory on this machine or anywhere fsspec reaches.

  Args:
    where: the flag or field that names it, for messages.

  Raises:
    BadInput: fsspec does not know the protocol, or the package for it is not installed.
  """

  def __init__(self, url, where: str):
    self.where, self.is_local = where, '://' not in str(url)
    self.url = str(local_path(url, where).absolute()) if self.is_local else str(url).rstrip('/')
    self._fs, self._path = filesystem(self.url, where)

  def path(self, name: str) -> str:
    return f'{self._path}/{name}'

  def sizes(self) -> dict[str, int]:
    """Bytes of each file in it, without subfolders; {} where there is no such directory."""
    if self.is_local:
      if not os.path.isdir(self._path):
        return {}
      # isfile is False of a link that leads in a circle, of which is_file raises
      return {entry.name: entry.stat().st_size for entry in os.scandir(self._path) if os.path.isfile(entry.path)}
    self._fs.invalidate_cache()
    if not self._fs.isdir(self._path):
      return {}
    entries = self._fs.ls(self._path, detail=True)
    return {entry['name'].rpartition('/')[2]: entry['size'] for entry in entries if entry['type'] == 'file'}

  def read(self, name: str) -> bytes:
    return self._fs.cat_file(self.path(name))

  def write(self, name: str, content: bytes) -> None:
    with self.new_file(name) as path:
      pathlib.Path(path).write_bytes(content)

  @contextlib.contextmanager
  def new_file(self, name: str):
    """Path of a temporary file on this machine, which becomes `name` unless the block raises."""
    if self.is_local:
      os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
    descriptor, path = tempfile.mkstemp(prefix=UNFINISHED, dir=self._path if self.is_local else None)
    try:
      os.close(descriptor)
      yield path
      with open(path, 'rb') as file:
        os.fsync(file.fileno())
      if self.is_local:
        os.chmod(path, 0o666 & ~_umask())
        os.replace(path, self.path(name))
      else:
        self._fs.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        self._fs.put_file(path, self.path(name))
    finally:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(path)

  def remove(self, *names: str) -> None:
    """Deletes files, or subfolders with everything in them."""
    for name in names:
      if self._fs.exists(self.path(name)):
        self._fs.rm(self.path(name), recursive=True)

  def local_copy(self, name: str, size: int, sha256: str, cache: str) -> str:
    """Path of a file on this machine; a remote one is copied into `cache` unless a copy of that
    size is there.

    Raises:
      Damaged: the copy has another digest.
    """
    if self.is_local:
      return self.path(name)
    copies = Folder(pathlib.Path(cache) / 'shards', self.where)
    if copies.sizes().get(sha256) != size:
      with copies.new_file(sha256) as path:
        self._fs.get_file(self.path(name), path)
        with open(path, 'rb') as file:
          if hashlib.file_digest(file, 'sha256').hexdigest() != sha256:
            raise Damaged(f'{self.url}/{name}: its digest is not that of the index; {RESTORE}')
    return copies.path(sha256)


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask
