"""Parameters and FLOPs against counts of leaves and of the operations traced; the digest of parameters."""
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from mtp_jax import objective
from mtp_jax.config import Config, DataConfig, MeshConfig, ModelConfig, ObjectiveConfig, TrainConfig
from mtp_jax.mesh import make_mesh
from mtp_jax.model import costs, feed_forward, kernels
from mtp_jax.model.model import Model
from mtp_jax.objective import Read
from mtp_jax.sharding import place, shardings, spec
from mtp_jax.train import step as training

LENGTH = 16


def shapes(c: ModelConfig):
  return jax.eval_shape(functools.partial(Model, c), jax.random.key(0))


def unrolled_flops(function, *arguments) -> int:
  """2 x the multiply-adds of every matrix product, counted from its operands, of a function traced
  with its scans unrolled; loops over tiles of experts count as often as an even load needs.
  """
  def walk(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
      assert equation.primitive.name != 'scan', equation
      tiles = re.search(r'about_(\d+)_times', str(equation.source_info.name_stack))
      if equation.primitive.name == 'dot_general':
        (contracted, _), (shared, _) = equation.params['dimension_numbers']
        left, right = (x.aval.shape for x in equation.invars)
        total += 2 * math.prod(left) * math.prod(right) // math.prod(left[i] for i in contracted + shared)
      times = int(tiles.group(1)) if equation.primitive.name == 'while' and tiles else 1
      total += times * sum(walk(inner) for inner in jaxprs_in_params(equation.params))
    return total

  with jax.disable_jit():
    return walk(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_matrix_products_are_counted_as_often_as_they_run():
  @jax.checkpoint
  def body(x, w):
    return jax.jit(jnp.matmul)(x, w), jnp.einsum('ij,kj->ik', x, x)

  def function(x, w_nij, a, b):
    return jax.lax.scan(body, x, w_nij), jax.vmap(jnp.matmul)(a, b), jnp.sum(x * x)

  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, np.float32)
  arguments = shape(2, 3), shape(7, 3, 3), shape(4, 2, 5), shape(4, 5, 3)
  wanted = 2 * (7 * (2 * 3 * 3 + 2 * 3 * 2) + 4 * 2 * 5 * 3)
  assert costs.matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr) == unrolled_flops(function,
                                                                                          *arguments) == wanted


@pytest.mark.parametrize('sizes, length', [({'fsdp': 2, 'tensor': 2}, 1024), ({'context': 2, 'fsdp': 2}, 4096)],
                         ids=str)
