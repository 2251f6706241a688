"""The host's side of decoding: shapes, programs, reading what the device generated, timing.

Shapes are padded, so that similar requests share one compiled program: batches are filled up to a
few sizes (`batch_size`), prompts and caches to a multiple of 32 positions. The last `PROGRAMS`
programs are kept. The device makes a few passes at a time, so that a signal is heard between them.
"""
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from mtp_jax.decode import loop
from mtp_jax.decode.decoder import Decoder
from mtp_jax.decode.detokenizer import Detokenizer
from mtp_jax.decode.drafters import Drafter
from mtp_jax.decode.loop import DecodeState
from mtp_jax.decode.verify import Sampler

SHAPE_MULTIPLE = 32  # prompts and caches are padded to a multiple of this
PROGRAMS = 64  # each holds some 10 MB and 180 memory maps, of which a process may have 65,530
PASSES_BETWEEN_READS = 8  # at first, and at most while text is streamed or searched for stop strings
SECONDS_BETWEEN_READS = 0.25
MEASURED_SECONDS = 0.04  # of passes in one measurement of their time
UNLIMITED = np.int32(2**31 - 1)

Stream = Callable[[int, list[int], str], None]  # of (row, new ids, new text)


@dataclasses.dataclass(frozen=True)
class Engine:
  """A model, its drafter and sampler. lengths, pass_costs: as in `loop.decode_passes`.

  sampler: of B rows; a request of fewer is filled up with rows that have ended before they begin.
  """
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
        The tokens after it, from passes before the host sees it, do not count.
      stream: called as a row grows.

    Raises:
      KeyboardInterrupt: between passes; the device then stops too.
    """
    state, passes = self.prefill(rows, limit_B), PASSES_BETWEEN_READS
    end_B = np.array([len(ids) for ids in rows])  # tokens that the host has read, if there are texts
    while True:
      if texts:
        state = _read(state, end_B, texts, stream)
      if jax.device_get(state.done_B).all():
        break
      start = time.perf_counter()
      state = jax.block_until_ready(self.decode_passes(state, passes))
      growth = min(4, SECONDS_BETWEEN_READS / (time.perf_counter() - start))
      passes = max(1, int(passes * growth))
      if texts:
        passes = min(passes, PASSES_BETWEEN_READS)
    state = jax.device_get(dataclasses.replace(state, memory=None, caches=None))
    return state, end_B if texts else state.length_B

  def prefill(self, rows: Sequence[np.ndarray], limit_B) -> DecodeState:
    """The state after the pass over the prompts."""
    B, p, S = self.shape(rows, limit_B)
    prompts_Bp, (length_B, limits_B) = np.full((B, p), self.pad, np.int32), np.ones((2, B), np.int32)
    for row_p, ids in zip(prompts_Bp, rows):
      row_p[:len(ids)] = ids
    length_B[:len(rows)], limits_B[:len(rows)] = [len(ids) for ids in rows], limit_B
    program = self.program(loop.prefill, (B, p), slots=S)
    return program(self.decoder, self.drafter, self.sampler, prompts_Bp, length_B, limits_B,
                   np.int32(self.eos))

  def shape(self, rows: Sequence[np.ndarray], limit_B) -> tuple[int, int, int]:
    """(B, p, S): rows of the batch, padded length of prompts and of caches."""
    p = _padded(max(map(len, rows)))
    return len(self.sampler.seed_B2), p, max(p, _padded(max(limit_B) + self.drafter.depth))

  def decode_passes(self, state: DecodeState, passes: int) -> DecodeState:
    """The state after so many passes, or fewer if all rows end before. state is donated."""
    program = self.program(loop.decode_passes, state.tokens_BS.shape, ('state',), lengths=self.lengths)
    return program(self.decoder, self.drafter, self.sampler, state, np.int32(self.eos),
                   np.int32(passes), self.pass_costs)

  def key(self, rows: Sequence[np.ndarray], limit_B) -> tuple:
    """What the time of a pass depends on: equal for requests of one shape."""
    return self._structure, self.lengths, self.shape(rows, limit_B)

  @functools.cached_property
  def _structure(self):
    """All that is static in decoder, drafter and sampler."""
    return jax.tree.structure((self.decoder, self.drafter, self.sampler))

  def program(self, function: Callable, shape: tuple[int, ...], donated: tuple[str, ...] = (), **static):
    """The function, compiled for arguments of this shape and this engine's decoder."""
    return _compiled(function, donated, tuple(static.items()), shape, self._structure)

  def of_each_length(self) -> list['Engine']:
    """For each of `lengths` this engine, taking it in every pass, by the same program."""
    costs = np.where(np.eye(len(self.lengths), dtype=bool), np.float32(1e-9), np.float32(1))
    several = len(self.lengths) > 1
    return [dataclasses.replace(self, pass_costs=pass_costs if several else None) for pass_costs in costs]

  def seconds_of(self, rows, limit_B, passes: int) -> float:
    """Seconds of so many passes in which no row ends, on the shapes of rows and limit_B."""
    state = self.prefill(rows, limit_B)
    like = lambda x_B, value: jax.device_put(np.full(x_B.shape, value, x_B.dtype), x_B.sharding)
    state = dataclasses.replace(state, limit_B=like(state.limit_B, UNLIMITED),
                                done_B=like(state.done_B, False))
    engine = dataclasses.replace(self, eos=-1)
    jax.block_until_ready(state)
    start = time.perf_counter()
    jax.block_until_ready(engine.decode_passes(state, passes))
    return time.perf_counter() - start


