"""Names against shapes, names against shardings, the einsum's gradients against jnp.einsum's own."""
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

import mtp_jax
from mtp_jax import sharding
from mtp_jax.config import BadInput, Config, MeshConfig
from mtp_jax.mesh import by_device, by_row, make_mesh, mesh_order, to_mesh_order, to_text_order
from mtp_jax.model.model import Model
from mtp_jax.sharding import devices_along, einsum, lookup, shardings, spec
from mtp_jax.train import step as training

SUBSCRIPTS = sorted({found for path in pathlib.Path(mtp_jax.__file__).parent.rglob('*.py') if path.name != 'sharding.py'
                     for found in re.findall(r"einsum\('([A-Za-z,]+->[A-Za-z]*)'", path.read_text())})
SIZES = {'B': 8, 'L': 6, 'S': 10, 'D': 8, 'C': 16, 'H': 4, 'G': 2, 'K': 6, 'F': 12, 'V': 14, 'P': 8, 't': 10, 'd': 8,
         'M': 3, 'R': 8, 'Q': 6, 'i': 6, 'E': 6, 'J': 10, 'A': 8, 'U': 12, 'o': 4}
WIDTH = 'fsdp', 'expert'
PARAMETERS = {
    'embed_VD': P('tensor', WIDTH), 'unembed_VD': P('tensor', WIDTH), 'final_norm_D': P(None),
    'attention_norm_D': P(None, None), 'feed_forward_norm_D': P(None, None),
    'q_norm_K': P(None, None), 'k_norm_K': P(None, None),
    'wq_DHK': P(None, WIDTH, 'tensor', None), 'wk_DGK': P(None, WIDTH, 'tensor', None),
    'wv_DGK': P(None, WIDTH, 'tensor', None), 'wo_HKD': P(None, 'tensor', None, WIDTH),
    'gate_DF': P(None, WIDTH, 'tensor'), 'up_DF': P(None, WIDTH, 'tensor'), 'down_FD': P(None, 'tensor', WIDTH),
    'embedding_norm_D': P(None, None), 'hidden_norm_D': P(None, None), 'out_norm_D': P(None, None),
    'join_CD': P(None, WIDTH, None), 'map_Dd': P(None, WIDTH, None),
    'router_DE': P(None, WIDTH, None), 'bias_E': P(None, None), 'gate_EDW': P(None, 'expert', 'fsdp', 'tensor'),
    'up_EDW': P(None, 'expert', 'fsdp', 'tensor'), 'down_EWD': P(None, 'expert', 'tensor', 'fsdp'),
}


