"""A prepared set: a folder of shards and `index.json`, which tells sizes and digests of all of them, and its own.

That a whole shard was put in place of another is found by `verify`.
"""
import dataclasses
import hashlib
import json
from collections.abc import Callable

from mtp_jax.config import BadInput
from mtp_jax.data.folder import RESTORE, Damaged, Folder
from mtp_jax.data.shards import REMEDY, Shard, Stream

FORMAT = 3  # fixes the layout, BLOCK included
INDEX, PLAN = 'index.json', 'plan.json'  # of a set that is complete, and of one that is not


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A set of token shards, found complete. index: what its index.json says; fingerprint: of inputs, tokenizer and options."""
  folder: Folder
  index: dict
  train: Stream
  validation: Stream

  @property
  def fingerprint(self) -> str:
    return self.index['fingerprint']

  def verify(self) -> list[str]:
    """Reads every byte; what is wrong, a line each."""
    wrong = []
    for shard in (*self.train.shards, *self.validation.shards):
      try:
        if hashlib.sha256(self.folder.read(shard.file)).hexdigest() != shard.sha256:
          wrong.append(f'{self.folder.url}/{shard.file}: its digest is not that of the index; {RESTORE}')
      except OSError as error:
        wrong.append(f'{self.folder.url}/{shard.file}: {error.strerror or error}')
    return wrong


def write_index(folder: Folder, index: dict) -> None:
  folder.write(INDEX, _serialized(index))


def _serialized(index: dict) -> bytes:
  """The index as JSON, with its own digest."""
  return json.dumps(index | {'sha256': hashlib.sha256(json.dumps(index).encode()).hexdigest()}, indent=1).encode() + b'\n'


def open_set(folder: Folder, cache: str, note: Callable[[str], None] | None = None) -> Prepared:
  """A prepared set whose files are all there at full length.

  Args:
    note: where given, it is told of shards that are missing or cut off, and they are an error only when they are read.

  Raises:
    BadInput: it is none, or of another format.
    Damaged: its index is not what was written, or a shard is missing or cut off.
  """
  sizes = folder.sizes()
  if INDEX not in sizes:
    mend = ('its preparation has not ended: run the same prepare again' if PLAN in sizes else
            f'make one with: python -m mtp_jax prepare --input=... --output={folder.url}')
    raise BadInput(f'{folder.where}: {folder.url!r} holds no prepared set; {mend}')
  content = folder.read(INDEX)
  try:
    index = {key: value for key, value in json.loads(content).items() if key != 'sha256'}
    intact = _serialized(index) == content
  except (ValueError, AttributeError):
    intact = False
  if not intact:
    raise Damaged(f'{folder.url}/{INDEX}: is damaged; {RESTORE}')
  if (layout := index.get('identity', {}).get('layout')) != FORMAT:
    raise BadInput(f'{folder.where}: {folder.url!r} has layout {layout}, this version reads {FORMAT}; prepare it again, in another folder')
  if index['tokenizer'] not in ('bytes', *sizes):
    raise Damaged(f'{folder.url}/{index["tokenizer"]}: is missing; {RESTORE}')
  streams = {}
  for split, entries in index['splits'].items():
    shards = [Shard(**entry) for entry in entries]
    for shard in shards:
      if sizes.get(shard.file) != shard.bytes:
        there = f'has {sizes[shard.file]:,} of {shard.bytes:,} bytes' if shard.file in sizes else 'is missing'
        if not note:
          raise Damaged(f'{folder.url}/{shard.file}: {there}; {REMEDY}')
        note(f'quarantined: {folder.url}/{shard.file} {there}')
    streams[split] = Stream(folder, shards, index['dtype'], cache)
  return Prepared(folder, index, streams['train'], streams['validation'])
