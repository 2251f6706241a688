"""Groups of tokens, so that an evaluation can tell which ones a model predicts, and drafts, well.

    kind        what the token is in its document, read as Python's source
    position    how many tokens of its document stand before it in the row: 1, 2-3, 4-7, 8-15, ...

A document with hardly any brackets, '=' and such among its characters is prose as a whole.
"""
import keyword
import re

import numpy as np

from mtp_jax.config import BadInput, nearest
from mtp_jax.data.rows import Rows, SourceRows
from mtp_jax.tokenizer import Tokenizer

BY = ('kind', 'position')
KINDS = ('indentation', 'spacing', 'name', 'keyword', 'literal', 'punctuation', 'prose', 'end of document')
_CODE = {kind: i for i, kind in enumerate(KINDS)}
_MARKS = re.compile(rb'[()\[\]{}=;<>_]')
_TOKEN = re.compile(rb'''
    (?P<prose>\#[^\n]* | [rbfuRBFU]{0,2}("""|\'\'\')(?s:.*?)(?:(?<!\\)\2|\Z))
  | (?P<literal>[rbfuRBFU]{0,2}(?:"(?:\\.|[^"\\\n])*"? | \'(?:\\.|[^\'\\\n])*\'?) | \.?[0-9][\w.]*)
  | (?P<name>[A-Za-z_\x80-\xff][\w\x80-\xff]*)
  | (?P<indentation>^[ \t]+)
  | (?P<spacing>[ \t\r\f\v]+ | \n)
  | (?P<punctuation>.)
''', re.VERBOSE | re.MULTILINE | re.DOTALL)
_KEYWORDS = frozenset(word.encode() for word in keyword.kwlist)


def kinds_of_bytes(text: bytes) -> np.ndarray:
  """The index in KINDS of each byte of a document: int8[n].

  Comments and strings in three quotes are prose; other strings, and numbers, are literals; a new
  line and spaces within a line are spacing.
  """
  if len(_MARKS.findall(text)) * 50 < len(text):
    return np.full(len(text), _CODE['prose'], np.int8)
  kinds_n = np.zeros(len(text), np.int8)
  for match in _TOKEN.finditer(text):
    kind = match.lastgroup if match[0] not in _KEYWORDS else 'keyword'
    kinds_n[match.start():match.end()] = _CODE[kind]
  return kinds_n


def kinds_of_tokens(ids, tokenizer: Tokenizer) -> np.ndarray:
  """The index in KINDS of each token of a document, without bos and eos: int8[n].

  A token of several kinds is of the kind of its first byte that is no space, if there is one.
  """
  lengths = tokenizer.byte_lengths[np.asarray(ids)]
  text = np.frombuffer(tokenizer.decode(ids), np.uint8)
  kinds_n = kinds_of_bytes(text.tobytes())
  starts = np.cumsum(lengths) - lengths
  blank_n = np.isin(text, list(b' \t\r\n\f\v'))
  # For each byte the first one from it on that is no space.
  place_n = np.where(blank_n, len(text), np.arange(len(text)))
  next_n = np.append(np.minimum.accumulate(place_n[::-1])[::-1], len(text))
  first = np.where(next_n[starts] < starts + lengths, next_n[starts], starts)
  return np.append(kinds_n, _CODE['end of document'])[first].astype(np.int8)


class _KindStream:
  """The kind of every token of a stream, in its place; bos counts as the end of the document before."""

  def __init__(self, stream, tokenizer: Tokenizer):
    self.stream, self.tokenizer, self.tokens = stream, tokenizer, stream.tokens
    self._last = (-1, None)  # a document and the kinds of its tokens

  def gather(self, starts: np.ndarray, stops: np.ndarray) -> list[np.ndarray]:
    return [self._read(start, min(stop, self.tokens)) for start, stop in zip(starts.tolist(), stops.tolist())]

  def _read(self, start: int, stop: int) -> np.ndarray:
    parts = [np.zeros(0, np.int8)]
    while start < stop:
      i, begin = self.stream.document_at(start)
      parts.append(self._kinds(i)[start - begin:stop - begin])
      start += len(parts[-1])
    return np.concatenate(parts)

  def _kinds(self, i: int) -> np.ndarray:
    if self._last[0] != i:
      kinds = kinds_of_tokens(self.stream.document(i), self.tokenizer)
      self._last = i, np.pad(kinds, 1, constant_values=_CODE['end of document'])
    return self._last[1]


class ByKind:
  """The kind of every token of some rows; `names` are KINDS."""
  names = KINDS

  def __init__(self, rows: SourceRows, tokenizer: Tokenizer):
    self._rows = SourceRows([
        Rows(_KindStream(source.stream, tokenizer), source.packing, source.length, source.futures, bos=-2, pad=-1,
             quarantine=True)
        for source in rows.sources])

  def groups_BT(self, ids, batch) -> np.ndarray:
    """The group of every token of the rows `ids`, int32[B, L+M]; -1 for none."""
    return self._rows.batch(ids)['tokens']


class ByPosition:
  """The power of two of every token's position, named '1', '2-3', '4-7', ..."""

  def __init__(self, rows: SourceRows, tokenizer: Tokenizer):
    most = (rows.sources[0].length + rows.sources[0].futures - 1).bit_length()
    self.names = tuple(f'{2**k}-{2**(k + 1) - 1}' if k else '1' for k in range(most))

  def groups_BT(self, ids, batch) -> np.ndarray:
    """As `ByKind.groups_BT`."""
    return np.frexp(batch['positions'])[1] - 1  # -1 for position 0


GROUPINGS = dict(zip(BY, (ByKind, ByPosition)))


def groupings(names: list) -> list[str]:
  """The names, checked.

  Raises:
    BadInput: there is no such grouping.
  """
  for name in names:
    if name not in BY:
      raise BadInput(f'by={name!r}: no such grouping; {nearest(str(name), BY)}')
  return names
