"""Multi-head latent attention against loops in float64, its absorbed form and its cache against the plain form."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import LATENT
from flax import nnx
from jax.sharding import PartitionSpec as P

from mtp_jax.config import Config, MeshConfig, ModelConfig
from mtp_jax.measure import certify
from mtp_jax.mesh import make_mesh, to_mesh_order, to_text_order
from mtp_jax.model import kernels
from mtp_jax.model.attention import attend, documents
from mtp_jax.model.block import Block
from mtp_jax.model.feed_forward import SwiGLU
from mtp_jax.model.latent import LatentAttention, LatentCache
from mtp_jax.sharding import name, parameter_spec, place

SEGMENTS_BL = np.array([[1, 1, 1, 2, 3, 3, 3], [1, 2, 2, 2, 2, 0, 0]])
POSITIONS_BL = np.array([[0, 1, 2, 0, 0, 1, 2], [0, 0, 1, 2, 3, 0, 1]])
MASK_BLS = (SEGMENTS_BL[:, :, None] == SEGMENTS_BL[:, None, :]) & np.tril(np.ones((7, 7), bool))
B, L, D = 2, 7, 16


@pytest.fixture(params=[LATENT, LATENT | {'query_rank': 0}], ids=['queries compressed', 'queries whole'])
def c(request, tiny) -> ModelConfig:
  return tiny(**request.param, rope_base=50.0, norm_epsilon=0.1)


def attention_of(c: ModelConfig) -> LatentAttention:
  """Random parameters, norm scales included."""
  rng = np.random.default_rng(0)
  shapes = nnx.eval_shape(lambda: LatentAttention(c, nnx.Rngs(0)))
  fill = lambda path, x: jnp.asarray(('norm' in jax.tree_util.keystr(path)) + 0.3 * rng.standard_normal(x.shape),
                                     jnp.float32)
  return jax.tree_util.tree_map_with_path(fill, shapes)


def states(seed: int = 1):
  return np.random.default_rng(seed).standard_normal((B, L, D)).astype(np.float32)


@jax.jit
def plain(attention, h_BLD, positions_BL, segments_BL):
  """The form that training runs."""
  return attention(h_BLD, positions_BL, attention.write(h_BLD, positions_BL, documents(segments_BL)))


def by_hand(xp, c: ModelConfig, w: dict, h_BLD, positions_BL, mask_BLS):
  """The equations, one row, head and query at a time, in numpy or jax.numpy."""
  K, o = c.head_width, c.rope_width

  def norm(x, scale):
    return x / xp.sqrt((x * x).mean(-1, keepdims=True) + c.norm_epsilon) * scale

  def turned(x_Lo, positions_L):
    angle = positions_L[:, None] * c.rope_base ** (-2 * np.arange(o // 2) / o)
    a, b = x_Lo[:, :o // 2], x_Lo[:, o // 2:]
    return xp.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

  rows = []
  for b in range(len(h_BLD)):
    h, positions = h_BLD[b], positions_BL[b]
    latent = norm(h @ w['kv_down_DA'], w['kv_norm_A'])
    k_rotary, y = turned(h @ w['k_rotary_Do'], positions), 0
    for i in range(c.heads):
      q = norm(h @ w['q_down_DU'], w['q_norm_U']) @ w['q_up_UHJ'][:, i] if c.query_rank else h @ w['wq_DHJ'][:, i]
      q_rotary = turned(q[:, K:], positions)
      k, v, read = latent @ w['k_up_AHK'][:, i], latent @ w['v_up_AHK'][:, i], []
      for t in range(len(h)):
        seen = np.flatnonzero(mask_BLS[b, t])
        scores = (k[seen] @ q[t, :K] + k_rotary[seen] @ q_rotary[t]) / np.sqrt(K + o)
        p = xp.exp(scores - scores.max())
        read.append(p @ v[seen] / p.sum())
      y = y + xp.stack(read) @ w['wo_HKD'][i]
    rows.append(y)
  return xp.stack(rows)


def weights(attention, dtype=np.float64) -> dict:
  leaves = jax.tree_util.tree_leaves_with_path(attention)
  return {name(path): np.asarray(leaf, dtype) for path, leaf in leaves}


def test_latent_attention_is_its_equations_within_documents(c, assert_close):
  attention, h = attention_of(c), states()
  assert ('wq_DHJ' in weights(attention)) == (c.query_rank == 0)
  found = plain(attention, h, POSITIONS_BL, jnp.asarray(SEGMENTS_BL))
  assert_close(found, by_hand(np, c, weights(attention), np.float64(h), POSITIONS_BL, MASK_BLS))


def test_its_gradients_are_those_of_the_equations(c, assert_close):
  """JAX's own gradients of the loops, which know no kernel and no backward pass written by hand."""
  attention, h, weight = attention_of(c), states(), states(2)
  found = jax.jit(jax.grad(lambda a, h: jnp.sum(weight * plain(a, h, POSITIONS_BL, jnp.asarray(SEGMENTS_BL))),
                           (0, 1)))(attention, h)
  wanted = jax.jit(jax.grad(lambda w, h: jnp.sum(weight * by_hand(jnp, c, w, h, POSITIONS_BL, MASK_BLS)),
                            (0, 1)))(weights(attention, np.float32), h)
  assert_close((weights(found[0]), found[1]), wanted, 3e-5)


