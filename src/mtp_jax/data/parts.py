"""The inputs cut into parts, and a part tokenized: its shards, then its report.

    train-00007.array_record, validation-00007.array_record
    parts/00007.json     report of part 7, written after its shards; a part with a report is done

A document is held out iff hash(name) < validation_share, or if it is the very first of all. Apart
from that one, a document's split depends on its name alone: adding files never moves another
document to the other split.
"""
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable

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
  """How a set is prepared. The set depends on all but bad_share.

  validation_share: of the documents, held out.
  shard_bytes: of input in a part; 0 is a 64th of all, but at least 4 and at most 256 MiB.
  bad_share: of the records that may be skipped.
  """
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
      raise BadInput(f'--shard_bytes={self.shard_bytes}: must not be negative; '
                     '0 chooses by the size of the inputs')


def cut_into_parts(inputs: list[File], format: str, part_bytes: int) -> list[list[Piece]]:
  """Parts of about `part_bytes`, in order. Only uncompressed JSON-lines files are cut.

  The parts depend on names and sizes of the inputs alone.
  """
  parts, size = [], part_bytes
  for file in inputs:
    can_be_cut = file.kind(format) == 'jsonl' and not file.compression
    starts = [*range(0, file.bytes, part_bytes)] if can_be_cut and file.bytes > part_bytes else [0]
    for start, stop in zip(starts, [*starts[1:], -1]):
      if size >= part_bytes:
        parts.append([])
        size = 0
      parts[-1].append(Piece(file, start, stop))
      size += parts[-1][-1].bytes
  return parts


@dataclasses.dataclass(frozen=True)
class Preparation:
  """All that a worker process needs: what to read, how, and where to write."""
  folder: Folder
  tokenizer: Tokenizer
  options: Options
  parts: list[list[Piece]]
  where: str

  @property
  def dtype(self) -> str:
    return '<u2' if self.tokenizer.size < 2**16 else '<u4'

  @functools.cached_property
  def identity(self) -> dict:
    """Everything but the inputs that the bytes of the set depend on, as JSON."""
    o = self.options
    return {'layout': FORMAT, 'tokenizer': self.tokenizer.digest,
            'validation_share': o.validation_share, 'shard_bytes': o.shard_bytes,
            **dataclasses.asdict(o.reading), 'keep': sorted(o.reading.keep)}

  def parts_done(self) -> set[int]:
    names = Folder(f'{self.folder.url}/{PARTS}', '--output').sizes()
    return {number for number in range(len(self.parts)) if f'{number:05}.json' in names}

  def report(self, number: int) -> dict:
    """Of a part that is done: records and their faults, digests of its pieces, entries of its shards."""
    return json.loads(self.folder.read(_report_name(number)))

  def tokenize(self, number: int, count: Callable[[int, int, int], None]) -> tuple[int, int]:
    """Writes the shards of a part, then its report.

    Args:
      count: called with bytes read, documents and tokens since its last call.

    Returns:
      The numbers of records, and of those skipped.
    """
    t, faults, pieces, documents = self.tokenizer, [], [], 0
    writers = {}
    with contextlib.ExitStack() as new_files:
      for piece in self.parts[number]:
        reader, unread = Reader(piece, self.options.reading, self.where), piece.bytes
        for record in reader:
          if isinstance(record, Fault):
            faults.append(dataclasses.asdict(record))
            continue
          split = self._split(record.name, is_first=number == documents == 0)
          if split not in writers:
            path = new_files.enter_context(self.folder.new_file(_shard_name(split, number)))
            writers[split] = ShardWriter(path, self.dtype)
          ids = np.concatenate(([t.bos], t.encode(record.text), [t.eos])).astype(self.dtype)
          writers[split].add(ids, len(record.text))
          read = min(len(record.text), unread)
          unread -= read
          documents += 1
          count(read, 1, len(ids))
        count(unread, 0, 0)
        pieces.append({'file': piece.file.name, 'sha256': reader.sha256, 'bytes': reader.bytes,
                       'lines': reader.lines})
      splits = {split: {'file': _shard_name(split, number), **writer.close()}
                for split, writer in writers.items()}
    skipped = sum(not fault['kept'] for fault in faults)
    report = {'records': documents + skipped, 'skipped': skipped, 'pieces': pieces, 'splits': splits,
              'faults': faults}
    self.folder.write(_report_name(number), json.dumps(report).encode())
    return report['records'], skipped

  def _split(self, name: str, is_first: bool) -> str:
    held_out = is_first or name_hash(name) < self.options.validation_share * 2**64
    return 'validation' if held_out else 'train'


def _report_name(number: int) -> str:
  return f'{PARTS}/{number:05}.json'


def _shard_name(split: str, number: int) -> str:
  return f'{split}-{number:05}.array_record'
