"""Damage to a prepared set is found: when it is opened, read, or verified."""
import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from mtp_jax import tokenizer
from mtp_jax.config import BadInput
from mtp_jax.data import prepared_set, shards
from mtp_jax.data.files import File
from mtp_jax.data.folder import Damaged, Folder
from mtp_jax.data.parts import Options
from mtp_jax.data.prepare import prepare
from mtp_jax.data.prepared_set import open_set


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(shards, 'BLOCK', 16)


@pytest.fixture
def prepared(tmp_path):
  """A set of 60 documents, in several shards."""
  (tmp_path / 'in').mkdir()
  files = []
  for i in range(60):
    path = tmp_path / 'in' / f'{i:02}.txt'
    path.write_bytes(bytes([i + 32]) * (i + 1))
    files.append(File(f'in/{i:02}.txt', str(path), i + 1))
  options = Options(validation_share=0.2, shard_bytes=600)
  return prepare(files, tokenizer.load('bytes'), options, tmp_path / 'set', 0, '')


def contents(folder) -> dict:
  return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def test_every_flipped_bit_of_shards_and_index_is_found_and_none_becomes_a_wrong_token(prepared, tmp_path):
  """40 flips: `verify`, or opening, names the file; reading gives the right tokens or raises."""
  whole = prepared.train.read(0, prepared.train.tokens)
  files = contents(prepared.folder.url)
  rng, refused, harmless = np.random.default_rng(0), 0, 0
  names = [name for name in sorted(files) if name.startswith('train-')] + [prepared_set.INDEX]
  for trial in range(40):
    name = names[trial % len(names)]
    anywhere = name == prepared_set.INDEX or trial % 4 < 2
    damaged = bytearray(files[name])
    place = int(rng.integers(len(damaged) if anywhere else 3000))  # where the blocks are; a file is padded to 64 KiB
    damaged[place] ^= 1 << rng.integers(8)
    shutil.copytree(prepared.folder.url, tmp_path / str(trial))
    (tmp_path / str(trial) / name).write_bytes(damaged)
    try:
      opened = open_set(Folder(tmp_path / str(trial), '--data'), '')
    except Damaged as error:
      assert name in str(error)
      refused += 1
      continue
    problem, = opened.verify()
    assert name in problem
    for start in range(0, opened.train.tokens, 100):
      try:
        assert np.array_equal(opened.train.read(start, start + 100), whole[start:start + 100])
        harmless += 1
      except Damaged as error:
        assert name in str(error) and 'on_damage' in str(error)
        refused += 1
  assert refused > 15 and harmless  # most of a set can still be read
  assert not prepared.verify()


@pytest.mark.parametrize('harm', ['cut', 'empty', 'delete', 'longer'])
@pytest.mark.parametrize('which', ['shard', 'index'])
def test_files_that_are_missing_or_of_another_length_are_named_when_a_set_is_opened(prepared, harm, which):
  name = prepared_set.INDEX if which == 'index' else prepared.train.shards[1].file
  path = pathlib.Path(prepared.folder.url, name)
  content = path.read_bytes()
  path.unlink()
  if harm != 'delete':
    path.write_bytes({'cut': content[:-1], 'empty': b'', 'longer': content + b'\n'}[harm])
  message = f'{name}.*; restore the file, or delete the folder and prepare it again'
  if which == 'index' and harm == 'delete':
    message = 'holds no prepared set'
  with pytest.raises(BadInput, match=message):
    open_set(Folder(prepared.folder.url, '--data'), '')


def test_a_shard_in_place_of_another_is_found_by_its_blocks(prepared):
  a, b = (pathlib.Path(prepared.folder.url, shard.file) for shard in prepared.train.shards[:2])
  a.write_bytes(b.read_bytes())
  opened = open_set(Folder(prepared.folder.url, '--data'), '')
  with pytest.raises(Damaged, match=a.name):
    opened.train.read(0, 500)
  assert len(opened.verify()) == 1


@pytest.mark.parametrize('identity, version', [({'layout': 99}, '99'), ({}, 'None')])
def test_another_layout_is_refused(prepared, identity, version):
  prepared_set.write_index(prepared.folder, prepared.index | {'identity': identity})
  message = f'has layout {version}, this version reads 4; prepare it again, in another folder'
  with pytest.raises(BadInput, match=message):
    open_set(Folder(prepared.folder.url, '--data'), '')


def test_a_set_elsewhere_is_fetched_once_and_checked(prepared, tmp_path, memory):
  for name, content in contents(prepared.folder.url).items():
    memory.pipe_file(f'/bucket/set/{name}', content)
  remote, cache = Folder('memory://bucket/set', '--data'), str(tmp_path / 'cache')
  opened = open_set(remote, cache)
  whole = prepared.train.read(0, prepared.train.tokens)
  assert np.array_equal(opened.train.read(0, opened.train.tokens), whole) and not opened.verify()
  copies = tmp_path / 'cache' / 'shards'
  assert {path.name for path in copies.iterdir()} == {shard.sha256 for shard in opened.train.shards}
  first = opened.train.shards[0]
  memory.pipe_file(f'/bucket/set/{first.file}', b'x' * first.bytes)
  again = open_set(remote, cache)
  assert np.array_equal(again.train.read(0, 10), whole[:10])  # from the copy
  (copies / first.sha256).write_bytes(b'cut')
  for folder in (cache, str(tmp_path / 'other')):  # both have to fetch it
    with pytest.raises(Damaged, match=f'memory://bucket/set/{first.file}: its digest'):
      open_set(remote, folder).train.read(0, 10)
  memory.rm(f'/bucket/set/{first.file}')
  with pytest.raises(Damaged, match=f'{first.file}: is missing'):
    open_set(remote, cache)


def test_an_index_holds_what_reading_needs(prepared):
  index = json.loads(pathlib.Path(prepared.folder.url, prepared_set.INDEX).read_text())
  assert [dataclasses.asdict(shard) for shard in prepared.train.shards] == index['splits']['train']
  assert index['dtype'] == '<u2' and prepared.index['fingerprint'] == prepared.fingerprint
