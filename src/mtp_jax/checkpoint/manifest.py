"""The manifest of a checkpoint: size and SHA-256 of each of its files, written once all of them are.

    STEP/manifest-INDEX-of-COUNT.json   {'name of a file, relative to STEP': [bytes, 'hex digest'], ...}

Orbax and TensorStore keep no checksum of arrays: they load a flipped bit in silence. Each process
reads a share of the files back and lists it; a checkpoint has a manifest when all COUNT lists are
there. Nothing here imports JAX or Orbax.
"""
import concurrent.futures
import hashlib
import json
import os
import pathlib
import re

from mtp_jax.config.paths import is_local, sizes

NAME = 'manifest-{index}-of-{count}.json'
PATTERN = re.compile(r'manifest-(\d+)-of-(\d+)\.json')


def write(folder: pathlib.Path, index: int = 0, count: int = 1) -> None:
  """Lists share number `index` of `count` of the files in the folder of a checkpoint. Raises OSError."""
  share = _share(_sizes(folder), index, count)
  digests = _digests(folder / name for name in share)
  listed = {name: [size, found] for (name, size), found in zip(share.items(), digests)}
  path, text = folder / NAME.format(index=index, count=count), json.dumps(listed, indent=0) + '\n'
  if not is_local(folder):  # an object appears whole or not at all
    path.write_text(text)
    return
  temporary = path.with_name(f'.{path.name}')
  with temporary.open('w') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)


def problem(folder: pathlib.Path, index: int = 0, count: int = 1, without: str = '') -> str:
  """What differs from the manifest in share number `index` of `count` of the listed files, in
  words; '' if nothing does, or if there is no manifest.

  Args:
    without: a folder whose files are not looked at.

  Raises:
    OSError: a file cannot be read.
  """
  try:
    listed = read(folder) or {}
  except ValueError as error:
    return str(error)
  chosen = {name: listed[name] for name in listed if not (without and name.startswith(without + '/'))}
  share = _share(chosen, index, count)
  found = _sizes(folder) if share else {}
  for name, (size, _) in share.items():
    if name not in found and not (folder / name).is_file():  # raises where the folder cannot be read
      return f'{name} is missing'
    if name in found and found[name] != size:
      return f'{name} has {found[name]:,} bytes, not {size:,}'
  for (name, (_, expected)), found in zip(share.items(), _digests(folder / name for name in share)):
    if found != expected:
      return f'{name} holds other bytes than were saved'
  return ''


def read(folder: pathlib.Path) -> dict[str, tuple[int, str]] | None:
  """{name: (bytes, digest)} of all files of a checkpoint; None if it has no manifest, or not all of it yet.

  Raises:
    ValueError: it cannot be understood.
    OSError: it cannot be read.
  """
  found = _lists(folder)
  if not found or len(found) < int(found[0].group(2)):
    return None
  listed = {}
  for match in found:
    try:
      entries = json.loads((folder / match.string).read_text())
      listed |= {_inside(name): (int(size), str(hexadecimal)) for name, (size, hexadecimal) in entries.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
      raise ValueError(f'{match.string} is no list of files') from None
  return listed


def exists(folder: pathlib.Path) -> bool:
  """Whether any process has written its part. Raises OSError."""
  return bool(_lists(folder))


def _lists(folder: pathlib.Path) -> list[re.Match]:
  """The names of the lists that stand in the folder."""
  return [match for match in (PATTERN.fullmatch(path.name) for path in folder.iterdir()) if match]


def size_bytes(folder: pathlib.Path) -> int:
  """Of all files of a checkpoint; 0 where they cannot be read."""
  try:
    return sum(_sizes(folder).values())
  except OSError:
    return 0


def digest(path: pathlib.Path) -> str:
  """SHA-256 of a file, in hexadecimal."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _digests(paths) -> list[str]:
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(digest, paths))


def _inside(name: str) -> str:
  """The name of a file within the folder. Raises ValueError for any other."""
  if pathlib.PurePosixPath(name).is_absolute() or '..' in name.split('/'):
    raise ValueError
  return name


def _sizes(folder) -> dict[str, int]:
  """Bytes of each file of a checkpoint but its manifest, by its name relative to the folder."""
  return {name: size for name, size in sizes(folder).items() if not PATTERN.fullmatch(name.removeprefix('.'))}


def _share(files: dict, index: int, count: int) -> dict:
  return dict(sorted(files.items())[index::count])
