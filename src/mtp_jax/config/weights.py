"""The weight of a future in the loss: a number, or a path through training written in words; see
`ObjectiveConfig`.

    '0.3 step 0.676 0.1'        0.3, and 0.1 from 67.6 % of training on
    '0 linear 0:0.5 1'          from 0 to 1 during the first half; `cosine` likewise, along half a cosine
"""
import dataclasses
import functools
import math


@dataclasses.dataclass(frozen=True)
class Segment:
  """A change of a weight to `goal`, between two fractions of training; a step has start == end."""
  shape: str  # step, linear or cosine
  start: float
  end: float
  goal: float


def weight_at(weight: float | str, fraction: float) -> float:
  """The value of a weight when this fraction of training is done."""
  value, segments = parse_weight(weight)
  for segment in segments:
    if fraction < segment.start:
      break
    if fraction < segment.end:
      done = (fraction - segment.start) / (segment.end - segment.start)
      if segment.shape == 'cosine':
        done = (1 - math.cos(math.pi * done)) / 2
      return value + (segment.goal - value) * done
    value = segment.goal
  return value


@functools.lru_cache
def parse_weight(weight: float | str) -> tuple[float, tuple[Segment, ...]]:
  """The value at the beginning, and the changes in order. Raises ValueError that tells what is
  wrong.
  """
  if not isinstance(weight, str):
    return float(weight), ()
  first, *words = weight.split() or ['nothing']
  segments = tuple(_segment(*(words[i:i + 3] + ['', ''])[:3]) for i in range(0, len(words), 3))
  limits = [limit for segment in segments for limit in (segment.start, segment.end)]
  fractions = [0.0, *limits, 1.0]
  rise = all(a <= b for a, b in zip(fractions, fractions[1:]))
  if not rise or any(segment.shape != 'step' and segment.start == segment.end
                     for segment in segments):
    raise ValueError('fractions of training must rise from 0 to 1')
  return _number(first), segments


def _segment(shape: str, when: str, goal: str) -> Segment:
  if shape not in ('step', 'linear', 'cosine'):
    raise ValueError(f'{shape!r} is not step, linear or cosine')
  start, colon, end = when.partition(':')
  if shape == 'step':
    if colon:
      raise ValueError(f'{when!r} after step must be a fraction of training, such as 0.5')
    end = start
  elif not colon:
    raise ValueError(f'{when!r} after {shape} must be two fractions of training, such as 0:0.5')
  return Segment(shape, _number(start), _number(end), _number(goal))


def _number(word: str) -> float:
  try:
    return float(word)
  except ValueError:
    raise ValueError(f'{word!r} is not a number') from None


def forward_curriculum(futures: int) -> tuple[float | str, ...]:
  """Weights that add one future after another, in stages of equal length.

  Source: Aynetdinov & Akbik 2025, arXiv:2505.22757.
  """
  return (1.0, *(f'0 step {m / futures} 1' for m in range(1, futures)))


def reverse_curriculum(futures: int) -> tuple[float | str, ...]:
  """Weights that begin with all futures and drop the farthest first, in stages of equal length
  (same paper).
  """
  return (1.0, *(f'1 step {(futures - m) / futures} 0' for m in range(1, futures)))
