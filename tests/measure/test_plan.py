"""Ahead of time, for TPU slices that are not here: memory, FLOPs and what chips send."""
import dataclasses
import functools
import importlib.util
import json
import re

import jax
import pytest

from mtp_jax.cli.main import main
from mtp_jax.config import (
    BadInput,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from mtp_jax.measure.plan import Plan, plan, spread
from mtp_jax.measure.topology import devices
from mtp_jax.model import costs
from mtp_jax.model.model import Model

needs_compiler = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                                    reason="needs the TPU compiler: pip install -e '.[tpu]'")


@pytest.fixture(scope='module', autouse=True)
def quick_compiler():
  """Optimises less: a sixth of the time, within 3 % of the memory."""
  jax.config.update('jax_optimization_level', 'O1')
  yield
  jax.config.update('jax_optimization_level', 'UNKNOWN')


def gloeckle(futures: int, kind: str = 'parallel', layers: int = 18, **changes) -> Config:
  """0.3B of Table S14, with 18 layers."""
  model = ModelConfig(vocab=32_000, width=1024, layers=layers, heads=16, kv_heads=16, head_width=64,
                      feed_forward=2816,
                      futures=futures, kind=kind, dtype='bfloat16', **changes)
  return Config(model, ObjectiveConfig(), DataConfig(length=4096),
                train=TrainConfig(batch=32, evaluate_rows=32),
                mesh=MeshConfig(fsdp=8))


def small(**changes) -> Config:
  """Compiles in seconds."""
  model = ModelConfig(vocab=264, width=64, layers=4, heads=2, kv_heads=2, head_width=32,
                      feed_forward=128, futures=2,
                      remat='full')
  config = Config(model, data=DataConfig(length=64), train=TrainConfig(batch=32, evaluate_rows=32))
  return dataclasses.replace(config, **changes)


def sent_bytes(made: Plan) -> float:
  return sum(sum(by_axes.values()) for by_axes in made.collective_bytes.values())


def test_without_a_compiler_the_command_says_how_to_get_one(monkeypatch):
  devices.cache_clear()
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  install = r"--topology: needs the TPU compiler; install it with: pip install -e '\.\[tpu\]'"
  with pytest.raises(BadInput, match=install):
    plan(gloeckle(1), 'v5p:2x2x2')


@needs_compiler
def test_a_mesh_must_use_every_chip():
  with pytest.raises(BadInput,
                     match='config.mesh: 4 devices, but v5p:2x2x2 has 8; such as '
                           '--config.mesh.fsdp=8'):
    plan(dataclasses.replace(gloeckle(1), mesh=MeshConfig(fsdp=4)), 'v5p:2x2x2')


@needs_compiler
def test_a_config_of_one_device_is_spread_over_the_chips_with_slices_on_the_data_axis():
  for topology, mesh in (('v5p:2x2x2', MeshConfig(fsdp=8)),
                         ('2xv5e:4x4', MeshConfig(data=2, fsdp=16))):
    assert spread(small(), devices(topology), topology).mesh == mesh
  with pytest.raises(BadInput,
                     match='config.train.batch=32: a microbatch must be a multiple of data x fsdp '
                           '= 256'):
    spread(small(), devices('v5e:16x16'), 'v5e:16x16')


def test_the_devices_of_this_machine_are_planned_for_too(capsys, tmp_path):
  """The parts of a plan agree: run and steps, bound and times, FLOPs and utilisation."""
  source = ('from mtp_jax.config import Config\n\ndef get_config():\n'
            f'  return Config.from_dict({small().to_dict()!r}).to_config_dict()\n')
  (tmp_path / 'config.py').write_text(source)
  arguments = ['plan', f'--config={tmp_path / "config.py"}', '--topology=cpu:8']
  assert main([*arguments, '--json']) == 0
  d = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert d['mesh'] == {'data': 1, 'fsdp': 8, 'context': 1, 'tensor': 1, 'expert': 1}
  assert d['chips'] == 8 and d['fits'] and d['bound'] == 'compute'
  assert d['hbm_capacity_bytes'] > d['hbm_bytes'] >= d['argument_bytes'] > 3 * 4 * d['parameters'] / 8
  assert d['step_seconds'] == max(seconds for seconds in d['seconds'].values()
                                  if seconds is not None) > 0
  tokens = 32 * 64
  assert d['tokens_per_second'] == pytest.approx(tokens / d['step_seconds'])
  assert d['run_tokens'] == 1000 * tokens
  assert d['run_days'] * 86400 == pytest.approx(1000 * d['step_seconds'])
  assert d['chip_hours'] == pytest.approx(24 * 8 * d['run_days'])
  for count in ('', '_causal'):
    ratio = d[f'model_flops_per_token{count}'] / d['flops_per_token']
    assert d[f'mfu_bound{count}'] == pytest.approx(ratio)
  attention = 3 * 4 * 4 * 2 * 32 * 64  # forward and backward: 4 H K L in each of 4 blocks
  assert d['model_flops_per_token'] - d['model_flops_per_token_causal'] == attention / 2
  gathered = d['collective_bytes']['all-gather']['fsdp']
  sharded = d['parameters'] * 4 * 7 / 8  # each matrix comes in the forward and the backward pass
  assert sharded < gathered < 3.5 * sharded
  assert main(arguments) == 0
  printed = capsys.readouterr().out
  assert 'fits' in printed and re.search('all-gather +fsdp',
                                         printed) and 'bound by compute' in printed


