"""What a train step will take on a TPU slice, found by compiling it on a machine without one.

XLA's TPU compiler is a library (`pip install -e '.[tpu]'`). Given the description of a topology it compiles the very step that
`train` would run, and says what every chip must hold; a step that does not fit is refused by the compiler itself. How long a step
takes at least is a roofline: what it multiplies, what it moves through memory, over the links of the slice and over the network
between slices, each at the chip's published peak and all at the same time; the longest of the four is the bound.

    step_seconds = max(FLOPs / peak, memory bytes / bandwidth, sum of (sent bytes / links), sum of (crossing bytes / network))

FLOPs are counted in the traced step, loops multiplied by their length, and memory and collectives in the compiled one (`traffic`).
"""
import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.chips import CHIPS, Chip, peak_flops
from mtp_jax.config import BadInput, Config, MeshConfig
from mtp_jax.measure.traffic import axes, traffic
from mtp_jax.mesh import make_mesh
from mtp_jax.model import costs
from mtp_jax.report.picture import picture
from mtp_jax.sharding import spec
from mtp_jax.train import step as training

DIMENSIONS = {'v4': 3, 'v5e': 2, 'v5p': 3, 'v6e': 2, 'cpu': 1}
SUCH_AS = 'write such as v5p:2x2x2, v5e:4x4, 2xv5e:16x16 or cpu:8'


@dataclasses.dataclass(frozen=True)
class Plan:
  """A compiled step. Bytes are those of one chip; seconds are lower bounds.

  hbm_bytes: at the step's peak, in all, of which argument_bytes are the state and a batch; on a CPU, where XLA does not tell a peak, the sum of
  all. output_bytes: of results that do not take an argument's place. host_bytes: in the memory of the host. temporary_bytes: XLA's sum of
  temporaries, which are not all alive at once.
  flops_per_token: what is really multiplied, recomputation included and, on a TPU, without the tiles of attention that causality hides;
  model_flops_per_token: the analytic count, in which nothing runs twice and attention counts the whole length.
  collective_bytes: sent in a step, by kind and by the mesh axes ('fsdp', 'data+fsdp') over which it goes.
  seconds: by what takes them, 'compute', 'memory', 'links', 'network'; bound: the longest of them, step_seconds.
  mfu_bound: model FLOPs in that time, over the peak. hlo: the compiled module as text.
  """
  topology: str
  mesh: dict[str, int]
  accumulate: int
  remat: str
  chips: int
  parameters: int
  hbm_bytes: int
  hbm_capacity_bytes: float
  fits: bool
  argument_bytes: int
  temporary_bytes: int
  output_bytes: int
  host_bytes: int
  flops_per_token: float
  model_flops_per_token: int
  memory_traffic_bytes: float
  collective_bytes: dict[str, dict[str, float]]
  seconds: dict[str, float]
  bound: str
  step_seconds: float
  tokens_per_second: float
  mfu_bound: float
  run_days: float
  run_tokens: int
  chip_hours: float
  compile_seconds: float
  hlo: str = dataclasses.field(repr=False)


