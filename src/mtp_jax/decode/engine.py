"""The host's side of decoding: shapes in buckets, so that a program is compiled once for many prompts; costs; text as it grows."""
import codecs
import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode.decoder import Decoder
from mtp_jax.decode.drafters import Drafter
from mtp_jax.decode.loop import Progress, advance, prefill
from mtp_jax.decode.verify import Sampler
from mtp_jax.tokenizer import Tokenizer

BUCKET = 32  # prompts and caches are as long as a multiple of this
EVER = np.int32(2**31 - 1)  # passes


@dataclasses.dataclass(frozen=True)
class Engine:
  """A model, its drafter, and how rows choose. lengths and pass_seconds as in `loop.advance`."""
  decoder: Decoder
  drafter: Drafter
  sampler: Sampler
  eos: int
  pad: int
  lengths: tuple[int, ...]
  pass_seconds: np.ndarray | None = None

  def begin(self, rows: Sequence[np.ndarray], limit_B) -> Progress:
    """The pass over the prompts. limit_B: tokens of each row in all."""
    B, p, S = self.shape(rows, limit_B)
    prompts_Bp, length_B = np.full((B, p), self.pad, np.int32), np.array([len(row) for row in rows], np.int32)
    for row, ids in zip(prompts_Bp, rows):
      row[:len(ids)] = ids
    return prefill(self.decoder, self.drafter, self.sampler, prompts_Bp, length_B, np.asarray(limit_B, np.int32), np.int32(self.eos), slots=S)

  def shape(self, rows: Sequence[np.ndarray], limit_B) -> tuple[int, int, int]:
    """(B, p, S): rows, the bucket of their prompts and that of their caches."""
    up = lambda n: -(-int(n) // BUCKET) * BUCKET
    p = up(max(map(len, rows)))
    return len(rows), p, max(p, up(max(limit_B) + self.drafter.depth))

  def advance(self, progress: Progress, passes: int = EVER) -> Progress:
    """progress is given away."""
    return advance(self.decoder, self.drafter, self.sampler, progress, np.int32(self.eos), np.int32(passes), self.pass_seconds, lengths=self.lengths)

  def costs(self, rows: Sequence[np.ndarray], limit_B, passes: int = 4) -> np.ndarray:
    """Seconds of a pass for each of `lengths`, on these shapes: the least of three times, after one that compiles."""
    found = []
    for i in range(len(self.lengths)):
      only = np.where(np.arange(len(self.lengths)) == i, 1e-9, 1).astype(np.float32) if len(self.lengths) > 1 else None
      forced = dataclasses.replace(self, eos=-1, pass_seconds=only)
      seconds = []
      for _ in range(4):
        endless = jax.block_until_ready(dataclasses.replace(forced.begin(rows, limit_B), limit_B=jnp.full(len(rows), EVER), done_B=jnp.zeros(len(rows), bool)))
        start = time.perf_counter()
        jax.block_until_ready(forced.advance(endless, passes))
        seconds.append((time.perf_counter() - start) / passes)
      found.append(min(seconds[1:]))
    return np.array(found, np.float32)

  def run(self, rows: Sequence[np.ndarray], limit_B, texts: 'Sequence[Text]' = (), tell: Callable[[int, list[int], str], None] | None = None):
    """Decodes to the end: (the Progress, its arrays on the host and without caches; tokens of each row that count).

    Args:
      texts: one a row, where somebody reads along: a row then ends at its stop string; the few passes it makes before the host sees
        that are counted, though their tokens are not.
      tell: called with (row, new ids, new text).
    """
    progress, length_B, done = self.begin(rows, limit_B), np.array([len(row) for row in rows]), not texts
    while not done:
      tokens_BS, known_B, done_B = jax.device_get((progress.tokens_BS, progress.length_B, progress.done_B))
      for b, text in enumerate(texts):
        ids, said = text.grow(tokens_BS[b, length_B[b]:known_B[b]].tolist(), bool(done_B[b]))
        length_B[b] += len(ids)
        if tell and (ids or said):
          tell(b, ids, said)
      stopped_B = done_B | [text.stopped for text in texts]
      done = bool(stopped_B.all())
      if not done:
        progress = self.advance(dataclasses.replace(progress, done_B=jnp.asarray(stopped_B)), 8)
    if not texts:
      progress = self.advance(progress)
    end = jax.device_get(dataclasses.replace(progress, memory=None, caches=None))
    return end, length_B if texts else end.length_B


class Text:
  """The text of a row as it grows; what may be the beginning of a stop string, or of a character, is held back until it is not."""

  def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
    self.stopped, self._tokenizer, self._stop = False, tokenizer, [text.encode('utf-8', errors='surrogatepass') for text in stop]
    self._bytes, self._told, self._characters = b'', 0, codecs.getincrementaldecoder('utf-8')(errors='replace')

  def grow(self, ids: Sequence[int], last: bool) -> tuple[list[int], str]:
    """(these ids, up to the one that completes a stop string; text that is now certain, without the stop string)."""
    if self.stopped:
      return [], ''
    for i, token in enumerate(ids, 1):
      before = len(self._bytes)
      self._bytes += self._tokenizer.decode([token])
      found = [self._bytes.find(stop, max(0, before - len(stop) + 1)) for stop in self._stop]
      if max(found, default=-1) >= 0:
        self.stopped, self._bytes, ids = True, self._bytes[:min(at for at in found if at >= 0)], ids[:i]
        break
    certain = len(self._bytes) - (0 if self.stopped or last else max(map(len, self._stop), default=1) - 1)
    said, self._told = self._bytes[self._told:max(certain, self._told)], max(certain, self._told)
    return list(ids), self._characters.decode(said, final=self.stopped or last)

  @property
  def whole(self) -> str:
    return self._bytes.decode('utf-8', errors='replace')
