"""The host's side of decoding: shapes, timing, streaming.

Shapes are padded, so that prompts of similar length share one compiled program.
"""
import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode import loop
from mtp_jax.decode.decoder import Decoder
from mtp_jax.decode.detokenizer import Detokenizer
from mtp_jax.decode.drafters import Drafter
from mtp_jax.decode.loop import DecodeState
from mtp_jax.decode.verify import Sampler

SHAPE_MULTIPLE = 32  # prompts and caches are padded to a multiple of this
PASSES_BETWEEN_READS = 8  # while text is streamed or searched for stop strings
UNLIMITED = np.int32(2**31 - 1)

Stream = Callable[[int, list[int], str], None]  # of (row, new ids, new text)


@dataclasses.dataclass(frozen=True)
class Engine:
  """A model, its drafter and sampler. lengths, pass_costs: as in `loop.decode_passes`."""
  decoder: Decoder
  drafter: Drafter
  sampler: Sampler
  eos: int
  pad: int
  lengths: tuple[int, ...]
  pass_costs: np.ndarray | None = None

  def run(self, rows: Sequence[np.ndarray], limit_B, texts: Sequence[Detokenizer] = (),
          stream: Stream | None = None) -> tuple[DecodeState, np.ndarray]:
    """Decodes until every row has ended: (the state on the host, tokens of each row that count).

    Args:
      rows: prompts, as ids.
      limit_B: tokens of each row at most, prompt included.
      texts: one a row, if there are stop strings or a stream; a row then ends at its stop string.
        The passes it takes part in before the host sees the stop string are counted, their tokens
        are not.
      stream: called as a row grows.
    """
    state = self.prefill(rows, limit_B)
    if texts:
      state, length_B = self._run_with_text(state, rows, texts, stream)
    else:
      state = self.decode_passes(state)
    state = jax.device_get(dataclasses.replace(state, memory=None, caches=None))
    return state, length_B if texts else state.length_B

  def prefill(self, rows: Sequence[np.ndarray], limit_B) -> DecodeState:
    """The state after the pass over the prompts."""
    B, p, S = self.shape(rows, limit_B)
    prompts_Bp = np.full((B, p), self.pad, np.int32)
    for row_p, ids in zip(prompts_Bp, rows):
      row_p[:len(ids)] = ids
    length_B = np.array([len(ids) for ids in rows], np.int32)
    return loop.prefill(self.decoder, self.drafter, self.sampler, prompts_Bp, length_B,
                        np.asarray(limit_B, np.int32), np.int32(self.eos), slots=S)

  def shape(self, rows: Sequence[np.ndarray], limit_B) -> tuple[int, int, int]:
    """(B, p, S): rows, padded length of their prompts and of their caches."""
    p = _padded(max(map(len, rows)))
    return len(rows), p, max(p, _padded(max(limit_B) + self.drafter.depth))

  def decode_passes(self, state: DecodeState, passes: int = UNLIMITED) -> DecodeState:
    """The state after so many passes, or fewer if all rows end before. state is donated."""
    return loop.decode_passes(self.decoder, self.drafter, self.sampler, state, np.int32(self.eos),
                              np.int32(passes), self.pass_costs, lengths=self.lengths)

  def measure_pass_seconds(self, rows, limit_B, passes: int = 4) -> np.ndarray:
    """Seconds of a pass with each of `lengths`, on the shapes of rows and limit_B: float32.

    The least of three measurements of so many passes, after one that compiles.
    """
    choices = range(len(self.lengths))
    return np.array([self._pass_seconds(i, rows, limit_B, passes) for i in choices], np.float32)

  def _pass_seconds(self, i: int, rows, limit_B, passes: int) -> float:
    """Seconds of a pass when every pass takes the i-th of `lengths` and no row ends."""
    costs = np.ones(len(self.lengths), np.float32)
    costs[i] = 1e-9  # so that it is always chosen
    engine = dataclasses.replace(self, eos=-1, pass_costs=costs if len(costs) > 1 else None)
    seconds = []
    for _ in range(4):
      unlimited_B, not_done_B = jnp.full(len(rows), UNLIMITED), jnp.zeros(len(rows), bool)
      state = engine.prefill(rows, limit_B)
      state = dataclasses.replace(state, limit_B=unlimited_B, done_B=not_done_B)
      jax.block_until_ready(state)
      start = time.perf_counter()
      jax.block_until_ready(engine.decode_passes(state, passes))
      seconds.append((time.perf_counter() - start) / passes)
    return min(seconds[1:])

  def _run_with_text(self, state: DecodeState, rows, texts, stream):
    """(the state, tokens of each row that count); the host reads the tokens every few passes."""
    read_B = np.array([len(ids) for ids in rows])
    while True:
      tokens_BS, length_B, done_B = jax.device_get((state.tokens_BS, state.length_B, state.done_B))
      for b, text in enumerate(texts):
        ids, new_text = text.add(tokens_BS[b, read_B[b]:length_B[b]].tolist(), last=bool(done_B[b]))
        read_B[b] += len(ids)
        if stream and (ids or new_text):
          stream(b, ids, new_text)
      done_B = done_B | [text.stopped for text in texts]
      if done_B.all():
        return state, read_B
      state = dataclasses.replace(state, done_B=jnp.asarray(done_B))
      state = self.decode_passes(state, PASSES_BETWEEN_READS)


def _padded(length) -> int:
  return -(-int(length) // SHAPE_MULTIPLE) * SHAPE_MULTIPLE
