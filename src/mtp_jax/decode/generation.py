"""What decoding returns: texts, and how many passes and drafts they took."""
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mtp_jax.decode.detokenizer import Detokenizer
from mtp_jax.decode.engine import Engine, tally
from mtp_jax.decode.loop import DecodeState
from mtp_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, repr=False)
class Generation:
  """What `LanguageModel.generate` returns; a row is a sample of a prompt.

  Attributes:
    ids: new tokens of each row; the last one may be the end of the document or complete a stop
      string.
    depths: for each of these tokens 0 if it is the model's own, m if it was an accepted m-th draft.
    text: the new tokens of each row as text, up to the stop string.
    finish_reason: why each row ended: 'eos' (the end of the document), 'stop' (a stop string) or
      'length' (`max_tokens` or `max_length`).
    tokens: number of new tokens.
    forwards: passes that generated these tokens, summed over the rows. The pass over the prompt
      counts: it gives the first token.
    offered: by draft depth, those in which all drafts before it were accepted and it was within
      the limit.
    accepted: by draft depth, those in which it was accepted too.
    passes: of the batch, by draft length.
    lossless: whether the text follows the model's distribution.
    seconds: wall-clock time, including compilation on the first call with a shape.
  """
  ids: list[list[int]]
  depths: list[list[int]]
  text: list[str]
  finish_reason: list[str]
  tokens: int
  forwards: int
  offered: list[int]
  accepted: list[int]
  passes: list[int]
  lossless: bool
  seconds: float

  @classmethod
  def of(cls, rows: Sequence[np.ndarray], state: DecodeState, end_B, engine: Engine, tokenizer: Tokenizer,
         texts: Sequence[Detokenizer], seconds: float) -> 'Generation':
    """Of the prompts, as ids, and what `Engine.run` returned for them and these texts."""
    new = [slice(len(row), end) for row, end in zip(rows, end_B)]
    ids, depths, drafted = ([x_S[positions] for x_S, positions in zip(x_BS, new)]
                            for x_BS in (state.tokens_BS, state.depth_BS, state.drafted_BS))
    tallies = [tally(*row, engine.drafter.depth) for row in zip(depths, drafted)]
    passes, offered, accepted = map(np.array, zip(*tallies))
    ids = [row.tolist() for row in ids]
    stopped = [text.stopped for text in texts] or [False] * len(ids)
    return cls(
        ids=ids,
        depths=[row.tolist() for row in depths],
        text=[text.text for text in texts] or [tokenizer.text(row) for row in ids],
        finish_reason=['stop' if stop else 'eos' if row[-1:] == [tokenizer.eos] else 'length'
                       for row, stop in zip(ids, stopped)],
        tokens=sum(map(len, ids)),
        forwards=int(passes.sum()),
        offered=offered.sum(0).tolist(),
        accepted=accepted.sum(0).tolist(),
        passes=max(passes.tolist(), key=sum),  # of the row that ended last
        lossless=engine.sampler.criterion.lossless,
        seconds=seconds)

  def __repr__(self) -> str:
    return (f'Generation: rows {len(self.ids)}, tokens {self.tokens:,}, tokens per forward '
            f'{self.tokens_per_forward:.2f}, seconds {self.seconds:.2f}\n{self.text[0]!r:.100}')

  @property
  def acceptance(self) -> list[float]:
    """By draft depth, given that all drafts before it were accepted; nan where none was offered."""
    return [a / n if n else math.nan for a, n in zip(self.accepted, self.offered)]

  @property
  def tokens_per_forward(self) -> float:
    return self.tokens / max(1, self.forwards)

  @property
  def mean_draft(self) -> float:
    """Mean number of drafts in a pass, without the pass over the prompt, which has none."""
    return sum(k * n for k, n in enumerate(self.passes)) / max(1, sum(self.passes) - 1)