def names(tree) -> list[tuple[str, str, jax.Array]]:
  """(first attribute, last attribute, leaf) of every parameter."""
  keys = lambda path: [key.name for key in path if getattr(key, 'name', 'value') != 'value']
  return [(keys(path)[0], keys(path)[-1], leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def test_letters_choose_mesh_axes_and_the_first_to_ask_gets_one():
  assert spec('BLD') == P(('data', 'fsdp', 'expert'), 'context', None)
  assert spec('BLV') == P(('data', 'fsdp', 'expert'), 'context', 'tensor')
  assert spec('BSGK') == P(('data', 'fsdp', 'expert'), None, 'tensor', None)
  assert spec('DHK') == P(WIDTH, 'tensor', None)
  assert spec('EDW') == P('expert', 'fsdp', 'tensor')
  assert spec('HGK') == P('tensor', None, None)
  assert spec('CD') == P(WIDTH, None)
  assert spec('Vd') == P('tensor', None)
  assert spec('DB') == P(WIDTH, 'data')
  assert spec('PTV') == P(('data', 'fsdp', 'expert', 'context'), None, 'tensor')
  assert spec('') == P()


@pytest.mark.parametrize('changes',
                         [{}, {'qk_norm': True}, {'tie_embeddings': True}, {'placement': 'appended'},
                          {'futures': 1}], ids=str)
def test_a_parameters_suffix_is_its_shape_and_stacked_axes_lead(tiny, variant, changes):
  c = tiny(**variant | changes)
  size = {'D': 16, 'C': 32, 'H': 4, 'G': 2, 'K': 8, 'F': 20, 'V': 24, 'd': 16, 'E': 12, 'W': 10}
  modules = min(1, c.futures - 1) if c.share_modules else c.futures - 1
  M = modules if c.kind == 'sequential' else c.futures if c.futures > 1 else 0
  N = 5 if c.kind == 'linear' else 5 - M if c.placement == 'matched' else 5 if c.kind == 'sequential' else 4
  dense = c.dense_layers if c.experts else N
  stacks = {'trunk': (dense,), 'expert_trunk': (N - dense,), 'futures': (M,)}
  leaves = names(jax.eval_shape(functools.partial(Model, c), jax.random.key(0)))
  for first, last, leaf in leaves:
    assert leaf.shape == stacks.get(first, ()) + tuple(size[letter] for letter in last.rpartition('_')[2]), (first,
                                                                                                             last)
    assert leaf.dtype == jnp.float32
  block = 9 + 2 * c.qk_norm
  with_experts = block + 5 if c.experts else 0
  futures = 0 if M == 0 else 1 if c.kind == 'linear' else (with_experts or block) + 4 * (c.kind == 'sequential')
  assert len(leaves) == 2 + (not c.tie_embeddings) + block + with_experts + futures


def assert_placed(tree, mesh):
  for first, last, leaf in names(tree):
    assert leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh, PARAMETERS[last]), len(leaf.shape)), (first, last,
                                                                                                        leaf.sharding)


def test_parameters_and_moments_are_typed_to_live_where_their_names_say(tiny, variant):
  config = Config(model=tiny(qk_norm=True, **variant), mesh=MeshConfig(data=2, fsdp=2, tensor=2))
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    state = training.abstract(config, mesh)
  for tree in (state.model, state.optimizer['adam'].mu, state.optimizer['adam'].nu):
    assert_placed(tree, mesh)
    for (_, last, leaf), wanted in zip(names(tree), jax.tree.leaves(shardings(tree, mesh))):
      assert leaf.sharding.is_equivalent_to(wanted, len(leaf.shape)), last


def test_a_fresh_state_lives_where_it_is_typed_to(tiny):
  config = Config(model=tiny(layers=3, futures=2), mesh=MeshConfig(data=2, fsdp=2, tensor=2))
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    state = jax.jit(functools.partial(training.init, config))(jax.random.key(0))
  for tree in (state.model, state.optimizer['adam'].mu, state.optimizer['adam'].nu):
    assert_placed(tree, mesh)


def test_a_mesh_wants_no_more_devices_than_there_are():
  with pytest.raises(BadInput,
                      match=r'config\.mesh: data 1 x fsdp 4 x context 1 x tensor 4 x expert 1 = 16 devices, '
                            'but there are 8'):
    make_mesh(MeshConfig(fsdp=4, tensor=4))
  assert make_mesh(MeshConfig(fsdp=2)).size == 2


MESHES = [MeshConfig(fsdp=4, tensor=2), MeshConfig(data=2, fsdp=2, context=2), MeshConfig(tensor=2),
          MeshConfig(data=2, fsdp=2, tensor=2)]


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_parts_are_the_tokens_of_each_device_in_a_row_of_their_own_and_nothing_moves(sizes):
  mesh, (B, L, D) = make_mesh(sizes), (8, 6, 3)
  x_BLD = np.arange(B * L * D).reshape(B, L, D)
  with jax.set_mesh(mesh):
    placed = on_mesh(mesh, 'BLd', x_BLD)
    there, back = jax.jit(by_device), jax.jit(lambda x_PTD: by_row(x_PTD, B))
    x_PTD = there(placed)
    again = back(x_PTD)
    assert devices_along('P') == x_PTD.shape[0] == sizes.data * sizes.fsdp * sizes.context
    assert not re.search('all-|collective|reduce-scatter',
                         there.lower(placed).compile().as_text() + back.lower(x_PTD).compile().as_text())
  np.testing.assert_array_equal(again, x_BLD)
  for x, sent in ((x_PTD, placed), (again, x_PTD)):
    for mine, theirs in zip(x.addressable_shards, sent.addressable_shards, strict=True):
      assert mine.device == theirs.device
      np.testing.assert_array_equal(mine.data.ravel(), theirs.data.ravel())
  assert again.sharding.is_equivalent_to(placed.sharding, 3)


