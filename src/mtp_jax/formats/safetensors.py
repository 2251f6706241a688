"""Files of the safetensors format, written and read array by array.

    8 bytes        length of the header, little-endian
    header         JSON: {name: {'dtype': 'F32', 'shape': [2, 3], 'data_offsets': [begin, end]}, ...}
    data           the arrays one after the other, each contiguous

A folder holds one file, model.safetensors, or several and an index of which holds what.
"""
import json
import math
import os
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from mtp_jax.config import BadInput
from mtp_jax.config.errors import cannot

TYPES = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
         'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2, 'I64': np.int64,
         'I32': np.int32,
         'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_}
NAMES = {np.dtype(kind): name for name, kind in TYPES.items()}
INDEX = 'model.safetensors.index.json'
LONGEST_HEADER = 100_000_000


class Writer:
  """Files of arrays whose names, types and shapes are known, to be written in any order.

  Args:
    folder: of the files, which exists.
    arrays: {name: (dtype, shape)}, in the order of the files.
    shard_bytes: a file is closed before it gets longer, but holds at least one array.
    stem: begins the names of the files.
  """

  def __init__(self, folder: pathlib.Path, arrays: Mapping[str, tuple], shard_bytes: int,
               stem: str = 'model'):
    self._arrays, self._left = dict(arrays), set(arrays)
    sizes = {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (dtype,
                                                                          shape) in arrays.items()}
    self._shards, self._files = _shards(sizes, shard_bytes), []
    count, self._place = len(self._shards), {}
    for i, names in enumerate(self._shards):
      name = f'{stem}.safetensors' if count == 1 else f'{stem}-{i + 1:05}-of-{count:05}.safetensors'
      self._files.append((folder / name).open('wb'))
      self._begin(self._files[-1], names, sizes)
    if count > 1:
      files = {name: pathlib.Path(file.name).name for name, (file, _) in self._place.items()}
      index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': files}
      (folder / f'{stem}.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n')

  def _begin(self, file, names: list[str], sizes: dict[str, int]) -> None:
    """Writes the header of a file, and makes it as long as it will be."""
    header, offset = {'__metadata__': {'format': 'pt'}}, 0
    for name in names:
      dtype, shape = self._arrays[name]
      header[name] = {'dtype': NAMES[np.dtype(dtype)], 'shape': list(shape),
                      'data_offsets': [offset, offset + sizes[name]]}
      offset += sizes[name]
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    file.write(len(text).to_bytes(8, 'little') + text)
    for name in names:
      self._place[name] = file, 8 + len(text) + header[name]['data_offsets'][0]
    file.truncate(8 + len(text) + offset)

  def write(self, name: str, array: np.ndarray) -> None:
    """Writes an array, rounded to its type. Raises ValueError for another shape."""
    dtype, shape = self._arrays[name]
    if array.shape != tuple(shape):
      raise ValueError(f'{name}: shape {array.shape} is not {tuple(shape)}')
    file, offset = self._place[name]
    file.seek(offset)
    file.write(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data)
    self._left.remove(name)

  def close(self) -> None:
    """Ends the files, on disk. Raises ValueError if an array was not written."""
    if self._left:
      raise ValueError(f'{min(self._left)}: was not written')
    for file in self._files:
      file.flush()
      os.fsync(file.fileno())
    self.abandon()

  def abandon(self) -> None:
    for file in self._files:
      file.close()


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
  """Names of the arrays of each file."""
  shards, total = [[]], 0
  for name, size in sizes.items():
    if shards[-1] and total + size > shard_bytes:
      shards, total = [*shards, []], 0
    shards[-1].append(name)
    total += size
  return shards


def read(folder: pathlib.Path, where: str) -> dict[str, np.ndarray]:
  """{name: array} of all files of a folder; a file is read where an array is looked at.

  Args:
    where: the flag or argument that named the folder, with its value.

  Raises:
    BadInput: there is no such file, or one is not as its header says.
  """
  with cannot('read', where, 'make it readable, or give another folder'):
    paths, arrays = _paths(folder, where), {}
    for path in paths:
      for name, array in _read(path).items():
        if name in arrays:
          raise BadInput(f'{path}: holds {name}, which another file holds too')
        arrays[name] = array
    return arrays


def _paths(folder: pathlib.Path, where: str) -> list[pathlib.Path]:
  index = folder / INDEX
  if index.is_file():
    try:
      names = sorted(set(json.loads(index.read_text())['weight_map'].values()))
      paths = [folder / os.path.basename(name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
      raise BadInput(f'{index}: is no index of safetensors files') from None
    for path in paths:
      if not path.is_file():
        raise BadInput(f'{path}: is missing; {INDEX} names it')
    return paths
  paths = sorted(folder.glob('*.safetensors'))
  if not paths:
    raise BadInput(f'{where}: holds no *.safetensors')
  return paths


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  size = path.stat().st_size
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if length > min(size - 8, LONGEST_HEADER):
      raise BadInput(f'{path}: is no safetensors file, or cut short')
    try:
      header = json.loads(file.read(length))
      entries = {name: _entry(entry) for name, entry in header.items() if name != '__metadata__'}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
      raise BadInput(f'{path}: has no header of a safetensors file ({error})') from None
  arrays = {}
  for name, (dtype, shape, begin, end) in entries.items():
    if end - begin != math.prod(shape) * np.dtype(dtype).itemsize or begin < 0 or 8 + length + end > size:
      raise BadInput(f'{path}: {name} is not whole; the file is cut short or damaged')
    if begin == end:
      arrays[name] = np.zeros(shape, dtype)
    else:
      flat = np.memmap(path, np.uint8, 'r', 8 + length + begin, (end - begin,))
      arrays[name] = flat.view(dtype).reshape(shape)
  return arrays


def _entry(entry: dict) -> tuple:
  """(dtype, shape, begin, end)"""
  begin, end = map(int, entry['data_offsets'])
  return TYPES[entry['dtype']], tuple(map(int, entry['shape'])), begin, end
