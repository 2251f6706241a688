"""What a request for text may say, checked. Nothing here imports JAX."""
import dataclasses
import math

import numpy as np

from mtp_jax.config import BadInput, nearest

CRITERIA = ('exact', 'lossy_top_k', 'lossy_distance', 'lossy_typical')


@dataclasses.dataclass(frozen=True)
class Criterion:
  """When a draft x is accepted, p being the model's law at the row's temperature (at 1 where that is 0), not truncated.

  exact            so that the text keeps its law (`decode.verify`)
  lossy_top_k      x is among the `threshold` likeliest tokens                              (Stern et al., section 5.1)
  lossy_distance   |x - argmax p| <= threshold, of ids that are magnitudes                  (section 5.2)
  lossy_typical    p(x) > min(threshold, sqrt(threshold) exp(-entropy of p))                (Medusa, arXiv:2401.10774, section 2.3)

  min_block: tokens of a pass at least, whatever the criterion says (section 5.3); above 1 it is lossy too.

  Raises:
    BadInput: a field is out of range.
  """
  name: str = 'exact'
  threshold: float = 0.0
  min_block: int = 1

  def __post_init__(self):
    if self.name not in CRITERIA:
      raise BadInput(f'criterion={self.name}: no such criterion; {nearest(self.name, CRITERIA)}')
    wanted = {'lossy_top_k': (self.threshold >= 1, 'at least 1, so many of the likeliest tokens'),
              'lossy_distance': (self.threshold >= 0, 'at least 0, a distance of ids'),
              'lossy_typical': (0 < self.threshold < 1, 'between 0 and 1, such as 0.09')}
    ok, range_ = wanted.get(self.name, (self.threshold == 0, '0, for the exact criterion has none'))
    if not ok:
      raise BadInput(f'threshold={self.threshold:g}: for {self.name} it must be {range_}')
    if self.min_block < 1:
      raise BadInput(f'min_block={self.min_block}: must be at least 1, the token that the model says itself')

  @property
  def lossless(self) -> bool:
    return self.name == 'exact' and self.min_block == 1


EXACT = Criterion()


def choices(rows: int, temperature=0.0, seed=0, top_k=0, top_p=1.0) -> tuple[np.ndarray, ...]:
  """(temperature_B, seed_B, top_k_B, top_p_B), checked; see `LanguageModel.generate`.

  Raises:
    BadInput: a number is out of range.
  """
  seed_B = per_row('seed', seed, rows, lambda s: 0 <= s < 2**31, 'between 0 and 2^31 - 1', np.uint32)
  return (per_row('temperature', temperature, rows, lambda t: 0 <= t < math.inf, '0 (greedy) or a positive number', np.float32),
          seed_B + np.arange(rows, dtype=np.uint32) * np.uint32(np.ndim(seed) == 0),
          per_row('top_k', top_k, rows, lambda k: k >= 0, 'at least 1, or 0 for all', np.int32),
          per_row('top_p', top_p, rows, lambda p: 0 < p <= 1, 'above 0 and at most 1', np.float32))


def per_row(name: str, value, rows: int, holds, wanted: str, dtype) -> np.ndarray:
  """One number a row."""
  values_B = np.broadcast_to(value, rows) if np.ndim(value) == 0 else np.asarray(value)
  if values_B.shape != (rows,):
    raise BadInput(f'{name}={value!r}: must be a number, or {rows} of them, one a prompt')
  for x in values_B.tolist():
    if not holds(x):
      raise BadInput(f'{name}={x:g}: must be {wanted}')
  return values_B.astype(dtype)
