"""What a compiled step moves: bytes through a chip's memory, and between chips, by collective and mesh axis.

XLA's own analysis counts a loop's body once. Here the compiled module, as text, is walked like a program: a loop's body as often as it
runs, a fusion once for what it reads and writes. Of a stack that a loop goes through only the slice at hand is read; what stays in a chip's
own memory (VMEM, S(1) in a layout) does not count.

A collective counts what a chip sends, in a ring of n: all-gather (n-1) x its shard, reduce-scatter and all-to-all (n-1)/n x its input,
all-reduce twice that, collective-permute its input. Between slices a TPU sends by way of its host, in a `send` that tells what it is part of.
A collective that runs beside computations stands in several fusions, a chain, and counts where that starts.
"""
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

SIZES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8,
         'f64': 8, 'c64': 8, 'c128': 16}
SENT = {'all-gather': lambda size, n: size * (n - 1), 'reduce-scatter': lambda size, n: size * (n - 1) / n,
        'all-to-all': lambda size, n: size * (n - 1) / n, 'all-reduce': lambda size, n: 2 * size * (n - 1) / n,
        'collective-permute': lambda size, n: size}
REFUSED = {'ragged-all-to-all', 'collective-broadcast'}
CHAIN = 'chain_id='
FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id', 'while', 'conditional', 'call'}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One kind over one set of devices, in a whole step: the first group's places in the mesh, and the bytes that each chip sends."""
  kind: str
  group: tuple[int, ...]
  sent_bytes: float


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Of one chip and one execution."""
  memory_bytes: float
  collectives: tuple[Collective, ...]


def traffic(hlo: str, slices: int = 1) -> Traffic:
  """Reads a compiled module, as `compiled.as_text()` gives it. With several slices it is that of one, which sends to the others."""
  module = _Module(hlo, slices)
  memory, sent = module.run(module.entry)
  return Traffic(memory, tuple(Collective(kind, group, size) for (kind, group), size in sorted(sent.items())))


def axes(group: Sequence[int], shape: dict[str, int]) -> tuple[str, ...]:
  """The mesh axes along which the members of a group differ; shape: that of the mesh, whose places are counted in its order."""
  places = np.unravel_index(np.array(group), tuple(shape.values()))
  return tuple(axis for axis, along in zip(shape, places) if len(set(along.tolist())) > 1)


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  kind: str
  type: str
  operands: tuple[str, ...]
  rest: str
  root: bool

  def called(self, role: str) -> str:
    return re.search(rf'\b{role}=%?([\w.\-]+)', self.rest).group(1)


