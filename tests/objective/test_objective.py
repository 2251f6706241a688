"""Cross-entropy against float64, meshes against one device,
accumulation against one batch, memory.
"""
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from experiments import FAMILIES

from mtp_jax import objective, sharding
from mtp_jax.config import Config, DataConfig, MeshConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from mtp_jax.mesh import make_mesh, put
from mtp_jax.model import costs
from mtp_jax.model.model import Model
from mtp_jax.objective import Labels, Read, Table, cross_entropy, cross_entropy_and_gradients
from mtp_jax.sharding import shardings, spec
from mtp_jax.train import optimizer
from mtp_jax.train import step as training

TERMS = {'plain': (0.0, 0.0), 'z-loss': (0.1, 0.0), 'cap': (0.0, 4.0), 'both': (0.1, 4.0)}


@pytest.mark.parametrize('z_loss, cap', TERMS.values(), ids=TERMS)
@pytest.mark.parametrize('chunk', [1000, 5, 1])
def test_cross_entropy_and_its_gradients_are_the_dense_ones_in_float64(tiny, chunk, z_loss, cap, assert_close):
  rng = np.random.default_rng(0)
  G, B, L, D, V = 2, 3, 8, 16, 24
  c, o = tiny(logit_cap=cap), ObjectiveConfig(chunk=chunk, z_loss=z_loss)
  h, table = rng.standard_normal((G, B, L, D)), rng.standard_normal((V, D))
  y, counted, k = rng.integers(0, V, (G, B, L)), rng.random((G, B, L)) < 0.6, rng.random((G, B, L))
  raw = h @ table.T
  logits = cap * np.tanh(raw / cap) if cap else raw
  best = rng.random((G, B, L)) < 0.5
  y[best] = logits[best].argmax(-1)
  lse = np.log(np.exp(logits).sum(-1))
  p, hit = np.exp(logits - lse[..., None]), np.eye(V)[y]
  nats, weight = -np.log((p * hit).sum(-1)), k * counted
  slope = weight[..., None] * ((1 + 2 * z_loss * lse)[..., None] * p - hit)
  if cap:
    slope *= 1 / np.cosh(raw / cap)**2
  wanted = (weight * (nats + z_loss * lse**2)).sum(), slope @ table, np.einsum('gbld,gblv->dv', h, slope)

  single = [jnp.asarray(x, jnp.float32) for x in (h, table)]
  labels = Labels(jnp.asarray(y), jnp.asarray(k, jnp.float32), jnp.asarray(counted))
  arguments = single[0], Table.of(c, single[1], B * L), labels
  value, sums, dh, dw_DV = jax.jit(functools.partial(cross_entropy_and_gradients, c, o))(*arguments)
  assert_close((value, dh, dw_DV), wanted)
  assert not np.any(dh[~counted])
  assert_close(sums.nats_M, (nats * counted).sum((1, 2)))
  np.testing.assert_array_equal(sums.count_M, counted.sum((1, 2)))
  # exact, since the best logit leads by 0.01 or more
  np.testing.assert_array_equal(sums.correct_M, ((logits.argmax(-1) == y) & counted).sum((1, 2)))
  assert 0 < sums.correct_M.sum() < best.sum()
  assert_close(jax.jit(functools.partial(cross_entropy, c, o))(*arguments), (value, sums))

  def reference(h, table):
    logits = h @ table.T
    logits = cap * jnp.tanh(logits / cap) if cap else logits
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.sum(k * (nats + z_loss * jax.nn.logsumexp(logits, -1)**2), where=counted)

  assert_close((value, (dh, dw_DV.T)), jax.value_and_grad(reference, (0, 1))(*single))


