"""AdamW against NumPy in float64, schedules against formulas, groups against a table."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import objective
from mtp_jax.config import ObjectiveConfig, OptimizerConfig
from mtp_jax.config.weights import weight_at
from mtp_jax.train import optimizer

DECAYED = {'embed_VD', 'unembed_VD', 'wq_DHK', 'wk_DGK', 'wv_DGK', 'wo_HKD', 'gate_DF', 'up_DF',
           'down_FD', 'join_CD', 'map_Dd', 'router_DE', 'gate_EDW', 'up_EDW', 'down_EWD'}
PLAIN = {'final_norm_D', 'attention_norm_D', 'feed_forward_norm_D', 'q_norm_K', 'k_norm_K',
         'embedding_norm_D', 'hidden_norm_D', 'out_norm_D', 'bias_E', 'q_bias_HK', 'k_bias_GK', 'v_bias_GK'}


def name(path) -> str:
  return [key.name for key in path if getattr(key, 'name', 'value') != 'value'][-1]


def rate(c: OptimizerConfig, step: int, steps: int) -> float:
  final = c.learning_rate * c.final_ratio
  if step < c.warmup_steps:
    return c.learning_rate * step / c.warmup_steps
  if c.schedule == 'cosine':
    share = min(1, (step - c.warmup_steps) / (steps - c.warmup_steps))
    return final + (c.learning_rate - final) * (1 + math.cos(math.pi * share)) / 2
  decay = c.decay_share * steps
  share = min(1, max(0, (step - (steps - decay)) / decay))
  return c.learning_rate + (final - c.learning_rate) * share


@pytest.mark.parametrize('schedule', ['cosine', 'wsd'])
@pytest.mark.parametrize('warmup', [0, 10])
def test_learning_rates_follow_their_formulas(schedule, warmup):
  c = OptimizerConfig(learning_rate=0.5, warmup_steps=warmup, schedule=schedule, decay_share=0.25,
                      final_ratio=0.1)
  found = jax.vmap(optimizer.schedule(c, 80))(jnp.arange(90))
  # a cosine in float32
  np.testing.assert_allclose(found, [rate(c, step, 80) for step in range(90)], rtol=2e-6)
  assert math.isclose(found[80], 0.05, rel_tol=2e-6) and math.isclose(max(found), 0.5, rel_tol=2e-6)


@pytest.mark.parametrize('clip', [0.5, 1e6], ids=['clipped', 'not clipped'])
def test_updates_are_adamw_as_written(tiny, random_model, clip, assert_close):
  c = OptimizerConfig(learning_rate=0.1, warmup_steps=2, clip=clip, weight_decay=0.3, epsilon=1e-3,
                      b1=0.8, b2=0.9)
  transform = optimizer.make(c, 10)
  model = random_model(tiny(kind='sequential', qk_norm=True))
  advance = jax.jit(transform.update)
  state = transform.init(model)
  paths, start = zip(*jax.tree_util.tree_leaves_with_path(model))
  wanted = [np.float64(p) for p in start]
  first, second = ([np.zeros(p.shape) for p in start] for _ in range(2))
  for step in range(4):
    grads = random_model(model.config, seed=step + 1)
    updates, state = advance(grads, state, model)
    model = jax.tree.map(jnp.add, model, updates)

    raw = [np.float64(g) for g in jax.tree.leaves(grads)]
    norm = math.sqrt(sum((g * g).sum() for g in raw))
    assert 0.5 < norm < 1e6
    for i, path in enumerate(paths):
      g = raw[i] * min(1, clip / norm)
      first[i] = 0.8 * first[i] + 0.2 * g
      second[i] = 0.9 * second[i] + 0.1 * g * g
      m, v = first[i] / (1 - 0.8**(step + 1)), second[i] / (1 - 0.9**(step + 1))
      direction = m / (np.sqrt(v) + 1e-3)
      decay = 0.3 * wanted[i] * (name(path) in DECAYED)
      wanted[i] = wanted[i] - rate(c, step, 10) * (direction + decay)
    assert_close(jax.tree.leaves(model), wanted)
    assert (step == 0) == all(np.array_equal(a, b)
                              for a, b in zip(jax.tree.leaves(model),
                                              start)), 'warm-up starts from 0'


@pytest.mark.parametrize('changes', [{}, {'tie_embeddings': True}], ids=['untied', 'tied'])
def test_every_parameter_gets_a_gradient_and_only_matrices_decay(
    tiny, random_model, packed, variant, changes):
  model = random_model(tiny(qk_norm=True, qkv_bias=True, layers=4, **variant, **changes))
  M = model.config.futures
  run = jax.jit(jax.grad(lambda model, batch: objective.loss(
      model, objective.Read.of(batch, M), jnp.ones(M), ObjectiveConfig(chunk=8))[0]))
  grads = run(model, packed(model.config, 2, 8))
  decayed = jax.tree_util.tree_leaves_with_path(optimizer.decayed(model))
  assert len(decayed) == len(jax.tree.leaves(model)) > 0
  for (path, decays), g in zip(decayed, jax.tree.leaves(grads)):
    assert decays == (name(path) in DECAYED) and name(path) in DECAYED | PLAIN
    is_stacked = any(part in jax.tree_util.keystr(path) for part in ('.trunk', '.expert_trunk', '.futures'))
    stacked = g if is_stacked else g[None]
    assert all(np.any(layer) for layer in stacked), jax.tree_util.keystr(path)


@pytest.mark.parametrize('path', ['1 cosine 0.676:0.966 0.1 step 0.989 0.033', '0.5 linear 0.25:0.5 1', '1'])
def test_a_path_of_the_learning_rate_is_that_of_the_words_after_a_warm_up(path):
  c = OptimizerConfig(learning_rate=2e-4, warmup_steps=100, schedule=path)
  rates = np.asarray(optimizer.schedule(c, 1000)(np.arange(1000)))
  wanted = [2e-4 * min(1, step / 100) * weight_at(path, step / 1000) for step in range(1000)]
  np.testing.assert_allclose(rates, wanted, 1e-5)
