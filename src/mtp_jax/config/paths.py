"""Paths as people write them: in a flag, in a config, in a call."""
import contextlib
import functools
import logging
import os
import pathlib
import shutil

from mtp_jax.config.errors import BadInput, in_words

BUCKET = 'gs://'


def folder_path(path, where: str = '--workdir'):
  """The path of a folder on this machine, or of one in a bucket of Google Cloud Storage.

  Args:
    path: a str or a path; ~ is the home directory.
    where: the flag, field or argument that gave it, for messages.

  Returns:
    A `pathlib.Path`, or of gs://BUCKET/FOLDER an `etils.epath.Path`, which has the methods of one.

  Raises:
    BadInput: it is empty, no path, another address, in a bucket that cannot be reached, or begins with a ~ that
      stands for nothing here.
  """
  text = str(path) if isinstance(path, os.PathLike) else path
  if isinstance(path, os.PathLike) and not is_local(path) and text.startswith(BUCKET):
    return path
  if isinstance(text, str) and text.startswith('gs:/'):  # pathlib merges slashes
    text = BUCKET + text.removeprefix('gs:').lstrip('/')
  if isinstance(text, str):
    check_folder(text, where)
  is_address = isinstance(text, str) and text.startswith(BUCKET)
  return _bucket_path(text.rstrip('/'), where) if is_address else local_path(path, where)


def check_folder(text: str, where: str) -> None:
  """Raises BadInput for an address that `folder_path` does not take; asks no bucket."""
  if not text.startswith(BUCKET):
    check_local(text, where, ' or gs://BUCKET/FOLDER')
  elif len(text.removeprefix(BUCKET).strip('/').split('/')) < 2:
    raise BadInput(f'{where}={text}: a bucket without a folder; write gs://BUCKET/FOLDER')


def is_local(path) -> bool:
  """Whether it is a path on this machine."""
  return isinstance(path, pathlib.Path)


def absolute(path):
  """A path of `folder_path`, whatever the current folder becomes."""
  return path.absolute() if is_local(path) else path


def sizes(folder) -> dict[str, int]:
  """Bytes of each file in a folder of `folder_path` and in all folders in it, by its name relative to the folder."""
  if is_local(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob('*') if path.is_file()}
  above = str(folder).removeprefix(BUCKET) + '/'
  found = _file_system(str(folder)).find(str(folder), detail=True)
  return {name.removeprefix(above): info['size'] for name, info in found.items()}


def _file_system(address: str):
  """That of gcsfs, as etils has it. Raises ImportError without gcsfs."""
  from etils.epath import backend
  return backend.fsspec_backend.fs(address)


def remove(folder) -> None:
  """Deletes a folder of `folder_path` and everything in it, as far as that can be done."""
  if is_local(folder):
    shutil.rmtree(folder, ignore_errors=True)
    return
  with contextlib.suppress(Exception):  # whatever the bucket's client may raise
    folder.rmtree()


def folders_above(path) -> list:
  """Those that hold an absolute path of `folder_path`, the nearest first; of a bucket's, up to the bucket."""
  return [folder for folder in path.parents if is_local(path) or len(folder.parts) > 2]  # '/', 'gs', 'bucket'


@functools.cache
def _bucket_path(text: str, where: str):
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # what it raises is told
  from etils import epath
  path = epath.Path(text)
  try:
    # else a folder looks as it did before another process, or TensorStore, wrote there
    _file_system(text).dircache.use_listings_cache = False
    path.exists()
  except ImportError:
    raise BadInput(f"{where}={text}: gcsfs is missing; pip install -e '.[gcs]'") from None
  except Exception as error:  # of gcsfs, of Google's packages, of the network
    raise BadInput(f'{where}={text}: the bucket cannot be reached ({in_words(error)}); see to the network and to '
                   'the credentials: gcloud auth application-default login') from None
  return path


def local_path(path, where: str) -> pathlib.Path:
  """The path on this machine; ~ is the home directory.

  Args:
    path: a str or a `pathlib.Path`.
    where: the flag, field or argument that gave it, for messages.

  Raises:
    BadInput: it is empty, no path, an address, or begins with a ~ that stands for nothing here.
  """
  if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
    raise BadInput(f'{where}={path!r}: must be a path, not {type(path).__name__}')
  text = expanded(os.fspath(path), where)
  if not text:
    raise BadInput(f'{where}: empty; give a path')
  check_local(text, where)
  return pathlib.Path(text)


def check_local(text: str, where: str, or_else: str = '') -> None:
  """Raises BadInput for an address, such as gs://bucket/run, where only a path on this machine will do."""
  scheme, is_address, rest = text.partition('://')
  if is_address and scheme.isidentifier():
    fix = f'write {rest}' if scheme == 'file' else 'mount it, such as with gcsfuse, and give that folder'
    raise BadInput(f'{where}={text}: must be a path on this machine{or_else}, no address; {fix}')


def expanded(text: str, where: str) -> str:
  """The text with the home directory in place of a leading ~; addresses stay as they are.

  Raises:
    BadInput: no file can have that name, or ~ stands for nothing here.
  """
  try:
    name = os.fsencode(text)
    if b'\0' in name or '://' not in text and max(map(len, name.split(b'/'))) > 255:
      raise ValueError
  except ValueError:
    raise BadInput(f'{where}={text!r}: no file can have such a name') from None
  path = os.path.expanduser(text)
  if text.startswith('~') and path == text:
    name = text.partition('/')[0]
    raise BadInput(f'{where}={text}: there is no home directory for {name} here; write the whole path, '
                   f'or ./{name} for a folder of that name')
  return path