def test_of_a_tpus_attention_the_tiles_that_causality_leaves_are_counted(sizes, length):
  """Of each two in the forward pass, seven in the backward pass, which makes scores and their
  gradients once for queries and once for keys; and once sum(o * do)."""
  tile, (B, H, K) = 512, (4, 4, 64)

  def attention(q, g, segments_BL):
    k = place(q, 'BSGK')
    return jax.vjp(lambda q, k: kernels.splash(q, k, k, segments_BL, interpret=True), q, k)[1](g)

  shape = lambda letters, *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype,
                                                                          sharding=jax.NamedSharding(mesh,
                                                                                                     spec(letters)))
  mesh = make_mesh(MeshConfig(**sizes))
  with jax.set_mesh(mesh):
    x = shape('BLHK', B, length, H, K)
    found = costs.matmul_flops(jax.make_jaxpr(attention)(x, x, shape('BL', B, length, dtype=jnp.int32)).jaxpr)
  tiles = sum(keys <= queries for queries in range(length // tile) for keys in range(length // tile))
  assert found == B * H * 2 * K * (tiles * (2 + 3 + 4) * tile * tile + length)


def loss_of(c: ModelConfig):
  """(function of a model, its gradient, arguments) of the loss."""
  batch = {name: jax.ShapeDtypeStruct((2, LENGTH + c.futures), np.int32) for name in ('tokens', 'segments',
                                                                                      'positions')}
  forward = lambda model, batch: objective.loss(model, Read.of(batch, c.futures), jnp.ones(c.futures),
                                                ObjectiveConfig(chunk=8))
  return forward, jax.value_and_grad(forward, has_aux=True), (shapes(c), batch)


@pytest.mark.parametrize('futures', [1, 4])
@pytest.mark.parametrize('placement', ['matched', 'appended'])
def test_flops_are_those_of_the_operations_traced(tiny, variant, placement, futures):
  c = tiny(layers=6, futures=futures, placement=placement, **variant)
  forward, gradient, arguments = loss_of(dataclasses.replace(c, remat='none'))
  count = lambda function: costs.matmul_flops(jax.make_jaxpr(function)(*arguments).jaxpr) / (2 * LENGTH)
  claimed, again = costs.flops_per_token(c, LENGTH), costs.recomputed_flops_per_token(c, LENGTH)
  assert 3 * count(forward) == claimed['total']
  assert count(gradient) == claimed['total'] + again
  assert claimed['total'] == claimed['trunk'] + claimed['futures'] + claimed['unembedding']


def test_causal_flops_count_half_the_keys_of_a_row(tiny, variant):
  c = tiny(layers=6, **variant)
  whole, causal = (costs.flops_per_token(c, LENGTH, causal=causal) for causal in (False, True))
  assert causal == costs.flops_per_token(c, LENGTH // 2) and causal['unembedding'] == whole['unembedding']
  assert whole['trunk'] - causal['trunk'] == 3 * c.trunk_layers * 2 * c.heads * c.head_width * LENGTH


def test_a_train_steps_count_is_that_of_its_scans_unrolled(tiny, variant):
  _, gradient, arguments = loss_of(tiny(layers=6, **variant))
  assert costs.matmul_flops(jax.make_jaxpr(gradient)(*arguments).jaxpr) == unrolled_flops(gradient, *arguments)


@pytest.mark.parametrize('changes',
                         [{}, {'tie_embeddings': True}, {'qk_norm': True}, {'futures': 1},
                          {'kind': 'sequential', 'futures': 1}], ids=str)
def test_parameters_are_the_sizes_of_the_leaves(tiny, variant, changes):
  model = shapes(tiny(**(variant if 'kind' not in changes else {}) | changes))
  size = lambda part: sum(math.prod(x.shape) for x in jax.tree.leaves(part))
  found = costs.parameters(model)
  assert found['total'] == size(model) == sum(found[part] for part in costs.PARTS)
  assert found['embedding'] == size(model.embed_VD)
  assert found['trunk'] == size(model.stacks) + size(model.final_norm_D)
  assert found['futures'] == (size(model.futures) if hasattr(model, 'futures') else 0)
  routed = [x for path, x in jax.tree_util.tree_leaves_with_path(model) if re.search('_E(DW|WD)', str(path))]
  idle = sum(math.prod(x.shape) for x in routed) * 3 // 4 + (0 if model.config.tie_embeddings else 23 * 16)
  assert found['active'] == found['total'] - idle
  assert found['unembedding'] == (0 if model.config.tie_embeddings else size(model.unembed_VD))


@pytest.mark.parametrize('futures', [2, 3, 4])
def test_the_next_token_twin_of_matched_futures_has_as_many_parameters(tiny, futures):
  c = tiny(futures=futures)
  twin = dataclasses.replace(c, futures=1)
  assert costs.parameters(shapes(c))['total'] == costs.parameters(shapes(twin))['total']


@pytest.mark.parametrize('mesh',
                         [MeshConfig(fsdp=4, tensor=2), MeshConfig(data=2, fsdp=2, tensor=2),
                          MeshConfig(tensor=2)], ids=str)
def test_the_digest_of_the_parameters_is_the_same_on_any_mesh(tiny, random_model, mesh):
  model = random_model(tiny())
  assert costs.parameters_sha256(jax.device_put(model,
                                                shardings(model, make_mesh(mesh)))) == costs.parameters_sha256(model)


def test_the_digest_of_the_parameters_sees_one_bit(tiny, random_model):
  model = random_model(tiny())
  leaves, structure = jax.tree.flatten(model)
  digests = {costs.parameters_sha256(model)}
  for i, leaf in enumerate(leaves):
    bits = np.array(leaf).view(np.uint32)
    bits.flat[-1] ^= 1
    digests.add(costs.parameters_sha256(jax.tree.unflatten(structure,
                                                           [*leaves[:i], bits.view(np.float32), *leaves[i + 1:]])))
  assert len(digests) == len(leaves) + 1


@pytest.mark.parametrize('kind', ['parallel', 'sequential'])
def test_a_feed_forward_in_stretches_adds_no_product_to_a_step(tiny, monkeypatch, kind):
  """With every block recomputed, in the trunk and in the heads."""
  config = Config(tiny(kind=kind, feed_forward=512, remat='full'), data=DataConfig(length=8),
                  train=TrainConfig(batch=2, evaluate_rows=2))
  at_once = training.counted_flops_per_token(config)
  monkeypatch.setattr(feed_forward, 'NARROWEST', 128)
  monkeypatch.setattr(feed_forward, 'LARGEST_BYTES', 1)
  assert feed_forward.stretches(config.model, jnp.zeros((2, 8, 16)), 512) == 4
  assert training.counted_flops_per_token(config) == at_once
