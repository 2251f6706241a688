"""Tables of tensors: which arrays of a model each tensor of another format holds, for both
directions.

A row names one tensor and the arrays in it, with the axes of the tensor in the letters of those
arrays:

    Row('self_attn.q_proj.weight', {'attention.wq_DHK': 'HK D'})          [H*K, D], the transpose
    Row('mlp.experts.{e}.up_proj.weight', {'feed_forward.up_EDW': 'W D'})      one for each expert
    Row('self_attn.kv_b_proj.weight', {'attention.k_up_AHK': 'HK A', 'attention.v_up_AHK': 'HK A'},
    join=1)

Letters without a space between them are one axis. An E that is missing is split: {e} is its index.
Several arrays stand side by side along letter number `join`. A mark before a letter reorders along
it:

    ~    the pairs (i, i + o/2) of the last o entries, which rotate together, side by side: (2i, 2i + 1)
    /    the second half comes first

All of this only moves numbers, so each direction is the inverse of the other.
"""
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of a table; see above.

  zeros: all its numbers are 0; the array only gives its axes their sizes.
  copy: its arrays are in another tensor too; it is written for readers that want it, and may be
    missing.
  float32: whatever the type of the others.
  """
  name: str
  ours: Mapping[str, str]
  join: int = 0
  zeros: bool = False
  copy: bool = False
  float32: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
  """An array of ours, or one entry of its leading axes, in a tensor.

  axes: letters of the tensor, in its order, with their marks.
  """
  ours: str
  index: tuple[int, ...]
  axes: str

  @property
  def letters(self) -> str:
    """Of the tensor's axes, without marks."""
    return ''.join(filter(str.isalpha, self.axes))

  @property
  def marks(self) -> dict[str, str]:
    """{letter: its mark}."""
    return {letter: mark for mark, letter in zip(self.axes, self.axes[1:]) if not mark.isalpha()}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of another format: `name`, and the parts that stand side by side in it along letter
  number `join`.

  groups: how many letters each of its axes merges. zeros, copy, float32: as in `Row`.
  """
  name: str
  parts: tuple[Part, ...]
  groups: tuple[int, ...]
  join: int = 0
  zeros: bool = False
  copy: bool = False
  float32: bool = False


@dataclasses.dataclass(frozen=True)
class Arrays:
  """The arrays of a model: their shapes, and how many last entries of a head rotate.

  shapes: {'trunk.attention.wq_DHK': (N, D, H, K), ...}
  """
  shapes: Mapping[str, tuple[int, ...]]
  rotary: int

  def shape(self, part: Part) -> tuple[int, ...]:
    """Of a part, in the order of its own letters."""
    return self.shapes[part.ours][len(part.index):]

  def tensor_shape(self, tensor: Tensor) -> tuple[int, ...]:
    sizes = np.array([self._sizes(part) for part in tensor.parts])
    whole = sizes[0].copy()
    whole[tensor.join] = sizes[:, tensor.join].sum()
    return _merged(whole, tensor.groups)

  def to_theirs(self, tensor: Tensor, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """The tensor, in the type of ours.

    Args:
      read: returns one of our arrays.
    """
    if tensor.zeros:
      return np.zeros(self.tensor_shape(tensor), np.float32)
    parts = [self._ordered(part, np.asarray(read(part.ours)[part.index])) for part in tensor.parts]
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts, tensor.join)
    return np.ascontiguousarray(joined.reshape(self.tensor_shape(tensor)))

  def to_ours(self, tensor: Tensor, array: np.ndarray, target: Mapping[str, np.ndarray]) -> None:
    """Writes a tensor into the arrays in `target` that it holds."""
    for part, x in zip(tensor.parts, self._split(tensor, array)):
      if part.ours in target:
        target[part.ours][part.index] = self._restored(part, x)

  def _split(self, tensor: Tensor, array: np.ndarray) -> list[np.ndarray]:
    sizes = [self._sizes(part) for part in tensor.parts]
    widths = [size[tensor.join] for size in sizes]
    whole = list(sizes[0])
    whole[tensor.join] = sum(widths)
    return np.split(array.reshape(whole), np.cumsum(widths)[:-1], tensor.join)

  def _own_letters(self, part: Part) -> str:
    name = part.ours.rpartition('_')[2]
    return name[len(name) - len(self.shape(part)):]

  def _sizes(self, part: Part) -> tuple[int, ...]:
    sizes = dict(zip(self._own_letters(part), self.shape(part)))
    return tuple(sizes[letter] for letter in part.letters)

  def _ordered(self, part: Part, x: np.ndarray) -> np.ndarray:
    own = self._own_letters(part)
    for letter, mark in part.marks.items():
      axis = own.index(letter)
      x = np.take(x, self._order(mark, x.shape[axis]), axis)
    return x.transpose([own.index(letter) for letter in part.letters])

  def _restored(self, part: Part, x: np.ndarray) -> np.ndarray:
    own = self._own_letters(part)
    x = x.transpose([part.letters.index(letter) for letter in own])
    for letter, mark in part.marks.items():
      axis = own.index(letter)
      x = np.take(x, np.argsort(self._order(mark, x.shape[axis])), axis)
    return x

  def _order(self, mark: str, size: int) -> np.ndarray:
    """Where each entry along an axis comes from."""
    order = np.arange(size)
    if mark == '/':
      return np.roll(order, size // 2)
    kept = size - self.rotary
    return np.concatenate([order[:kept], order[kept:].reshape(2, -1).T.ravel()])


def tensors(rows: Iterable[Row], name: str = '', ours: str = '', index: tuple[int, ...] = (),
            experts: int = 0) -> list[Tensor]:
  """The tensors of a table.

  Args:
    name: begins the name of each tensor, such as 'model.layers.3.'.
    ours: begins the name of each array, such as 'trunk.'.
    index: of these arrays, along their stacked axis.
    experts: E, by which rows with {e} are repeated.
  """
  found = []
  for row in rows:
    for e in range(experts) if '{e}' in row.name else (None,):
      at = index if e is None else (*index, e)
      parts = tuple(Part(ours + path, at, axes.replace(' ', '')) for path, axes in row.ours.items())
      axes = next(iter(row.ours.values())).split()
      groups = tuple(sum(map(str.isalpha, axis)) for axis in axes)
      found.append(Tensor(name + row.name.format(e=e), parts, groups, row.join, row.zeros, row.copy,
                          row.float32))
  return found


def _merged(sizes, groups: tuple[int, ...]) -> tuple[int, ...]:
  sizes = iter(map(int, sizes))
  return tuple(math.prod(next(sizes) for _ in range(count)) for count in groups)
