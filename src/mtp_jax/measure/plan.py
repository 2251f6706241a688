"""What a train step will take on a TPU slice, found by compiling it on a machine without one.

Given the description of a slice (topology.py), XLA compiles the very step that `train` would run
and reports the memory of each chip; it refuses a step that does not fit. The least time of a step
is a roofline: its matrix products, its traffic with memory, over the links of the slice and over
the network between slices, each at the chip's published peak and all at the same time. The longest
of the four is the bound:

    step_seconds = max(FLOPs / peak, memory bytes / bandwidth,
                       sum of (sent bytes / links), sum of (crossing bytes / network))

FLOPs are counted in the traced step, loops times their length; memory traffic and collectives in
the compiled one (traffic.py).
"""
import dataclasses
import functools
import math
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mtp_jax.chips import Chip
from mtp_jax.config import BadInput, Config, MeshConfig
from mtp_jax.evaluation.held_out import evaluate_batch
from mtp_jax.measure.topology import chip_of, collective_seconds, devices, first_line, slice_count
from mtp_jax.measure.traffic import Collective, Traffic, axes, traffic
from mtp_jax.mesh import make_mesh
from mtp_jax.model import costs
from mtp_jax.sharding import spec
from mtp_jax.train import step as training


@dataclasses.dataclass(frozen=True)
class Plan:
  """A compiled step. Bytes are those of one chip; seconds are lower bounds.

  hbm_bytes: at the step's peak; on a CPU, where XLA reports no peak, the sum of all.
  argument_bytes: of the state and a batch, part of hbm_bytes.
  temporary_bytes: XLA's sum of temporaries, which do not all exist at the same time.
  output_bytes: of results that do not take an argument's place.
  host_bytes: in the memory of the host.
  validation_hbm_bytes: at the peak of a validation of as many rows as a microbatch has, with all that a step keeps.
  flops_per_token: what is multiplied, including recomputation; on a TPU without the tiles of
    attention that causality hides.
  model_flops_per_token: the analytic count, in which nothing runs twice and attention counts the
    whole length;
    model_flops_per_token_causal: the same with half the length in attention.
  collective_bytes: sent in a step, by kind and by the mesh axes ('fsdp', 'data+fsdp') over which
    they go.
  overlapped_share: by mesh axes, the fraction of these bytes that is sent while matrix products run.
  seconds: by what takes them: compute, memory, links, network; bound: the longest of them,
    step_seconds.
  mfu_bound, mfu_bound_causal: model FLOPs in that time, over the peak, by either count.
  hlo: the compiled module as text.
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
  validation_hbm_bytes: float
  flops_per_token: float
  model_flops_per_token: int
  model_flops_per_token_causal: int
  memory_traffic_bytes: float
  collective_bytes: dict[str, dict[str, float]]
  overlapped_share: dict[str, float]
  seconds: dict[str, float]
  bound: str
  step_seconds: float
  tokens_per_second: float
  mfu_bound: float
  mfu_bound_causal: float
  run_days: float
  run_tokens: int
  chip_hours: float
  compile_seconds: float
  hlo: str = dataclasses.field(repr=False)


class TooLarge(BadInput):
  """The compiler refuses a step because it does not fit into a chip's memory."""


