"""The inputs cut into parts, and a part tokenized: its shards, then its report.

    train-00007.array_record, validation-00007.array_record
    parts/00007.json     report of part 7, written after its shards; a part with a report is done

What is held out, split.py says; or it is what the last parts hold, those of a validation set of the
user's own.
"""
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable

import numpy as np

from mtp_jax.config import BadInput
from mtp_jax.data.files import File
from mtp_jax.data.folder import Folder
from mtp_jax.data.prepared_set import FORMAT
from mtp_jax.data.records import Fault, Piece, Reader, Reading
from mtp_jax.data.shards import ShardWriter, dtype_of
from mtp_jax.data.split import Split, content_hash
from mtp_jax.tokenizer import Tokenizer

PARTS = 'parts'


@dataclasses.dataclass(frozen=True)
class Options:
  """How a set is prepared. The set depends on all but bad_share.

  validation_share: of the text, held out; without effect beside a validation set.
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


def cut_into_parts(inputs: list[File], separator: str, part_bytes: int) -> list[list[Piece]]:
  """Parts of about `part_bytes`, in order. Only uncompressed files are cut: JSON lines, and text with
  a separator of which no end is also its beginning, so that it is found wherever reading starts.

  The parts depend on names, kinds and sizes of the inputs alone.
  """
  is_clear = separator and not any(separator.endswith(separator[:n]) for n in range(1, len(separator)))
  parts, size = [], part_bytes
  for file in inputs:
    can_be_cut = not file.compression and (file.format == 'jsonl' or file.format == 'text' and is_clear)
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
  """All that a worker process needs: what to read, how, and where to write.

  validation_parts: the last so many parts are a validation set; all others are for training then.
  """
  folder: Folder
  tokenizer: Tokenizer
  options: Options
  parts: list[list[Piece]]
  where: str
  split: Split
  validation_parts: int = 0

  @property
  def dtype(self) -> str:
    return dtype_of(self.tokenizer.size)

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
    """Of a part that is done: records and their faults, digests of its pieces, entries of its shards,
    the lowest and highest hash of a document, and bytes in documents that can be split by position.
    """
    return json.loads(self.folder.read(_report_name(number)))

  def tokenize(self, number: int, count: Callable[[int, int, int], None]) -> tuple[int, int]:
    """Writes the shards of a part, then its report.

    Args:
      count: called with bytes read, documents and tokens since its last call.

    Returns:
      The numbers of records, and of those skipped.
    """
    t, faults, pieces, documents, writers = self.tokenizer, [], [], 0, {}
    lowest, highest, long_bytes = 2**64, -1, 0
    with contextlib.ExitStack() as new_files:
      for piece in self.parts[number]:
        reader, unread = Reader(piece, self.options.reading, self.where), piece.bytes
        for record in reader:
          if isinstance(record, Fault):
            faults.append(dataclasses.asdict(record))
            continue
          hash, tokens = content_hash(record.text), 0
          lowest, highest = min(lowest, hash), max(highest, hash)
          long_bytes += len(record.text) if self.split.held_out_bytes(record.text) else 0
          for split, text in self._sides(record.text, hash, number):
            if split not in writers:
              path = new_files.enter_context(self.folder.new_file(_shard_name(split, number)))
              writers[split] = ShardWriter(path, self.dtype)
            ids = np.concatenate(([t.bos], t.encode(text), [t.eos])).astype(self.dtype)
            writers[split].add(ids, len(text))
            tokens += len(ids)
          read = min(len(record.text), unread)
          unread -= read
          documents += 1
          count(read, 1, tokens)
        count(unread, 0, 0)
        pieces.append({'file': piece.file.name, 'sha256': reader.sha256, 'bytes': reader.bytes,
                       'lines': reader.lines, 'separators': reader.separators})
      splits = {split: {'file': _shard_name(split, number), **writer.close()}
                for split, writer in writers.items()}
    skipped = sum(not fault['kept'] for fault in faults)
    report = {'records': documents + skipped, 'skipped': skipped, 'pieces': pieces, 'splits': splits,
              'faults': faults, 'lowest': lowest, 'highest': highest, 'long_bytes': long_bytes}
    self.folder.write(_report_name(number), json.dumps(report).encode())
    return report['records'], skipped

  def _sides(self, text: bytes, hash: int, number: int) -> list[tuple[str, bytes]]:
    if self.validation_parts:
      return [('train' if number < len(self.parts) - self.validation_parts else 'validation', text)]
    return self.split.sides(text, hash)


def _report_name(number: int) -> str:
  return f'{PARTS}/{number:05}.json'


def _shard_name(split: str, number: int) -> str:
  return f'{split}-{number:05}.array_record'