def test_cross_entropy_survives_large_logits(tiny):
  h, table = jnp.full((1, 1, 2, 4), 1e3), jnp.stack([jnp.ones(4), -jnp.ones(4)])
  ones = jnp.ones((1, 1, 2))
  labels = Labels(jnp.array([[[0, 1]]]), ones, ones > 0)
  value, sums, dh, dw_DV = cross_entropy_and_gradients(tiny(), ObjectiveConfig(chunk=1), h,
                                                       Table.of(tiny(), table, 2), labels)
  np.testing.assert_allclose((value, sums.nats_M[0]), 8e3)
  np.testing.assert_array_equal(dh, [[np.multiply.outer([0, 2], np.ones(4))]])
  np.testing.assert_array_equal(dw_DV, np.multiply.outer(np.ones(4), [1e3, -1e3]))


def dense(model, read, coefficient_M, o: ObjectiveConfig):
  """The loss as it is written, all logits of all futures, to be differentiated by JAX."""
  c, table_VD = model.config, model.readout().unembed_VD
  logits_MBLV = objective.future_states(model, read) @ table_VD.T
  logits_MBLV = c.logit_cap * jnp.tanh(logits_MBLV / c.logit_cap) if c.logit_cap else logits_MBLV
  nats_MBL = -jnp.take_along_axis(jax.nn.log_softmax(logits_MBLV), read.targets_MBL[..., None], -1)[..., 0]
  terms_MBL = nats_MBL + o.z_loss * jax.nn.logsumexp(logits_MBLV, -1)**2
  return jnp.dot(coefficient_M, jnp.sum(terms_MBL, (1, 2), where=read.counted_MBL))


DENSE = {name: (name, {'tie_embeddings': True}) for name in FAMILIES} | {
    'parallel in pairs': ('parallel', {'head_batch': 2}),
    'linear all at once': ('linear', {'head_batch': 4}),
    'sequential of one': ('post_norm', {'futures': 1}),
    'a shared module of the trunk': ('trunk', {'share_modules': True, 'hidden_input': 'pre_norm'})}


@pytest.mark.parametrize('family, changes', DENSE.values(), ids=DENSE)
def test_the_gradient_is_that_of_the_dense_objective(tiny, random_model, packed, family, changes, assert_close):
  o = ObjectiveConfig(chunk=5, z_loss=0.02, balance_loss=0.0)  # 24 positions in chunks of 5
  model = random_model(tiny(**{'layers': 6, 'futures': 4, 'logit_cap': 3.0} | FAMILIES[family] | changes))
  read = Read.of(packed(model.config, 3, 8), model.config.futures)
  coefficient_M = 1.0 / (2 + np.arange(model.config.futures, dtype=np.float32))
  wanted = jax.jit(jax.value_and_grad(functools.partial(dense, o=o)))(model, read, coefficient_M)
  (value, _), grads = jax.jit(jax.value_and_grad(functools.partial(objective.loss, o=o), has_aux=True))(model, read,
                                                                                                        coefficient_M)
  assert_close((value, grads), wanted)


def test_only_the_loss_has_a_gradient_and_it_is_linear_in_its_cotangent(tiny, random_model, packed, assert_close):
  model = random_model(tiny(futures=2, layers=3))
  batch = packed(model.config, 2, 8)

  @jax.jit
  def run(model, batch):
    value, back, sums = jax.vjp(lambda model: objective.loss(model, Read.of(batch, 2), jnp.ones(2),
                                                             ObjectiveConfig()), model, has_aux=True)
    return back(jnp.float32(1))[0], back(jnp.float32(-3))[0]

  once, thrice = run(model, batch)
  assert_close(thrice, jax.tree.map(lambda x: -3 * x, once))