def plan(config: Config, topology: str) -> Plan:
  """Compiles `train.step` for a slice such as 'v5p:4x4x4', several of them, '2xv5p:4x4x4', or 'cpu:8', devices of this machine.

  A config whose mesh is of one device is spread over all chips: data over slices, fsdp within.

  Raises:
    BadInput: when libtpu is missing, the topology unknown or of another size, or the compiler finds that the step does not fit.
  """
  chips = devices(topology)
  config = spread(config, chips, topology)
  mesh = make_mesh(config.mesh, chips)
  started = time.perf_counter()
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    state, *others = arguments(config, mesh)
    traced = jax.jit(functools.partial(training.step, config, active=(True,) * config.model.futures), donate_argnums=0).trace(state, *others)
    try:
      compiled = traced.lower(lowering_platforms=(chips[0].platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      raise TooLarge(f'config.train.batch={config.train.batch}: a step does not fit into a chip of {topology} ({_first_line(error)}); raise '
                     f"config.train.accumulate={config.train.accumulate}, set config.model.remat='full' or config.optimizer.moments='host', "
                     'or take more chips') from None
  compile_seconds, memory, hlo = time.perf_counter() - started, compiled.memory_analysis(), compiled.as_text()
  output = memory.output_size_in_bytes - memory.alias_size_in_bytes
  host = memory.host_argument_size_in_bytes + memory.host_output_size_in_bytes - memory.host_alias_size_in_bytes  # XLA's peak has it as well
  peak = memory.peak_memory_in_bytes - host if chips[0].platform == 'tpu' else memory.argument_size_in_bytes + memory.temp_size_in_bytes + output
  moved, chip = traffic(hlo, _slices(chips)), chip_of(chips)
  tokens = config.train.batch * config.data.length
  counted, model_flops = costs.matmul_flops(traced.jaxpr) / tokens, costs.flops_per_token(state.model, config.data.length)['total']
  by_kind, links, network = {}, 0.0, 0.0
  for each in moved.collectives:
    by_axes = by_kind.setdefault(each.kind, {})
    over = '+'.join(axes(each.group, dict(mesh.shape)))
    by_axes[over] = by_axes.get(over, 0.0) + each.sent_bytes
    on_links, on_network = _seconds(each, mesh, chip)
    links, network = links + on_links, network + on_network
  seconds = {'compute': counted * tokens / mesh.size / chip.flops, 'memory': moved.memory_bytes / chip.hbm_bandwidth, 'links': links, 'network': network}
  bound = max(seconds, key=lambda kind: -1 if math.isnan(seconds[kind]) else seconds[kind])
  whole = config.train.steps * seconds[bound]
  return Plan(
      topology, dict(mesh.shape), config.train.accumulate, config.model.remat, mesh.size, costs.parameters(state.model)['total'],
      peak, chip.hbm_bytes, peak <= chip.hbm_bytes, memory.argument_size_in_bytes, memory.temp_size_in_bytes, output, host,
      counted, model_flops, moved.memory_bytes, by_kind, seconds, bound, seconds[bound], tokens / seconds[bound],
      model_flops * tokens / mesh.size / chip.flops / seconds[bound], whole / 86400, config.train.steps * tokens, whole * mesh.size / 3600,
      compile_seconds, hlo)


class TooLarge(BadInput):
  """The compiler refuses a step because it does not fit into a chip's memory."""


def spread(config: Config, chips: list, topology: str) -> Config:
  """The config on a mesh of all chips; its own, or, where that is of one device, data over slices and fsdp within.

  Raises:
    BadInput: the config's mesh is of another size, or its batch is too small.
  """
  size, slices = math.prod(dataclasses.astuple(config.mesh)), _slices(chips)
  if size == 1:
    return dataclasses.replace(config, mesh=MeshConfig(data=slices, fsdp=len(chips) // slices))
  if size != len(chips):
    raise BadInput(f'config.mesh: {size} devices, but {topology} has {len(chips)}; such as --config.mesh.fsdp={len(chips)}')
  return config


def weak_scaling(config: Config, topologies: list[str], note: Callable[[str], None]) -> list[Plan]:
  """Plans of the config on each topology, with as many rows a chip, in a mesh that grows along its data axis, as on the first.

  Raises:
    BadInput: a topology is no multiple of the first.
  """
  first, found = spread(config, devices(topologies[0]), topologies[0]), []
  for topology in topologies:
    times, rest = divmod(len(devices(topology)), len(devices(topologies[0])))
    if rest or not times:
      raise BadInput(f'--topology={topology}: {len(devices(topology))} chips, no multiple of the first, {topologies[0]}')
    t, mesh = first.train, dataclasses.replace(first.mesh, data=times * first.mesh.data)
    grown = dataclasses.replace(t, batch=times * t.batch, evaluate_rows=times * t.evaluate_rows)
    found.append(plan(dataclasses.replace(first, train=grown, mesh=mesh), topology))
    note(f'{topology}: {found[-1].step_seconds:.3f} s a step at least, by {found[-1].bound}')
  return found


def plot(plans: list[Plan], path: str) -> None:
  """Seconds of a step by what takes them, over the number of chips."""
  with picture(path, 7, 3.5) as axes_:
    chips = [each.chips for each in plans]
    for kind in plans[0].seconds:
      seconds = [each.seconds[kind] for each in plans]
      if any(seconds):
        axes_.plot(chips, seconds, marker='o', label=kind)
    axes_.set(xscale='log', xlabel='chips', ylabel='seconds a step, at least', xticks=chips, xticklabels=[f'{n:,}' for n in chips], ylim=(0, None))
    axes_.minorticks_off()
    axes_.legend()


def sweep(config: Config, topology: str, note: Callable[[str], None]) -> list[Plan]:
  """Plans of other meshes, while nothing fits with every block recomputed and then of smaller microbatches, and at last of other rematerialisation
  on the best of them; the fastest that fits first. `note` hears of each.

  Raises:
    BadInput: the batch is too small for the chips.
    TooLarge: nothing fits.
  """
  found, chips = [], devices(topology)

  def tried(changed: Config) -> None:
    what = f'mesh {shape(dataclasses.asdict(changed.mesh))}, accumulate {changed.train.accumulate}, remat {changed.model.remat}'
    try:
      each = plan(changed, topology)
    except TooLarge:
      note(f'{what}: does not fit')
      return
    found.append(each)
    note(f'{what}: {each.hbm_bytes / 2**30:.2f} GiB, {each.step_seconds:.3f} s a step at least, by {each.bound}' + ('' if each.fits else '; does not fit'))

  best, fits = lambda: min(found, key=_rank), lambda: any(each.fits for each in found)
  meshes = list(_meshes(config, chips)) or [spread(config, chips, topology).mesh]
  for remat in dict.fromkeys((config.model.remat, 'full')):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
    for mesh in meshes:
      tried(dataclasses.replace(config, mesh=mesh))
    if fits():
      break
  while not fits():
    k = 2 * config.train.accumulate
    try:
      config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=k))
      tried(dataclasses.replace(config, mesh=MeshConfig(**best().mesh)) if found else spread(config, chips, topology))
    except BadInput as error:
      raise TooLarge(f'--topology={topology}: no mesh, microbatch or rematerialisation fits ({error}); take more chips') from None
  config = dataclasses.replace(config, mesh=MeshConfig(**best().mesh))
  for remat in ('full', 'attention', 'attention,qkv', 'dots', 'none'):
    if remat not in {each.remat for each in found if each.accumulate == config.train.accumulate}:
      tried(dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat)))
  return sorted(found, key=_rank)