def test_without_a_mesh_there_is_one_part():
  x_BLD = np.arange(24).reshape(2, 4, 3)
  np.testing.assert_array_equal(by_device(x_BLD), x_BLD.reshape(1, 8, 3))
  np.testing.assert_array_equal(by_row(by_device(x_BLD), 2), x_BLD)


@pytest.mark.parametrize('context, length, wanted', [
    (1, 6, [0, 1, 2, 3, 4, 5]), (2, 8, [0, 1, 6, 7, 2, 3, 4, 5]), (2, 6, [0, 1, 2, 3, 4, 5]),
    (4, 16, [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9])])
def test_each_device_of_the_context_axis_has_a_stretch_from_the_front_and_its_mirror_image(context, length, wanted):
  """Where two stretches a device do not come out even, positions lie as they come."""
  x_BL = np.arange(2 * length).reshape(2, length)
  with jax.set_mesh(make_mesh(MeshConfig(context=context))):
    assert mesh_order(length).tolist() == wanted
    laid = jax.jit(to_mesh_order)(x_BL)
    assert np.asarray(laid).tolist() == x_BL[:, wanted].tolist() and laid.sharding.spec == spec('BL')
    np.testing.assert_array_equal(jax.jit(to_text_order)(laid), x_BL)
    if length % (2 * context) == 0:  # a causal mask hides as much from each device as from the others
      assert len({int(np.sum(np.asarray(shard.data)[0] + 1)) for shard in laid.addressable_shards}) == 1


@pytest.mark.parametrize('columns', [2, 4, 128])
@pytest.mark.parametrize('sizes', [MESHES[0], MESHES[1]], ids=str)
def test_looked_up_rows_and_their_gradient_are_those_of_one_device(sizes, columns, monkeypatch, assert_close):
  """Each device looks up 2, 4 or all columns."""
  monkeypatch.setattr(sharding, 'COLUMNS', columns)
  rng, mesh = np.random.default_rng(0), make_mesh(sizes)
  table_VD, ids_BL, g_BLD = rng.standard_normal((14, 8)).astype(np.float32), np.minimum(rng.integers(0, 28, (8, 6)),
                                                                                        13), rng.standard_normal((8,
                                                                                                                  6, 8))
  wanted = np.zeros((14, 8))
  np.add.at(wanted, ids_BL, g_BLD)

  @functools.partial(jax.jit, static_argnums=3)
  def run(table_VD, ids_BL, g_BLD, dtype):
    x_BLD, back = jax.vjp(lambda table_VD: lookup(table_VD, ids_BL, dtype), table_VD)
    return x_BLD, back(g_BLD.astype(dtype))[0]

  with jax.set_mesh(mesh):
    placed = on_mesh(mesh, 'VD', table_VD), on_mesh(mesh, 'BL', ids_BL), on_mesh(mesh, 'BLD', g_BLD.astype(np.float32))
    x_BLD, gradient = run(*placed, 'float32')
    narrow = run(*placed, 'bfloat16')
  np.testing.assert_array_equal(x_BLD, table_VD[ids_BL])
  assert_close(gradient, wanted)
  for x, like in ((x_BLD, placed[2]), (gradient, placed[0])):
    assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
  assert narrow[0].dtype == jnp.bfloat16
  rounded = np.zeros((14, 8))
  np.add.at(rounded, ids_BL, np.float64(g_BLD.astype(np.float32).astype(jnp.bfloat16)))
  assert_close(narrow[1], rounded)  # each term is rounded to 8 bits, their sum is not


