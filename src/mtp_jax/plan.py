"""What a train step will take on a TPU slice, found by compiling it on a machine without one.

XLA's TPU compiler is a library (`pip install -e '.[tpu]'`). Given the description of a topology it compiles the very step that
`train` would run, and says what every chip must hold; a step that does not fit is refused by the compiler itself. FLOPs are
counted in the traced step, loops multiplied by their length: XLA's own count takes a loop's body once.
"""
import dataclasses
import functools
import importlib.util
import os
import time

import jax
import jax.numpy as jnp

from mtp_jax import metrics, train
from mtp_jax.config import BadInput, Config
from mtp_jax.sharding import make_mesh, spec


@dataclasses.dataclass(frozen=True)
class Plan:
  """A compiled step: bytes a chip holds at its peak, and of its arguments; XLA's sum of temporaries, which are not all alive at once;
  matmul FLOPs of a token.

  model_flops_per_token is the analytic count, forward and backward; counted_flops_per_token is what the step really multiplies,
  recomputation included. hlo is the compiled module as text.
  """
  hbm_bytes: int
  argument_bytes: int
  temporary_bytes: int
  model_flops_per_token: int
  counted_flops_per_token: float
  compile_seconds: float
  hlo: str


def plan(config: Config, topology: str) -> Plan:
  """Compiles `train.step` for a slice such as 'v5p:4x4x4', whose chips the config's mesh must use to the last.

  Raises:
    BadInput: when libtpu is missing, the topology unknown or of another size, or the step does not fit into a chip's memory.
  """
  chips = devices(topology)
  mesh = make_mesh(config.mesh, chips)
  if mesh.size < len(chips):
    raise BadInput(f'config.mesh: {mesh.size} devices, but {topology} has {len(chips)}; such as --config.mesh.fsdp={len(chips)}')
  started = time.perf_counter()
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    state, *others = arguments(config, mesh)
    traced = jax.jit(functools.partial(train.step, config, active=(True,) * config.model.futures), donate_argnums=0).trace(state, *others)
    try:
      compiled = traced.lower(lowering_platforms=('tpu',)).compile()
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      raise BadInput(f'config.train.batch={config.train.batch}: a step does not fit into a chip ({_first_line(error)}); raise '
                     "config.train.accumulate, set config.model.remat='full', or take more chips") from None
  memory = compiled.memory_analysis()
  return Plan(memory.peak_memory_in_bytes, memory.argument_size_in_bytes, memory.temp_size_in_bytes,
              metrics.flops_per_token(state.model, config.data.length)['total'], train.counted_flops_per_token(config),
              time.perf_counter() - started, compiled.as_text())


def arguments(config: Config, mesh) -> tuple:
  """Shapes of what `train.step` takes, on the mesh: state, batch, bytes of each id, weights."""
  on_mesh = lambda shape, dtype, letters: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec(letters)))
  batch = {name: on_mesh((config.train.batch, config.data.length + config.model.futures), jnp.int32, 'Bt') for name in ('tokens', 'segments', 'positions')}
  return train.abstract(config, mesh), batch, on_mesh((config.model.vocab,), jnp.int32, 'v'), on_mesh((config.model.futures,), jnp.float32, 'm')


def devices(topology: str) -> list:
  """The chips of a slice, described."""
  if importlib.util.find_spec('libtpu') is None:
    raise BadInput("--topology: needs the TPU compiler; install it with: pip install -e '.[tpu]'")
  # Left to itself, libtpu asks a server on the network who it is, and refuses a second process.
  os.environ.update(TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1', TPU_WORKER_HOSTNAMES='localhost', TPU_ACCELERATOR_TYPE='v5p-8',
                    TPU_STDERR_LOG_LEVEL='3')
  from jax.experimental import topologies
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  except Exception as error:
    raise BadInput(f'--topology={topology}: {_first_line(error)}; write such as v5p:2x2x2 or v5e:4x4') from None


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0][:200]