# family, weights, heads that need not run, futures that are not read: one that others of its chain
# depends on is, with weight 0
SKIPPED = {
    'parallel': ({}, (0, 1, 0, 0.5), 2, 2),
    'parallel in pairs': ({'head_batch': 2}, (0, 1, 0, 0.5), 2, 2),
    'parallel, a pair and one': ({'head_batch': 2}, (1, 1, 0, 0.5), 1, 1),
    'linear': (FAMILIES['linear'], (0, 1, 0, 0.5), 2, 2),
    'causal': (FAMILIES['causal'], (0, 1, 0.5, 0), 1, 1),
    'anticausal': (FAMILIES['anticausal'], (0, 1, 0, 0.5), 1, 1),
    'sequential': (FAMILIES['post_norm'], (1, 0, 0.5, 0), 1, 1),
    'sequential, next token': (FAMILIES['pre_norm'], (1, 0, 0, 0), 3, 3),
    'sequential, not the next token': (FAMILIES['post_norm'], (0, 1, 0, 0), 2, 3),
    'shared': (FAMILIES['shared'], (0, 0.5, 1, 0), 1, 2),
    'modules of the trunk': (FAMILIES['trunk'], (0.5, 0, 1, 0), 2, 2),
    'shared modules of the trunk': (FAMILIES['trunk'] | FAMILIES['shared'], (0, 0.5, 0, 1), 1, 2),
    'shared, next token': (FAMILIES['shared'], (1, 0, 0, 0), 3, 3),
}


@pytest.mark.parametrize('family, weights, idle, unread', SKIPPED.values(), ids=SKIPPED)
def test_a_future_of_weight_zero_is_skipped_and_changes_nothing(tiny, random_model, packed, family, weights, idle,
                                                                unread, assert_close):
  c = tiny(layers=6, futures=4, remat='none', **family)
  model, batch, active = random_model(c), packed(c, 2, 8), tuple(weight > 0 for weight in weights)
  L, tokens, coefficient_M = 8, 16, jnp.float32(weights)

  def run(active):
    loss = lambda model, batch: objective.loss(model, Read.of(batch, 4), coefficient_M, ObjectiveConfig(chunk=8),
                                               active)
    traced = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(model, batch)
    return costs.matmul_flops(traced.jaxpr.jaxpr), traced.lower().compile()(model, batch)

  (all_flops, ((value, sums), grads)), (flops, ((some_value, some_sums), some_grads)) = run(None), run(active)
  assert_close((some_value, some_grads), (value, grads))
  for found, everything in zip(jax.tree.leaves(some_sums), jax.tree.leaves(sums)):
    np.testing.assert_array_equal(np.asarray(found)[~np.array(active)], 0)
    # two programs: float32 sums in another order; correct predictions lead by 0.1, so counts are equal
    np.testing.assert_allclose(found, np.where(active, everything, 0), rtol=1e-5)
  assert np.all(sums.count_M)

  head = 2 * sum(math.prod(x.shape[1:]) for path, x in jax.tree_util.tree_leaves_with_path(model.futures)
                 if 'norm' not in jax.tree_util.keystr(path))
  scores = 0 if c.kind == 'linear' else 2 * c.heads * c.head_width * L
  unembedding, model_flops = 2 * c.vocab * c.width, idle * (head + 2 * scores)
  # the last of a chain never runs twice
  chained = 0 if c.independent else min(idle, 2 if c.first_own_head else 3) * (head + 2 * scores)
  assert all_flops - flops == tokens * (3 * (model_flops + unread * unembedding) + idle * scores + chained)
  claimed = [costs.flops_per_token(c, L, a)['total'] for a in (None, active)]
  assert claimed[0] - claimed[1] == 3 * (model_flops + active.count(False) * unembedding)


def test_the_unembedding_costs_three_matrix_products_a_chunk(tiny, variant):
  def flops(vocab):
    c = tiny(vocab=vocab, layers=6, futures=4, **variant)
    batch = {name: jax.ShapeDtypeStruct((2, 16 + 4), np.int32) for name in ('tokens', 'segments', 'positions')}
    model = jax.eval_shape(functools.partial(Model, c), jax.random.key(0))
    gradient = jax.value_and_grad(lambda model,
                                  batch: objective.loss(model, Read.of(batch, 4), jnp.ones(4),
                                                        ObjectiveConfig(chunk=8)), has_aux=True)
    return costs.matmul_flops(jax.make_jaxpr(gradient)(model, batch).jaxpr)

  per_token = 3 * 2 * 16 * 4  # D, M
  assert flops(48) - flops(24) == (48 - 24) * per_token * 32


