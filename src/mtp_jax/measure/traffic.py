"""What a compiled step moves: bytes through a chip's memory, and between chips.

XLA's own analysis counts the body of a loop once. Here the compiled module (hlo.py) is walked like
a program: the body of a loop counts as often as it runs, a fusion once, for what it reads and
writes. Where a loop goes through a stack of arrays, it reads one slice of the stack each time.
Arrays in a chip's own memory do not count.

What each of the n chips of a ring sends, for an operand of `size` bytes on each chip:

    all-gather                    size (n-1)
    reduce-scatter, all-to-all    size (n-1) / n
    all-reduce                    2 size (n-1) / n
    collective-permute            size

Between slices a TPU sends by way of its host, in a `send` that names the collective it is part of.
A collective that runs beside computations appears in several fusions, a chain; it counts where the
chain starts. A collective is overlapped if matrix products stand between its start and its end.
"""
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from mtp_jax.measure.hlo import (
  Computation,
  Instruction,
  arrays,
  first_group,
  memory_bytes,
  parse,
  size_bytes,
)
from mtp_jax.model.expert_rows import times_in_name

SENT_BYTES = {
    'all-gather': lambda size, n: size * (n - 1),
    'reduce-scatter': lambda size, n: size * (n - 1) / n,
    'all-to-all': lambda size, n: size * (n - 1) / n,
    'all-reduce': lambda size, n: 2 * size * (n - 1) / n,
    'collective-permute': lambda size, n: size}
REFUSED = {'ragged-all-to-all', 'collective-broadcast'}  # what they send depends on the data
NO_TRAFFIC = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all',
              'partition-id', 'replica-id', 'while', 'conditional', 'call', 'async'}
CHAIN = 'chain_id='
PRODUCTS = {'dot', 'convolution'}


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind over one set of devices in a step.

  group: positions in the mesh of the first group. sent_bytes: what each chip sends; overlapped_bytes: of these,
  while matrix products run.
  """
  kind: str
  group: tuple[int, ...]
  sent_bytes: float
  overlapped_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one chip moves in one execution of a module."""
  memory_bytes: float
  collectives: tuple[Collective, ...]


def traffic(hlo: str, slices: int = 1) -> Traffic:
  """The traffic of a compiled module, as `compiled.as_text()` gives it.

  Args:
    slices: with several, the module is that of one slice, which sends to the others.

  Raises:
    ValueError: the module holds a loop without a known length, or a collective that is not known.
  """
  module = _Module(hlo, slices)
  memory, sent = module.run(module.entry)
  keys = sorted({(kind, group) for kind, group, _ in sent})
  size = lambda key, overlapped: sent.get((*key, overlapped), 0.0)
  collectives = (Collective(*key, size(key, False) + size(key, True), size(key, True)) for key in keys)
  return Traffic(memory, tuple(collectives))


def axes(group: Sequence[int], shape: dict[str, int]) -> tuple[str, ...]:
  """The mesh axes along which the members of a group differ.

  Args:
    group: positions in the mesh.
    shape: sizes of the mesh's axes, in its order.
  """
  places = np.unravel_index(np.array(group), tuple(shape.values()))
  return tuple(axis for axis, along in zip(shape, places) if len(set(along.tolist())) > 1)


