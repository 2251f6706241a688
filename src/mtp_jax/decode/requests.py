"""What a request for text may say, checked. Nothing here imports JAX."""
import dataclasses

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
  seed_B = per_row('seed', seed, rows, 0, 2**31 - 1, np.uint32)
  return (per_row('temperature', temperature, rows, 0, float(np.finfo(np.float32).max), np.float32, '0 (greedy) or a positive number'),
          seed_B + np.arange(rows, dtype=np.uint32) * np.uint32(np.ndim(seed) == 0),
          per_row('top_k', top_k, rows, 0, 2**31 - 1, wanted='at least 1, or 0 for all'),
          per_row('top_p', top_p, rows, float(np.finfo(np.float32).tiny), 1, np.float32, 'above 0 and at most 1'))


def per_row(name: str, value, rows: int, least, most, dtype=np.int32, wanted: str = '') -> np.ndarray:
  """One number a row, from `least` to `most`, and whole where `dtype` is.

  Raises:
    BadInput: it is none, or not one a row.
  """
  try:
    values_B = np.broadcast_to(np.asarray(value, np.float64), rows) if np.ndim(value) == 0 else np.asarray(value, np.float64)
  except (TypeError, ValueError):
    raise BadInput(f'{name}={value!r}: must be a number') from None
  if values_B.shape != (rows,):
    raise BadInput(f'{name}={value!r}: must be a number, or {rows} of them, one a prompt')
  whole = np.issubdtype(dtype, np.integer)
  for x in values_B.tolist():
    if not least <= x <= most or whole and x != int(x):
      raise BadInput(f'{name}={x:.12g}: must be {wanted or f"between {least} and {most}"}' + (', a whole number' if whole and x % 1 else ''))
  return values_B.astype(dtype)
