"""A check of a config on a small float32 twin of it, in minutes on a CPU.

    gradients   those that JAX finds for a dense objective, and the same in every way of running a
                step: microbatches, meshes, rematerialisation, heads at once
    leakage     a token influences exactly the predictions that documents, causality and the kind
                of futures allow
    FLOPs       what the step multiplies is what `model.costs` counts

The twin has the config's kind, futures, sharing, norms, weights and objective, but few layers and
small sizes. Its rows are packed with documents of unequal length, so that microbatches and devices
count unequally, and every parameter is random. It is a check of the code that the config chooses,
not of the config's own sizes, types or data.
"""
import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import objective
from mtp_jax.config import BadInput, Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from mtp_jax.mesh import make_mesh, put
from mtp_jax.model import costs
from mtp_jax.model.model import Model
from mtp_jax.objective import Read
from mtp_jax.sharding import name, shardings
from mtp_jax.train import step as training

DEVICES = 8
ALLOWED = 1e-5  # of a group's largest gradient: float32 sums in another order
ROWS, LENGTH = 8, 32
ONE = MeshConfig()
MESHES = {
    'fsdp 8': MeshConfig(fsdp=8),
    'fsdp 4 x tensor 2': MeshConfig(fsdp=4, tensor=2),
    'data 2 x fsdp 2 x tensor 2': MeshConfig(data=2, fsdp=2, tensor=2),
    'context 2 x fsdp 4': MeshConfig(context=2, fsdp=4),
}
EXPERT_MESHES = {
    'expert 8': MeshConfig(expert=8),
    'expert 4 x fsdp 2': MeshConfig(expert=4, fsdp=2),
    'expert 2 x context 2 x tensor 2': MeshConfig(expert=2, context=2, tensor=2),
    'data 2 x expert 2 x fsdp 2': MeshConfig(data=2, expert=2, fsdp=2),
}


@dataclasses.dataclass(frozen=True)
class Finding:
  """One line of the report: what was checked, what was found, what is allowed, and whether it
  holds.
  """
  check: str
  found: str
  allowed: str
  holds: bool


def certify(config: Config) -> Iterator[Finding]:
  """Yields the findings, one after another.

  Raises:
    BadInput: there are fewer than eight devices.
  """
  if len(jax.devices()) < DEVICES:
    raise BadInput(f'certify: needs {DEVICES} devices, but there are {len(jax.devices())}; run it in a process '
                   f'of its own, which makes {DEVICES} on a CPU')
  twin = small(config)
  yield from gradients(twin)
  yield from leakage(twin)
  yield from flops(config, twin)


def small(config: Config) -> Config:
  """The twin."""
  m = config.model
  experts = {}
  if m.experts:
    groups = 2 if m.groups_per_token < m.expert_groups else 1
    experts = {'experts': 8, 'experts_per_token': min(3, m.experts_per_token), 'expert_width': 16,
               'shared_experts': min(2, m.shared_experts), 'dense_layers': min(1, m.dense_layers),
               'expert_groups': groups, 'groups_per_token': 1}
  model = dataclasses.replace(
      m, **experts, vocab=48, width=32, heads=4, kv_heads=4 if m.kv_heads == m.heads else 2, head_width=8,
      kv_rank=24, query_rank=16 if m.query_rank else 0, rope_width=4, feed_forward=48,
      layers=m.layers - m.trunk_layers + 2, dtype='float32', remat='none', head_batch=1)
  weights = config.objective.weights_M(m.futures, 0.5)
  trained = tuple(weight or 0.1 for weight in weights)  # a future that is skipped at times is checked as well
  chunked = dataclasses.replace(config.objective, weights=trained, chunk=40)
  return Config(model, chunked, DataConfig(length=LENGTH), train=TrainConfig(batch=ROWS, evaluate_rows=ROWS))


def random_model(config: Config) -> Model:
  """A model whose every parameter is random, scales of norms included."""
  rng, spread = np.random.default_rng(0), 1 / math.sqrt(config.model.width)

  def fill(path, x):
    return jnp.asarray(('norm' in name(path)) + spread * rng.standard_normal(x.shape), x.dtype)

  shapes = jax.eval_shape(lambda: Model(config.model, jax.random.key(0)))
  return jax.tree_util.tree_map_with_path(fill, shapes)


