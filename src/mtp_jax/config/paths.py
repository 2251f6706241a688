"""Paths as people write them: in a flag, in a config, in a call."""
import os
import pathlib

from mtp_jax.config.errors import BadInput


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


def check_local(text: str, where: str) -> None:
  """Raises BadInput for an address, such as gs://bucket/run, where only a path on this machine will do."""
  scheme, is_address, rest = text.partition('://')
  if is_address and scheme.isidentifier():
    fix = f'write {rest}' if scheme == 'file' else 'mount it, such as with gcsfuse, and give that folder'
    raise BadInput(f'{where}={text}: must be a path on this machine, no address; {fix}')


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