class _Module:
  def __init__(self, hlo: str, slices: int):
    self.computations, self.entry, lines = {}, '', None
    partitions = re.search(r'num_partitions=(\d+)', hlo)
    self.partitions = int(partitions.group(1)) if partitions else 1
    self.across = tuple(s * self.partitions for s in range(slices)) if slices > 1 else ()
    for line in hlo.splitlines():
      header = re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{$', line)
      if header:
        lines = self.computations.setdefault(header.group(2), {})
        self.entry = header.group(2) if header.group(1) else self.entry
      elif lines is not None and ' = ' in line:
        instruction = _parse(line)
        lines[instruction.name] = instruction
    self.done = {}

  def run(self, name: str) -> tuple[float, dict]:
    """(bytes of memory, bytes sent by (kind, group)) of one run of a computation."""
    if name in self.done:
      return self.done[name]
    memory, sent = 0.0, {}

    def add(found, times=1):
      nonlocal memory
      memory += times * found[0]
      for key, size in found[1].items():
        sent[key] = sent.get(key, 0.0) + times * size

    lines = self.computations[name]
    for each in lines.values():
      kind = each.kind.removesuffix('-start')
      if kind == 'while':
        add(self.run(each.called('body')), self._times(each))
      elif kind == 'conditional':  # the branch that moves most
        branches = re.search(r'branch_computations=\{([^}]*)\}', each.rest)
        names = branches.group(1).replace('%', '').split(', ') if branches else [each.called('true_computation'), each.called('false_computation')]
        add(max((self.run(branch) for branch in names), key=lambda found: found[0]))
      elif kind in ('call', 'async'):
        add(self.run(each.called('to_apply' if 'to_apply=' in each.rest else 'calls')))
      elif kind in SENT:
        add(self._collective(kind, each, lines))
      elif kind in REFUSED:
        raise ValueError(f'{each.name}: what a {kind} sends is not known')
      elif kind == 'send' and (found := re.search('_xla_megascale_transfer_type="([A-Z_]+)"', each.rest)):
        kind = found.group(1).lower().replace('_', '-')
        add((0.0, {(kind, self.across): SENT.get(kind, SENT['collective-permute'])(_bytes(lines[each.operands[0]].type), len(self.across))}))
      elif kind == 'fusion':
        for inner in self._fused(self.computations[each.called('calls')]):
          add(inner)
      if kind not in FREE and kind != 'async' and not kind.endswith('-done'):
        add((self._moved(each, lines), {}))
    self.done[name] = memory, sent
    return memory, sent

  def _times(self, loop: _Instruction) -> int:
    """How often a loop runs: what XLA says, or the number that its counter is compared with."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
      return int(known.group(1))
    condition = self.computations[loop.called('condition')].values()
    bounds = [int(found.group(1)) for each in condition if each.kind == 'constant' and (found := re.match(r'(\d+)\)', each.rest))]
    if not bounds:
      raise ValueError(f'{loop.name}: how often it runs is not in the compiled module')
    return max(bounds)

  def _collective(self, kind: str, each: _Instruction, lines) -> tuple[float, dict]:
    group = tuple(range(self.partitions)) if 'replica_groups={}' in each.rest else _group(each.rest)
    size = sum(_bytes(lines[name].type) for name in each.operands if name in lines)
    return 0.0, {(kind, group): SENT[kind](size, len(group))} if len(group) > 1 else {}

  def _fused(self, inner) -> Iterator[tuple[float, dict]]:
    """The collectives of a fusion. A TPU's reduce-scatter is an all-reduce and the slice that a chip keeps of it."""
    starts = any('"AsyncCollectiveStart"' in line.rest for line in inner.values())
    for line in inner.values():
      kind = line.kind.removesuffix('-start')
      if kind in SENT and (starts or CHAIN not in line.rest):
        sliced = kind == 'all-reduce' and any(user.kind == 'dynamic-slice' and user.operands[0] == line.name for user in inner.values())
        yield self._collective('reduce-scatter' if sliced else kind, line, inner)

  def _moved(self, each: _Instruction, lines) -> float:
    """Bytes that one instruction reads from memory and writes to it."""
    types = [lines[name].type for name in each.operands if name in lines]
    if each.kind == 'fusion':
      return self._fusion(self.computations[each.called('calls')], types, each.type)
    if each.kind in ('dynamic-slice', 'slice', 'gather'):
      return 2 * _bytes(each.type, True)
    if each.kind == 'dynamic-update-slice':
      return 2 * _bytes(types[1], True)
    result = each.type
    if each.kind.endswith('-start'):  # (operands, results, contexts), or (to, from, context) of a copy
      parts = _split(result)
      result = parts[0] if each.kind == 'copy-start' else parts[len(types)] if len(parts) > len(types) else result
    return _bytes(result, True) + sum(_bytes(type_, True) for type_ in types)

  def _fusion(self, inner, types: list[str], result: str) -> float:
    users, chained = {}, any(CHAIN in line.rest for line in inner.values())  # its buffers are passed on, and written once, where it starts
    for line in inner.values():
      for name in line.operands:
        users.setdefault(name, []).append(line)

    def uses(name):  # seen through bitcasts
      return [found for line in users.get(name, []) for found in (uses(line.name) if line.kind == 'bitcast' else [(line, name)])]

    def read(use, name) -> float:  # of what a fusion takes in, by one use of it
      first = use.operands[0] == name
      if chained and (use.kind in SENT or use.kind in ('tuple', 'custom-call')):
        return 0.0
      return (_bytes(use.type) if use.kind in ('dynamic-slice', 'slice', 'gather') and first else
              0.0 if use.kind == 'dynamic-update-slice' and first else math.inf)

    parameters = {int(line.rest.partition(')')[0]): line.name for line in inner.values() if line.kind == 'parameter'}
    total = sum(min(_bytes(type_, True), sum(read(*use) for use in uses(parameters[i]))) for i, type_ in enumerate(types))

    def written(line):
      if line.kind == 'bitcast':
        return written(inner[line.operands[0]])
      if chained and (line.kind in SENT or line.kind == 'parameter' or '"AsyncCollectiveDone"' in line.rest):
        return 0.0
      return _bytes(inner[line.operands[1]].type) if line.kind == 'dynamic-update-slice' else None

    root = next(line for line in inner.values() if line.root)
    parts = _split(result)
    results = [inner[name] for name in root.operands] if root.kind == 'tuple' else [root] * len(parts)
    for line, type_ in zip(results, parts):
      part = written(line)
      total += min(part, _bytes(type_, True)) if part is not None else _bytes(type_, True)
    return total


def _parse(line: str) -> _Instruction:
  left, _, right = re.sub(r'/\*.*?\*/', '', line).partition(' = ')
  end = _closing(right) + 1 if right.startswith('(') else right.index(' ')
  kind, _, rest = right[end:].strip().partition('(')
  inside = rest[:_closing('(' + rest) - 1]
  operands = tuple(re.findall(r'%([\w.\-]+)', inside)) or tuple(word.split()[-1] for word in inside.split(', ') if word.strip())
  return _Instruction(left.strip().removeprefix('ROOT ').lstrip('%'), kind, right[:end], operands, rest, left.strip().startswith('ROOT '))


def _closing(text: str) -> int:
  """Where the bracket that opens the text closes."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == '(') - (letter == ')')
    if depth == 0:
      return i
  raise ValueError(f'no closing bracket: {text[:80]}')


def _split(type_: str) -> list[str]:
  """The arrays of a type."""
  return re.findall(r'\w+\[[\d,]*\](?:\{[^}]*\})?', type_)


def _bytes(type_: str, in_memory: bool = False) -> float:
  """Of a type, tuples summed up; in_memory: of those parts that a chip keeps in HBM."""
  total = 0.0
  for part in _split(type_):
    name, shape, layout = re.match(r'(\w+)\[([\d,]*)\](\{.*\})?', part).groups()
    if not (in_memory and re.search(r'S\([1-9]\)', layout or '')):
      total += (SIZES.get(name) or (1 if name.startswith('f8') else 0)) * math.prod(int(size) for size in shape.split(',') if size)
  return total


def _group(rest: str) -> tuple[int, ...]:
  """Places of the first group of a collective, however the module writes it."""
  if found := re.search(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}', rest):
    return tuple(map(int, found.group(1).split(',')))
  if found := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', rest):
    groups, shape, order = (tuple(map(int, part.split(','))) if part else () for part in found.groups())
    places = np.arange(math.prod(shape)).reshape(shape)
    return tuple((places.transpose(order) if order else places).reshape(groups)[0].tolist())
  if found := re.search(r"replica_groups=mesh\[([^\]]+)\](?:, ?device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}", rest):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found.group(1))}
    shape, order = (tuple(map(int, found.group(i).split(','))) if found.group(i) else () for i in (2, 3))
    chosen = re.findall(r"'(\w+)'", found.group(4))
    places = np.arange(math.prod(sizes.values()))
    if shape:
      places = places.reshape(shape).transpose(order or None)
    places = places.reshape(tuple(sizes.values()))
    return tuple(places[tuple(slice(None) if name in chosen else 0 for name in sizes)].ravel().tolist())
  raise ValueError(f'a collective whose devices are written in an unknown way: {rest[:300]}')