def measure_pass_seconds(engines: Sequence[Engine], rows, limit_B, repeats: int = 3) -> np.ndarray:
  """Seconds of a pass of each engine: float32.

  They are timed in alternation, so that what slows the machine down slows all of them: the least of
  so many measurements. Each is of as many passes as take `MEASURED_SECONDS`, from 4 to 1,024, so that
  what a call costs beside its passes does not count.
  """
  for engine in engines:
    engine.seconds_of(rows, limit_B, 4)  # compiles
  passes = [int(np.clip(4 * MEASURED_SECONDS / engine.seconds_of(rows, limit_B, 4), 4, 1024)) for engine in engines]
  seconds = [[engine.seconds_of(rows, limit_B, n) / n for engine, n in zip(engines, passes)] for _ in range(repeats)]
  return np.min(seconds, 0).astype(np.float32)


def tally(depth_n, drafted_n, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """What the passes that generated a row's tokens did, from the tokens alone.

  A pass generates accepted drafts, of depths 1, 2, ..., then a token of the model's own, of depth 0.

  Args:
    depth_n, drafted_n: of each new token, as in `DecodeState`.
    most: drafts in a pass at most.

  Returns:
    (passes by draft length 0..most; by depth, passes in which all drafts before were accepted and
    this one was within the limit; passes in which it was accepted too)
  """
  before_n = np.concatenate([[0], depth_n])[:len(depth_n)]  # 0 where a pass begins
  index_n = np.where(depth_n > 0, depth_n - 1, before_n)  # within its pass
  return (np.bincount(drafted_n[before_n == 0], minlength=most + 1),
          np.bincount(index_n[index_n < drafted_n], minlength=most),
          np.bincount(depth_n[depth_n > 0] - 1, minlength=most))


def batch_size(rows: int) -> int:
  """The rows that a batch of so many is filled up to: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
  power = 1 << (rows - 1).bit_length()
  return power * 3 // 4 if rows <= power * 3 // 4 else power


@functools.lru_cache(maxsize=PROGRAMS)
def _compiled(function: Callable, donated: tuple[str, ...], static: tuple, *shape):
  """The function for one shape. XLA's program is dropped with it, since no other has its partial."""
  function = functools.partial(function, **dict(static))
  return jax.jit(function, donate_argnames=donated, compiler_options=_compiler_options())


def _compiler_options() -> dict:
  """XLA's options for a pass. On a CPU its operations are so small that running two at once costs more than it
  saves, so XLA need not order them for that.
  """
  return {'xla_cpu_enable_concurrency_optimized_scheduler': False} if jax.default_backend() == 'cpu' else {}


def _read(state: DecodeState, end_B, texts: Sequence[Detokenizer], stream: Stream | None) -> DecodeState:
  """The state in which rows with a stop string have ended. end_B, texts: advanced in place."""
  tokens_BS, length_B, done_B = jax.device_get((state.tokens_BS, state.length_B, state.done_B))
  for b, text in enumerate(texts):
    ids, new_text = text.add(tokens_BS[b, end_B[b]:length_B[b]].tolist(), last=bool(done_B[b]))
    end_B[b] += len(ids)
    if stream and (ids or new_text):
      stream(b, ids, new_text)
  stopped_B = np.array([text.stopped for text in texts])
  stopped_B = np.pad(stopped_B, (0, len(done_B) - len(stopped_B)))
  return dataclasses.replace(state, done_B=jax.device_put(done_B | stopped_B, state.done_B.sharding))


def _padded(length) -> int:
  return -(-int(length) // SHAPE_MULTIPLE) * SHAPE_MULTIPLE