@pytest.fixture(scope='module')
def gradients():
  """(loss, sums, gradients) of weights 1, 1/2, 1/3 .. over counts; no mesh's share of the positions
  is whole chunks.
  """
  @jax.jit
  def run(model, batch):
    read = Read.of(batch, model.config.futures)
    coefficient_M = 1.0 / (1 + jnp.arange(model.config.futures)) / jnp.maximum(read.count_M, 1)
    (value, sums), grads = jax.value_and_grad(objective.loss, has_aux=True)(model, read, coefficient_M,
                                                                            ObjectiveConfig(chunk=6, z_loss=0.01))
    return value, sums, grads
  return run


def test_a_batch_without_targets_has_zero_loss_and_zero_gradients(tiny, random_model, packed, family, gradients):
  c = tiny(**family)
  batch = packed(c, 8, 16)
  # padding, and one-token documents
  for segments in (np.zeros_like(batch['segments']), np.tile(np.arange(1, 20), (8, 1))):
    value, sums, grads = gradients(random_model(c), batch | {'segments': segments.astype(np.int32)})
    assert float(value) == 0
    assert all(not np.any(x) for x in jax.tree.leaves((sums, grads)))


# Tables of 192 rows are shared by two or four neighbours, those of 24 by none.
MESHES = {'fsdp-tensor': MeshConfig(fsdp=4, tensor=2), 'data-fsdp-tensor': MeshConfig(data=2, fsdp=2, tensor=2),
          'fsdp-context': MeshConfig(fsdp=4, context=2)}
ON_MESHES = [*((family, mesh) for family in ('parallel', 'post_norm') for mesh in MESHES), ('linear', 'fsdp-tensor'),
             ('causal', 'fsdp-context'),
             ('anticausal', 'data-fsdp-tensor'), ('shared', 'fsdp-tensor'),
             ('trunk', 'fsdp-context'), ('all at once', 'fsdp-context')]
ON_MESHES = [*((*case, 24) for case in ON_MESHES), *(('parallel', mesh, 192) for mesh in MESHES),
             ('post_norm', 'fsdp-context', 192)]


@pytest.mark.parametrize('family, sizes, vocab', ON_MESHES)
def test_loss_and_gradients_on_a_mesh_are_those_of_one_device(tiny, random_model, packed, family, sizes, vocab,
                                                              gradients, assert_close):
  model = random_model(tiny(**FAMILIES.get(family, {'head_batch': 3}), logit_cap=5.0, vocab=vocab))
  batch = packed(model.config, 8, 16)
  wanted = gradients(model, batch)
  mesh = make_mesh(MESHES[sizes])
  with jax.set_mesh(mesh):
    placed = jax.device_put(model, shardings(model, mesh))
    value, sums, grads = gradients(placed, put(batch, mesh))
  assert_close((value, sums, grads), wanted)  # correct predictions lead by 0.002 or more
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(placed)):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim), jax.tree_util.keystr(path)


def test_axes_of_size_one_keep_their_sharding_on_a_mesh(tiny, variant):
  """A gradient must have its parameter's type: traced with one key head, as in multi-query
  attention.
  """
  batched = {'head_batch': 3} if variant['kind'] in ('parallel', 'linear') else {}
  for changes in ({}, batched):
    config = Config(tiny(kv_heads=1, **variant, **changes), data=DataConfig(length=8),
                    train=TrainConfig(batch=2, evaluate_rows=2))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
      state = training.abstract(config, mesh)
      rows = jax.ShapeDtypeStruct((2, 8 + 3), jnp.int32, sharding=jax.NamedSharding(mesh, spec('Bt')))
      batch = dict.fromkeys(('tokens', 'segments', 'positions'), rows)
      step = functools.partial(training.step, config, active=(True,) * 3)
      following, _ = jax.eval_shape(step, state, batch, jnp.ones(24, jnp.int32), jnp.ones(3))
    types = lambda state: [(x.shape, x.dtype, x.sharding.spec) for x in jax.tree.leaves(state.model)]
    assert types(following) == types(state)


