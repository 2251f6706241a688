"""Which text is held out. Its content decides, never a name or a place:

    by content     a document is held out if the hash of its text is among the lowest `share`; so
                   equal documents are on one side, and adding files moves no document to another
    by position    the end of every document, a gap before it being on neither side; where a choice by
                   content would leave a side without text, or with a share far from the one asked
                   for, and most of the text is in documents long enough, such as one book
"""
import dataclasses
import hashlib
from collections.abc import Iterable

SHORTEST_END = 64  # bytes; where the end of a document would be shorter, none of it is held out
GAP = 4096  # bytes at most between both sides of a document


def content_hash(text: bytes) -> int:
  """Uniform in [0, 2**64)."""
  return int.from_bytes(hashlib.sha256(text).digest()[:8], 'big')


@dataclasses.dataclass(frozen=True)
class Split:
  """share: of the text, held out, in (0, 1); below: hashes of held-out documents are below it."""
  share: float
  below: int
  by_position: bool = False

  @classmethod
  def by_content(cls, share: float) -> 'Split':
    return cls(share, int(share * 2**64))

  def sides(self, text: bytes, hash: int) -> list[tuple[str, bytes]]:
    """A document as ('train' or 'validation', text), or as one of each."""
    if not self.by_position:
      return [('validation' if hash < self.below else 'train', text)]
    size = self.held_out_bytes(text)
    gap = min(GAP, size // 4, (len(text) - size) // 4)
    if not size:
      return [('train', text)]
    start = len(text) - size
    return [('train', text[:_line_start(text, start - gap, gap)]), ('validation', text[_line_start(text, start, gap):])]

  def held_out_bytes(self, text: bytes) -> int:
    """Bytes at the end of a document that are held out by position; 0 if it is too short."""
    size = int(self.share * len(text))
    return size if size >= SHORTEST_END else 0


def why_again(split: Split) -> str:
  """A line for the user: why all documents are read a second time, with this split."""
  how = 'the end of each long one is held out' if split.by_position else 'one is held out'
  return f'few documents: {how}; all are read again'


def _line_start(text: bytes, place: int, within: int) -> int:
  """Where the next line begins, if that is within so many bytes; else the next character."""
  line_end = text.find(b'\n', place - 1, place + within)
  while line_end < 0 and place < len(text) and text[place] & 0xC0 == 0x80:
    place += 1
  return line_end + 1 if line_end >= 0 else place


def better_split(split: Split, reports: Iterable[dict]) -> Split:
  """The split to use instead of one by content, or the same one, by what that one gave.

  Args:
    reports: of all parts (see `Preparation.tokenize`).
  """
  tokens, size, long_size, lowest, highest = {'train': 0, 'validation': 0}, 0, 0, 2**64, -1
  for report in reports:
    for side, entry in report['splits'].items():
      tokens[side] += entry['tokens']
      size += entry['document_bytes']
    long_size += report['long_bytes']
    lowest, highest = min(lowest, report['lowest']), max(highest, report['highest'])
  share = tokens['validation'] / max(1, sum(tokens.values()))
  if split.share / 4 <= share <= min(4 * split.share, (1 + split.share) / 2):
    return split
  if 2 * long_size > size:
    return dataclasses.replace(split, by_position=True)
  if not tokens['validation']:
    return dataclasses.replace(split, below=lowest + 1)
  return dataclasses.replace(split, below=highest) if not tokens['train'] and lowest < highest else split