def gradients(function, operands):
  """Of every subscript: the result, and the gradients of its inner product with a fixed array."""
  def one(subscripts, a, b, g):
    result, back = jax.vjp(functools.partial(function, subscripts), a, b)
    return result, *back(g)

  return {subscripts: one(subscripts, *arrays) for subscripts, arrays in operands.items()}


def random_operands():
  rng, found = np.random.default_rng(0), {}
  for subscripts in SUBSCRIPTS:
    found[subscripts] = tuple(rng.standard_normal([SIZES[x] for x in part]).astype(np.float32)
                              for part in subscripts.replace('->', ',').split(','))
  return found


def on_mesh(mesh, letters, x):
  return jax.device_put(x, jax.NamedSharding(mesh, spec(letters)))


@pytest.mark.parametrize('sizes, most_scattered_to', [
    (MeshConfig(fsdp=2, context=2, tensor=2), 32), (MeshConfig(fsdp=2, context=2, tensor=2), 1),
    (MeshConfig(fsdp=4, data=2), 1)], ids=str)
def test_the_gradients_of_einsum_are_those_of_jnp_einsum(sizes, most_scattered_to, monkeypatch, assert_close):
  """Summed over devices at once, or in two stages."""
  monkeypatch.setattr(sharding, 'MOST_SCATTERED_TO', most_scattered_to)
  assert len(SUBSCRIPTS) >= 10
  operands = random_operands()
  wanted = jax.jit(functools.partial(gradients, jnp.einsum))(operands)
  assert_close(jax.jit(functools.partial(gradients, einsum))(operands), wanted)

  mesh = make_mesh(sizes)
  placed = {s: tuple(on_mesh(mesh, part, x) for part, x in zip(s.replace('->', ',').split(','), operands[s]))
            for s in SUBSCRIPTS}
  with jax.set_mesh(mesh):
    found = jax.jit(functools.partial(gradients, einsum))(placed)
  assert_close(found, wanted)
  for subscripts, (result, *grads) in found.items():
    for x, like in zip((result, *grads), (placed[subscripts][2], *placed[subscripts][:2])):
      assert x.sharding.is_equivalent_to(like.sharding, x.ndim), subscripts


def test_einsum_of_bfloat16_with_a_float32_result_has_bfloat16_gradients(assert_close):
  a, b = (jnp.asarray(np.random.default_rng(i).standard_normal(shape), jnp.bfloat16) for i,
          shape in enumerate([(2, 6, 8), (14, 8)]))
  g = jnp.asarray(np.random.default_rng(2).standard_normal((2, 6, 14)), jnp.float32)
  result, back = jax.vjp(lambda a, b: einsum('BLD,VD->BLV', a, b, jnp.float32), a, b)
  da, db = back(g)
  exact = np.float64
  assert (result.dtype, da.dtype, db.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
  assert_close(result, np.einsum('BLD,VD->BLV', exact(a), exact(b)))
  # bfloat16 holds 8 bits
  assert_close((da, db), (np.einsum('BLV,VD->BLD', g, exact(b)), np.einsum('BLD,BLV->VD', exact(a), g)), 1e-2)


def test_a_parameters_gradient_is_a_float32_sum_over_tokens_and_devices(assert_close):
  """Operands of bfloat16: each product is rounded, no sum is. In bfloat16 the sums of four devices
  would be off by up to 2^-9.
  """
  rng = np.random.default_rng(0)
  a, w, g = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 64, 16), (16, 12), (8, 64, 12)))
  narrow = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
  mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
  with jax.set_mesh(mesh):
    result, back = jax.vjp(lambda a, w: einsum('BLD,DF->BLF', a, w),
                           on_mesh(mesh, 'BLD', jnp.asarray(a, jnp.bfloat16)), on_mesh(mesh, 'DF', w))
    da, dw = jax.jit(back)(on_mesh(mesh, 'BLF', jnp.asarray(g, jnp.bfloat16)))
  assert (result.dtype, da.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  assert_close(dw, np.einsum('BLD,BLF->DF', narrow(a), narrow(g)), 2e-6)
  assert_close(da, np.einsum('BLF,DF->BLD', narrow(g), narrow(w)), 1e-2)