def test_a_packed_document_reads_what_it_reads_alone(c, assert_close):
  attention, h = attention_of(c), states()
  together = plain(attention, h, POSITIONS_BL, jnp.asarray(SEGMENTS_BL))
  alone = plain(attention, h[:1, 4:], np.array([[0, 1, 2]]), jnp.ones((1, 3), int))
  assert_close(together[0, 4:], alone[0])


def test_positions_act_through_the_rotary_part_alone(c, assert_close):
  """Without it they change nothing; with it only their differences count."""
  attention, h, ones = attention_of(c), states(), jnp.ones((B, L), int)
  far = 3 * POSITIONS_BL + 100
  read = lambda attention, positions: plain(attention, h, positions, ones)
  assert_close(read(attention, POSITIONS_BL + 9), read(attention, POSITIONS_BL), 1e-4)
  assert not np.allclose(read(attention, far), read(attention, POSITIONS_BL), atol=1e-2)
  without = nnx.clone(attention)
  without.k_rotary_Do = nnx.Param(jnp.zeros_like(attention.k_rotary_Do[...]))
  assert_close(read(without, far), read(without, POSITIONS_BL))


def test_the_absorbed_form_reads_what_the_expanded_keys_and_values_give(c, assert_close):
  """Queries of a random latent cache against softmax attention over every head's own keys and values."""
  attention, rng, S = attention_of(c), np.random.default_rng(3), 9
  H, K, A, o = c.heads, c.head_width, c.kv_rank, c.rope_width
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  q_BLHK, q_BLHo, c_BSA, r_BSo = normal(B, 3, H, K), normal(B, 3, H, o), normal(B, S, A), normal(B, S, o)
  k_up, v_up = attention.k_up_AHK[...], attention.v_up_AHK[...]
  positions_BL = np.array([[0, 4, 8], [3, 3, 5]])

  k_BSHJ = jnp.concatenate([jnp.einsum('BSA,AHK->BSHK', c_BSA, k_up), jnp.repeat(r_BSo[:, :, None], H, 2)], -1)
  wanted = attend(jnp.concatenate([q_BLHK, q_BLHo], -1), k_BSHJ, jnp.einsum('BSA,AHK->BSHK', c_BSA, v_up),
                  jnp.arange(S) <= positions_BL[..., None])
  scaling = (K + o)**-0.5
  o_BLHA = LatentCache(c_BSA, r_BSo).attend(scaling * jnp.einsum('BLHK,AHK->BLHA', q_BLHK, k_up), scaling * q_BLHo,
                                            positions_BL)
  assert_close(jnp.einsum('BLHA,AHK->BLHK', o_BLHA, v_up), wanted)


@pytest.mark.parametrize('pieces', [[1] * L, [3, 1, 2, 1], [L], [2, 4, 1]], ids=str)
def test_the_cached_form_is_the_uncached_one_however_many_tokens_a_pass_reads(c, pieces, assert_close):
  """Every pass also writes a wrong token after its own, as a rejected draft does; the cache grows on the way."""
  attention, h = attention_of(c), states()
  wanted = plain(attention, h, np.arange(L)[None] + np.zeros((B, 1), int), jnp.ones((B, L), int))
  cache, found, start = LatentCache.empty(c, B, 5), [], 0

  @jax.jit
  def run(h_BiD, positions_Bi, cache):
    cache = attention.write(h_BiD, positions_Bi, cache)
    return attention(h_BiD, positions_Bi, cache), cache

  for n in pieces:
    cache = cache.grown(12) if start + n > 4 else cache
    tokens = np.concatenate([h[:, start:start + n], states(5)[:, :1]], 1)
    read, cache = run(tokens, np.tile(np.arange(start, start + n + 1), (B, 1)), cache)
    found.append(read[:, :n])
    start += n
  assert cache.c_BSA.shape == (B, 12, c.kv_rank) and cache.r_BSo.shape == (B, 12, c.rope_width)
  assert_close(jnp.concatenate(found, 1), wanted)


