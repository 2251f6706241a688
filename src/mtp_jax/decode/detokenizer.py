"""The text of a row while its tokens are generated, with stop strings."""
import codecs
from collections.abc import Sequence

from mtp_jax.tokenizer import Tokenizer, as_bytes


class Detokenizer:
  """Turns ids into text as they come. Bytes that may begin a stop string, or are part of a
  character, wait for the next ids.

  stopped: a stop string is complete.
  """

  def __init__(self, tokenizer: Tokenizer, stop: Sequence[str | bytes]):
    self.stopped = False
    self._tokenizer = tokenizer
    self._stop = [as_bytes(string) for string in stop]
    self._bytes = b''  # all of the row, up to the stop string
    self._returned = 0  # of those bytes
    self._characters = codecs.getincrementaldecoder('utf-8')(errors='replace')

  def add(self, ids: Sequence[int], last: bool) -> tuple[list[int], str]:
    """(these ids, up to the one that completes a stop string; text that is now certain, without the
    stop string).

    last: no ids follow.
    """
    if self.stopped:
      return [], ''
    for i, token in enumerate(ids, 1):
      self._add_token(token)
      if self.stopped:
        ids = ids[:i]
        break
    final = self.stopped or last
    certain = len(self._bytes) - (0 if final else max(map(len, self._stop), default=1) - 1)
    new_bytes = self._bytes[self._returned:max(certain, self._returned)]
    self._returned += len(new_bytes)
    return list(ids), self._characters.decode(new_bytes, final=final)

  def _add_token(self, token: int) -> None:
    before = len(self._bytes)
    self._bytes += self._tokenizer.decode([token])
    starts = [self._bytes.find(string, max(0, before - len(string) + 1)) for string in self._stop]
    starts = [start for start in starts if start >= 0]
    if starts:
      self.stopped, self._bytes = True, self._bytes[:min(starts)]

  @property
  def text(self) -> str:
    """All of it, up to the stop string."""
    return self._bytes.decode('utf-8', errors='replace')
