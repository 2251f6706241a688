"""What a pass of decoding will take on TPU chips, found by compiling it on a machine without them.

XLA compiles the very pass that `generate` runs, greedy, with the model's own futures as drafts, for one
draft length and one number of rows, on a mesh as decode/placement.py divides it. The least time of a pass
is the roofline of plan.py; its ratio to that of a pass without drafts is what a pass of k drafts costs,
and the speed-up to expect is, with a_m the acceptance at depth m (Leviathan et al. 2022, arXiv:2211.17192,
section 3),

    (1 + a_1 + a_1 a_2 + ... + a_1 ... a_k) / (seconds with k drafts / seconds without)
"""
import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from mtp_jax.chips import Chip
from mtp_jax.config import BadInput, Config, MeshConfig
from mtp_jax.decode import loop
from mtp_jax.decode.decoder import arranged
from mtp_jax.decode.drafters import futures
from mtp_jax.decode.placement import decoding_mesh, parameter_shardings, state_shardings
from mtp_jax.decode.verify import Sampler
from mtp_jax.evaluation.acceptance import expected_tokens
from mtp_jax.measure.plan import least_seconds, memory_bytes, shard_bytes
from mtp_jax.measure.topology import chip_of, devices, slice_count
from mtp_jax.measure.traffic import traffic
from mtp_jax.mesh import make_mesh
from mtp_jax.model import costs
from mtp_jax.model.model import Model


@dataclasses.dataclass(frozen=True)
class PassPlan:
  """A compiled pass. Bytes are those of one chip; seconds are lower bounds.

  batch: rows. draft: k; a pass reads k + 1 tokens of each row. slots: positions of a cache.
  hbm_bytes: at the pass's peak; parameter_bytes, state_bytes: of it what stays between passes.
  flops: matrix products of all chips together.
  memory_traffic_bytes: read and written. sent_bytes: to other chips.
  seconds: by what takes them; bound: the longest of them, pass_seconds.
  tokens_per_pass, speed_up, tokens_per_second: expected with the acceptances; of all rows. nan without
    acceptances of all depths.
  fits: if not, hbm_bytes is what the compiler asks for, nan where it does not say, and all that is known.
  """
  topology: str
  mesh: dict[str, int]
  batch: int
  draft: int
  slots: int
  hbm_bytes: float
  hbm_capacity_bytes: float
  fits: bool
  parameter_bytes: float = math.nan
  state_bytes: float = math.nan
  flops: float = math.nan
  memory_traffic_bytes: float = math.nan
  sent_bytes: float = math.nan
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  bound: str = ''
  pass_seconds: float = math.nan
  tokens_per_pass: float = math.nan
  speed_up: float = math.nan
  tokens_per_second: float = math.nan
  compile_seconds: float = math.nan


def plan_decode(config: Config, topology: str, batches: Sequence[int], drafts: Sequence[int], slots: int,
                acceptance: Sequence[float] = (), note: Callable[[str], None] = lambda line: None) -> list[PassPlan]:
  """Plans of a pass for each number of rows and each draft length, 0 among them.

  Args:
    topology: a slice, such as 'v5e:2x4', or devices of this machine, 'cpu:8'.
    slots: positions that a cache holds: tokens of prompt and text, and drafts.
    acceptance: at depths 1, 2, ..., given that all drafts before were accepted; none: no speed-up.
    note: is called with a line about each plan.

  Raises:
    BadInput: libtpu is missing, the topology does not exist or has another size than the mesh, or the
      model has fewer futures.
  """
  chips, c = devices(topology), config.model
  if slice_count(chips) > 1:
    raise BadInput(f'--topology={topology}: decoding stays within one slice; plan for that')
  if max(drafts) >= c.futures and not (c.share_modules and c.futures > 1):
    raise BadInput(f'--draft={max(drafts)}: this model has {c.futures} futures, so 0 to {c.futures - 1} can draft')
  mesh, chip = make_mesh(decoding_sizes(config, len(chips), topology), chips), chip_of(chips)
  plans = []
  for batch in batches:
    plain = None
    for draft in sorted({0, *drafts}):
      made = _pass_plan(config, mesh, chip, topology, batch, draft, slots)
      if made.fits and len(acceptance) >= draft:
        plain = made if draft == 0 else plain
        made = _with_expected(made, plain, acceptance[:draft])
      plans.append(made)
      note(f'batch {batch}, {draft} drafts: ' + (f'{1e3 * made.pass_seconds:.3f} ms at least, by {made.bound}'
                                                if made.fits else 'does not fit'))
  return plans


