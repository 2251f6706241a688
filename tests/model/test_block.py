"""Every layer against its equation in float64 NumPy, loops where they make the meaning plain."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from mtp_jax.config import MeshConfig
from mtp_jax.mesh import make_mesh, to_mesh_order, to_text_order
from mtp_jax.model import costs, feed_forward, kernels
from mtp_jax.model.attention import Cache, attend, documents, rotary, write
from mtp_jax.model.block import Block
from mtp_jax.model.feed_forward import SwiGLU
from mtp_jax.model.norm import rms_norm
from mtp_jax.model.parameters import matrix, stack
from mtp_jax.sharding import AXES, place


def attend_numpy(q_BLHK, k_BSGK, v_BSGK, mask_BLS):
  """One softmax a (row, query, head)."""
  B, L, H, K = q_BLHK.shape
  group = H // k_BSGK.shape[2]
  o_BLHK = np.zeros(q_BLHK.shape)
  for b, t, h in np.ndindex(B, L, H):
    seen = mask_BLS[b, t]
    score_S = k_BSGK[b, seen, h // group] @ q_BLHK[b, t, h] / np.sqrt(K)
    p_S = np.exp(score_S - score_S.max())
    o_BLHK[b, t, h] = p_S @ v_BSGK[b, seen, h // group] / p_S.sum()
  return o_BLHK


def rotary_numpy(x_BLHK, positions_BL, base):
  y_BLHK, half = np.zeros(x_BLHK.shape), x_BLHK.shape[-1] // 2
  for b, t, h, k in np.ndindex(*x_BLHK.shape[:3], half):
    turn = np.exp(1j * positions_BL[b, t] * base ** (-2 * k / (2 * half)))
    z = (x_BLHK[b, t, h, k] + 1j * x_BLHK[b, t, h, k + half]) * turn
    y_BLHK[b, t, h, k], y_BLHK[b, t, h, k + half] = z.real, z.imag
  return y_BLHK


def norm_numpy(x, scale, epsilon):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def mask_numpy(segments_BL):
  return (segments_BL[:, :, None] == segments_BL[:, None, :]) & np.tril(np.ones((segments_BL.shape[1],) * 2, bool))


SEGMENTS_BL = np.array([[1, 1, 1, 2, 3, 3], [1, 2, 2, 2, 0, 0]])


def test_documents_are_seen_causally_and_end_where_they_end():
  wanted = np.array([[[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0],
                      [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]],
                     [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0],
                      [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]]], bool)
  found = documents(jnp.asarray(SEGMENTS_BL))
  np.testing.assert_array_equal(found.mask_BLS, wanted)
  np.testing.assert_array_equal(found.segments_BL, SEGMENTS_BL)


@pytest.mark.parametrize('G', [4, 2, 1])
def test_attention_and_its_gradients_are_those_of_a_softmax_in_float64(G, assert_close):
  rng = np.random.default_rng(G)
  B, L, S, H, K = 2, 3, 6, 4, 4
  q, k, v = (rng.standard_normal(shape) for shape in [(B, L, H, K), (B, S, G, K), (B, S, G, K)])
  mask = mask_numpy(SEGMENTS_BL)[:, -L:]
  weight = rng.standard_normal((B, L, H, K))

  @jax.jit
  def value_and_gradients(q, k, v):
    o, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
    return o, back(jnp.asarray(weight, jnp.float32))

  found, grads = value_and_gradients(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
  assert_close(found, attend_numpy(q, k, v, mask))
  wanted, step = [np.zeros(x.shape) for x in (q, k, v)], 1e-5
  for which, index in ((i, index) for i in range(3) for index in np.ndindex(*wanted[i].shape)):
    ends = []
    for sign in (1, -1):
      moved = [x.copy() for x in (q, k, v)]
      moved[which][index] += sign * step
      ends.append((attend_numpy(*moved, mask) * weight).sum())
    wanted[which][index] = (ends[0] - ends[1]) / (2 * step)
  assert_close(list(grads), wanted)


def test_attention_survives_large_scores_and_a_query_that_sees_nothing():
  q = jnp.full((1, 2, 2, 4), 1e4)
  k, v = jnp.full((1, 3, 1, 4), 1e4), jnp.ones((1, 3, 1, 4))
  mask = jnp.array([[[True, True, False], [False, False, False]]])
  o, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
  np.testing.assert_allclose(o, 1, rtol=1e-6)
  assert all(np.isfinite(x).all() for x in back(o))


def test_rotary_turns_the_pairs_of_the_two_halves(assert_close):
  rng = np.random.default_rng(0)
  x, positions = rng.standard_normal((2, 5, 3, 8)), rng.integers(0, 40, (2, 5))
  assert_close(rotary(jnp.asarray(x, jnp.float32), jnp.asarray(positions), 100.0), rotary_numpy(x, positions, 100.0))
  np.testing.assert_array_equal(rotary(jnp.asarray(x), jnp.zeros((2, 5), int), 100.0), jnp.asarray(x))


def test_scores_depend_on_relative_positions_only(assert_close):
  rng = np.random.default_rng(1)
  q, k = (jnp.asarray(rng.standard_normal((1, 6, 2, 8)), jnp.float32) for _ in range(2))
  scores = lambda shift: np.einsum('blhk,bshk->bhls', *(rotary(x, jnp.arange(6)[None] + shift, 100.0) for x in (q, k)))
  assert_close(scores(37), scores(0))
  assert np.abs(scores(0) - np.einsum('blhk,bshk->bhls', q, k)).max() > 0.1


def test_rms_norm_is_its_equation_in_float32_and_keeps_the_type(assert_close):
  rng = np.random.default_rng(0)
  x, scale = rng.standard_normal((2, 3, 16)) * 5, rng.standard_normal(16)
  assert_close(rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), 0.5), norm_numpy(x, scale, 0.5))
  half = jnp.asarray(x, jnp.bfloat16)
  found = rms_norm(half, jnp.asarray(scale, jnp.float32), 1e-6)
  assert found.dtype == jnp.bfloat16
  assert_close(found, norm_numpy(np.float64(half), scale, 1e-6), 2**-8)  # rounded once, at the end


@pytest.mark.parametrize('qkv_bias', [False, True])
@pytest.mark.parametrize('qk_norm', [False, True])
def test_a_block_is_its_equations(tiny, random_model, qk_norm, qkv_bias, assert_close):
  c = tiny(qk_norm=qk_norm, qkv_bias=qkv_bias, rope_base=50.0, norm_epsilon=0.1)
  block = jax.tree.map(lambda x: x[0], random_model(c).trunk)
  x = np.random.default_rng(0).standard_normal((2, 6, 16))
  positions = np.array([[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 0, 0]])
  run = jax.jit(lambda block, x: block(x, positions, documents(jnp.asarray(SEGMENTS_BL)))[0])
  found = run(block, jnp.asarray(x, jnp.float32))

  parts = block, block.attention, block.feed_forward
  w = {name: np.float64(getattr(part, name)[...]) for part in parts for name in vars(part) if name[-1].isupper()}
  h = norm_numpy(x, w['attention_norm_D'], 0.1)
  q, k, v = (np.einsum('bld,dhk->blhk', h, w[name]) for name in ('wq_DHK', 'wk_DGK', 'wv_DGK'))
  if qkv_bias:
    q, k, v = q + w['q_bias_HK'], k + w['k_bias_GK'], v + w['v_bias_GK']
  if qk_norm:
    q, k = norm_numpy(q, w['q_norm_K'], 0.1), norm_numpy(k, w['k_norm_K'], 0.1)
  o = attend_numpy(rotary_numpy(q, positions, 50.0), rotary_numpy(k, positions, 50.0), v, mask_numpy(SEGMENTS_BL))
  x = x + np.einsum('blhk,hkd->bld', o, w['wo_HKD'])
  h = norm_numpy(x, w['feed_forward_norm_D'], 0.1)
  gate = h @ w['gate_DF']
  assert_close(found, x + (gate / (1 + np.exp(-gate)) * (h @ w['up_DF'])) @ w['down_FD'])


def test_new_entries_are_written_at_their_positions_and_those_outside_are_dropped():
  old = jnp.arange(10).reshape(2, 5)
  found = write(old, jnp.array([[-1, -2, -3], [-4, -5, -6]]), jnp.array([[4, 0, 5], [-1, 2, 3]]))
  np.testing.assert_array_equal(found, [[-2, 1, 2, 3, -1], [5, 6, -5, -6, 9]])


def test_a_cache_shows_a_query_the_slots_up_to_its_own_and_no_other_sequence(tiny, assert_close):
  """Written in two pieces, some slots twice, against attention over all that each query may see."""
  rng, c, B, S = np.random.default_rng(0), tiny(), 2, 6
  random = lambda heads: jnp.asarray(rng.standard_normal((B, S, heads, c.head_width)), jnp.float32)
  q, k, v = random(c.heads), random(c.kv_heads), random(c.kv_heads)
  cache = Cache.empty(c, B, S)
  assert cache.k_RKS.shape == (4, 8, 6) and cache.v_RSK.shape == (4, 6, 8)
  first, second = jnp.array([[0, 1, 2], [0, 1, 2]]), jnp.array([[2, 3, 4, 9], [1, 2, 3, -1]])
  # what stood at slot 0 is seen, what stood later is written anew
  cache = cache.write(q[:, :3, :2] * 0 + 7, v[:, :3], first)
  at = lambda x, index: jnp.take_along_axis(x, jnp.clip(index, 0, S - 1)[..., None, None], 1)
  cache = cache.write(at(k, second), at(v, second), second)
  k = k.at[:, 0].set(7).at[0, 1].set(7)
  found = cache.attend(at(q, second), second)
  mask = jnp.arange(S) <= second[..., None]
  assert_close(found[:, :3], attend(at(q, second), k, v, mask)[:, :3])


def test_a_stack_holds_independent_modules_in_order():
  class Matrix(nnx.Module):
    def __init__(self, rngs):
      self.w_DF = matrix(rngs, 16, 16, 20)

  key = jax.random.key(3)
  stacked = np.asarray(stack(Matrix, 3, key).w_DF[...])
  assert stacked.shape == (3, 16, 20)
  np.testing.assert_array_equal(stacked[1], Matrix(nnx.Rngs(jax.random.split(key, 3)[1])).w_DF[...])
  assert len({w_DF.tobytes() for w_DF in stacked}) == 3
  assert 0.7 / 4 < stacked.std() < 1.0 / 4  # a normal of variance 1/16, cut at two sigma
  assert stack(Matrix, 0, key).w_DF.shape == (0, 16, 20)


KERNELS = {'tpu': functools.partial(kernels.splash, interpret=True),
           'gpu': functools.partial(kernels.cudnn, implementation='xla')}


@pytest.mark.parametrize('mesh',
                         [MeshConfig(fsdp=2, tensor=2), MeshConfig(context=2, tensor=2),
                          MeshConfig(fsdp=2, context=4)], ids=str)
@pytest.mark.parametrize('kernel', KERNELS)
def test_a_kernel_is_attention_within_documents_wherever_the_positions_lie(kernel, mesh, assert_close):
  """The TPU's interpreted, the call of the GPU's in XLA; with grouped heads, packed documents and
  padding; gradients too; against no mesh at all.
  """
  rng, c = np.random.default_rng(0), mesh.context
  B, L, H, G, K = 2, 128 * c, 4, 2, 64
  q, k, v, g = (rng.standard_normal((B, L, heads, K)).astype(np.float32) for heads in (H, G, G, H))
  segments = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [50 * c, c, 60 * c, 17 * c], axis=1).astype(np.int32)
  run = lambda attention: jax.jit(lambda q, k, v, g: (lambda o, back: (o, *back(g)))(*jax.vjp(attention, q, k, v)))
  wanted = run(lambda q, k, v: attend(q, k, v, documents(jnp.asarray(segments)).mask_BLS))(q, k, v, g)

  def on_mesh(q, k, v, g, segments_BL):
    keys = documents(to_mesh_order(segments_BL))
    whole = lambda x_BLGK: place(to_mesh_order(x_BLGK, 'BLGK'), 'BSGK')

    def attention(q, k, v):
      return KERNELS[kernel](to_mesh_order(q, 'BLHK'), whole(k), whole(v), keys.segments_BL, keys.mask_BLS)

    o, back = jax.vjp(attention, q, k, v)
    return (to_text_order(o), *back(to_mesh_order(g, 'BLHK')))

  with jax.set_mesh(make_mesh(mesh)):
    found = jax.jit(on_mesh)(*map(jnp.asarray, (q, k, v, g, segments)))
  assert_close(found, wanted, 1e-4)


H100 = 'NVIDIA H100 80GB HBM3'


@pytest.mark.parametrize('kind, dtype, length, widths, kernel', [
    (H100, 'bfloat16', 100, (64, 64), kernels.cudnn), (H100, 'float32', 100, (64, 64), None),
    (H100, 'bfloat16', 100, (96, 64), kernels.cudnn), (H100, 'bfloat16', 100, (192, 128), None),
    ('TPU v5p', 'float32', 256, (64, 64), kernels.splash), ('TPU v5p', 'bfloat16', 128, (64, 64), None),
    ('TPU v5p', 'bfloat16', 256, (192, 128), kernels.splash), ('TPU v5p', 'bfloat16', 256, (144, 128), None),
    ('cpu', 'bfloat16', 256, (64, 64), None)])
def test_a_mesh_of_chips_runs_its_kernel_where_the_shapes_fit(kind, dtype, length, widths, kernel):
  """Two devices share the length, of which 128 positions are no whole tile each. The mesh is only
  described.
  """
  platform = {'N': 'cuda', 'T': 'tpu', 'c': 'cpu'}[kind[0]]
  device = jax.sharding.AbstractDevice(kind, None, platform)
  mesh = jax.sharding.AbstractMesh((1, 1, 2, 1, 1), AXES, axis_types=(AxisType.Explicit,) * 5, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    wide, narrow = (jax.ShapeDtypeStruct((1, length, 2, width), dtype) for width in widths)
    assert kernels.kernel_for(wide, narrow) is kernel


def test_documents_attend_by_the_kernel_of_the_mesh_where_there_is_one(monkeypatch):
  """The kernel is called with segments and mask; without one, the plain softmax runs."""
  segments_BL = jnp.ones((1, 4), int)
  x = jnp.ones((1, 4, 2, 8))
  keys = documents(segments_BL).write(x, x, None)
  np.testing.assert_allclose(keys.attend(x, None), 1, rtol=1e-6)
  monkeypatch.setattr(kernels, 'kernel_for', lambda q, v: lambda q, k, v, segments, mask: (q, k, v, segments, mask))
  for given, passed_on in zip(keys.attend(x, None), (x, x, x, keys.segments_BL, keys.mask_BLS)):
    np.testing.assert_array_equal(given, passed_on)


def test_the_parts_of_a_block_count_the_flops_of_their_matrices_and_of_attention(tiny, random_model):
  c = tiny()
  block = jax.tree.map(lambda x: x[0], random_model(c).trunk)
  products = lambda part: 2 * sum(x.size for x in jax.tree.leaves(part) if x.ndim > 1)
  assert SwiGLU.flops(c) == products(block.feed_forward)
  assert type(block.attention).flops(c, 10) == products(block.attention) + 4 * c.heads * c.head_width * 10
  assert Block.flops(c, 10) == SwiGLU.flops(c) + type(block.attention).flops(c, 10)


@pytest.mark.parametrize('n', [2, 4])
def test_a_feed_forward_layer_in_stretches_is_the_layer_at_once_with_as_many_products(
    tiny, random_model, monkeypatch, n, assert_close):
  """Recomputed in the backward pass, as config.model.remat='full' does."""
  c, rng = tiny(feed_forward=512, remat='full'), np.random.default_rng(0)
  layer = jax.tree.map(lambda x: x[0], random_model(c).trunk.feed_forward)
  h_BLD, dy_BLD = rng.standard_normal((2, 3, 6, 16)).astype(np.float32)

  def run(layer, h_BLD, dy_BLD):
    y_BLD, back = jax.vjp(jax.checkpoint(lambda layer, h_BLD: layer(h_BLD)), layer, h_BLD)
    return y_BLD, back(dy_BLD)

  def traced():
    traced = jax.jit(lambda *inputs: run(*inputs)).trace(layer, h_BLD, dy_BLD)
    return costs.matmul_flops(traced.jaxpr.jaxpr), traced.lower().compile()(layer, h_BLD, dy_BLD)

  flops, wanted = traced()
  monkeypatch.setattr(feed_forward, 'NARROWEST', 128)
  monkeypatch.setattr(feed_forward, 'LARGEST_BYTES', 3 * 6 * 4 * 512 // n)
  assert feed_forward.stretches(c, h_BLD, 512) == n
  found_flops, found = traced()
  assert_close(found, wanted)
  assert found_flops == flops
