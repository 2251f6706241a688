"""Experts against a dense reference in which every expert multiplies every token; who is chosen, and with what
weight; the load that stands for the gradient of a bias.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtp_jax import objective, sharding
from mtp_jax.config import Config, DataConfig, MeshConfig, ObjectiveConfig, TrainConfig
from mtp_jax.decode.decoder import arranged
from mtp_jax.mesh import make_mesh, put
from mtp_jax.model import costs, expert_rows, experts, kernels
from mtp_jax.model.attention import documents
from mtp_jax.model.block import Block
from mtp_jax.model.expert_rows import tile_rows
from mtp_jax.model.grouped import mixture
from mtp_jax.model.model import Model
from mtp_jax.objective import Read
from mtp_jax.sharding import place, shardings
from mtp_jax.train import step as training

B, L, D, E, W, J = 8, 12, 16, 8, 24, 3
MESHES = {'one device': MeshConfig(), 'expert 8': MeshConfig(expert=8),
          'expert 4 x fsdp 2': MeshConfig(expert=4, fsdp=2),
          'expert 2 x context 2 x tensor 2': MeshConfig(expert=2, context=2, tensor=2),
          'data 2 x fsdp 2 x tensor 2': MeshConfig(data=2, fsdp=2, tensor=2)}


def every_expert(h, expert, weight, gate, up, down):
  """y_t = sum_e weight_te down_e(silu(gate_e h_t) * up_e h_t), each expert over every token."""
  hidden = jax.nn.silu(jnp.einsum('BLD,EDW->BLEW', h, gate)) * jnp.einsum('BLD,EDW->BLEW', h, up)
  weight_BLE = jnp.sum(jax.nn.one_hot(expert, E) * weight[..., None], 2)
  return jnp.einsum('BLEW,EWD,BLE->BLD', hidden, down, weight_BLE)


def arguments(load: str):
  """(h, experts of each token, weights, gate, up, down). Some tokens go to no expert."""
  rng = np.random.default_rng(0)
  expert = np.stack([rng.permutation(E)[:J] for _ in range(B * L)]).reshape(B, L, J)
  if load == 'one expert takes all':
    expert[:] = [5, 6, 7]
  if load == 'one token':
    expert[:] = E
    expert[3, 4] = [7, 0, 2]
  expert[0, :5] = E
  normal = lambda *shape: np.float32(rng.standard_normal(shape))
  return normal(B, L, D), np.int32(expert), normal(B, L, J), normal(E, D, W), normal(E, D, W), normal(E, W, D)


@pytest.mark.parametrize('load', ['even', 'one expert takes all', 'one token'])
@pytest.mark.parametrize('mesh', MESHES)
def test_grouped_experts_are_every_expert_over_every_token_and_so_are_their_gradients(mesh, load, assert_close):
  h, expert, *others = arguments(load)
  dy = np.float32(np.random.default_rng(1).standard_normal((B, L, D)))

  def run(function, dy, h, expert, *others):
    loss = lambda h, *others: jnp.sum(function(h, expert, *others) * dy)
    return function(h, expert, *others), *jax.grad(loss, range(1 + len(others)))(h, *others)

  wanted = jax.jit(functools.partial(run, every_expert))(dy, h, expert, *others)
  with jax.set_mesh(make_mesh(MESHES[mesh])):
    placed = [place(jnp.asarray(x), letters) for x, letters in
              zip((dy, h, expert, *others), ('BLD', 'BLD', 'BLj', 'BLj', 'EDW', 'EDW', 'EWD'))]
    assert_close(jax.jit(functools.partial(run, lambda *x: mixture(*x)[0]))(*placed), wanted, 2e-6)
    rows_E = jax.jit(mixture)(*placed[1:])[1]
  np.testing.assert_array_equal(rows_E, [(expert == e).sum() for e in range(E)])  # nothing is dropped


@pytest.mark.parametrize('load, rows, mesh', [
    ('even', 16, MeshConfig()), ('one expert takes all', 16, MeshConfig()), ('one token', 16, MeshConfig()),
    ('even', 128, MeshConfig()), ('even', 16, MeshConfig(expert=2))], ids=str)
def test_rows_sorted_for_a_kernel_give_the_same(load, rows, mesh, assert_close, monkeypatch):
  monkeypatch.setattr(kernels, 'grouped_kernel', lambda: kernels.Megablox(rows, interpret=True))
  inputs = np.float32(np.random.default_rng(1).standard_normal((B, L, D))), *arguments(load)

  def run(function, dy, h, expert, *others):
    y, back = jax.vjp(lambda h, *others: function(h, expert, *others), h, *others)
    return y, back(dy)

  wanted = jax.jit(functools.partial(run, every_expert))(*inputs)
  with jax.set_mesh(make_mesh(mesh)):
    placed = [place(jnp.asarray(x), letters) for x, letters in
              zip(inputs, ('BLD', 'BLD', 'BLj', 'BLj', 'EDW', 'EDW', 'EWD'))]
    assert_close(jax.jit(functools.partial(run, lambda *x: mixture(*x)[0]))(*placed), wanted, 2e-6)


def test_of_fewer_rows_than_experts_each_is_a_tile(assert_close):
  h, expert, weight, *matrices = map(jnp.asarray, arguments('even'))
  h, expert, weight = h[:1, 4:6], expert[:1, 4:6], weight[:1, 4:6]  # one of the two tokens goes to no expert
  assert (expert == E).sum() == J and (expert < E).sum() == J
  loss = lambda function: lambda h, *others: jnp.sum(function(h, expert, *others)**2)
  wanted, found = (jax.value_and_grad(loss(function), range(5))(h, weight, *matrices)
                   for function in (every_expert, lambda *x: mixture(*x)[0]))
  assert_close(found, wanted, 2e-6)


def test_a_tile_that_no_turn_multiplies_is_missing_in_the_counted_rows(monkeypatch):
  h, expert, *others = map(jnp.asarray, arguments('even'))
  whole = expert_rows.Tiles._loop
  monkeypatch.setattr(expert_rows.Tiles, '_loop', lambda tiles, body, carry: whole(
      dataclasses.replace(tiles, used=tiles.used - 1), body, carry))
  assert 0 < jnp.sum(expert < E) - jnp.sum(mixture(h, expert, *others)[1]) <= tile_rows(expert.size, E)


def test_room_for_more_rows_than_an_even_load_sends_does_not_count_as_multiplied(monkeypatch):
  shapes = [(8, 512, D), (8, 512, J), (8, 512, J), (E, D, W), (E, D, W), (E, W, D)]
  letters = ('BLD', 'BLj', 'BLj', 'EDW', 'EDW', 'EWD')

  def flops():
    x = [jax.ShapeDtypeStruct(shape, jnp.int32 if i == 1 else jnp.float32) for i, shape in enumerate(shapes)]
    return costs.matmul_flops(jax.make_jaxpr(lambda *x: mixture(*map(place, x, letters)))(*x).jaxpr)

  wanted, in_tiles = 8 * 512 * J * 3 * 2 * D * W, flops()
  found = []
  with jax.set_mesh(make_mesh(MeshConfig(expert=8))):
    found.append(flops())
    monkeypatch.setattr(kernels, 'grouped_kernel', kernels.Megablox)
    found.append(flops())
  assert in_tiles == found[0] == wanted == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize('rows, experts, wanted', [(1, 8, 8), (96 * 8 * 8, 8, 64), (2**22, 8, 512), (640, 4, 16)])
def test_an_expert_fills_about_eight_tiles(rows, experts, wanted):
  assert tile_rows(rows, experts) == wanted


@pytest.fixture
def routed(tiny):
  return functools.partial(tiny, experts=8, experts_per_token=3, expert_width=10)


def scores(rng, *shape):
  return jnp.asarray(rng.permutation(np.prod(shape)).reshape(shape) / np.prod(shape), jnp.float32)  # without ties


def test_the_chosen_are_those_with_the_largest_affinity_plus_bias_and_weights_know_no_bias(routed):
  c, rng = routed(expert_scale=2.5), np.random.default_rng(0)
  affinity, bias = scores(rng, 2, 5, 8), jnp.asarray(rng.standard_normal(8), jnp.float32)
  chosen, biased = experts.choose(c, affinity), experts.choose(c, affinity + bias)
  assert (np.sort(chosen) != np.sort(biased)).any()
  np.testing.assert_array_equal(np.sort(biased), np.sort(np.argsort(affinity + bias)[..., -3:]))
  for picked in (chosen, biased):
    kept = np.take_along_axis(np.float64(affinity), np.asarray(picked), -1)
    np.testing.assert_allclose(experts.weights(c, affinity, picked), 2.5 * kept / kept.sum(-1, keepdims=True), 1e-6)


def test_of_groups_only_those_whose_best_two_have_the_largest_sum_are_open(routed):
  c, rng = routed(expert_groups=4, groups_per_token=2), np.random.default_rng(0)
  score = scores(rng, 6, 50, 8)
  chosen = np.asarray(experts.choose(c, score))
  best = np.argsort(np.sort(np.asarray(score).reshape(6, 50, 4, 2)).sum(-1))[..., -2:]
  assert all(set(chosen[b, t] // 2) <= set(best[b, t]) for b, t in np.ndindex(6, 50))
  open_ = (np.arange(8) // 2 == best[..., None]).any(2)
  np.testing.assert_array_equal(np.sort(chosen), np.sort(np.argsort(np.where(open_, score, -1))[..., -3:]))
  assert (np.sort(chosen) != np.sort(np.argsort(score)[..., -3:])).any()


def test_the_balance_loss_is_one_a_row_under_an_even_load_and_knows_no_padding(routed):
  c, rng = routed(experts_per_token=2), np.random.default_rng(0)
  affinity = 0.1 + np.eye(8)[np.arange(16) % 8] + np.eye(8)[(np.arange(16) + 1) % 8]  # each expert twice in eight
  real = np.arange(24) < 16
  affinity = np.concatenate([affinity, rng.random((8, 8))])[None].astype(np.float32)
  np.testing.assert_allclose(experts.balance_loss(c, affinity, jnp.asarray(real[None])), 1.0, 1e-6)
  uneven = np.where(np.arange(8) < 2, 1.0, 0.1) * np.ones((1, 24, 1), np.float32)
  np.testing.assert_allclose(experts.balance_loss(c, uneven, jnp.asarray(real[None])), 8 / 2 * 2 * 1 / 2.6, 1e-6)


def test_a_decoder_in_bfloat16_routes_in_float32_as_training_does(routed):
  model = jax.eval_shape(lambda: Model(routed(dtype='bfloat16'), jax.random.key(0)))
  leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda model: arranged(model, 24), model))
  types = {sharding.name(path): leaf.dtype for path, leaf in leaves}
  assert types['router_DE'] == types['bias_E'] == jnp.float32
  assert types['gate_EDW'] == types['wq_DHK'] == jnp.bfloat16


def test_the_balance_loss_counts_the_largest_affinities_of_all_groups(routed):
  """DeepSeek-V3, equation 18."""
  c = routed(experts_per_token=2, expert_groups=4, groups_per_token=1)
  affinity = jnp.array([[[.9, .1, .5, .6, .2, .2, .2, .2]]])
  share = (.9 + .6) / jnp.sum(affinity)
  np.testing.assert_allclose(experts.balance_loss(c, affinity, jnp.ones((1, 1), bool)), 8 / 2 * share, 1e-6)


@pytest.mark.parametrize('router', ['sigmoid', 'softmax'])
def test_a_block_adds_the_balance_loss_to_its_gradient_and_gives_the_load_for_that_of_its_bias(routed, router,
                                                                                            assert_close):
  c, weight = routed(router=router, heads=2, kv_heads=2), 0.7
  rng = np.random.default_rng(0)
  block = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype),
                       jax.eval_shape(lambda: Block(c, True, nnx.Rngs(0))))
  h = jnp.asarray(rng.standard_normal((3, 9, 16)), jnp.float32)
  segments = jnp.asarray(np.repeat([[1, 2, 0]], 3, 0).repeat(3, 1))

  def gradient(balance: float, extra: float):
    def loss(feed_forward, h):
      y = feed_forward(h, documents(segments, balance))
      affinity = experts.affinities(c, h @ feed_forward.router_DE[...])
      return jnp.sum(y * y) + extra * experts.balance_loss(c, affinity, segments > 0), affinity
    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(block.feed_forward, h)

  (found, dh), affinity = gradient(weight, 0.0)
  (wanted, dh_wanted), _ = gradient(0.0, weight)
  assert_close((found, dh), (wanted, dh_wanted))
  (without, _), _ = gradient(0.0, 0.0)
  assert np.abs(found.router_DE[...] - without.router_DE[...]).max() > 1e-3
  chosen = experts.choose(c, affinity + block.feed_forward.bias_E[...])[segments > 0]
  np.testing.assert_array_equal(found.bias_E[...], [(chosen == e).sum() for e in range(8)])


SKEWED = {'experts': 8, 'experts_per_token': 2, 'expert_width': 12, 'layers': 4, 'futures': 3}


@pytest.mark.parametrize('kind', ['sequential', 'parallel'])
def test_the_load_of_a_router_that_favours_two_experts_evens_out_in_every_block(tiny, packed, kind):
  """The futures' too. Of two, which would take all, the bias is 0.4 above that of the others."""
  c = tiny(kind=kind, placement='appended', **SKEWED)
  config = Config(c, ObjectiveConfig(balance_rate=0.02, balance_loss=0.0), DataConfig(length=24),
                  train=TrainConfig(batch=8, steps=200))
  state = training.compiled_init(config, jax.random.key(0))
  skew = lambda path, x: x + 0.4 * (jnp.arange(8) < 2) if 'bias' in str(path) else x
  state = dataclasses.replace(state, model=jax.tree_util.tree_map_with_path(skew, state.model))
  batch, ones = packed(c, 8, 24), np.ones(c.vocab, np.int32)
  seen = []
  for _ in range(60):
    state, metrics = training.compiled_step(config, state, batch, ones, 0.0)
    seen.append(jax.device_get(metrics))
  blocks = c.expert_trunk_layers + c.own_heads
  assert seen[0]['expert_load'].shape == (blocks,) and all(m['dropped'] == 0 for m in seen)
  assert (seen[0]['expert_load'] > 2.5).all() and (seen[-1]['expert_load'] < 2).all()
  assert (seen[-1]['expert_entropy'] > seen[0]['expert_entropy']).all()
  np.testing.assert_allclose(seen[0]['expert_bias'], 0.4, 1e-5)
  assert (seen[-1]['expert_bias'] < 0.4).all()


