"""A SentencePiece model trained on a sample of the inputs, and measured on held-out documents."""
import dataclasses
import time
from collections.abc import Iterator

from mtp_jax import tokenizer
from mtp_jax.config import BadInput
from mtp_jax.data.files import File, name_hash
from mtp_jax.data.kinds import recognized
from mtp_jax.data.parts import cut_into_parts
from mtp_jax.data.progress import quiet
from mtp_jax.data.records import Document, Fault, Reader, Reading
from mtp_jax.data.split import Split, content_hash

HELD_OUT = Split.by_content(0.1)  # of the sample


@dataclasses.dataclass(frozen=True)
class TrainedTokenizer:
  """A model and its measurements.

  model: content of the SentencePiece model file.
  held_out_bytes, held_out_tokens: of the documents it was not trained on; seconds: to encode them.
  """
  model: bytes
  tokenizer: tokenizer.Tokenizer
  held_out_documents: int
  held_out_bytes: int
  held_out_tokens: int
  seconds: float

  @property
  def bytes_per_token(self) -> float:
    return self.held_out_bytes / self.held_out_tokens

  @property
  def bytes_per_second(self) -> float:
    return self.held_out_bytes / self.seconds


def train_tokenizer(inputs: list[File], reading: Reading, vocab: int, where: str, kind: str = 'bpe',
                    sample_bytes: int = 100_000_000, bad_share: float = 0.05, note=quiet) -> TrainedTokenizer:
  """A SentencePiece model of what `prepare` would read; no text loses a byte in it (see
  `mtp_jax.tokenizer.train`).

  Args:
    inputs: from `files`.
    vocab: ids, with bos, eos, pad and 256 bytes.
    where: the flag or field that names the inputs, for messages.
    kind: 'bpe' or 'unigram'.
    sample_bytes: of text to read, from all over the inputs.
    bad_share: of the records of the sample that may be skipped.
    note: see data/progress.py.

  Raises:
    BadInput: an input cannot be read, too many records are bad, or there are too few documents for
    a vocabulary of that size.
  """
  documents, held_out, skipped = [], [], []
  for record in sample(recognized(inputs, reading, where), reading, sample_bytes, where):
    if isinstance(record, Document):
      documents.append(record.text)
    elif not record.kept:
      skipped.append(record)
  documents, held_out = _sides(documents, HELD_OUT)
  _check_sample(documents, held_out, skipped, reading, bad_share, where)
  note(f'training {kind} on {len(documents):,} documents, {sum(map(len, documents)) / 1e6:,.1f} MB')
  model = tokenizer.train(documents, vocab, kind)
  trained = tokenizer.SentencePiece(model)
  start = time.perf_counter()
  tokens = sum(len(trained.encode(text)) for text in held_out)
  seconds = time.perf_counter() - start
  return TrainedTokenizer(model, trained, len(held_out), sum(map(len, held_out)), tokens, seconds)


def _sides(documents: list[bytes], split: Split) -> tuple[list[bytes], list[bytes]]:
  """Documents to train on, and held-out ones; by position where a side would have none."""
  sides = {'train': [], 'validation': []}
  for text in documents:
    for side, part in split.sides(text, content_hash(text)):
      sides[side].append(part)
  if not all(sides.values()) and not split.by_position:
    return _sides(documents, dataclasses.replace(split, by_position=True))
  return sides['train'], sides['validation']


def _check_sample(documents: list[bytes], held_out: list[bytes], skipped: list[Fault],
                  reading: Reading, bad_share: float, where: str) -> None:
  good = len(documents) + len(held_out)
  records = good + len(skipped)
  if len(skipped) > bad_share * records:
    first = skipped[0]
    field = f'; --field={reading.field}' if first.kind == 'missing_field' else ''
    detail = f' ({first.detail}{field})' if first.detail else ''
    raise BadInput(f'{where}: {len(skipped):,} of {records:,} records are bad, '
                   f'more than --bad_share={bad_share}; the first is {first.kind} in {first.file}{detail}')
  if not documents or not held_out:
    raise BadInput(f'{where}: {good} documents are too few, since one of ten is held out; give more')


def sample(inputs: list[File], reading: Reading, size: int, where: str) -> Iterator[Document | Fault]:
  """Documents and faults from all over the inputs, about `size` bytes of text or all there is.

  They are the beginnings of files, and of every MiB of uncompressed JSON lines, in the order of the
  hashes of those places.
  """
  pieces = [piece for part in cut_into_parts(inputs, reading.separator, 2**20) for piece in part]
  bytes_a_piece = max(2**16, size // len(pieces))
  for piece in sorted(pieces, key=lambda piece: name_hash(f'{piece.file.name}@{piece.start}')):
    left = min(bytes_a_piece, size)
    for record in Reader(piece, reading, where):
      yield record
      if isinstance(record, Document):
        left -= len(record.text)
        size -= len(record.text)
      if left <= 0:
        break
    if size <= 0:
      return