def one_step(tiny, random_model, batch, family, weights, accumulate):
  """Parameters, gradient (read off Adam's first moment) and metrics after a train.step; a large
  epsilon keeps Adam nearly linear.
  """
  config = Config(tiny(layers=3, futures=2, **family), ObjectiveConfig(weights, chunk=3), DataConfig(length=8),
                  OptimizerConfig(warmup_steps=0, clip=1e9, epsilon=1.0, learning_rate=1.0),
                  TrainConfig(batch=4, accumulate=accumulate))
  model, zero = random_model(config.model), jnp.zeros((), jnp.int32)
  state = training.State(zero, zero, zero, model, optimizer.make(config.optimizer, config.train.steps).init(model))
  step = jax.jit(functools.partial(training.step, config, active=tuple(weight > 0 for weight in weights)))
  state, metrics = step(state, batch, jnp.ones(24, jnp.int32), np.float32(weights))
  return state.model, state.optimizer['adam'].mu, metrics


ACCUMULATED = {'parallel': ({}, (1.0, 0.5)), 'parallel, future 0': ({}, (1.0, 0.0)),
               'parallel, future 1': ({}, (0.0, 1.0)),
               'sequential': ({'kind': 'sequential'}, (1.0, 0.5))}


@pytest.mark.parametrize('which', ACCUMULATED)
def test_accumulation_changes_nothing(tiny, random_model, packed, which, assert_close):
  family, weights = ACCUMULATED[which]
  batch = packed(tiny(futures=2), 4, 8, seed=0)
  per_row = [tuple(Read.of({name: x[i:i + 1] for name, x in batch.items()}, 2).count_M.tolist()) for i in range(4)]
  assert len(set(per_row)) == 4, f'the rows must count unequally, not {per_row}'
  wanted = one_step(tiny, random_model, batch, family, weights, 1)
  assert float(wanted[2]['gradient_norm']) > 0.1
  for k in (2, 4):
    assert_close(one_step(tiny, random_model, batch, family, weights, k), wanted)


COLLECTIVE = re.compile(r'= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(')


def collectives(hlo: str) -> list[tuple[str, set[int], int]]:
  """(operation, sizes of its results, how many loops stand around it) of all that devices tell each
  other in a compiled module.
  """
  bodies, name = {}, None
  for line in hlo.splitlines():
    if start := re.match(r'(?:ENTRY )?%?([\w.-]+) \(.*\{$', line):
      name = start[1]
    bodies.setdefault(name, []).append(line)
  calls = [(caller, callee, ' while(' in line) for caller, lines in bodies.items() for line in lines
           for callee in re.findall(r'%?([\w.-]+)', line) if callee in bodies and callee != caller]
  depth, deeper = dict.fromkeys(bodies, 0), True
  while deeper:
    deeper = False
    for caller, callee, loop in calls:
      if depth[callee] < depth[caller] + loop:
        depth[callee], deeper = depth[caller] + loop, True
  size = lambda shape: math.prod(map(int, filter(None, shape.split(','))))
  assert max(depth.values()) >= 2, 'a loop over futures, and one over chunks within it'
  return [(found[2], {size(shape) for shape in re.findall(r'\w+\[([\d,]*)\]', found[1])}, depth[name])
          for name, lines in bodies.items() for line in lines if (found := COLLECTIVE.search(line))]