def test_accumulation_and_rematerialisation_are_paid_in_flops_or_memory():
  """A recomputed block runs forward once more; microbatches multiply nothing more."""
  full = plan(small(), 'cpu:8')
  none = plan(small(model=dataclasses.replace(small().model, remat='none')), 'cpu:8')
  twice = plan(small(train=TrainConfig(batch=32, evaluate_rows=32, accumulate=2)), 'cpu:8')
  assert full.hbm_bytes < none.hbm_bytes and full.flops_per_token > 1.2 * none.flops_per_token
  assert full.model_flops_per_token == none.model_flops_per_token
  assert twice.flops_per_token == full.flops_per_token
  assert sent_bytes(twice) > 1.5 * sent_bytes(full)  # parameters are gathered for each microbatch


@functools.cache
def planned(futures: int) -> Plan:
  return plan(gloeckle(futures), 'v5p:2x2x2')


@needs_compiler
@pytest.mark.slow
def test_four_futures_cost_a_chip_at_most_a_twentieth_more_memory_than_one_and_the_flops_they_should():
  """At equal parameters. With remat='full' a trunk block is run once more, a head is not."""
  one, four = planned(1), planned(4)
  assert four.fits and four.hbm_capacity_bytes == 95 * 2**30
  assert four.hbm_bytes <= 1.05 * one.hbm_bytes
  model_flops_ratio = four.model_flops_per_token / one.model_flops_per_token
  assert four.flops_per_token / one.flops_per_token <= 1.02 * model_flops_ratio
  assert 0.5 < four.mfu_bound < 1 and four.bound in ('compute', 'memory')


@needs_compiler
@pytest.mark.slow
def test_moments_that_rest_in_the_host_leave_the_chip():
  config = small(model=dataclasses.replace(small().model, width=256, feed_forward=512))
  on_device, in_host = (plan(dataclasses.replace(config, optimizer=OptimizerConfig(moments=where)),
                             'v5p:2x2x1')
                        for where in ('device', 'host'))
  moments = 2 * 4 * on_device.parameters / 4
  assert moments <= in_host.host_bytes < 1.25 * moments  # tiles of 128 are filled up
  assert moments <= on_device.argument_bytes - in_host.argument_bytes < 1.25 * moments
  # Also during the update, which holds one parameter's moments at a time.
  assert in_host.hbm_bytes < on_device.hbm_bytes - 0.7 * moments


@needs_compiler
@pytest.mark.slow
def test_slices_exchange_gradients_over_the_network_and_nothing_else():
  made = plan(small(train=TrainConfig(batch=64, evaluate_rows=64)), '2xv5e:4x4')
  assert made.mesh['data'] == 2 and made.mesh['fsdp'] == 16 and made.seconds['network'] > 0
  between_slices = {kind: by_axes['data'] for kind, by_axes in made.collective_bytes.items()
                    if 'data' in by_axes}
  assert between_slices.keys() == {'all-reduce'}
  assert {axes for by_axes in made.collective_bytes.values() for axes in by_axes} <= {'data',
                                                                                      'fsdp'}
  gradients = 4 * made.parameters / 16  # bytes of a chip's shard; some are not sharded here
  assert gradients <= between_slices['all-reduce'] < 4 * gradients


@needs_compiler
@pytest.mark.slow
def test_eight_heads_take_at_most_a_tenth_more_temporary_memory_than_one():
  """At the peak, besides arguments and the gradients of the heads, beside a trunk of the same
  depth.

  A step holds the gradients of all parameters, so those of the heads are subtracted.
  """
  one, eight = (plan(gloeckle(M, layers=4 + (M > 1), placement='appended'), 'v5p:2x2x2')
                for M in (1, 8))
  heads = costs.parameters(jax.eval_shape(lambda: Model(gloeckle(8).model,
                                                        jax.random.key(0))))['futures']
  gradients = heads * 4 / 8  # bytes on each of eight chips
  temporary = [made.hbm_bytes - made.argument_bytes for made in (one, eight)]
  assert temporary[1] - gradients <= 1.10 * temporary[0]