def _rank(each: Plan) -> tuple:
  return not each.fits, each.step_seconds, each.hbm_bytes


def _meshes(config: Config, chips: list) -> Iterator[MeshConfig]:
  """Those that the config allows: fsdp over all, or some of it given to data, tensor or context."""
  slices = _slices(chips)
  for data, tensor, context in ((1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 4, 1), (1, 1, 2), (1, 1, 4)):
    fsdp, rest = divmod(len(chips), slices * data * tensor * context)
    if not rest:
      mesh = MeshConfig(data=data * slices, fsdp=fsdp, tensor=tensor, context=context)
      try:
        yield dataclasses.replace(config, mesh=mesh).mesh
      except BadInput:
        continue


def shape(mesh: dict[str, int]) -> str:
  """'data 2 x fsdp 8': the axes that have more than one device."""
  return ' x '.join(f'{axis} {size}' for axis, size in mesh.items() if size > 1) or 'one device'


def arguments(config: Config, mesh) -> tuple:
  """Shapes of what `train.step` takes, on the mesh: state, batch, bytes of each id, weights."""
  on_mesh = lambda shape, dtype, letters: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec(letters)))
  batch = {name: on_mesh((config.train.batch, config.data.length + config.model.futures), jnp.int32, 'Bt') for name in ('tokens', 'segments', 'positions')}
  state = training.abstract(config, mesh)
  if config.optimizer.moments == 'host':
    in_host = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind('pinned_host')) if x.shape else x
    state = dataclasses.replace(state, optimizer=jax.tree.map(in_host, state.optimizer))
  return state, batch, on_mesh((config.model.vocab,), jnp.int32, 'v'), on_mesh((config.model.futures,), jnp.float32, 'm')


