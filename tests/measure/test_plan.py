"""Ahead of time, for TPU slices that are not here: what grows with the futures and what does not, and what the chips send each other."""
import dataclasses
import functools
import importlib.util
import json
import re

import jax
import numpy as np
import pytest

from mtp_jax.chips import CHIPS, Chip
from mtp_jax.cli.main import main
from mtp_jax.config import BadInput, Config, DataConfig, MeshConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from mtp_jax.measure import plan
from mtp_jax.measure.traffic import Collective
from mtp_jax.mesh import make_mesh
from mtp_jax.model import costs
from mtp_jax.model.model import Model

needs_compiler = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason="needs the TPU compiler: pip install -e '.[tpu]'")


@pytest.fixture(scope='module', autouse=True)
def quick_compiler():
  """Optimises less: a sixth of the time, within 3 % of the memory."""
  jax.config.update('jax_optimization_level', 'O1')
  yield
  jax.config.update('jax_optimization_level', 'UNKNOWN')


def gloeckle(futures: int, kind: str = 'parallel', layers: int = 18, **changes) -> Config:
  """0.3B of Table S14, with 18 layers."""
  model = ModelConfig(vocab=32_000, width=1024, layers=layers, heads=16, kv_heads=16, head_width=64, feed_forward=2816, futures=futures, kind=kind,
                      dtype='bfloat16', **changes)
  return Config(model, ObjectiveConfig(), DataConfig(length=4096), train=TrainConfig(batch=32, evaluate_rows=32), mesh=MeshConfig(fsdp=8))


def small(**changes) -> Config:
  """Compiles in seconds."""
  model = ModelConfig(vocab=264, width=64, layers=4, heads=2, kv_heads=2, head_width=32, feed_forward=128, futures=2, remat='full')
  return dataclasses.replace(Config(model, data=DataConfig(length=64), train=TrainConfig(batch=32, evaluate_rows=32)), **changes)


def test_without_a_compiler_the_command_says_how_to_get_one(monkeypatch):
  plan.devices.cache_clear()
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(BadInput, match=r"--topology: needs the TPU compiler; install it with: pip install -e '\.\[tpu\]'"):
    plan.plan(gloeckle(1), 'v5p:2x2x2')