def test_the_unembedding_is_gathered_once_for_all_futures_and_its_gradient_summed_up_once_a_future(
    tiny, family, monkeypatch):
  """Four futures of four chunks each; 44 x 48, a device's share of V by all of D, is the size of
  nothing else.
  """
  monkeypatch.setattr(sharding, 'COLUMNS', 12)  # so few of the embedding are looked up where they lie
  config = Config(tiny(vocab=88, width=48, layers=6, futures=4, **family), mesh=MeshConfig(fsdp=4, tensor=2))
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    model = training.abstract(config, mesh).model
    batch = {name: jax.ShapeDtypeStruct((8, 16 + 4), jnp.int32, sharding=jax.NamedSharding(mesh, spec('Bt')))
             for name in ('tokens', 'segments', 'positions')}
    gradient = jax.value_and_grad(objective.loss, has_aux=True)
    run = jax.jit(lambda model, batch: gradient(model, Read.of(batch, 4), jnp.ones(4), ObjectiveConfig(chunk=8)))
    found = collectives(run.lower(model, batch).compile().as_text())
  gathered, share = 44 * 48, 44 * 48 // 4
  assert [loops for operation, sizes, loops in found if operation == 'all-gather' and gathered in sizes] == [0]
  sums = [(operation, loops) for operation, sizes, loops in found if operation != 'all-gather'
          and sizes & {gathered, share}]
  assert 'reduce-scatter' in dict(sums) and max(loops for _, loops in sums) <= 1


def temporary_bytes(c: ModelConfig) -> int:
  """What the compiled loss and gradient hold besides parameters, batch and gradients."""
  model = jax.eval_shape(functools.partial(Model, c), jax.random.key(0))
  batch = {name: jax.ShapeDtypeStruct((16, 256 + c.futures), jnp.int32) for name in ('tokens', 'segments', 'positions')}
  gradient = jax.value_and_grad(objective.loss, has_aux=True)
  run = jax.jit(lambda model, batch: gradient(model, Read.of(batch, c.futures), jnp.ones(c.futures), ObjectiveConfig()))
  return run.lower(model, batch).compile().memory_analysis().temp_size_in_bytes


def test_eight_futures_take_at_most_a_hundredth_more_memory_than_two_and_a_tenth_more_than_one():
  """At four chunks of logits; where a batch is a single chunk, a plain model has that much less
  alive beside it.
  """
  c = ModelConfig(vocab=1024, width=64, layers=5, heads=4, kv_heads=2, head_width=16, feed_forward=176,
                  placement='appended')
  # a trunk of four blocks
  one, two, eight = (temporary_bytes(dataclasses.replace(c, futures=futures, layers=4 + (futures > 1)))
                     for futures in (1, 2, 8))
  assert eight <= 1.10 * one, f'{eight} bytes are {eight / one:.3f} x {one}'
  assert eight <= 1.01 * two, f'{eight} bytes are {eight / two:.3f} x {two}'


def test_bfloat16_gradients_add_up_in_float32():
  """A token that stands everywhere, and many chunks: sums that bfloat16 could not hold."""
  c = ModelConfig(vocab=8, width=16, layers=3, heads=2, kv_heads=2, head_width=8, feed_forward=16, futures=2)
  model = Model(c, jax.random.key(0))
  tokens = np.minimum(np.random.default_rng(0).integers(0, 60, (8, 258)), 2).astype(np.int32)
  batch = {'tokens': tokens, 'segments': np.ones_like(tokens),
           'positions': np.broadcast_to(np.arange(258, dtype=np.int32), tokens.shape)}

  def gradient(dtype):
    cast = jax.tree.map(lambda x: x, model)
    cast.config = dataclasses.replace(c, dtype=dtype)
    return jax.jit(jax.grad(lambda m: objective.loss(m, Read.of(batch, 2), jnp.ones(2) / 2000,
                                                     ObjectiveConfig(chunk=32))[0]))(cast)

  wide, narrow = gradient('float32'), gradient('bfloat16')
  for name in ('embed_VD', 'unembed_VD'):
    exact, rounded = (np.asarray(getattr(g, name)[...]) for g in (wide, narrow))
    # each term is rounded to 8 bits, their sum is not
    assert np.linalg.norm(rounded - exact) < 0.02 * np.linalg.norm(exact), name
