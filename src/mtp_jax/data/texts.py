"""Documents in memory, as rows: one's own texts, or the content of files."""
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from mtp_jax.config import BadInput, DataConfig, expanded
from mtp_jax.data.files import files
from mtp_jax.data.kinds import recognized
from mtp_jax.data.packing import Consecutive
from mtp_jax.data.records import MAY_BE_KEPT, Fault, Piece, Reader, Reading
from mtp_jax.data.rows import Rows, SourceRows
from mtp_jax.tokenizer import Tokenizer


class Texts:
  """The tokens of documents, each between bos and eos; what rows ask of a `Stream`.

  tokens: how many.

  Args:
    documents: their ids, without bos and eos.
  """

  def __init__(self, documents: Sequence[np.ndarray], tokenizer: Tokenizer):
    self._starts = np.cumsum([0, *(len(ids) + 2 for ids in documents)])
    parts = [part for ids in documents for part in ([tokenizer.bos], ids, [tokenizer.eos])]
    self._ids = np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)
    self.tokens = len(self._ids)

  def gather(self, starts: np.ndarray, stops: np.ndarray) -> list[np.ndarray]:
    """tokens[start:stop] of each pair, shorter where the stream ends."""
    return [self._ids[start:stop] for start, stop in zip(starts.tolist(), stops.tolist())]

  def document(self, i: int) -> np.ndarray:
    """The ids of one document, int32[n], without bos and eos."""
    return self._ids[self._starts[i] + 1:self._starts[i + 1] - 1]

  def document_at(self, position: int) -> tuple[int, int]:
    """(the document that holds the token at a position, the position of its bos)."""
    i = int(np.searchsorted(self._starts, position, side='right')) - 1
    return i, int(self._starts[i])


def own_rows(documents: Sequence[np.ndarray], config: DataConfig, tokenizer: Tokenizer, futures: int) -> SourceRows:
  """Rows of documents, given as ids, packed as held-out documents are."""
  t, texts, length = tokenizer, Texts(documents, tokenizer), config.length
  packing, across = Consecutive(texts, length), config.boundary == 'across'
  return SourceRows([Rows(texts, packing, length, futures, t.bos, t.pad, across)])


def read(paths: Sequence[pathlib.Path | str], where: str) -> Iterator[bytes]:
  """The documents of files and folders, in whatever `prepare` reads; empty ones are left out.

  Args:
    where: the flag or argument that gave them, for messages.

  Raises:
    BadInput: there is no such file, or a record of it cannot be read.
  """
  reading = Reading(keep=MAY_BE_KEPT, max_document_bytes=2**40)
  names = [expanded(str(path), where) for path in paths]
  for file in recognized(files(names, where), reading, where):
    for record in Reader(Piece(file), reading, where):
      if not isinstance(record, Fault):
        yield record.text
      elif not record.kept and record.kind != 'empty':
        raise BadInput(f'{where}: {record.file}, record {record.line}: {record.kind}; fix it or leave the file out')
