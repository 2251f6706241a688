"""Targets against a double loop, cross-entropy against float64, meshes against one device, accumulation against one batch, memory."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtp_jax import objective, optimizer, train
from mtp_jax.config import Config, DataConfig, MeshConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from mtp_jax.model import Model
from mtp_jax.objective import cross_entropy
from mtp_jax.sharding import make_mesh, shardings


@pytest.mark.parametrize('seed', range(4))
def test_targets_equal_a_double_loop(tiny, packed, seed):
  c = tiny(futures=5)
  batch = packed(c, 6, 10, seed)
  wanted_count = []
  for m in range(5):
    y_BL, counted_BL = objective.targets(batch, m, 5)
    wanted = np.zeros((6, 10), bool)
    for b, t in np.ndindex(6, 10):
      segment = batch['segments'][b, t]
      wanted[b, t] = segment != 0 and batch['segments'][b, t + 1 + m] == segment
      assert y_BL[b, t] == batch['tokens'][b, t + 1 + m]
    np.testing.assert_array_equal(counted_BL, wanted)
    wanted_count.append(wanted.sum())
  np.testing.assert_array_equal(objective.counts(batch, 5), wanted_count)
  assert any(min(np.unique(row, return_counts=True)[1]) == 1 for row in batch['segments']), 'some document must be shorter than M'


def test_targets_end_with_their_document():
  batch = {'tokens': jnp.arange(10, 18)[None], 'segments': jnp.array([[1, 1, 1, 2, 3, 3, 3, 0]])}
  tables = {0: [1, 1, 0, 0, 1], 1: [1, 0, 0, 0, 1], 2: [0, 0, 0, 0, 0]}
  for m, table in tables.items():
    y_BL, counted_BL = objective.targets(batch, m, 3)
    np.testing.assert_array_equal(y_BL[0], np.arange(10, 15) + m + 1)
    np.testing.assert_array_equal(counted_BL[0], np.array(table, bool))


@pytest.mark.parametrize('chunk', [8, 4, 1])
def test_cross_entropy_is_the_dense_one_in_float64(chunk, assert_close):
  rng = np.random.default_rng(0)
  B, L, D, V = 3, 8, 16, 24
  h, table = rng.standard_normal((B, L, D)), rng.standard_normal((V, D))
  y, counted = rng.integers(0, V, (B, L)), rng.random((B, L)) < 0.6
  logits = h @ table.T
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  best = rng.random((B, L)) < 0.5
  y[best] = logits[best].argmax(-1)
  hit = np.eye(V)[y]
  slope = (p - hit) * counted[..., None]

  nats = lambda h, table: (lambda sums: (sums.nats_M, sums))(cross_entropy(h, table, jnp.asarray(y), jnp.asarray(counted), chunk))
  single = [jnp.asarray(x, jnp.float32) for x in (h, table)]
  (value, sums), grads = jax.jit(jax.value_and_grad(nats, (0, 1), has_aux=True))(*single)
  assert_close((value, grads), (-np.log((p * hit).sum(-1))[counted].sum(), (slope @ table, np.einsum('blv,bld->vd', slope, h))))
  assert int(sums.count_M) == counted.sum()
  assert int(sums.correct_M) == ((logits.argmax(-1) == y) & counted).sum() < best.sum()
  reference = lambda h, table: jnp.sum(optax.softmax_cross_entropy_with_integer_labels(h @ table.T, y), where=jnp.asarray(counted))
  assert_close((value, grads), jax.value_and_grad(reference, (0, 1))(*single))


def test_cross_entropy_survives_large_logits():
  h, table = jnp.full((1, 2, 4), 1e3), jnp.stack([jnp.ones(4), -jnp.ones(4)])
  sums = cross_entropy(h, table, jnp.array([[0, 1]]), jnp.ones((1, 2), bool), 1)
  np.testing.assert_allclose(sums.nats_M, 8e3)


@pytest.fixture(scope='module')
def gradients():
  """(loss, sums, gradients) of weights 1, 1/2, 1/3 .. over counts."""
  @jax.jit
  def run(model, batch):
    M = model.config.futures
    coefficient_M = 1.0 / (1 + jnp.arange(M)) / jnp.maximum(objective.counts(batch, M), 1)
    (value, sums), grads = jax.value_and_grad(objective.loss, has_aux=True)(model, batch, coefficient_M, 4)
    return value, sums, grads
  return run


def test_a_batch_without_targets_has_zero_loss_and_zero_gradients(tiny, random_model, packed, family, gradients):
  c = tiny(**family)
  batch = packed(c, 8, 16)
  for segments in (np.zeros_like(batch['segments']), np.tile(np.arange(1, 20), (8, 1))):  # padding, and one-token documents
    value, sums, grads = gradients(random_model(c), batch | {'segments': segments.astype(np.int32)})
    assert float(value) == 0
    assert all(not np.any(x) for x in jax.tree.leaves((sums, grads)))


MESHES = [MeshConfig(fsdp=4, tensor=2), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=4, context=2)]


@pytest.mark.parametrize('sizes', MESHES, ids=['fsdp-tensor', 'data-fsdp-tensor', 'fsdp-context'])
def test_loss_and_gradients_on_a_mesh_are_those_of_one_device(tiny, random_model, packed, family, sizes, gradients, assert_close):
  model = random_model(tiny(**family))
  batch = packed(model.config, 8, 16)
  wanted = gradients(model, batch)
  mesh = make_mesh(sizes)
  with jax.set_mesh(mesh):
    placed = jax.device_put(model, shardings(model, mesh))
    value, sums, grads = gradients(placed, train.put(batch, mesh))
  assert_close((value, sums, grads), wanted)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(placed)):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim), jax.tree_util.keystr(path)


def one_step(tiny, random_model, batch, family, weights, accumulate):
  """Parameters, gradient (read off Adam's first moment) and metrics after a train.step; a large epsilon keeps Adam nearly linear."""
  config = Config(tiny(layers=3, futures=2, **family), ObjectiveConfig(weights, 4), DataConfig(length=8),
                  OptimizerConfig(warmup_steps=0, clip=1e9, epsilon=1.0, learning_rate=1.0), TrainConfig(batch=4, accumulate=accumulate))
  model, zero = random_model(config.model), jnp.zeros((), jnp.int32)
  state = train.State(zero, zero, zero, model, optimizer.make(config.optimizer, config.train.steps).init(model))
  state, metrics = jax.jit(functools.partial(train.step, config))(state, batch, jnp.ones(24, jnp.int32))
  return state.model, state.optimizer[1].mu, metrics


ACCUMULATED = {'parallel': ({}, (1.0, 0.5)), 'parallel, future 0': ({}, (1.0, 0.0)), 'parallel, future 1': ({}, (0.0, 1.0)),
               'sequential': ({'kind': 'sequential'}, (1.0, 0.5))}


@pytest.mark.parametrize('which', ACCUMULATED)
def test_accumulation_changes_nothing(tiny, random_model, packed, which, assert_close):
  family, weights = ACCUMULATED[which]
  batch = packed(tiny(futures=2), 4, 8, seed=0)
  per_row = [tuple(objective.counts({name: x[i:i + 1] for name, x in batch.items()}, 2).tolist()) for i in range(4)]
  assert len(set(per_row)) == 4, f'the rows must count unequally, not {per_row}'
  wanted = one_step(tiny, random_model, batch, family, weights, 1)
  assert float(wanted[2]['gradient_norm']) > 0.1
  for k in (2, 4):
    assert_close(one_step(tiny, random_model, batch, family, weights, k), wanted)


def temporary_bytes(c: ModelConfig) -> int:
  """What the compiled loss and gradient hold besides parameters, batch and gradients."""
  model = jax.eval_shape(functools.partial(Model, c), jax.random.key(0))
  batch = {name: jax.ShapeDtypeStruct((4, 128 + c.futures), jnp.int32) for name in ('tokens', 'segments', 'positions')}
  run = jax.jit(lambda model, batch: jax.value_and_grad(objective.loss, has_aux=True)(model, batch, jnp.ones(c.futures), 128))
  return run.lower(model, batch).compile().memory_analysis().temp_size_in_bytes


def test_eight_futures_take_the_memory_of_one():
  c = ModelConfig(vocab=1024, width=64, layers=5, heads=4, kv_heads=2, head_width=16, feed_forward=176, futures=1, placement='appended')
  one, two, eight = (temporary_bytes(dataclasses.replace(c, futures=futures)) for futures in (1, 2, 8))
  assert eight <= 1.15 * one, f'{eight} bytes are {eight / one:.3f} x {one}'
  assert eight <= 1.01 * two, f'{eight} bytes are {eight / two:.3f} x {two}'


def test_bfloat16_gradients_add_up_in_float32():
  """A token that stands everywhere, and many chunks: sums that bfloat16 could not hold."""
  c = ModelConfig(vocab=8, width=16, layers=3, heads=2, kv_heads=2, head_width=8, feed_forward=16, futures=2)
  model = Model(c, jax.random.key(0))
  tokens = np.minimum(np.random.default_rng(0).integers(0, 60, (8, 258)), 2).astype(np.int32)
  batch = {'tokens': tokens, 'segments': np.ones_like(tokens), 'positions': np.broadcast_to(np.arange(258, dtype=np.int32), tokens.shape)}

  def gradient(dtype):
    cast = jax.tree.map(lambda x: x, model)
    cast.config = dataclasses.replace(c, dtype=dtype)
    return jax.jit(jax.grad(lambda m: objective.loss(m, batch, jnp.ones(2) / 2000, 4)[0]))(cast)

  wide, narrow = gradient('float32'), gradient('bfloat16')
  for name in ('embed_VD', 'unembed_VD'):
    exact, rounded = (np.asarray(getattr(g, name)[...]) for g in (wide, narrow))
    assert np.linalg.norm(rounded - exact) < 0.02 * np.linalg.norm(exact), name  # each term is rounded to 8 bits, their sum is not
