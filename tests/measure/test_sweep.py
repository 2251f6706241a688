"""Which meshes a sweep tries and how it ranks them, with a pretended compiler; weak scaling."""
import dataclasses

import pytest

from mtp_jax.config import BadInput, Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from mtp_jax.measure import sweep as sweeping
from mtp_jax.measure.plan import Plan, TooLarge, plan

BYTES_A_ROW = {'full': 2, 'attention': 3, 'attention,qkv': 4, 'dots': 5, 'none': 6}


def config(remat: str = 'full', **train: int) -> Config:
  model = ModelConfig(vocab=264, width=64, layers=4, heads=2, kv_heads=2, head_width=32,
                      feed_forward=128, futures=2,
                      remat=remat)
  return Config(model, data=DataConfig(length=64),
                train=TrainConfig(**{'batch': 32, 'evaluate_rows': 32} | train))


@pytest.fixture(scope='module')
def real() -> Plan:
  return plan(config(), 'cpu:8')


@pytest.fixture
def sweep(real):
  """sweep(config, capacity): plans and lines.

  Memory grows with the microbatch; time with the mesh and with recomputation.
  """
  def run(c: Config, capacity: int) -> tuple[list[Plan], list[str]]:
    def pretended(c: Config, topology: str) -> Plan:
      rows = c.train.batch // c.train.accumulate
      memory = rows * BYTES_A_ROW[c.model.remat]
      if memory > 300:
        raise TooLarge('too large')
      seconds = 1.0 + 0.1 * c.mesh.tensor + 0.05 * c.mesh.context + 0.01 * c.mesh.data
      seconds -= 0.1 * memory / rows
      return dataclasses.replace(real, mesh=dataclasses.asdict(c.mesh),
                                 accumulate=c.train.accumulate,
                                 remat=c.model.remat, hbm_bytes=memory, fits=memory <= capacity,
                                 step_seconds=seconds)
    lines = []
    return sweeping.sweep(c, 'cpu:8', lines.append, pretended), lines
  return run


def test_a_sweep_tries_every_mesh_and_rematerialisation_and_ranks_what_fits_first(sweep):
  ranked, lines = sweep(config(), 100)
  best = ranked[0]
  assert (best.remat, best.hbm_bytes) == ('attention', 96)
  assert best.mesh == dataclasses.asdict(MeshConfig(fsdp=8))
  assert {made.remat for made in ranked} == set(BYTES_A_ROW) and len(lines) == len(ranked)
  tried = {axis: {made.mesh[axis] for made in ranked} for axis in ('data', 'tensor', 'context')}
  assert tried == {'data': {1, 2, 4}, 'tensor': {1, 2}, 'context': {1, 2, 4}}
  assert [made.fits for made in ranked] == sorted((made.fits for made in ranked), reverse=True)
  fitting = [made.step_seconds for made in ranked if made.fits]
  assert fitting == sorted(fitting)


def test_recomputation_is_tried_before_smaller_microbatches(sweep):
  ranked, _ = sweep(config('none'), 100)
  assert ranked[0].remat == 'attention' and {made.accumulate for made in ranked} == {1}


def test_smaller_microbatches_are_tried_while_nothing_fits(sweep):
  ranked, lines = sweep(config(), 40)  # 64 bytes at once, 32 in two microbatches
  assert ranked[0].accumulate == 2 and ranked[0].fits and any('does not fit' in line
                                                              for line in lines)
  ranked, _ = sweep(config('dots'), 60)
  tried = {(made.accumulate, made.remat) for made in ranked}
  assert {(1, 'dots'), (1, 'full'), (2, 'full'),
          (2, 'dots')} <= tried  # what did not fit is tried again with less


def test_a_sweep_says_when_nothing_can_fit(sweep):
  line = '--topology=cpu:8: no mesh, microbatch or rematerialisation fits .*; take more chips'
  with pytest.raises(TooLarge, match=line):
    sweep(config(), 1)
  with pytest.raises(BadInput, match='^config.train.batch=1: .*microbatch') as error:
    sweep(config(batch=1, evaluate_rows=1), 100)
  assert not isinstance(error.value, TooLarge)


def test_plans_are_drawn(sweep, tmp_path):
  sweeping.plot(sweep(config(), 100)[0], str(tmp_path / 'sweep.png'))
  assert (tmp_path / 'sweep.png').stat().st_size > 1000


def test_weak_scaling_keeps_the_rows_of_a_chip_and_its_part_of_the_parameters():
  few_rows, ignore = config(batch=8, evaluate_rows=8), lambda line: None
  plans = sweeping.weak_scaling(few_rows, ['cpu:2', 'cpu:8'], ignore)
  rows = [made.run_tokens // (1000 * 64) for made in plans]
  meshes = [(made.chips, made.mesh['data'], made.mesh['fsdp']) for made in plans]
  assert rows == [8, 32] and meshes == [(2, 1, 2), (8, 4, 2)]
  gathered = [made.collective_bytes['all-gather']['fsdp'] for made in plans]
  assert gathered[1] == pytest.approx(gathered[0],
                                      rel=0.01)  # shards are as large, and gathered as often
  with pytest.raises(BadInput, match='--topology=cpu:3: 3 chips, no multiple of the first, cpu:2'):
    sweeping.weak_scaling(config(), ['cpu:2', 'cpu:3'], ignore)
