"""A folder, here or wherever fsspec reaches, whose files appear whole or not at all."""
import contextlib
import hashlib
import os
import pathlib
import tempfile

from mtp_jax.config import BadInput
from mtp_jax.data.files import filesystem

UNFINISHED = '.unfinished-'  # begins the names of files that are being written
RESTORE = 'restore the file, or delete the folder and prepare it again'


class Damaged(BadInput):
  """Bytes on disk are not those that were written."""


class Folder:
  """A directory, here or wherever fsspec reaches. What is written appears whole or not at all."""

  def __init__(self, url, where: str):
    self.where, self.here = where, '://' not in str(url)
    self.url = str(pathlib.Path(url).expanduser().absolute()) if self.here else str(url).rstrip('/')
    self._fs, self._path = filesystem(self.url, where)

  def path(self, name: str) -> str:
    return f'{self._path}/{name}'

  def sizes(self) -> dict[str, int]:
    """Of the files in it, not of those in folders below; {} where there is no such directory."""
    if self.here:
      return {entry.name: entry.stat().st_size for entry in os.scandir(self._path) if entry.is_file()} if os.path.isdir(self._path) else {}
    self._fs.invalidate_cache()
    if not self._fs.isdir(self._path):
      return {}
    return {entry['name'].rpartition('/')[2]: entry['size'] for entry in self._fs.ls(self._path, detail=True) if entry['type'] == 'file'}

  def read(self, name: str) -> bytes:
    return self._fs.cat_file(self.path(name))

  def write(self, name: str, content: bytes) -> None:
    with self.aside(name) as path:
      pathlib.Path(path).write_bytes(content)

  @contextlib.contextmanager
  def aside(self, name: str):
    """The path of a new file on this machine, which becomes `name` when the block ends well."""
    if self.here:
      os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
    descriptor, path = tempfile.mkstemp(prefix=UNFINISHED, dir=self._path if self.here else None)
    try:
      os.close(descriptor)
      yield path
      with open(path, 'rb') as file:
        os.fsync(file.fileno())
      if self.here:
        os.chmod(path, 0o666 & ~_umask())
        os.replace(path, self.path(name))
      else:
        self._fs.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        self._fs.put_file(path, self.path(name))
    finally:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(path)

  def remove(self, *names: str) -> None:
    """Files, or folders with all that is in them."""
    for name in names:
      if self._fs.exists(self.path(name)):
        self._fs.rm(self.path(name), recursive=True)

  def fetched(self, name: str, size: int, sha256: str, cache: str) -> str:
    """The path of a file on this machine, copied into `cache` if it lies elsewhere and no copy of that size is there.

    Raises:
      Damaged: the copy has another digest.
    """
    if self.here:
      return self.path(name)
    copies = Folder(pathlib.Path(cache) / 'shards', self.where)
    if copies.sizes().get(sha256) != size:
      with copies.aside(sha256) as path:
        self._fs.get_file(self.path(name), path)
        with open(path, 'rb') as file:
          if hashlib.file_digest(file, 'sha256').hexdigest() != sha256:
            raise Damaged(f'{self.url}/{name}: its digest is not that of the index; {RESTORE}')
    return copies.path(sha256)


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask
