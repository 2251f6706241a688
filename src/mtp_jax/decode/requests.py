"""What `LanguageModel.generate` accepts: checks of its arguments. Nothing here imports JAX."""
import dataclasses
from collections.abc import Mapping, Set

import numpy as np

from mtp_jax.config import BadInput, nearest

CRITERIA = ('exact', 'lossy_top_k', 'lossy_distance', 'lossy_typical')


@dataclasses.dataclass(frozen=True)
class Criterion:
  """When a draft x is accepted. p: the model's distribution at the row's temperature (at 1 where
  that is 0), not truncated.

  exact            so that the text follows the model's distribution (`decode.verify`)
  lossy_top_k      x is among the `threshold` likeliest tokens
  lossy_distance   |x - argmax p| <= threshold, for ids that are magnitudes
  lossy_typical    p(x) > min(threshold, sqrt(threshold) exp(-entropy of p))

  Stern et al., arXiv:1811.03115, sections 5.1 and 5.2; Medusa, arXiv:2401.10774, section 2.3.

  min_block: the least number of tokens a pass generates, whatever the criterion (section 5.3);
    above 1 it is lossy too.

  Raises:
    BadInput: a field is out of range.
  """
  name: str = 'exact'
  threshold: float = 0.0
  min_block: int = 1

  def __post_init__(self):
    if not (isinstance(self.name, str) and self.name in CRITERIA):
      raise BadInput(f'criterion={self.name}: no such criterion; {nearest(str(self.name), CRITERIA)}')
    most = float(np.finfo(np.float32).max)
    threshold = per_row('threshold', self.threshold, 1, -most, most, np.float64)
    object.__setattr__(self, 'threshold', threshold.item())
    valid, range_ = {
        'exact': (self.threshold == 0, '0, because the exact criterion has none'),
        'lossy_top_k': (self.threshold >= 1, 'at least 1, a number of likeliest tokens'),
        'lossy_distance': (self.threshold >= 0, 'at least 0, a distance of ids'),
        'lossy_typical': (0 < self.threshold < 1, 'between 0 and 1, such as 0.09'),
    }[self.name]
    if not valid:
      raise BadInput(f'threshold={self.threshold:g}: for {self.name} it must be {range_}')
    min_block = per_row('min_block', self.min_block, 1, 1, 2**31 - 1,
                        allowed="at least 1, the model's own token")
    object.__setattr__(self, 'min_block', min_block.item())

  @property
  def lossless(self) -> bool:
    return self.name == 'exact' and self.min_block == 1


def sampling_parameters(prompts: int, temperature=0.0, seed=0, top_k=0, top_p=1.0,
                        n: int = 1) -> tuple[np.ndarray, ...]:
  """(temperature_B, seed_B2, top_k_B, top_p_B), checked, of n rows a prompt; see `LanguageModel.generate`.

  A row's random numbers come from its pair seed_B2: one seed of all rows and the row's number, or
  the prompt's own seed and the sample's number.

  Raises:
    BadInput: a number is out of range.
  """
  seed_B = np.repeat(per_row('seed', seed, prompts, 0, 2**31 - 1, np.uint32), n)
  number_B = np.arange(prompts * n) if np.ndim(seed) == 0 else np.tile(np.arange(n), prompts)
  seed_B2 = np.stack([seed_B, number_B.astype(np.uint32)], 1)
  least, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
  temperature_B = per_row('temperature', temperature, prompts, 0, most, np.float32,
                          '0 (greedy) or a positive number')
  top_k_B = per_row('top_k', top_k, prompts, 0, 2**31 - 1, allowed='at least 1, or 0 for all')
  top_p_B = per_row('top_p', top_p, prompts, least, 1, np.float32, 'above 0 and at most 1')
  return np.repeat(temperature_B, n), seed_B2, np.repeat(top_k_B, n), np.repeat(top_p_B, n)


def lengths_after_decoding(length_B: np.ndarray, max_tokens, max_length: int) -> np.ndarray:
  """Tokens of each row at most, prompt included: int32[B].

  Args:
    length_B: tokens of each prompt, `bos` included.
    max_tokens: new tokens of every row, or one number a row; None: what `max_length` leaves, at
      most 256.
    max_length: tokens of a row, prompt included.

  Raises:
    BadInput: a prompt is too long, or max_tokens is out of range.
  """
  room_B = max_length - length_B
  if room_B.min() < 1:
    raise BadInput(f'prompt: {length_B.max()} tokens with the one that begins it, but '
                   f'max_length={max_length} holds them and at least one more; '
                   'shorten it or raise max_length')
  if max_tokens is None:
    return length_B + np.minimum(room_B, 256)
  new_B = per_row('max_tokens', max_tokens, len(length_B), 1, 2**24)
  if (new_B > room_B).any():
    b = int(np.argmax(new_B - room_B))
    raise BadInput(f'max_tokens={new_B[b]}: a prompt of {length_B[b]} tokens leaves room for '
                   f'{room_B[b]} within max_length={max_length}; lower max_tokens or raise max_length')
  return length_B + new_B


def stop_strings(stop) -> list[str | bytes]:
  """One or several, text or bytes, as a list; None are none.

  Raises:
    BadInput: one is empty, or neither text nor bytes.
  """
  strings = one_or_several('stop', () if stop is None else stop, (str, bytes))
  if not all(isinstance(string, (str, bytes)) and string for string in strings):
    raise BadInput(f'stop={strings!r}: must be text or bytes, none of them empty')
  return strings


def one_or_several(name: str, value, one: tuple[type, ...]) -> list:
  """A list of a value of the types `one`, or of the entries of a sequence.

  Raises:
    BadInput: it is neither, such as None, a number or a set, which has no order.
  """
  if isinstance(value, one):
    return [value]
  try:
    if isinstance(value, (Mapping, Set)):
      raise TypeError
    return list(value)
  except TypeError:
    kinds = ' or '.join(kind.__name__ for kind in one)
    raise BadInput(f'{name}={value!r}: must be {kinds}, or a sequence of them') from None


def prompt_ids(prompt, tokenizer) -> np.ndarray:
  """The ids of a prompt: int32[n].

  Raises:
    BadInput: it is empty, or neither text nor ids.
  """
  ids = text_ids('prompts', prompt, tokenizer)
  if not ids.size:
    raise BadInput('prompt: empty; pass the text to continue, or None to begin a document')
  return ids


def text_ids(name: str, text, tokenizer) -> np.ndarray:
  """The ids of a text of an argument, which may be given as text, bytes or ids: int32[n].

  Raises:
    BadInput: it is neither text nor ids.
  """
  try:
    ids = tokenizer.encode(text) if isinstance(text, (str, bytes)) else np.asarray(text)
    whole = not ids.size or np.issubdtype(ids.dtype, np.integer)
    wrong = ids.ndim != 1 or not whole or ids.size and (ids.min() < 0 or ids.max() >= tokenizer.size)
  except (ValueError, TypeError, OverflowError):  # such as rows of unequal length
    wrong = True
  if wrong:
    raise BadInput(f'{name}: {text!r} is neither text nor a sequence of ids '
                   f'from 0 to {tokenizer.size - 1}')
  return ids.astype(np.int32)


def check_is(kind, **arguments) -> None:
  """Raises BadInput for an argument that is not of the type, or of one of the types, `kind`."""
  for name, value in arguments.items():
    if not isinstance(value, kind):
      kinds = kind if isinstance(kind, tuple) else (kind,)
      expected = ' or '.join(k.__name__ for k in kinds)
      raise BadInput(f'{name}={value!r}: must be of type {expected}, not {type(value).__name__}')


def number(name: str, value, least: int, most: int) -> int:
  """One whole number from least to most. Raises BadInput."""
  return int(per_row(name, value, 1, least, most, np.int64)[0])


def per_row(name: str, value, rows: int, least, most, dtype=np.int32,
            allowed: str = '') -> np.ndarray:
  """One number a row: dtype[rows].

  Args:
    name: of the argument, for the message.
    value: a number, or one number a row.
    least, most: the range; a number must be whole where `dtype` is.
    allowed: the range in words, for the message.

  Raises:
    BadInput: it is no number, out of range, or not one a row.
  """
  try:
    if value is None or isinstance(value, (Mapping, Set)):
      raise TypeError
    values = np.asarray(value, np.float64)
  except (TypeError, ValueError, OverflowError):
    raise BadInput(f'{name}={value!r}: must be a number') from None
  if values.ndim == 0:
    values = np.broadcast_to(values, rows)
  if values.shape != (rows,):
    raise BadInput(f'{name}={value!r}: must be a number, or {rows} of them, one a prompt')
  whole = np.issubdtype(dtype, np.integer)
  for x in values.tolist():
    if not least <= x <= most or whole and x != int(x):
      allowed = allowed or f'between {least} and {most}'
      kind = ', a whole number' if whole and x % 1 else ''
      raise BadInput(f'{name}={x:.12g}: must be {allowed}{kind}')
  return values.astype(dtype)


EXACT = Criterion()