def packed_rows(config: Config) -> dict[str, np.ndarray]:
  """Documents of one token and more, longer ones from row to row, and padding."""
  rng, T = np.random.default_rng(1), LENGTH + config.model.futures
  batch = {key: np.zeros((ROWS, T), np.int32) for key in ('tokens', 'segments', 'positions')}
  for b in range(ROWS):
    lengths = rng.integers(1, 4 * (b + 1), T)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    segments = np.repeat(np.arange(1, T + 1), lengths)[:T]
    batch['segments'][b], batch['positions'][b] = segments, np.arange(T) - starts[segments - 1]
    if b % 3 == 2:
      batch['segments'][b, T - 5:] = 0
  batch['tokens'] = rng.integers(0, config.model.vocab, (ROWS, T)).astype(np.int32)
  return batch


def gradients(config: Config, ways: dict[str, dict] | None = None, reference: dict | None = None) -> Iterator[Finding]:
  """Gradients of every parameter group, in each of the ways, against the plainest way of running a
  step.

  Args:
    ways: by name, the arguments of `gradients_by_group`; by default `ways_to_run(config)`.
    reference: what `gradients_by_group(config)` returned, where it is at hand.
  """
  reference = reference or gradients_by_group(config)
  for text, way in (ways or ways_to_run(config)).items():
    worst, group = worst_group(gradients_by_group(config, **way), reference)
    yield Finding(f'gradients, {text}', f'{worst:.1e} in {group}', f'{ALLOWED:.0e}', bool(worst <= ALLOWED))


def gradients_by_group(config: Config, sizes=ONE, accumulate: int = 1, loss=objective.loss,
                       **changes) -> dict[str, list[np.ndarray]]:
  """Gradients of a step by part and by matrix ('trunk wq_DHK', 'embed_VD'), in float64.

  By default in the plainest way: one device, one microbatch, one head at a time, nothing recomputed.

  Args:
    changes: fields of config.model.
  """
  model, batch, M = random_model(config), packed_rows(config), config.model.futures
  weight_M = np.float32(config.objective.weights_M(M))
  way = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes),
                            train=dataclasses.replace(config.train, accumulate=accumulate))
  mesh = make_mesh(sizes)
  with jax.set_mesh(mesh):
    placed = jax.device_put(model, shardings(model, mesh))
    placed.config = way.model

    @jax.jit
    def step(model, batch):
      return training.gradients(way, model, Read.of(batch, M), weight_M, (True,) * M, loss)[2]

    leaves = jax.device_get(step(placed, put(batch, mesh)))
  groups = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(leaves):
    part, matrix = path[0].name, name(path)
    groups.setdefault(matrix if part == matrix else f'{part} {matrix}', []).append(np.asarray(leaf, np.float64))
  return groups


def ways_to_run(config: Config) -> dict[str, dict]:
  """Ways of running a step that must not change its gradients."""
  M = config.model.futures
  ways = {'dense objective': {'loss': objective.dense}}
  ways |= {f'accumulation {n}': {'accumulate': n} for n in (2, 4)}
  meshes = MESHES | (EXPERT_MESHES if config.model.experts else {})
  ways |= {f'mesh {text}': {'sizes': sizes} for text, sizes in meshes.items()}
  ways |= {f'remat {remat}': {'remat': remat} for remat in ('dots', 'full')}
  if config.model.kind in ('parallel', 'linear') and M > 1:
    ways[f'head_batch {M}'] = {'head_batch': M}
  return ways


def worst_group(gradients: dict, reference: dict) -> tuple[float, str]:
  """(largest difference, relative to its group's largest entry; the name of that group). nan counts
  as the largest.
  """
  difference = {}
  for group, arrays in reference.items():
    largest = max(np.abs(x).max(initial=0) for x in arrays)
    difference[group] = max(np.abs(x - y).max(initial=0) for x, y in zip(gradients[group], arrays)) / largest
  group = max(difference, key=lambda group: math.inf if math.isnan(difference[group]) else difference[group])
  return difference[group], group


def leakage(config: Config, read=Read.of) -> Iterator[Finding]:
  """Changes one token at a time, and compares the predictions that change with those that may.

  Args:
    read: how a batch is read, `Read.of` by default.
  """
  reached, allowed = influence(config, read)
  leaks, missing = int((reached & ~allowed).sum()), int((allowed & ~reached).sum())
  found = f'{leaks} leaks, {missing} missing of {int(allowed.sum())} influences'
  yield Finding('leakage, token to prediction', found, '0, 0', leaks == missing == 0)


