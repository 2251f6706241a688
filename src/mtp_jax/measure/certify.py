"""A certificate that a config trains what it says, for a small twin of it, in minutes on a CPU.

gradients   those that JAX finds for a dense objective, and the same in every way of running a step: microbatches, meshes,
            rematerialisation, heads at once
leakage     which token reaches which prediction is what documents, causality and the kind of futures allow, no more and no less
FLOPs       what the step multiplies is what `metrics` says

The twin has the config's kind, futures, sharing, norms, weights and objective, a few layers and small sizes; its rows are packed with
documents of unequal length, so that microbatches and devices count unequally, and every parameter is random.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import objective
from mtp_jax.config import BadInput, Config, DataConfig, MeshConfig, TrainConfig
from mtp_jax.mesh import make_mesh, put
from mtp_jax.model import costs
from mtp_jax.model.model import Model
from mtp_jax.sharding import name, shardings
from mtp_jax.train import step as training

DEVICES = 8
ALLOWED = 1e-5  # of a group's largest gradient: float32 sums in another order
ROWS, LENGTH = 8, 32
ONE = MeshConfig()
MESHES = {'fsdp 8': MeshConfig(fsdp=8), 'fsdp 4 x tensor 2': MeshConfig(fsdp=4, tensor=2), 'data 2 x fsdp 2 x tensor 2': MeshConfig(data=2, fsdp=2, tensor=2),
          'context 2 x fsdp 4': MeshConfig(context=2, fsdp=4)}


@dataclasses.dataclass(frozen=True)
class Finding:
  """One line of the certificate: what was checked, what was found, what is allowed."""
  check: str
  found: str
  allowed: str
  holds: bool


def certify(config: Config):
  """Yields the findings, one after another.

  Raises:
    BadInput: when there are not eight devices.
  """
  if len(jax.devices()) < DEVICES:
    raise BadInput(f'certify: needs {DEVICES} devices, but there are {len(jax.devices())}; run it in a process of its own, which makes {DEVICES} on a CPU')
  twin = small(config)
  yield from gradients(twin)
  yield from leakage(twin)
  yield from flops(config, twin)


def small(config: Config) -> Config:
  """The twin."""
  m = config.model
  kv_heads = 4 if m.kv_heads == m.heads else 2
  model = dataclasses.replace(m, vocab=48, width=32, heads=4, kv_heads=kv_heads, head_width=8, feed_forward=48, layers=m.layers - m.trunk_layers + 2,
                              dtype='float32', remat='none', head_batch=1)
  weights = tuple(weight or 0.1 for weight in config.objective.weights_M(m.futures, 0.5))  # what is skipped at times is checked as well
  return Config(model, dataclasses.replace(config.objective, weights=weights, chunk=40), DataConfig(length=LENGTH),
                train=TrainConfig(batch=ROWS, evaluate_rows=ROWS))


def random_model(config: Config) -> Model:
  """Every parameter random, scales of norms included."""
  rng = np.random.default_rng(0)
  fill = lambda path, x: jnp.asarray(('norm' in name(path)) + rng.standard_normal(x.shape) / math.sqrt(config.model.width), x.dtype)
  return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(lambda: Model(config.model, jax.random.key(0))))


def packed_rows(config: Config) -> dict:
  """Documents of one token and more, from row to row longer ones, and padding."""
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


def gradients(config: Config):
  """Of every parameter group, against one device, one microbatch, nothing recomputed, one head at a time."""
  model, batch, M = random_model(config), packed_rows(config), config.model.futures
  weight_M = np.float32(config.objective.weights_M(M))

  def run(sizes=ONE, accumulate=1, loss=objective.loss, **changes):
    varied = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes), train=dataclasses.replace(config.train, accumulate=accumulate))
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
      placed = jax.device_put(model, shardings(model, mesh))
      placed.config = varied.model
      step = jax.jit(lambda model, batch: training.gradients(varied, model, batch, weight_M, (True,) * M, loss)[2])
      return jax.device_get(step(placed, put(batch, mesh)))

  wanted = groups(run())
  for text, way in ways(config).items():
    found = groups(run(**way))
    worst = {group: max(np.abs(a - b).max(initial=0) for a, b in zip(found[group], arrays)) / max(np.abs(b).max(initial=0) for b in arrays)
             for group, arrays in wanted.items()}
    group = max(worst, key=worst.get) if not any(map(math.isnan, worst.values())) else 'nan'
    yield Finding(f'gradients, {text}', f'{worst.get(group, math.nan):.1e} in {group}', f'{ALLOWED:.0e}', group != 'nan' and bool(worst[group] <= ALLOWED))


def ways(config: Config) -> dict[str, dict]:
  """How a step can be run that must change nothing."""
  M = config.model.futures
  heads = {f'head_batch {M}': {'head_batch': M}} if config.model.independent and M > 1 else {}
  return {'dense objective': {'loss': objective.dense}, **{f'accumulation {k}': {'accumulate': k} for k in (2, 4)},
          **{f'mesh {text}': {'sizes': sizes} for text, sizes in MESHES.items()}, **{f'remat {remat}': {'remat': remat} for remat in ('dots', 'full')}, **heads}


def groups(tree) -> dict[str, list[np.ndarray]]:
  """Gradients by part and by matrix: 'trunk wq_DHK'."""
  found = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    found.setdefault(f'{path[0].name} {name(path)}'.replace(f'{name(path)} {name(path)}', name(path)), []).append(np.asarray(leaf, np.float64))
  return found


def leakage(config: Config):
  """Changes one token at a time, and compares who notices with who may."""
  reached, allowed = influence(config)
  leaks, blind = int((reached & ~allowed).sum()), int((allowed & ~reached).sum())
  yield Finding('leakage, token to prediction', f'{leaks} leaks, {blind} unseen of {int(allowed.sum())} ways', '0, 0', leaks == blind == 0)


def influence(config: Config) -> tuple[np.ndarray, np.ndarray]:
  """bool[T, M, L] each: token j reaches the logits of future m at position t; and may reach them."""
  c = config.model
  M = c.futures
  L = M + 9
  segments = np.array([*[1] * (M + 2), 2, *[3] * 4, *[4] * 3 + [0] * (L + M)])[:L + M]
  starts = np.r_[True, segments[1:] != segments[:-1]]
  positions = np.arange(L + M) - np.maximum.accumulate(np.where(starts, np.arange(L + M), 0))
  rng = np.random.default_rng(2)
  tokens = np.tile(rng.integers(0, c.vocab, L + M), (L + M + 1, 1))
  tokens[np.arange(L + M), np.arange(L + M)] = (tokens[-1] + rng.integers(1, c.vocab, L + M)) % c.vocab  # row j differs in token j, the last in none
  batch = {'tokens': tokens, 'segments': np.tile(segments, (len(tokens), 1)), 'positions': np.tile(positions, (len(tokens), 1))}

  @jax.jit
  def nats_MBL(model, batch):
    """The loss of each prediction, on its own."""
    readout, V = model.readout(), jnp.arange(c.vocab)
    def future(m, h_BLD):
      y_BL, counted_BL = objective.targets(batch, m, M)
      logits_BLV = h_BLD @ readout.table().T
      return jnp.where(counted_BL, jax.nn.logsumexp(logits_BLV, -1) - jnp.sum(logits_BLV, -1, where=V == y_BL[..., None]), 0)
    return readout.map(future, *objective.states(model, batch))

  nats = np.asarray(nats_MBL(random_model(config), jax.tree.map(jnp.int32, batch)))
  reached = np.moveaxis(nats[:, :-1] != nats[:, -1:], 1, 0)
  allowed = np.zeros_like(reached)
  for j, m, t in np.ndindex(*allowed.shape):
    target = t + 1 + m
    told = t + m if c.kind == 'sequential' else t  # the last token that the future is told
    allowed[j, m, t] = segments[t] == segments[target] == segments[j] != 0 and (j <= told or j == target)
  return reached, allowed


def pictures(config: Config) -> list[str]:
  """The map of influence: a row a token, a column a position, a square a future."""
  reached, allowed = influence(config)
  mark = {(True, True): '#', (False, False): '.', (True, False): 'L', (False, True): '?'}
  lines = ['  '.join(f'future {m}'.ljust(reached.shape[2]) for m in range(reached.shape[1]))]
  for j in range(reached.shape[0]):
    lines.append('  '.join(''.join(mark[bool(a), bool(b)] for a, b in zip(reached[j, m], allowed[j, m])) for m in range(reached.shape[1])))
  return [*lines, 'row: token, column: position; # reaches it, . does not, L leaks, ? should reach it']


def flops(config: Config, twin: Config):
  """Matrix products of the twin, its loops unrolled, and of the config itself, loops times their length, against the analytic count."""
  with jax.disable_jit():
    unrolled = _flops('FLOPs, twin unrolled', twin)
  yield unrolled
  yield _flops('FLOPs, the config', dataclasses.replace(config, model=dataclasses.replace(config.model, remat='none', dtype='float32'), mesh=MeshConfig()))


def _flops(check: str, config: Config) -> Finding:
  model, L = jax.eval_shape(lambda: Model(config.model, jax.random.key(0))), config.data.length
  counted = training.counted_flops_per_token(config)
  analytic = costs.flops_per_token(model, L)['total'] + costs.recomputed_flops_per_token(model, L)
  return Finding(check, f'{counted:,.0f} a token', f'{analytic:,} within 1 %', abs(counted / analytic - 1) <= 0.01)
