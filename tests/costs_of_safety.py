"""What safety costs: hashing at a restore, the seconds for which a save blocks, and the guards' share of a step."""
import contextlib
import dataclasses
import functools
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from experiments import experiment, random_state, write

from mtp_jax.checkpoint import store
from mtp_jax.checkpoint.record import FOLDER, check_whole
from mtp_jax.config.files import load
from mtp_jax.mesh import make_mesh
from mtp_jax.objective import Read
from mtp_jax.train import optimizer
from mtp_jax.train import step as training

TINY = pathlib.Path(__file__).parents[1] / 'configs' / 'tiny.py'

MODEL = {'width': 512, 'layers': 6, 'heads': 8, 'kv_heads': 8, 'head_width': 64, 'feed_forward': 1536}


def checkpoint_seconds(folder: pathlib.Path) -> dict[str, float]:
  """Medians of three: what hashing adds to a restore, and for how long a save blocks."""
  config, workdir = experiment(folder, model=MODEL), folder / 'large'
  mesh, state = make_mesh(config.mesh), random_state(config)
  times = {'blocking': [], 'whole save': [], 'hashing': [], 'restore': []}
  with contextlib.closing(store.Writer(workdir, 1)) as writer:
    for step in (3, 4, 5):
      began = time.perf_counter()
      write(workdir, config, state, step, writer=writer)
      times['blocking'].append(time.perf_counter() - began)
      writer.wait()
      times['whole save'].append(time.perf_counter() - began)
  for _ in range(3):
    began = time.perf_counter()
    check_whole(workdir, 5)
    times['hashing'].append(time.perf_counter() - began)
    with jax.set_mesh(mesh):
      jax.block_until_ready(training.restore(config, workdir, 5, mesh))
    times['restore'].append(time.perf_counter() - began - times['hashing'][-1])
  size = sum(path.stat().st_size for path in (workdir / FOLDER / '5').rglob('*') if path.is_file())
  median = {name: statistics.median(values) for name, values in times.items()}
  return {'checkpoint MB': size / 1e6, 'hashing, seconds per GB': median['hashing'] / size * 1e9,
          'restore without hashing, seconds per GB': median['restore'] / size * 1e9,
          'a save blocks, seconds': median['blocking'], 'a whole save, seconds': median['whole save'],
          'blocking share of a save': median['blocking'] / median['whole save']}


def unguarded_step(config, state, batch, weight_M):
  """A step that nothing can skip: the gradients, the optimizer's transform once, no selection."""
  active = (True,) * config.model.futures
  loss, sums, grads = training.gradients(config, state.model, Read.of(batch, config.model.futures), weight_M, active)
  updates, moments = optimizer.make(config.optimizer, config.train.steps).update(grads, state.optimizer, state.model)
  model = optax.apply_updates(state.model, updates)
  return dataclasses.replace(state, model=model, optimizer=moments, step=state.step + 1), {'loss': loss, **vars(sums)}


def guarded_step(config, state, batch, weight_M):
  byte_length_V = jnp.ones(config.model.vocab, jnp.int32)
  return training.step(config, state, batch, byte_length_V, weight_M, (True,) * config.model.futures)


def guard_share(config, pairs: int = 40) -> float:
  """Median over pairs of steps, in alternation: by how much of its time a step is longer with the guards."""
  M, T = config.model.futures, config.data.length + config.model.futures
  ids_BT = jax.random.randint(jax.random.key(1), (config.train.batch, T), 0, config.model.vocab)
  position_BT = jnp.broadcast_to(jnp.arange(T), ids_BT.shape)
  batch = {'tokens': ids_BT, 'segments': jnp.ones_like(ids_BT), 'positions': position_BT}
  weight_M, ratios = jnp.ones(M), []
  with jax.set_mesh(make_mesh(config.mesh)):
    states = [training.compiled_init(config, jax.random.key(0)) for _ in range(2)]
    steps = [jax.jit(functools.partial(step, config), donate_argnums=0) for step in (unguarded_step, guarded_step)]
    for n in range(pairs + 1):
      seconds = []
      for i, step in enumerate(steps):
        began = time.perf_counter()
        states[i], _ = jax.block_until_ready(step(states[i], batch, weight_M))
        seconds.append(time.perf_counter() - began)
      ratios += [seconds[1] / seconds[0]] if n else []  # the first step compiles
  return statistics.median(ratios) - 1


def costs(folder: pathlib.Path) -> dict[str, float]:
  """All of them, by a name with the unit."""
  share = guard_share(load([f'--config={TINY}']))
  return checkpoint_seconds(folder) | {"guards' share of a step of configs/tiny.py": share}
