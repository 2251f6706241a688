"""Files of the safetensors format."""
import json

import ml_dtypes
import numpy as np
import pytest

from mtp_jax.config import BadInput
from mtp_jax.formats import safetensors

ARRAYS = {'b': np.arange(6, dtype=np.float32).reshape(2, 3).T, 'a': np.ones((), np.float32),
          'c': np.arange(4).astype(ml_dtypes.bfloat16), 'd': np.zeros((0, 3), np.int8)}


def written(folder, shard_bytes: int = 10**9):
  writer = safetensors.Writer(folder, {name: (array.dtype, array.shape) for name, array in ARRAYS.items()}, shard_bytes)
  for name in reversed(ARRAYS):  # in any order
    writer.write(name, ARRAYS[name])
  writer.close()
  return folder


@pytest.mark.parametrize('shard_bytes', [10**9, 25, 1])
def test_arrays_are_read_as_they_were_written_also_a_transpose(tmp_path, shard_bytes):
  found = safetensors.read(written(tmp_path, shard_bytes), '')
  assert found.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


def test_a_file_is_its_header_and_the_bytes_of_the_arrays(tmp_path):
  content = (written(tmp_path) / 'model.safetensors').read_bytes()
  length = int.from_bytes(content[:8], 'little')
  header = json.loads(content[8:8 + length])
  assert header['b'] == {'dtype': 'F32', 'shape': [3, 2], 'data_offsets': [0, 24]} and length % 8 == 0
  assert header['__metadata__'] == {'format': 'pt'}
  assert np.frombuffer(content[8 + length:8 + length + 24], '<f4').tolist() == [0, 3, 1, 4, 2, 5]


def test_the_package_of_that_name_reads_the_files(tmp_path):
  package = pytest.importorskip('safetensors.numpy')
  found = package.load_file(written(tmp_path) / 'model.safetensors')
  assert all(np.array_equal(found[name], array) for name, array in ARRAYS.items())


def test_an_array_that_is_not_written_or_misshapen_is_an_error(tmp_path):
  writer = safetensors.Writer(tmp_path, {'a': (np.float32, (2,))}, 10**9)
  with pytest.raises(ValueError, match='a: shape'):
    writer.write('a', np.zeros(3))
  with pytest.raises(ValueError, match='a: was not written'):
    writer.close()
  writer.abandon()


def test_files_that_are_cut_short_missing_or_no_such_files_are_named(tmp_path):
  path = written(tmp_path) / 'model.safetensors'
  content = path.read_bytes()
  for changed, why in ((content[:-1], 'is not whole'), (content[:20], 'cut short'), (b'', 'cut short'),
                       (content[:8] + b'x' + content[9:], 'has no header')):
    path.write_bytes(changed)
    with pytest.raises(BadInput, match=why):
      safetensors.read(tmp_path, '--input=x')
  path.unlink()
  with pytest.raises(BadInput, match='--input=x: holds no'):
    safetensors.read(tmp_path, '--input=x')
  (written(tmp_path, 1) / 'model-00002-of-00004.safetensors').unlink()
  with pytest.raises(BadInput, match='model-00002-of-00004.safetensors: is missing'):
    safetensors.read(tmp_path, '--input=x')