@pytest.mark.parametrize('topology', ['v9', 'v9z:4x4', 'v5p:4x4', 'v5e:4', 'cpu', 'cpu:0', 'cpu:x', 'cpu:2x2', '2xcpu:4', '0xv5e:4x4', 'v5e:0x4', 'v5e:4x', ''])
def test_a_topology_that_cannot_be_is_refused_without_a_compiler(topology, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(BadInput, match=f'^--topology={topology}: must be a chip of v4, .* and the sizes of its slice; write such as v5p:2x2x2'):
    plan.devices(topology)


@needs_compiler
def test_a_mesh_must_use_every_chip():
  with pytest.raises(BadInput, match='config.mesh: 4 devices, but v5p:2x2x2 has 8; such as --config.mesh.fsdp=8'):
    plan.plan(dataclasses.replace(gloeckle(1), mesh=MeshConfig(fsdp=4)), 'v5p:2x2x2')
  with pytest.raises(BadInput, match='--topology=cpu:9: there are 8 CPU devices; XLA_FLAGS=--xla_force_host_platform_device_count=N makes N'):
    plan.plan(small(), 'cpu:9')


@needs_compiler
def test_a_config_of_one_device_is_spread_over_the_chips_slices_on_the_data_axis():
  for topology, mesh in (('v5p:2x2x2', MeshConfig(fsdp=8)), ('2xv5e:4x4', MeshConfig(data=2, fsdp=16))):
    assert plan.spread(small(), plan.devices(topology), topology).mesh == mesh
  with pytest.raises(BadInput, match='config.train.batch=32: a microbatch must be a multiple of data x fsdp = 256'):
    plan.spread(small(), plan.devices('v5e:16x16'), 'v5e:16x16')


def test_links_of_all_dimensions_that_a_group_covers_carry_it_and_a_line_has_half_of_a_rings():
  """64 chips on a torus of 4 x 4 x 4, each link 1 byte/s a dimension; on 2 x 4 x 8, no ring closes; in two dimensions each does by itself."""
  chip = Chip(1, 1, 1, 1.0, 0.5, 4)

  @dataclasses.dataclass(frozen=True)
  class At:
    coords: tuple[int, int, int]
    slice_index: int = 0

  class Torus:
    def __init__(self, *sizes, slices=1):
      self.devices = np.array([At((x, y, z), s) for s in range(slices) for x in range(sizes[0]) for y in range(sizes[1]) for z in range(sizes[2])])

  seconds = lambda torus, group, kind='all-gather': plan._seconds(Collective(kind, group, 12.0), torus, chip)
  assert seconds(Torus(4, 4, 4), tuple(range(64))) == (12 / 3, 0)
  assert seconds(Torus(4, 4, 4), (0, 1, 2, 3)) == (12, 0)
  assert seconds(Torus(4, 4, 4), (0, 1, 4, 5)) == (12 / 2, 0)
  assert seconds(Torus(4, 4, 4), (0, 63), 'collective-permute') == (12, 0)
  assert seconds(Torus(2, 4, 8), tuple(range(64))) == (12 / 1.5, 0)
  assert seconds(Torus(2, 8, 1), tuple(range(16))) == (12 / (0.5 + 1), 0)
  assert seconds(Torus(2, 2, 2, slices=2), (0, 8)) == (0, 12 / 0.5)


def test_chips_have_peaks_that_belong_together():
  """A matrix product is worth its bytes from a few hundred FLOPs each; memory is faster than links, links than the network."""
  for name, chip in CHIPS.items():
    assert 150 < chip.flops / chip.hbm_bandwidth < 600, name
    assert chip.hbm_bandwidth > 3 * chip.link_bandwidth and not chip.network_bandwidth >= chip.link_bandwidth, name


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')  # of ml_collections
def test_the_devices_of_this_machine_are_planned_for_too(capsys, tmp_path):
  """Its parts add up: the run is so many steps, the bound the longest of what takes time, the rest of the FLOPs recomputation."""
  (tmp_path / 'config.py').write_text(f'from mtp_jax.config import Config\n\ndef get_config():\n  return Config.from_dict({small().to_dict()!r}).to_config_dict()\n')
  assert main(['plan', f'--config={tmp_path / "config.py"}', '--topology=cpu:8', '--json']) == 0
  d = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert d['mesh'] == {'data': 1, 'fsdp': 8, 'context': 1, 'tensor': 1, 'expert': 1} and d['chips'] == 8 and d['fits'] and d['bound'] == 'compute'
  assert d['hbm_bytes'] >= d['argument_bytes'] > 3 * 4 * d['parameters'] / 8 and d['hbm_bytes'] < d['hbm_capacity_bytes']
  assert d['step_seconds'] == max(seconds for seconds in d['seconds'].values() if seconds is not None) > 0
  tokens = 32 * 64
  assert d['tokens_per_second'] == pytest.approx(tokens / d['step_seconds']) and d['run_tokens'] == 1000 * tokens
  assert d['run_days'] * 86400 == pytest.approx(1000 * d['step_seconds']) and d['chip_hours'] == pytest.approx(24 * 8 * d['run_days'])
  assert d['mfu_bound'] == pytest.approx(d['model_flops_per_token'] / d['flops_per_token'])
  gathered = d['collective_bytes']['all-gather']['fsdp']
  sharded = d['parameters'] * 4 * 7 / 8  # each matrix comes once in the forward pass and again in the backward pass
  assert sharded < gathered < 3.5 * sharded
  assert main(['plan', f'--config={tmp_path / "config.py"}', '--topology=cpu:8']) == 0
  printed = capsys.readouterr().out
  assert 'fits' in printed and re.search('all-gather +fsdp', printed) and 'bound by compute' in printed


def test_accumulation_and_rematerialisation_are_paid_in_flops_or_memory():
  """Counted exactly: a recomputed block runs forward once more; microbatches multiply nothing more."""
  of = lambda **changes: plan.plan(small(**changes), 'cpu:8')
  model = small().model
  full, none = of(), of(model=dataclasses.replace(model, remat='none'))
  assert full.hbm_bytes < none.hbm_bytes and full.flops_per_token > 1.2 * none.flops_per_token
  assert full.model_flops_per_token == none.model_flops_per_token
  twice = of(train=TrainConfig(batch=32, evaluate_rows=32, accumulate=2))
  assert twice.flops_per_token == full.flops_per_token
  moved = lambda p: sum(sum(by_axes.values()) for by_axes in p.collective_bytes.values())
  assert moved(twice) > 1.5 * moved(full)  # parameters are gathered for each microbatch


def test_a_sweep_ranks_what_fits_and_says_when_nothing_does(monkeypatch, tmp_path):
  """Nothing is compiled: a step of a pretended compiler takes memory by microbatch and rematerialisation, and time by mesh and recomputation."""
  real = plan.plan(small(), 'cpu:8')
  capacity = 100

  def pretended(config: Config, topology: str) -> plan.Plan:
    rows = config.train.batch // config.train.accumulate
    memory = rows * {'full': 2, 'attention': 3, 'attention,qkv': 4, 'dots': 5, 'none': 6}[config.model.remat]
    seconds = 1.0 + 0.1 * config.mesh.tensor + 0.05 * config.mesh.context + 0.01 * config.mesh.data - 0.1 * memory / rows
    if memory > 3 * capacity:
      raise plan.TooLarge('too large')
    return dataclasses.replace(real, mesh=dataclasses.asdict(config.mesh), accumulate=config.train.accumulate, remat=config.model.remat, hbm_bytes=memory,
                               fits=memory <= capacity, step_seconds=seconds)

  monkeypatch.setattr(plan, 'plan', pretended)
  lines = []
  ranked = plan.sweep(small(), 'cpu:8', lines.append)
  assert ranked[0].remat == 'attention' and ranked[0].mesh == dataclasses.asdict(MeshConfig(fsdp=8)) and ranked[0].hbm_bytes == 96  # none fits only with 1 x accumulate
  assert {each.remat for each in ranked} == {'full', 'attention', 'attention,qkv', 'dots', 'none'} and len(lines) == len(ranked)
  assert {each.mesh['tensor'] for each in ranked} == {1, 2} and {each.mesh['context'] for each in ranked} == {1, 2, 4} and {each.mesh['data'] for each in ranked} == {1, 2, 4}
  assert [each.fits for each in ranked] == sorted((each.fits for each in ranked), reverse=True)
  fitting = [each.step_seconds for each in ranked if each.fits]
  assert fitting == sorted(fitting)
  none = small(model=dataclasses.replace(small().model, remat='none'))
  ranked = plan.sweep(none, 'cpu:8', lines.append)  # recomputation goes before smaller microbatches
  assert ranked[0].remat == 'attention' and {each.accumulate for each in ranked} == {1}
  with pytest.raises(BadInput, match='^config.train.batch=1: .*microbatch') as error:
    plan.sweep(small(train=TrainConfig(batch=1, evaluate_rows=1)), 'cpu:8', lines.append)
  assert not isinstance(error.value, plan.TooLarge)
  capacity, lines[:] = 40, []
  ranked = plan.sweep(small(), 'cpu:8', lines.append)  # 64 in one go, 32 in two
  assert ranked[0].accumulate == 2 and ranked[0].fits and any('does not fit' in line for line in lines)
  capacity, dots = 60, small(model=dataclasses.replace(small().model, remat='dots'))
  tried = {(each.accumulate, each.remat) for each in plan.sweep(dots, 'cpu:8', lines.append)}
  assert {(1, 'dots'), (1, 'full'), (2, 'full'), (2, 'dots')} <= tried  # what did not fit once is tried again with less at a time
  capacity = 1
  with pytest.raises(plan.TooLarge, match='--topology=cpu:8: no mesh, microbatch or rematerialisation fits .*; take more chips'):
    plan.sweep(small(), 'cpu:8', lines.append)
  plan.plot(ranked, str(tmp_path / 'sweep.png'))
  assert (tmp_path / 'sweep.png').stat().st_size > 1000


def test_weak_scaling_keeps_the_rows_of_a_chip_and_its_share_of_the_parameters():
  plans = plan.weak_scaling(small(train=TrainConfig(batch=8, evaluate_rows=8)), ['cpu:2', 'cpu:8'], lambda line: None)
  assert [(each.chips, each.mesh['data'], each.mesh['fsdp'], each.run_tokens // (1000 * 64)) for each in plans] == [(2, 1, 2, 8), (8, 4, 2, 32)]
  gathered = [each.collective_bytes['all-gather']['fsdp'] for each in plans]
  assert gathered[1] == pytest.approx(gathered[0], rel=0.01)  # shards are as large, and gathered as often
  with pytest.raises(BadInput, match='--topology=cpu:3: 3 chips, no multiple of the first, cpu:2'):
    plan.weak_scaling(small(), ['cpu:2', 'cpu:3'], lambda line: None)


@functools.cache
def planned(futures: int) -> plan.Plan:
  return plan.plan(gloeckle(futures), 'v5p:2x2x2')


@needs_compiler
@pytest.mark.slow
def test_four_futures_cost_a_chip_the_memory_of_one_and_the_flops_they_should():
  """At equal parameters. Recomputation apart: with remat='full' a trunk block is run once more, a head is not."""
  one, four = planned(1), planned(4)
  assert four.fits and four.hbm_capacity_bytes == 95 * 2**30
  assert four.hbm_bytes <= 1.05 * one.hbm_bytes
  assert four.flops_per_token / one.flops_per_token <= 1.02 * four.model_flops_per_token / one.model_flops_per_token
  assert 0.5 < four.mfu_bound < 1 and four.bound in ('compute', 'memory')


@needs_compiler
@pytest.mark.slow
def test_moments_that_rest_in_the_host_leave_the_chip():
  config = small(model=dataclasses.replace(small().model, width=256, feed_forward=512))
  held, resting = (plan.plan(dataclasses.replace(config, optimizer=OptimizerConfig(moments=where)), 'v5p:2x2x1') for where in ('device', 'host'))
  moments = 2 * 4 * held.parameters / 4
  assert moments <= resting.host_bytes < 1.25 * moments  # tiles of 128 are filled up
  assert moments <= held.argument_bytes - resting.argument_bytes < 1.25 * moments
  assert resting.hbm_bytes < held.hbm_bytes - 0.7 * moments  # while they are updated, too: a parameter's at a time


@needs_compiler
@pytest.mark.slow
def test_slices_exchange_gradients_over_the_network_and_nothing_else():
  found = plan.plan(small(train=TrainConfig(batch=64, evaluate_rows=64)), '2xv5e:4x4')
  assert found.mesh['data'] == 2 and found.mesh['fsdp'] == 16 and found.seconds['network'] > 0
  across = {kind: by_axes['data'] for kind, by_axes in found.collective_bytes.items() if 'data' in by_axes}
  assert across.keys() == {'all-reduce'} and all(axes in ('data', 'fsdp') for by_axes in found.collective_bytes.values() for axes in by_axes)
  share = 4 * found.parameters / 16
  assert share <= across['all-reduce'] < 4 * share  # each chip its share of the gradients, in float32; those of so small a model are partly whole


@needs_compiler
@pytest.mark.slow
def test_eight_heads_take_the_temporary_memory_of_one():
  """At the peak and besides arguments, beside a trunk of the same depth, the gradients of the heads apart: a step holds those of all parameters."""
  one, eight = (plan.plan(gloeckle(M, layers=4 + (M > 1), placement='appended'), 'v5p:2x2x2') for M in (1, 8))
  heads = costs.parameters(jax.eval_shape(lambda: Model(gloeckle(8).model, jax.random.key(0))))['futures']
  gradients = heads * 4 / 8  # bytes on each of eight chips
  alive = lambda p: p.hbm_bytes - p.argument_bytes
  assert alive(eight) - gradients <= 1.10 * alive(one)


def test_a_mesh_of_slices_is_refused_when_it_cuts_across_them():
  class At:
    def __init__(self, i):
      self.slice_index, self.process_index, self.platform, self.device_kind, self.id = i // 4, 0, 'tpu', 'TPU v5', i

  with pytest.raises(BadInput, match=r'config.mesh: data 1 x fsdp 8 .* the 8 devices stand in 2 slices.*set config.mesh.data to a multiple of 2'):
    make_mesh(MeshConfig(fsdp=8), [At(i) for i in range(8)])