def decoding_sizes(config: Config, chips: int, topology: str) -> MeshConfig:
  """The config's mesh; if that has one device, all chips: on tensor as many as divide heads,
  feed-forward and vocabulary, the rest on fsdp.

  Raises:
    BadInput: the config's mesh has another size, or the chips divide none of these.
  """
  size, c = math.prod(dataclasses.astuple(config.mesh)), config.model
  if size > 1:
    if size != chips:
      raise BadInput(f'config.mesh: {size} devices, but {topology} has {chips}; such as --config.mesh.tensor={chips}')
    return config.mesh
  tensor = math.gcd(chips, c.heads, c.kv_heads, c.feed_forward, c.vocab)
  if c.width % (chips // tensor):
    raise BadInput(f'--topology={topology}: {chips} chips divide neither heads, feed-forward and vocabulary nor '
                   'the width of this model; set config.mesh')
  return MeshConfig(fsdp=chips // tensor, tensor=tensor)


def _pass_plan(config: Config, mesh, chip: Chip, topology: str, batch: int, draft: int, slots: int) -> PassPlan:
  known = {'topology': topology, 'mesh': dict(mesh.shape), 'batch': batch, 'draft': draft, 'slots': slots,
           'hbm_capacity_bytes': chip.hbm_bytes}
  arguments = pass_arguments(config, mesh, batch, draft, slots)
  on_chip = lambda tree: sum(map(shard_bytes, jax.tree.leaves(tree)))
  decoder, _, _, state, _ = arguments
  known |= {'parameter_bytes': on_chip(decoder), 'state_bytes': on_chip(state)}
  started, platform = time.perf_counter(), mesh.devices.flat[0].platform
  # Heads that do not draft are held too.
  a_pass = jax.jit(functools.partial(loop.one_pass, k=draft), donate_argnames='state', keep_unused=True)
  traced = a_pass.trace(*arguments)
  try:
    compiled = traced.lower(lowering_platforms=(platform,)).compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return PassPlan(**known, hbm_bytes=asked_bytes(error), fits=False)
  moved = traffic(compiled.as_text())
  flops, memory = costs.matmul_flops(traced.jaxpr), memory_bytes(compiled.memory_analysis(), platform)
  seconds, bound = least_seconds(flops / mesh.size, moved, mesh, chip)
  return PassPlan(
      **known, hbm_bytes=memory['hbm_bytes'], fits=memory['hbm_bytes'] <= chip.hbm_bytes, flops=flops,
      memory_traffic_bytes=moved.memory_bytes,
      sent_bytes=sum(collective.sent_bytes for collective in moved.collectives),
      seconds=seconds, bound=bound, pass_seconds=seconds[bound], compile_seconds=time.perf_counter() - started)


def pass_arguments(config: Config, mesh, batch: int, draft: int, slots: int) -> tuple:
  """Shapes of what `loop.one_pass` takes, on the mesh: decoder, drafter, sampler, state, eos."""
  c, auto = config.model, decoding_mesh(mesh)
  placed_on = auto or jax.sharding.Mesh(mesh.devices, mesh.axis_names)
  on_mesh = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  whole = lambda tree: jax.tree.map(lambda x: on_mesh(x, jax.NamedSharding(placed_on, jax.P())), tree)
  shape = lambda dtype, *sizes: whole(jax.ShapeDtypeStruct(sizes, dtype))

  model = jax.eval_shape(functools.partial(Model, c), jax.random.key(0))
  decoder = jax.eval_shape(functools.partial(arranged, vocabulary=c.vocab, mesh=auto), model)
  decoder = jax.tree.map(on_mesh, decoder, parameter_shardings(decoder, placed_on))
  drafter = futures(decoder, draft)
  decoder = decoder.with_futures_in_forward(drafter.futures_in_forward)
  sampler = Sampler(shape(jnp.uint32, batch, 2), shape(jnp.float32, batch), shape(jnp.int32, batch),
                    shape(jnp.float32, batch), shape(jnp.bool, c.vocab))
  length_B, eos = shape(jnp.int32, batch), shape(jnp.int32)
  state = jax.eval_shape(functools.partial(loop.prefill, slots=slots), decoder, drafter, sampler,
                         shape(jnp.int32, batch, min(32, slots)), length_B, length_B, eos)
  state = jax.tree.map(on_mesh, state, state_shardings(state, placed_on))
  return decoder, drafter, sampler, state, eos


def _with_expected(made: PassPlan, plain: PassPlan, acceptance: Sequence[float]) -> PassPlan:
  """The plan with what drafts of this acceptance are worth against plain decoding."""
  tokens = expected_tokens(acceptance)
  return dataclasses.replace(
      made, tokens_per_pass=tokens, speed_up=tokens * plain.pass_seconds / made.pass_seconds,
      tokens_per_second=made.batch * tokens / made.pass_seconds)


def asked_bytes(error: Exception) -> float:
  """The memory of a chip that a refused program asks for, as XLA words it: 'Used 20.51G of 15.75G hbm'."""
  asked = re.search(r'[Uu]sed ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm', str(error))
  return float(asked.group(1)) * 2**{'K': 10, 'M': 20, 'G': 30, 'T': 40}[asked.group(2)] if asked else math.nan