def test_biases_do_not_move_in_a_step_that_is_skipped_and_are_decayed_in_none(tiny, packed):
  c = tiny(kind='sequential', **SKEWED)
  config = Config(c, ObjectiveConfig(balance_rate=0.5), DataConfig(length=24), train=TrainConfig(batch=4, steps=200))
  state = training.compiled_init(config, jax.random.key(0))
  biases = lambda state: [np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state.model)
                          if 'bias' in str(path)]
  batch, ones = packed(c, 4, 24), np.ones(c.vocab, np.int32)
  state, metrics = training.compiled_step(config, state, batch, ones, 0.0)
  moved = biases(state)
  assert metrics['skipped'] == 0
  for bias in moved:
    assert set(np.unique(bias)) <= {np.float32(-0.5), np.float32(0), np.float32(0.5)} and np.abs(bias).any(-1).all()
  broken = dataclasses.replace(state, model=dataclass_with_nan(state.model))
  broken, metrics = training.compiled_step(config, broken, batch, ones, 0.0)
  assert metrics['skipped'] == 1
  np.testing.assert_array_equal(np.concatenate(biases(broken)), np.concatenate(moved))


def dataclass_with_nan(model):
  """The model with one parameter that is not a number."""
  return jax.tree_util.tree_map_with_path(lambda path, x: x.at[0].set(jnp.nan) if 'unembed' in str(path) else x, model)


@pytest.mark.parametrize('sizes', [MeshConfig(expert=4, fsdp=2), MeshConfig(expert=2, context=2, data=2)], ids=str)
def test_loads_are_those_of_the_whole_batch_on_any_mesh_and_in_any_microbatches(tiny, packed, random_model, sizes):
  c = tiny(kind='sequential', width=16, **SKEWED)
  config = Config(c, ObjectiveConfig(balance_loss=0.0), DataConfig(length=24), train=TrainConfig(batch=16, steps=200))
  split = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=2), mesh=sizes)
  batch = packed(c, 16, 24)

  def loads(config):
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
      model = random_model(c)
      run = jax.jit(lambda model, batch: training.gradients(config, model, Read.of(batch, 3), jnp.ones(3),
                                                            (True,) * 3, objective.loss)[2])
      found = run(jax.device_put(model, shardings(model, mesh)), put(batch, mesh))
    return [np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(found) if 'bias' in str(path)]

  for alone, spread in zip(loads(config), loads(split), strict=True):
    np.testing.assert_array_equal(alone, spread)
  tokens = int((batch['segments'][:, :24] > 0).sum())
  assert all((alone.sum(-1) == 2 * tokens).all() for alone in loads(config))