def influence(config: Config, read=Read.of) -> tuple[np.ndarray, np.ndarray]:
  """bool[T, M, L] each: whether token j changes the loss of future m at position t; and whether it
  may.
  """
  c = config.model
  batch = one_token_changed(c)
  T = len(batch['tokens']) - 1
  model, batch = random_model(config), jax.tree.map(jnp.int32, batch)
  nats_MBL = np.asarray(jax.jit(lambda model, batch: nats(model, read(batch, c.futures)))(model, batch))
  reached = np.moveaxis(nats_MBL[:, :T] != nats_MBL[:, T:], 1, 0)
  segments, positions = (np.asarray(batch[key][0]) for key in ('segments', 'positions'))
  allowed = np.zeros_like(reached)
  for j, m, t in np.ndindex(*allowed.shape):
    target = t + 1 + m
    given = t < j <= t + m and c.kind == 'sequential'
    if c.independent:  # by this module alone, to positions of this document: to the first one token m of it
      given = given and positions[j] >= m
    in_document = segments[t] == segments[target] == segments[j] != 0
    allowed[j, m, t] = in_document and (j <= t or given or j == target)
  return reached, allowed


def one_token_changed(c: ModelConfig) -> dict[str, np.ndarray]:
  """T + 1 rows of T = 2M + 9 tokens, the same documents in each: row j has another token j, the
  last row has none.
  """
  M = c.futures
  T = 2 * M + 9
  segments = np.array([*[1] * (M + 2), 2, *[3] * 4, *[4] * 3, *[0] * T])[:T]
  begins = np.r_[True, segments[1:] != segments[:-1]]
  positions = np.arange(T) - np.maximum.accumulate(np.where(begins, np.arange(T), 0))
  rng = np.random.default_rng(2)
  tokens = np.tile(rng.integers(0, c.vocab, T), (T + 1, 1))
  tokens[np.arange(T), np.arange(T)] = (tokens[-1] + rng.integers(1, c.vocab, T)) % c.vocab
  every_row = lambda values: np.tile(values, (T + 1, 1))
  return {'tokens': tokens, 'segments': every_row(segments), 'positions': every_row(positions)}


def nats(model: Model, read: Read):
  """The nats of each prediction by itself, 0 where it does not count: [M, B, L]."""
  logits_MBLV = objective.future_states(model, read) @ model.readout().table().T
  hit_MBLV = jnp.arange(model.config.vocab) == read.targets_MBL[..., None]
  nats_MBL = jax.nn.logsumexp(logits_MBLV, -1) - jnp.sum(logits_MBLV, -1, where=hit_MBLV)
  return jnp.where(read.counted_MBL, nats_MBL, 0)


def pictures(config: Config, read=Read.of) -> list[str]:
  """The map of influence: a row a token, a column a position, a square a future."""
  reached, allowed = influence(config, read)
  mark = {(True, True): '#', (False, False): '.', (True, False): 'L', (False, True): '?'}
  T, M, L = reached.shape
  lines = ['  '.join(f'future {m}'.ljust(L) for m in range(M))]
  for j in range(T):
    squares = (''.join(mark[bool(a), bool(b)] for a, b in zip(reached[j, m], allowed[j, m])) for m in range(M))
    lines.append('  '.join(squares))
  return [*lines, 'row: token, column: position; # influences it, . does not, L leaks, ? should influence it']


def flops(config: Config, twin: Config,
          counted: Callable[[ModelConfig, int], int] | None = None) -> Iterator[Finding]:
  """Matrix products of the twin, its loops unrolled, and of the config itself, loops times their
  length, against `counted`.

  Args:
    counted: FLOPs of a token of a model at a length, recomputation included; by default those of
      `model.costs`.
  """
  with jax.disable_jit():
    unrolled = _flops('FLOPs, twin unrolled', twin, counted or _counted)
  yield unrolled
  plain = dataclasses.replace(config.model, remat='none', dtype='float32')
  yield _flops('FLOPs, the config', dataclasses.replace(config, model=plain, mesh=MeshConfig()), counted or _counted)


def _counted(c: ModelConfig, length: int) -> int:
  return costs.flops_per_token(c, length)['total'] + costs.recomputed_flops_per_token(c, length)


def _flops(check: str, config: Config, counted) -> Finding:
  multiplied, expected = training.counted_flops_per_token(config), counted(config.model, config.data.length)
  holds = abs(multiplied / expected - 1) <= 0.01
  return Finding(check, f'{multiplied:,.0f} a token', f'{expected:,} within 1 %', holds)
