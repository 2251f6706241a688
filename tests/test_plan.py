"""Ahead of time, for TPU slices that are not here: what grows with the futures and what does not."""
import dataclasses
import importlib.util

import jax
import pytest

from mtp_jax import metrics, plan
from mtp_jax.config import BadInput, Config, DataConfig, MeshConfig, ModelConfig, ObjectiveConfig, TrainConfig
from mtp_jax.model import Model

needs_compiler = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason="needs the TPU compiler: pip install -e '.[tpu]'")


def gloeckle(futures: int, kind: str = 'parallel', layers: int = 18, **changes) -> Config:
  """0.3B of Table S14, with 18 layers."""
  model = ModelConfig(vocab=32_000, width=1024, layers=layers, heads=16, kv_heads=16, head_width=64, feed_forward=2752, futures=futures, kind=kind,
                      dtype='bfloat16', **changes)
  return Config(model, ObjectiveConfig(), DataConfig(length=4096), train=TrainConfig(batch=32, evaluate_rows=32), mesh=MeshConfig(fsdp=8))


def test_without_a_compiler_the_command_says_how_to_get_one(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(BadInput, match=r"--topology: needs the TPU compiler; install it with: pip install -e '\.\[tpu\]'"):
    plan.plan(gloeckle(1), 'v5p:2x2x2')


@needs_compiler
def test_a_mesh_must_use_every_chip():
  with pytest.raises(BadInput, match='config.mesh: 4 devices, but v5p:2x2x2 has 8; such as --config.mesh.fsdp=8'):
    plan.plan(dataclasses.replace(gloeckle(1), mesh=MeshConfig(fsdp=4)), 'v5p:2x2x2')
  with pytest.raises(BadInput, match='--topology=v9: .*write such as v5p:2x2x2'):
    plan.plan(gloeckle(1), 'v9')


@needs_compiler
@pytest.mark.slow
def test_four_futures_cost_a_chip_the_memory_of_one_and_the_flops_they_should():
  """At equal parameters. Recomputation apart: with remat='full' a trunk block is run once more, a head is not."""
  one, four = (plan.plan(gloeckle(M, remat='full'), 'v5p:2x2x2') for M in (1, 4))
  assert four.hbm_bytes <= 1.05 * one.hbm_bytes
  assert four.counted_flops_per_token / one.counted_flops_per_token <= 1.02 * four.model_flops_per_token / one.model_flops_per_token


@needs_compiler
@pytest.mark.slow
def test_eight_heads_take_the_temporary_memory_of_one():
  """At the peak and besides arguments, beside a trunk of the same depth, the gradients of the heads apart: a step holds those of all parameters."""
  one, eight = (plan.plan(gloeckle(M, layers=4 + (M > 1), placement='appended'), 'v5p:2x2x2') for M in (1, 8))
  heads = metrics.parameters(jax.eval_shape(lambda: Model(gloeckle(8).model, jax.random.key(0))))['futures']
  gradients = heads * 4 / 8  # bytes on each of eight chips
  alive = lambda p: p.hbm_bytes - p.argument_bytes
  assert alive(eight) - gradients <= 1.10 * alive(one)