class _Module:
  """Walks a module; `run` gives (bytes of memory, bytes sent by (kind, group, overlapped)) of a computation."""

  def __init__(self, hlo: str, slices: int):
    self.computations, self.entry = parse(hlo)
    partitions = re.search(r'num_partitions=(\d+)', hlo)
    self.partitions = int(partitions.group(1)) if partitions else 1
    self.across_slices = tuple(i * self.partitions for i in range(slices)) if slices > 1 else ()
    self.results, self.products = {}, {}

  def run(self, name: str) -> tuple[float, dict]:
    if name not in self.results:
      self.results[name] = self._run(self.computations[name])
    return self.results[name]

  def _run(self, lines: Computation) -> tuple[float, dict]:
    memory, sent, overlapped = 0.0, {}, self._overlapped(lines)
    for line in lines.values():
      for times, (line_memory, line_sent) in self._parts(line, lines):
        memory += times * line_memory
        for key, size in line_sent.items():
          key = key if len(key) == 3 else (*key, line.name in overlapped)
          sent[key] = sent.get(key, 0.0) + times * size
    return memory, sent

  def _overlapped(self, lines: Computation) -> set[str]:
    """Lines that start a collective which does not end before the next matrix product."""
    found, open_ = set(), {}
    for line in lines.values():
      if self._multiplies(line):
        found |= set(open_.values())
      chain = self._chain(line)
      if line.kind.endswith('-start') or 'AsyncCollectiveStart' in chain:
        open_[chain.get('chain', line.name)] = line.name
      elif line.kind.endswith('-done') or 'AsyncCollectiveDone' in chain:
        open_.pop(chain.get('chain', line.operands[0]), None)
    return found

  def _chain(self, line: Instruction) -> dict[str, str]:
    """The chain of collectives that a fusion is part of, and whether it starts or ends it."""
    if line.kind != 'fusion':
      return {}
    texts = [part.rest for part in self.computations[line.called('calls')].values()]
    numbers = [number.group(1) for text in texts if (number := re.search(rf'{CHAIN}"(\d+)"', text))]
    ends = 'AsyncCollectiveStart', 'AsyncCollectiveDone'
    marks = {mark: '' for mark in ends if any(mark in text for text in texts)}
    return marks | ({'chain': numbers[0]} if numbers else {})

  def _multiplies(self, line: Instruction) -> bool:
    """Whether an instruction, or what it calls, holds a matrix product or a kernel."""
    if line.kind in PRODUCTS or (line.kind == 'custom-call' and 'tpu_custom_call' in line.rest):
      return True
    called = 'calls|body|to_apply' if line.kind == 'call' else 'calls|body'
    return any(map(self._has_product, re.findall(rf'\b(?:{called})=%?([\w.\-]+)', line.rest)))

  def _has_product(self, name: str) -> bool:
    if name not in self.products:
      self.products[name] = any(map(self._multiplies, self.computations[name].values()))
    return self.products[name]

  def _parts(self, line: Instruction, lines: Computation) -> Iterator[tuple[int, tuple]]:
    """(times, (bytes of memory, bytes sent)) of what an instruction calls, sends and moves."""
    kind = line.kind.removesuffix('-start')
    if kind == 'while':
      yield self._times(line), self.run(line.called('body'))
    elif kind == 'conditional':
      branches = (self.run(name) for name in _branches(line))
      yield 1, max(branches, key=lambda result: result[0])  # the branch that moves most
    elif kind in ('call', 'async'):
      yield 1, self.run(line.called('to_apply' if 'to_apply=' in line.rest else 'calls'))
    elif kind in SENT_BYTES:
      yield 1, (0.0, self._sent(kind, line, lines))
    elif kind in REFUSED:
      raise ValueError(f'{line.name}: what a {kind} sends is not known')
    elif kind == 'send':
      yield 1, (0.0, self._sent_to_slices(line, lines))
    elif kind == 'fusion':
      for sent in self._sent_in_fusion(self.computations[line.called('calls')]):
        yield 1, (0.0, sent)
    if kind not in NO_TRAFFIC and not kind.endswith('-done'):
      yield 1, (self._moved(line, lines), {})

  def _times(self, loop: Instruction) -> int:
    """How often a loop runs: as XLA notes it, or the number with which its counter is compared, or, where that
    depends on the load of experts, as expected."""
    named = re.search(r'op_name="([^"]*)/while"', loop.rest)
    if named and times_in_name(named.group(1)):
      return times_in_name(named.group(1))
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
      return int(known.group(1))
    constants = (line for line in self.computations[loop.called('condition')].values()
                 if line.kind == 'constant')
    values = [re.match(r'(\d+)\)', line.rest) for line in constants]
    bounds = [int(value.group(1)) for value in values if value]
    if not bounds:
      raise ValueError(f'{loop.name}: how often it runs is not in the compiled module')
    return max(bounds)

  def _sent(self, kind: str, line: Instruction, lines: Computation) -> dict:
    """What a collective sends."""
    all_devices = 'replica_groups={}' in line.rest
    group = tuple(range(self.partitions)) if all_devices else first_group(line.rest)
    size = sum(size_bytes(lines[name].type) for name in line.operands if name in lines)
    return {(kind, group): SENT_BYTES[kind](size, len(group))} if len(set(group)) > 1 else {}

  def _sent_to_slices(self, line: Instruction, lines: Computation) -> dict:
    """What a `send` to the other slices sends; nothing if it is part of no collective."""
    transfer = re.search('_xla_megascale_transfer_type="([A-Z_]+)"', line.rest)
    if not transfer:
      return {}
    kind = transfer.group(1).lower().replace('_', '-')
    sent_bytes = SENT_BYTES.get(kind, SENT_BYTES['collective-permute'])
    size = size_bytes(lines[line.operands[0]].type)
    return {(kind, self.across_slices): sent_bytes(size, len(self.across_slices))}

  def _sent_in_fusion(self, fused: Computation) -> Iterator[dict]:
    """What the collectives in a fusion send.

    A TPU's reduce-scatter is an all-reduce and the slice of it that a chip keeps.
    """
    starts = any('"AsyncCollectiveStart"' in line.rest for line in fused.values())
    for line in fused.values():
      kind = line.kind.removesuffix('-start')
      if kind in SENT_BYTES and (starts or CHAIN not in line.rest):
        users = (user for user in fused.values() if user.kind == 'dynamic-slice')
        sliced = any(user.operands[0] == line.name for user in users)
        yield self._sent('reduce-scatter' if kind == 'all-reduce' and sliced else kind, line, fused)

  def _moved(self, line: Instruction, lines: Computation) -> float:
    """Bytes that an instruction reads from memory and writes to it."""
    types = [lines[name].type for name in line.operands if name in lines]
    if line.kind == 'fusion':
      return _Fusion(self.computations[line.called('calls')]).moved(types, line.type)
    if line.kind in ('dynamic-slice', 'slice', 'gather'):
      return 2 * memory_bytes(line.type)
    if line.kind == 'dynamic-update-slice':
      return 2 * memory_bytes(types[1])
    if line.kind == 'slice-start':  # operands, the slice, contexts
      return sum(memory_bytes(type_) and size_bytes(array) + memory_bytes(array)
                 for type_, array in zip(types, arrays(line.type)[len(types):]))
    result = line.type
    if line.kind.endswith('-start'):
      parts = arrays(result)  # to, from, context of a copy; else operands, results, contexts
      if line.kind == 'copy-start':
        result = parts[0]
      elif len(parts) > len(types):
        result = parts[len(types)]
    return memory_bytes(result) + sum(map(memory_bytes, types))


