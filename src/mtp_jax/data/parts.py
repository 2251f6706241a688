"""The inputs cut into parts, and a part tokenized: its shards, then its report.

    parts/00007.json     what part 7 found, written when its shards are there; a part that has one is not done again
    train-00007.array_record, validation-00007.array_record
"""
import contextlib
import dataclasses
import json

import numpy as np

from mtp_jax.config import BadInput
from mtp_jax.data.files import File, name_hash
from mtp_jax.data.folder import Folder
from mtp_jax.data.prepared_set import FORMAT
from mtp_jax.data.records import Fault, Piece, Reader, Reading
from mtp_jax.data.shards import ShardWriter
from mtp_jax.tokenizer import Tokenizer

PARTS = 'parts'


@dataclasses.dataclass(frozen=True)
class Options:
  """reading, validation_share and shard_bytes fix the set. shard_bytes: of input in a part; 0 is a 64th of all, within 4 and 256 MiB.
  bad_share: of the records that may be skipped."""
  reading: Reading = Reading()
  validation_share: float = 0.01
  shard_bytes: int = 0
  bad_share: float = 0.05

  def __post_init__(self):
    if not 0 < self.validation_share < 1:
      raise BadInput(f'--validation_share={self.validation_share}: must be above 0 and below 1')
    if not 0 <= self.bad_share <= 1:
      raise BadInput(f'--bad_share={self.bad_share}: must be at least 0 and at most 1')
    if self.shard_bytes < 0:
      raise BadInput(f'--shard_bytes={self.shard_bytes}: must not be negative; 0 chooses by the size of the inputs')


def cut(inputs: list[File], options: Options) -> list[list[Piece]]:
  limit = options.shard_bytes
  parts, size = [], limit
  for file in inputs:
    plain_lines = file.kind(options.reading.format) == 'jsonl' and not file.compression
    cuts = [*range(0, file.bytes, limit)] if plain_lines and file.bytes > limit else [0]
    for start, stop in zip(cuts, [*cuts[1:], -1]):
      if size >= limit:
        parts.append([])
        size = 0
      parts[-1].append(Piece(file, start, stop))
      size += parts[-1][-1].bytes
  return parts


class Work:
  """What a worker knows: where to write, and what to read."""

  def __init__(self, folder: Folder, tokenizer: Tokenizer, options: Options, parts: list[list[Piece]], where: str):
    self.folder, self.tokenizer, self.options, self.parts, self.where = folder, tokenizer, options, parts, where
    self.dtype = '<u2' if tokenizer.size < 2**16 else '<u4'
    self.identity = {'layout': FORMAT, 'tokenizer': tokenizer.digest, 'validation_share': options.validation_share, 'shard_bytes': options.shard_bytes,
                     **dataclasses.asdict(options.reading), 'keep': sorted(options.reading.keep)}

  def report(self, number: int) -> str:
    return f'{PARTS}/{number:05}.json'

  def ready(self) -> set[int]:
    """The parts that have a report."""
    names = Folder(f'{self.folder.url}/{PARTS}', '--output').sizes()
    return {number for number in range(len(self.parts)) if self.report(number).rpartition('/')[2] in names}

  def done(self, number: int) -> dict:
    return json.loads(self.folder.read(self.report(number)))

  def tokenize(self, number: int, count) -> tuple[int, int]:
    """Writes the shards of a part, then its report. count: called with bytes, documents and tokens. Returns (records, skipped)."""
    t, faults, pieces, entries, documents = self.tokenizer, [], [], {}, 0
    with contextlib.ExitStack() as files:
      writers = {}
      for piece in self.parts[number]:
        reader, unread = Reader(piece, self.options.reading, self.where), piece.bytes
        for found in reader:
          if isinstance(found, Fault):
            faults.append(dataclasses.asdict(found))
            continue
          first = number == documents == 0
          split = 'validation' if first or name_hash(found.name) < self.options.validation_share * 2**64 else 'train'
          if split not in writers:
            writers[split] = ShardWriter(files.enter_context(self.folder.aside(_shard(split, number))), self.dtype)
          ids = np.concatenate(([t.bos], t.encode(found.text), [t.eos])).astype(self.dtype)
          writers[split].add(ids, len(found.text))
          read = min(len(found.text), unread)
          unread, documents = unread - read, documents + 1
          count(read, 1, len(ids))
        count(unread, 0, 0)
        pieces.append({'file': piece.file.name, 'sha256': reader.sha256, 'bytes': reader.bytes, 'lines': reader.lines})
      for split, writer in writers.items():
        entries[split] = {'file': _shard(split, number), **writer.close()}
    skipped = sum(not fault['kept'] for fault in faults)
    report = {'records': documents + skipped, 'skipped': skipped, 'pieces': pieces, 'splits': entries, 'faults': faults}
    self.folder.write(self.report(number), json.dumps(report).encode())
    return report['records'], skipped


def _shard(split: str, number: int) -> str:
  return f'{split}-{number:05}.array_record'