def plan(config: Config, topology: str, options: Mapping[str, str] | None = None) -> Plan:
  """Compiles `train.step` for a slice such as 'v5p:4x4x4', several, '2xv5p:4x4x4', or devices of
  this machine, 'cpu:8'.

  A config whose mesh has one device is spread over all chips, see `spread`.

  Args:
    options: of the compiler, such as {'xla_tpu_enable_async_collective_fusion': 'true'}.

  Raises:
    BadInput: libtpu is missing or has no such option, or the topology does not exist or has another size than the
      mesh.
    TooLarge: the step does not fit.
  """
  chips = devices(topology)
  config = spread(config, chips, topology)
  mesh, tokens = make_mesh(config.mesh, chips), config.train.batch * config.data.length
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    step_arguments = arguments(config, mesh)
  started = time.perf_counter()
  traced, compiled = _compile(config, mesh, topology, step_arguments, options)
  compile_seconds, hlo = time.perf_counter() - started, compiled.as_text()

  L, model = config.data.length, step_arguments[0].model
  flops_per_token = costs.matmul_flops(traced.jaxpr) / tokens
  model_flops, model_flops_causal = (
      costs.flops_per_token(config.model, L, causal=causal)['total'] for causal in (False, True))

  chip, moved = chip_of(chips), traffic(hlo, slice_count(chips))
  seconds, bound = least_seconds(flops_per_token * tokens / mesh.size, moved, mesh, chip)
  step_seconds, run_tokens = seconds[bound], config.train.rows_before(config.train.steps) * L
  run_seconds = run_tokens / tokens * step_seconds
  flops_per_token_at_peak = step_seconds * mesh.size * chip.flops / tokens

  memory = memory_bytes(compiled.memory_analysis(), chips[0].platform)
  validation_bytes = validation_hbm_bytes(config, mesh, topology, step_arguments)
  return Plan(
      topology=topology, mesh=dict(mesh.shape), accumulate=config.train.accumulate,
      remat=config.model.remat,
      chips=mesh.size, parameters=costs.parameters(model)['total'],
      **memory, hbm_capacity_bytes=chip.hbm_bytes, validation_hbm_bytes=validation_bytes,
      fits=max(memory['hbm_bytes'], validation_bytes) <= chip.hbm_bytes,
      flops_per_token=flops_per_token, model_flops_per_token=model_flops,
      model_flops_per_token_causal=model_flops_causal,
      memory_traffic_bytes=moved.memory_bytes,
      collective_bytes=_bytes_by_axes(moved.collectives, mesh),
      overlapped_share=_overlapped_share(moved.collectives, mesh),
      seconds=seconds, bound=bound, step_seconds=step_seconds,
      tokens_per_second=tokens / step_seconds,
      mfu_bound=model_flops / flops_per_token_at_peak,
      mfu_bound_causal=model_flops_causal / flops_per_token_at_peak,
      run_days=run_seconds / 86400, run_tokens=run_tokens,
      chip_hours=run_seconds * mesh.size / 3600, compile_seconds=compile_seconds, hlo=hlo)


def _compile(config: Config, mesh, topology: str, step_arguments: tuple, options):
  """The train step, traced and compiled for the devices of the mesh."""
  active = (True,) * config.model.futures
  step = jax.jit(functools.partial(training.step, config, active=active), donate_argnums=0)
  fix = (f'raise config.train.accumulate={config.train.accumulate}, set '
         "config.model.remat='full' or config.optimizer.moments='host', or take more chips")
  what = f'config.train.batch={config.train.batch}: a step'
  return _compiled(step, step_arguments, mesh, what, topology, fix, options)


def _compiled(function, arguments: tuple, mesh, what: str, topology: str, fix: str, options=None):
  """(traced, compiled) for the devices of the mesh. Raises TooLarge, in words, where it does not fit."""
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    traced = function.trace(*arguments)
    try:
      lowered = traced.lower(lowering_platforms=(mesh.devices.flat[0].platform,))
      return traced, lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      if options and 'RESOURCE_EXHAUSTED' not in str(error):
        raise BadInput(f'--xla={",".join(f"{name}={value}" for name, value in options.items())}: '
                       f'{first_line(error)}') from None
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      raise TooLarge(f'{what} does not fit into a chip of {topology} ({first_line(error)}); {fix}') from None


