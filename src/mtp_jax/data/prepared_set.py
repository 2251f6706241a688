"""A prepared set: a folder of shards and `index.json`, which holds the sizes and digests of all of
them, and its own.

`open_set` checks the index and the sizes of all files; `Prepared.verify` reads every byte, so it
also finds a whole shard that was replaced by another.
"""
import dataclasses
import hashlib
import json
from collections.abc import Callable

from mtp_jax.config import BadInput
from mtp_jax.data.folder import RESTORE, Damaged, Folder
from mtp_jax.data.shards import REMEDY, Shard, Stream

FORMAT = 4  # version of the layout, BLOCK included
INDEX = 'index.json'  # of a complete set
PLAN = 'plan.json'  # of an unfinished one


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A complete set of token shards. index: the content of index.json."""
  folder: Folder
  index: dict
  train: Stream
  validation: Stream

  @property
  def fingerprint(self) -> str:
    """Digest of inputs, tokenizer and options."""
    return self.index['fingerprint']

  def verify(self) -> list[str]:
    """Reads every byte; returns what is wrong, a line a shard. Raises OSError when one cannot be read."""
    errors = []
    for shard in (*self.train.shards, *self.validation.shards):
      path = f'{self.folder.url}/{shard.file}'
      try:
        if hashlib.sha256(self.folder.read(shard.file)).hexdigest() != shard.sha256:
          errors.append(f'{path}: its digest is not that of the index; {RESTORE}')
      except FileNotFoundError:
        errors.append(f'{path}: is missing; {RESTORE}')
    return errors


def write_index(folder: Folder, index: dict) -> None:
  folder.write(INDEX, _serialized(index))


def _serialized(index: dict) -> bytes:
  """The index as JSON, with its own digest."""
  sha256 = hashlib.sha256(json.dumps(index).encode()).hexdigest()
  return json.dumps(index | {'sha256': sha256}, indent=1).encode() + b'\n'


def open_set(folder: Folder, cache: str, note: Callable[[str], None] | None = None) -> Prepared:
  """A prepared set, all files of which have the sizes of the index.

  Args:
    cache: folder on this machine for copies of remote shards.
    note: if given, it is called for missing and cut-off shards, which then raise only when read.

  Raises:
    BadInput: it is not a prepared set, or of another format version.
    Damaged: its index is not what was written, or a shard is missing or cut off.
  """
  sizes = folder.sizes()
  if INDEX not in sizes:
    fix = ('its preparation has not ended: run the same prepare again' if PLAN in sizes else
           f'make one with: python -m mtp_jax prepare --input=... --output={folder.url}')
    raise BadInput(f'{folder.where}: {folder.url!r} holds no prepared set; {fix}')
  index = _read_index(folder)
  if (version := index.get('identity', {}).get('layout')) != FORMAT:
    raise BadInput(f'{folder.where}: {folder.url!r} has layout {version}, this version reads {FORMAT}; '
                   'prepare it again, in another folder')
  if index['tokenizer'] not in ('bytes', *sizes):
    raise Damaged(f'{folder.url}/{index["tokenizer"]}: is missing; {RESTORE}')
  streams = {}
  for split, entries in index['splits'].items():
    shards = [Shard(**entry) for entry in entries]
    for shard in shards:
      _check_size(folder, shard, sizes.get(shard.file), note)
    streams[split] = Stream(folder, shards, index['dtype'], cache)
  return Prepared(folder, index, streams['train'], streams['validation'])


def _read_index(folder: Folder) -> dict:
  content = folder.read(INDEX)
  try:
    index = {key: value for key, value in json.loads(content).items() if key != 'sha256'}
    intact = _serialized(index) == content
  except (ValueError, AttributeError):
    intact = False
  if not intact:
    raise Damaged(f'{folder.url}/{INDEX}: is damaged; {RESTORE}')
  return index


def _check_size(folder: Folder, shard: Shard, size: int | None,
                note: Callable[[str], None] | None) -> None:
  if size == shard.bytes:
    return
  problem = 'is missing' if size is None else f'has {size:,} of {shard.bytes:,} bytes'
  if not note:
    raise Damaged(f'{folder.url}/{shard.file}: {problem}; {REMEDY}')
  note(f'quarantined: {folder.url}/{shard.file} {problem}')
