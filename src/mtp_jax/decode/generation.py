"""What decoding returns: texts, and how many passes and drafts they took."""
import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Generation:
  """What `LanguageModel.generate` returns.

  Attributes:
    ids: new tokens of each prompt; the last one may be the end of the document or complete a stop
      string.
    depths: for each of these tokens 0 if it is the model's own, m if it was an accepted m-th draft.
    text: the new tokens of each prompt as text, up to the stop string.
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
  tokens: int
  forwards: int
  offered: list[int]
  accepted: list[int]
  passes: list[int]
  lossless: bool
  seconds: float

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
