"""Eight fake devices, warnings as errors (pyproject.toml), and what several files need: rows, small
models, a comparison.
"""
import os
import pathlib

from xla_flags import FAST

ROOT = pathlib.Path(__file__).parents[1]
# Compiled programs are kept from one session to the next, shared by the workers and by the
# processes that tests start.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.pytest_cache' / 'programs'))
os.environ |= {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}
os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count=8 {FAST} {os.environ.get("XLA_FLAGS", "")}'.strip()
os.environ['JAX_PLATFORMS'] = 'cpu'

import functools
import gc
import signal
import sysconfig

import fsspec
import jax
import numpy as np
import pytest
from experiments import FAMILIES

from mtp_jax import tokenizer
from mtp_jax.config import ModelConfig
from mtp_jax.data.folder import Folder
from mtp_jax.data.shards import Shard, ShardWriter, Stream
from mtp_jax.model.model import Model

# a shell has the one ignored by what runs in the background, nohup the other, and by all that these start
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """Every compiled program holds memory maps, of which a process may have only so many (65,530):
  LLVM crashes beyond.
  """
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture(params=['parallel', 'post_norm'], ids=['parallel', 'sequential'])
def family(request) -> dict:
  """The fields of ModelConfig that choose one of the two families."""
  return FAMILIES[request.param]


@pytest.fixture(params=FAMILIES)
def variant(request) -> dict:
  """Every kind of model, and each convention of the sequential one."""
  return FAMILIES[request.param]


@pytest.fixture(scope='session')
def tiny():
  """A small ModelConfig; no two of its sizes are equal."""
  def make(**changes) -> ModelConfig:
    return ModelConfig(**{'vocab': 24, 'width': 16, 'layers': 5, 'heads': 4, 'kv_heads': 2, 'head_width': 8,
                          'feed_forward': 20, 'futures': 3} | changes)
  return make


@pytest.fixture(scope='session')
def random_model():
  """A model whose every parameter is random, norm scales included, filled without compiling
  anything.
  """
  def make(c: ModelConfig, seed: int = 0) -> Model:
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(Model, c), jax.random.key(0))
    vector = lambda path: 'norm' in jax.tree_util.keystr(path)
    fill = lambda path, x: jax.numpy.asarray(vector(path) + 0.3 * rng.standard_normal(x.shape), x.dtype)
    return jax.tree_util.tree_map_with_path(fill, shapes)
  return make


@pytest.fixture(scope='session')
def packed():
  """Rows of documents of random length, one token often enough, and padding at the end of some."""
  def make(c: ModelConfig, rows: int, length: int, seed: int = 0) -> dict:
    rng, T = np.random.default_rng(seed), length + c.futures
    batch = {name: np.zeros((rows, T), np.int32) for name in ('tokens', 'segments', 'positions')}
    for b in range(rows):
      t, end = 0, T if rng.random() < 0.5 else T - rng.integers(1, T // 2)
      for segment in range(1, T + 1):
        size = min(end - t, 1 if rng.random() < 0.3 else rng.integers(2, T))
        if size == 0:
          break
        batch['tokens'][b, t:t + size] = rng.integers(0, c.vocab, size)
        batch['segments'][b, t:t + size] = segment
        batch['positions'][b, t:t + size] = np.arange(size)
        t += size
    return batch
  return make


@pytest.fixture(scope='session')
def stream_of():
  """A stream, in shards, of documents of given lengths. The first token of each is `bos`, 60,000;
  any other tells its place in the stream.
  """
  def make(folder, *shards) -> Stream:
    entries, place = [], 0
    for number, lengths in enumerate(shards):
      with Folder(folder, '').new_file(f'train-{number:05}.array_record') as path:
        writer = ShardWriter(path, '<u2')
        for length in lengths:
          ids = np.arange(place, place + length)
          ids[0] = 60_000
          place += length
          writer.add(ids, max(0, int(length) - 2))
        entries.append(Shard(f'train-{number:05}.array_record', **writer.close()))
    return Stream(Folder(folder, ''), entries, '<u2', '')
  return make


@pytest.fixture(scope='session')
def assert_close():
  """Equal leaf by leaf, up to `relative` of each leaf's largest entry: float32 sums in another
  order differ by a few 1e-7.
  """
  def check(found, wanted, relative: float = 1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted)):
      a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
      np.testing.assert_allclose(a, b, rtol=0, atol=relative * np.abs(b).max(initial=0, where=np.isfinite(b)),
                                 err_msg=jax.tree_util.keystr(path))
  return check


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Where `experiment` keeps its documents and their prepared set."""
  return tmp_path_factory.mktemp('experiment')


@pytest.fixture
def memory():
  """fsspec's file system in memory, empty."""
  fs = fsspec.filesystem('memory')
  fs.store.clear()
  fs.pseudo_dirs[:] = ['']
  yield fs
  fs.store.clear()
  fs.pseudo_dirs[:] = ['']


@pytest.fixture(scope='session')
def sentencepiece_model() -> bytes:
  """A model file, trained on a few of the standard library's."""
  stdlib = pathlib.Path(sysconfig.get_path('stdlib'))
  return tokenizer.train([(stdlib / name).read_bytes() for name in ('ast.py', 'bisect.py', 'calendar.py')], 500)