def validation_hbm_bytes(config: Config, mesh, topology: str, step_arguments: tuple) -> int:
  """The peak of a chip's memory while it validates, the moments that rest there included."""
  t = config.train
  rows = min(t.evaluate_rows, t.batch // t.accumulate)
  state, batch, byte_lengths, _ = step_arguments
  fewer = lambda x: jax.ShapeDtypeStruct((rows, x.shape[1]), x.dtype, sharding=x.sharding)
  allowed = jax.ShapeDtypeStruct(byte_lengths.shape, jnp.bool, sharding=byte_lengths.sharding)
  arguments = state.model, jax.tree.map(fewer, batch), byte_lengths, allowed
  validation = jax.jit(functools.partial(evaluate_batch, config))
  fix = 'lower config.train.evaluate_rows, or take more chips'
  _, compiled = _compiled(validation, arguments, mesh, f'config.train.evaluate_rows={rows}: a validation', topology,
                          fix)
  resting = 0 if config.optimizer.moments == 'host' else sum(map(shard_bytes, jax.tree.leaves(state.optimizer)))
  return memory_bytes(compiled.memory_analysis(), mesh.devices.flat[0].platform)['hbm_bytes'] + resting


def shard_bytes(x: jax.ShapeDtypeStruct) -> int:
  """Bytes of one chip's part of an array."""
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def memory_bytes(memory, platform: str) -> dict[str, int]:
  """Fields of `Plan` from XLA's analysis of a compiled step."""
  output = memory.output_size_in_bytes - memory.alias_size_in_bytes
  host = (memory.host_argument_size_in_bytes + memory.host_output_size_in_bytes
          - memory.host_alias_size_in_bytes)
  arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  # XLA's peak includes what rests in the host.
  peak = memory.peak_memory_in_bytes - host if platform == 'tpu' else arguments + temporary + output
  return {'hbm_bytes': peak, 'argument_bytes': arguments, 'temporary_bytes': temporary,
          'output_bytes': output,
          'host_bytes': host}


def least_seconds(flops: float, moved: Traffic, mesh, chip: Chip) -> tuple[dict[str, float], str]:
  """(least seconds by what takes them, the longest of them) of a program. flops: of one chip."""
  link_seconds, network_seconds = _communication_seconds(moved.collectives, mesh, chip)
  seconds = {'compute': flops / chip.flops, 'memory': moved.memory_bytes / chip.hbm_bandwidth,
             'links': link_seconds, 'network': network_seconds}
  return seconds, max(seconds, key=lambda kind: -1 if math.isnan(seconds[kind]) else seconds[kind])


def _communication_seconds(collectives: tuple[Collective, ...], mesh,
                           chip: Chip) -> tuple[float, float]:
  links, network = 0.0, 0.0
  for collective in collectives:
    on_links, on_network = collective_seconds(collective, mesh, chip)
    links, network = links + on_links, network + on_network
  return links, network


def _bytes_by_axes(collectives: tuple[Collective, ...], mesh) -> dict[str, dict[str, float]]:
  by_kind = {}
  for collective in collectives:
    by_axes = by_kind.setdefault(collective.kind, {})
    names = '+'.join(axes(collective.group, dict(mesh.shape)))
    by_axes[names] = by_axes.get(names, 0.0) + collective.sent_bytes
  return by_kind


def _overlapped_share(collectives: tuple[Collective, ...], mesh) -> dict[str, float]:
  sent, overlapped = {}, {}
  for collective in collectives:
    names = '+'.join(axes(collective.group, dict(mesh.shape)))
    sent[names] = sent.get(names, 0.0) + collective.sent_bytes
    overlapped[names] = overlapped.get(names, 0.0) + collective.overlapped_bytes
  return {names: overlapped[names] / sent[names] for names in sent if sent[names]}


def arguments(config: Config, mesh) -> tuple:
  """Shapes of what `train.step` takes, on the mesh: state, batch, bytes of each id, weights."""
  def on_mesh(shape, dtype, letters: str):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec(letters)))

  def in_host(x):
    sharding = x.sharding.with_memory_kind('pinned_host') if x.shape else x.sharding
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  rows = config.train.batch, config.data.length + config.model.futures
  batch = {name: on_mesh(rows, jnp.int32, 'Bt') for name in ('tokens', 'segments', 'positions')}
  state = training.abstract(config, mesh)
  if config.optimizer.moments == 'host':
    state = dataclasses.replace(state, optimizer=jax.tree.map(in_host, state.optimizer))
  byte_lengths = on_mesh((config.model.vocab,), jnp.int32, 'v')
  weights = on_mesh((config.model.futures,), jnp.float32, 'm')
  return state, batch, byte_lengths, weights


def spread(config: Config, chips: list, topology: str) -> Config:
  """The config on a mesh of all chips: its own mesh or, if that has one device, data over slices
  and fsdp within.

  Raises:
    BadInput: the config's mesh has another size, or its batch is too small.
  """
  size, slices = math.prod(dataclasses.astuple(config.mesh)), slice_count(chips)
  if size == 1:
    return dataclasses.replace(config, mesh=MeshConfig(data=slices, fsdp=len(chips) // slices))
  if size != len(chips):
    raise BadInput(f'config.mesh: {size} devices, but {topology} has {len(chips)}; '
                   f'such as --config.mesh.fsdp={len(chips)}')
  return config


def mesh_text(mesh: dict[str, int]) -> str:
  """'data 2 x fsdp 8': the axes that have more than one device."""
  return ' x '.join(f'{axis} {size}' for axis, size in mesh.items() if size > 1) or 'one device'