@functools.cache
def devices(topology: str) -> list:
  """The chips of a slice, or of several, described; or devices of this machine."""
  found = re.fullmatch(r'(?:([1-9]\d*)x)?(\w+):([1-9]\d*(?:x[1-9]\d*)*)', topology)
  slices, generation, sizes = found.groups() if found else ('', '', '')
  if DIMENSIONS.get(generation) != sizes.count('x') + 1 or (slices and generation == 'cpu'):
    raise BadInput(f'--topology={topology}: must be a chip of {", ".join(DIMENSIONS)} and the sizes of its slice; {SUCH_AS}')
  if generation == 'cpu':
    if int(sizes) > len(jax.devices('cpu')):
      raise BadInput(f'--topology={topology}: there are {len(jax.devices("cpu"))} CPU devices; XLA_FLAGS=--xla_force_host_platform_device_count=N makes N')
    return jax.devices('cpu')[:int(sizes)]
  if importlib.util.find_spec('libtpu') is None:
    raise BadInput("--topology: needs the TPU compiler; install it with: pip install -e '.[tpu]'")
  # Left to itself, libtpu asks a server on the network who it is, and refuses a second process.
  os.environ.update(TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1', TPU_WORKER_HOSTNAMES='localhost', TPU_ACCELERATOR_TYPE='v5p-8',
                    TPU_STDERR_LOG_LEVEL='3')
  from jax.experimental import topologies
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=f'{generation}:{sizes}', **({'num_slices': int(slices)} if slices else {})).devices
  except Exception as error:
    raise BadInput(f'--topology={topology}: {_first_line(error)}; {SUCH_AS}') from None


def chip_of(chips: list) -> Chip:
  """What the chips can do; of a CPU its share of the machine's measured speed and of its memory, and nothing else."""
  kind = chips[0].device_kind
  if kind not in CHIPS:
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / len(chips)
    return Chip(peak_flops() / len(chips), memory, math.nan, math.nan, math.nan)
  return CHIPS[kind]


def _slices(chips: list) -> int:
  return len({getattr(chip, 'slice_index', 0) for chip in chips})


def _seconds(collective, mesh, chip: Chip) -> tuple[float, float]:
  """(on the links of a slice, on the network between slices) for what each chip sends. A group that covers several dimensions of the torus
  uses the links of all, a permutation those of one; a dimension that does not close to a ring has half of them, and three close together or not at all."""
  members = [mesh.devices.flat[place] for place in collective.group]
  if _slices(members) > 1:
    return 0.0, collective.sent_bytes / chip.network_bandwidth
  if not hasattr(members[0], 'coords'):
    return collective.sent_bytes / chip.link_bandwidth, 0.0
  sizes = np.array([member.coords for member in mesh.devices.flat]).max(0) + 1
  closed = sizes % chip.ring == 0
  if sizes[2] > 1 and not closed.all():
    closed[:] = False
  covered = [len(set(places.tolist())) > 1 for places in np.array([member.coords for member in members]).T]
  shares = np.where(closed, 1, 0.5)[covered]
  return collective.sent_bytes / chip.link_bandwidth / (shares.max() if collective.kind == 'collective-permute' else shares.sum()), 0.0


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0][:200]