def test_a_latent_cache_holds_kv_rank_and_rope_width_numbers_a_token(c):
  cache = LatentCache.empty(c, 3, 10)
  assert sum(x.size for x in jax.tree.leaves(cache)) == 3 * 10 * (c.kv_rank + c.rope_width)


def test_ranks_are_where_the_width_is_and_heads_over_tensor(tiny):
  WIDTH = ('fsdp', 'expert')
  leaves = jax.tree_util.tree_leaves_with_path(attention_of(tiny(**LATENT)))
  assert {name(path): parameter_spec(path, leaf) for path, leaf in leaves} == {
      'q_down_DU': P(WIDTH, None), 'q_norm_U': P(None), 'q_up_UHJ': P(WIDTH, 'tensor', None),
      'kv_down_DA': P(WIDTH, None), 'kv_norm_A': P(None), 'k_rotary_Do': P(WIDTH, None),
      'k_up_AHK': P(WIDTH, 'tensor', None), 'v_up_AHK': P(WIDTH, 'tensor', None), 'wo_HKD': P('tensor', None, WIDTH)}


def test_the_flops_of_latent_attention_are_those_of_its_matrices_scores_and_values(c):
  attention, H, K = attention_of(c), c.heads, c.head_width
  matrices = 2 * sum(x.size for matrix, x in weights(attention).items() if 'norm' not in matrix)
  scores, values = 2 * H * (K + c.rope_width) * 10, 2 * H * K * 10
  assert LatentAttention.flops(c, 10) == matrices + scores + values
  assert LatentAttention.score_flops(c, 10) == scores
  assert Block.flops(c, 10) == LatentAttention.flops(c, 10) + SwiGLU.flops(c)


KERNELS = {'tpu': functools.partial(kernels.splash, interpret=True),
           'gpu': functools.partial(kernels.cudnn, implementation='xla')}


@pytest.mark.parametrize('mesh', [MeshConfig(fsdp=2, tensor=2), MeshConfig(context=2, tensor=2)], ids=str)
@pytest.mark.parametrize('kernel', KERNELS)
def test_a_kernel_takes_keys_that_are_wider_than_values(kernel, mesh, assert_close):
  """192 and 128, as in DeepSeek-V3; gradients too; against no mesh at all."""
  rng, context = np.random.default_rng(0), mesh.context
  length, H, J, K = 128 * context, 2, 192, 128
  q, k, v, g = (rng.standard_normal((2, length, H, width)).astype(np.float32) for width in (J, J, K, K))
  segments = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [50 * context, context, 60 * context, 17 * context], axis=1)
  both = lambda attention, *inputs: (lambda o, back: (o, back))(*jax.vjp(attention, *inputs))

  @jax.jit
  def without_mesh(q, k, v, g):
    o, back = both(lambda q, k, v: attend(q, k, v, documents(jnp.asarray(segments)).mask_BLS), q, k, v)
    return o, *back(g)

  def on_mesh(q, k, v, g, segments_BL):
    keys = documents(to_mesh_order(segments_BL))
    whole = lambda x: place(to_mesh_order(x, 'BLGK'), 'BSGK')
    run = lambda q, k, v: KERNELS[kernel](to_mesh_order(q, 'BLHK'), whole(k), whole(v), keys.segments_BL, keys.mask_BLS)
    o, back = both(run, q, k, v)
    return to_text_order(o), *back(to_mesh_order(g, 'BLHK'))

  with jax.set_mesh(make_mesh(mesh)):
    found = jax.jit(on_mesh)(*map(jnp.asarray, (q, k, v, g, segments)))
  assert_close(found, without_mesh(q, k, v, g), 1e-4)


TRUNK = {'kind': 'sequential', 'module_input': 'trunk'}
CERTIFIED = {'latent': LATENT | {'kind': 'sequential'}, 'modules of the trunk': TRUNK,
             'whole queries, experts and modules of the trunk': LATENT | TRUNK | {'query_rank': 0, 'experts': 8}}


@pytest.mark.parametrize('fields', CERTIFIED.values(), ids=CERTIFIED)
def test_latent_attention_and_modules_of_the_trunk_are_certified(fields):
  config = Config(ModelConfig(futures=4, **fields))
  twin = certify.small(config)
  assert twin.model.attention == config.model.attention and bool(twin.model.query_rank) == bool(config.model.query_rank)
  findings = list(certify.certify(config))
  assert len(findings) >= 12 and all(finding.holds for finding in findings), findings