class _Fusion:
  """What a fusion reads and writes: of a stack only the slices that it takes or replaces."""

  def __init__(self, lines: Computation):
    self.lines, self.users = lines, {}
    # The buffers of a chain are passed on; they are written once, where it starts.
    self.chained = any(CHAIN in line.rest for line in lines.values())
    for line in lines.values():
      for name in line.operands:
        self.users.setdefault(name, []).append(line)

  def moved(self, types: list[str], result: str) -> float:
    """Bytes read and written, given the types of the operands and of the result."""
    return self._read(types) + self._written(result)

  def _read(self, types: list[str]) -> float:
    parameters = {int(line.rest.partition(')')[0]): line.name
                  for line in self.lines.values() if line.kind == 'parameter'}
    total = 0.0
    for i, type_ in enumerate(types):
      by_use = (self._read_by(use, name) for use, name in self._uses(parameters[i]))
      total += min(memory_bytes(type_), sum(by_use))
    return total

  def _uses(self, name: str) -> list[tuple[Instruction, str]]:
    """(instruction, the operand's name in it) for every use of a value, through bitcasts."""
    uses = []
    for line in self.users.get(name, []):
      uses += self._uses(line.name) if line.kind == 'bitcast' else [(line, name)]
    return uses

  def _read_by(self, use: Instruction, name: str) -> float:
    """Bytes that one use reads of an operand; inf for all of it."""
    if self.chained and (use.kind in SENT_BYTES or use.kind in ('tuple', 'custom-call')):
      return 0.0
    if use.operands[0] == name and use.kind in ('dynamic-slice', 'slice', 'gather'):
      return size_bytes(use.type)
    if use.operands[0] == name and use.kind == 'dynamic-update-slice':
      return 0.0
    if use.operands[0] == name and use.kind == 'scatter' and len(use.operands) == 3:
      return size_bytes(self.lines[use.operands[2]].type)
    return math.inf

  def _written(self, result: str) -> float:
    root = next(line for line in self.lines.values() if line.root)
    types = arrays(result)
    lines = [root] * len(types)
    if root.kind == 'tuple':
      lines = [self.lines[name] for name in root.operands]
    return sum(min(self._written_by(line), memory_bytes(type_)) for line, type_ in zip(lines, types))

  def _written_by(self, line: Instruction) -> float:
    """Bytes that a result writes; inf for all of it."""
    if line.kind == 'bitcast':
      return self._written_by(self.lines[line.operands[0]])
    kept = line.kind in SENT_BYTES or line.kind == 'parameter'
    if self.chained and (kept or '"AsyncCollectiveDone"' in line.rest):
      return 0.0
    if line.kind == 'dynamic-update-slice':
      return size_bytes(self.lines[line.operands[1]].type)
    if line.kind == 'scatter' and len(line.operands) == 3:
      return size_bytes(self.lines[line.operands[2]].type)
    return math.inf


def _branches(line: Instruction) -> list[str]:
  """The computations between which a conditional chooses."""
  listed = re.search(r'branch_computations=\{([^}]*)\}', line.rest)
  if listed:
    return listed.group(1).replace('%', '').split(', ')
  return [line.called('true_computation'), line.called('false_computation')]
