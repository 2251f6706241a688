"""The language of a future's weight: a number, or a path through training; see `ObjectiveConfig`."""
import math


def weight_at(weight: float | str, fraction: float) -> float:
  """A weight's value when this fraction of training is done; see `ObjectiveConfig`."""
  value, turns = weight_path(weight)
  for shape, start, end, goal in turns:
    if fraction < start:
      break
    if fraction >= end:
      value = goal
      continue
    share = (fraction - start) / (end - start)
    value += (goal - value) * (share if shape == 'linear' else (1 - math.cos(math.pi * share)) / 2)
    break
  return value


def weight_path(weight: float | str) -> tuple[float, list[tuple[str, float, float, float]]]:
  """'0.3 step 0.676 0.1' -> (0.3, [('step', 0.676, 0.676, 0.1)]). Raises ValueError, saying what is wrong."""
  if not isinstance(weight, str):
    return float(weight), []
  first, *words = weight.split() or ['nothing']
  turns = []
  for i in range(0, len(words), 3):
    shape, where, goal = (words[i:i + 3] + ['', ''])[:3]
    if shape not in ('step', 'linear', 'cosine'):
      raise ValueError(f'{shape!r} is no step, linear or cosine')
    start, colon, end = where.partition(':')
    if (shape == 'step') == bool(colon):
      wanted = 'a fraction of training, such as 0.5' if shape == 'step' else 'two fractions of training, such as 0:0.5'
      raise ValueError(f'{where!r} after {shape} must be {wanted}')
    turns.append((shape, _number(start), _number(end if colon else start), _number(goal)))
  places = [0.0, *(place for _, start, end, _ in turns for place in (start, end)), 1.0]
  if not all(a <= b for a, b in zip(places, places[1:])) or any(shape != 'step' and start == end for shape, start, end, _ in turns):
    raise ValueError('fractions of training must rise from 0 to 1')
  return _number(first), turns


def _number(word: str) -> float:
  try:
    return float(word)
  except ValueError:
    raise ValueError(f'{word!r} is no number') from None


def forward_curriculum(futures: int) -> tuple[float | str, ...]:
  """Weights that add one future after another in stages of equal length (Aynetdinov & Akbik 2025, arXiv:2505.22757)."""
  return (1.0, *(f'0 step {m / futures} 1' for m in range(1, futures)))


def reverse_curriculum(futures: int) -> tuple[float | str, ...]:
  """Weights that begin with all futures and drop the farthest in stages of equal length (arXiv:2505.22757)."""
  return (1.0, *(f'1 step {(futures - m) / futures} 0' for m in range(1, futures)))
