"""XLA's compiled modules as text: instructions, types and their sizes, groups of devices.

    %name = f32[8,16]{1,0:T(8,128)S(1)} all-reduce(%operand), replica_groups={{0,1}}, ...
    name    type                        kind       operands   rest (from the operands on)
"""
import dataclasses
import math
import re

import numpy as np

BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2,
         's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16}


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation; root: whether it is the computation's result."""
  name: str
  kind: str
  type: str
  operands: tuple[str, ...]
  rest: str
  root: bool

  def called(self, role: str) -> str:
    """The computation that is called as `role`: 'body', 'condition', 'calls', 'to_apply'."""
    return re.search(rf'\b{role}=%?([\w.\-]+)', self.rest).group(1)


Computation = dict[str, Instruction]  # by name, in order


def parse(hlo: str) -> tuple[dict[str, Computation], str]:
  """The computations of a module by name, and the name of the one that runs."""
  computations, entry, current = {}, '', None
  for line in hlo.splitlines():
    header = re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{$', line)
    if header:
      current = computations.setdefault(header.group(2), {})
      entry = header.group(2) if header.group(1) else entry
    elif current is not None and ' = ' in line:
      instruction = _parse_line(line)
      current[instruction.name] = instruction
  return computations, entry


def _parse_line(line: str) -> Instruction:
  left, _, right = re.sub(r'/\*.*?\*/', '', line).partition(' = ')
  end = _closing(right) + 1 if right.startswith('(') else right.index(' ')
  kind, _, rest = right[end:].strip().partition('(')
  inside = rest[:_closing('(' + rest) - 1]
  operands = tuple(re.findall(r'%([\w.\-]+)', inside))
  if not operands:
    operands = tuple(word.split()[-1] for word in inside.split(', ') if word.strip())
  name, root = left.strip().removeprefix('ROOT ').lstrip('%'), left.strip().startswith('ROOT ')
  return Instruction(name, kind, right[:end], operands, rest, root)


def _closing(text: str) -> int:
  """The position at which the bracket that opens the text closes."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == '(') - (letter == ')')
    if depth == 0:
      return i
  raise ValueError(f'no closing bracket: {text[:80]}')


def arrays(type_: str) -> list[str]:
  """The arrays of a type, which may be a tuple."""
  return re.findall(r'\w+\[[\d,]*\](?:\{[^}]*\})?', type_)


def size_bytes(type_: str) -> float:
  """Bytes of a type, those of a tuple summed."""
  return sum(map(_array_bytes, arrays(type_)))


def memory_bytes(type_: str) -> float:
  """Bytes of a type in HBM; arrays in a chip's own memory (VMEM, S(1) in a layout) are not."""
  return sum(_array_bytes(array) for array in arrays(type_) if not re.search(r'S\([1-9]\)', array))


def _array_bytes(array: str) -> float:
  name, shape = re.match(r'(\w+)\[([\d,]*)\]', array).groups()
  bytes_each = BYTES.get(name) or (1 if name.startswith('f8') else 0)
  return bytes_each * math.prod(int(size) for size in shape.split(',') if size)


def first_group(rest: str) -> tuple[int, ...]:
  """Positions, in the mesh, of the first group of devices of a collective.

  A module writes groups as lists, as a reshaped and transposed range, or as axes of a mesh:
  {{0,2},{1,3}}, [2,2]<=[2,2]T(1,0), mesh['a'=2,'b'=2] {'a'}. Of a permutation it is the first pair of two devices; the
  pair of a device with itself if there is no other.

  Raises:
    ValueError: they are written in another way.
  """
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', rest)
  if listed:
    return _numbers(listed.group(1))
  permuted = re.search(r'source_target_pairs=\{(\{.*?\})\}', rest)
  if permuted:
    pairs = [_numbers(pair) for pair in re.findall(r'\{([\d,]+)\}', permuted.group(1))]
    return next((pair for pair in pairs if len(set(pair)) > 1), pairs[0])
  of_range = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', rest)
  if of_range:
    groups, shape, order = map(_numbers, of_range.groups())
    places = np.arange(math.prod(shape)).reshape(shape)
    return tuple((places.transpose(order) if order else places).reshape(groups)[0].tolist())
  of_mesh = re.search(r'replica_groups=mesh\[([^\]]+)\]'
                      r'(?:, ?device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}', rest)
  if of_mesh:
    axes, shape, order, chosen = of_mesh.groups()
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    places = np.arange(math.prod(sizes.values()))
    if shape:
      places = places.reshape(_numbers(shape)).transpose(_numbers(order) or None)
    places = places.reshape(tuple(sizes.values()))
    along = re.findall(r"'(\w+)'", chosen)
    first = tuple(slice(None) if name in along else 0 for name in sizes)
    return tuple(places[first].ravel().tolist())
  raise ValueError(f'a collective whose devices are written in an unknown way: {rest[:300]}')


def _numbers(text: str | None) -> tuple[int, ...]:
  return tuple(map(int, text.split(','))) if text else ()
