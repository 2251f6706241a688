"""The certificate holds for the tiny configs, and every check of it fails when what it guards is
broken.
"""
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import objective
from mtp_jax.cli.main import main
from mtp_jax.config import Config, MeshConfig, ModelConfig
from mtp_jax.measure import certify
from mtp_jax.model import costs, model
from mtp_jax.model.attention import documents
from mtp_jax.objective import Read, Table, walk

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


@pytest.mark.parametrize('name', ['tiny', 'tiny_ntp', 'tiny_sequential'])
def test_the_tiny_configs_are_certified(name, capsys):
  assert main(['certify', f'--config={CONFIGS / name}.py', '--json']) == 0
  found = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert found['holds'] and len(found['findings']) >= 11
  assert all(word in ' '.join(f['check'] for f in found['findings']) for word in
             ('accumulation 2', 'accumulation 4', 'fsdp 8', 'fsdp 4 x tensor 2', 'data 2 x fsdp 2 x tensor 2',
              'context 2 x fsdp 4', 'remat full', 'leakage', 'FLOPs'))


@pytest.fixture
def twin() -> Config:
  return certify.small(Config(ModelConfig(futures=3, layers=5)))


@functools.cache
def reference(twin: Config) -> dict:
  """The twin's gradients in the plainest way, before anything is broken."""
  return certify.gradients_by_group(twin)


@pytest.fixture
def holds(twin):
  """The gradients check, in a single way."""
  reference(twin)

  def check(**way) -> bool:
    finding, = certify.gradients(twin, {'one way': way}, reference(twin))
    return finding.holds
  return check


def shifted(read: Read, by: int) -> Read:
  """With the targets of other futures."""
  of = jnp.clip(jnp.arange(len(read.targets_MBL)) + by, 0, len(read.targets_MBL) - 1)
  return dataclasses.replace(read, targets_MBL=read.targets_MBL[of], counted_MBL=read.counted_MBL[of])


def test_a_mean_of_means_under_accumulation_is_a_breach(holds):
  """Each microbatch divided by its own counts, as peers did."""
  def per_microbatch(model, read, coefficient_M, *rest):
    return objective.loss(model, read, 20 * coefficient_M / jnp.maximum(read.count_M, 1), *rest)

  assert holds(accumulate=2) and not holds(accumulate=2, loss=per_microbatch)


def test_a_gradient_that_is_not_summed_over_devices_is_a_breach(holds, monkeypatch):
  assert holds(sizes=MeshConfig(fsdp=8))
  whole_sum = Table.scatter_gradient
  monkeypatch.setattr(Table, 'scatter_gradient', lambda table, dw_PDV: 1.1 * whole_sum(table, dw_PDV))
  assert not holds(sizes=MeshConfig(fsdp=8))


def test_targets_of_another_future_are_a_breach(holds):
  """Of the streamed objective, or of the dense one beside it."""
  assert holds(loss=objective.dense)
  for loss in (objective.loss, objective.dense):
    assert not holds(loss=lambda model, read, *rest, loss=loss: loss(model, shifted(read, -1), *rest))


def test_a_wrong_slope_is_a_breach(holds, monkeypatch):
  def wrong(*arguments):
    loss, sums, dh_gBLD, dw_DV = objective.cross_entropy_and_gradients(*arguments)
    return loss, sums, 1.01 * dh_gBLD, dw_DV

  monkeypatch.setattr(walk, 'cross_entropy_and_gradients', wrong)
  assert not holds()


def test_every_future_has_predictions_to_map():
  for M in (1, 4, 9):
    _, allowed = certify.influence(certify.small(Config(ModelConfig(futures=M, layers=M + 2))))
    assert allowed.any((0, 2)).all()


def test_rematerialisation_of_something_else_is_a_breach(holds, monkeypatch):
  assert holds(remat='full')
  slightly = lambda x: 1.001 * x if jnp.issubdtype(x.dtype, jnp.floating) else x
  plain = model.remat
  of_other_inputs = lambda f: lambda *inputs: jax.checkpoint(f)(*jax.tree.map(slightly, inputs))
  changed = lambda c, f, *saved: plain(c, f, *saved) if c.remat == 'none' else of_other_inputs(f)
  for module in (model, walk):
    monkeypatch.setattr(module, 'remat', changed)
  assert not holds(remat='full')


def test_heads_at_once_that_share_a_state_wrongly_are_a_breach(holds, monkeypatch):
  assert holds(head_batch=3)
  run_head = model.Futures.run_head
  wrong = lambda self, head, x, *rest: run_head(self, head, x * (1 + 0.01 * (self.config.head_batch > 1)), *rest)
  monkeypatch.setattr(model.Futures, 'run_head', wrong)
  assert not holds(head_batch=3)


def of_kind(twin: Config, kind: str) -> Config:
  return dataclasses.replace(twin, model=dataclasses.replace(twin.model, kind=kind))


@pytest.mark.parametrize('kind', ['parallel', 'sequential'])
def test_attention_across_documents_is_a_leak(twin, kind, monkeypatch):
  twin = of_kind(twin, kind)
  assert next(certify.leakage(twin)).holds
  monkeypatch.setattr(walk, 'documents', lambda segments_BL, balance: documents(jnp.minimum(segments_BL, 1)))
  finding = next(certify.leakage(twin))
  assert not finding.holds and not finding.found.startswith('0 leaks')
  assert any('L' in line for line in certify.pictures(twin)[1:-1])


@pytest.mark.parametrize('shift', [-1, 1])
def test_a_shifted_target_is_a_breach(twin, shift):
  assert not next(certify.leakage(twin, lambda batch, futures: shifted(Read.of(batch, futures), shift))).holds


def test_a_sequential_module_that_is_given_its_target_is_a_leak(twin, monkeypatch):
  monkeypatch.setattr(model.Futures, 'given', lambda self, futures,
                      targets_MBL: targets_MBL[futures[0]:futures[-1] + 1])
  assert not next(certify.leakage(of_kind(twin, 'sequential'))).holds


def test_flops_that_are_not_counted_are_a_breach(twin):
  assert all(finding.holds for finding in certify.flops(twin, twin))

  def without_the_futures_unembedding(c: ModelConfig, length: int) -> int:
    counts = costs.flops_per_token(c, length)
    return counts['total'] + costs.recomputed_flops_per_token(c, length) - counts['unembedding'] * 2 // 3

  assert not any(finding.holds for finding in certify.flops(twin, twin, without_the_futures_unembedding))


@pytest.mark.parametrize('kind', ['parallel', 'linear', 'causal', 'anticausal', 'sequential'])
def test_flops_are_counted_for_every_kind(kind):
  config = Config(ModelConfig(kind=kind))
  assert all(finding.holds for finding in certify.flops(config, certify.small(config)))


def test_the_rows_of_the_twin_count_unequally(twin):
  batch = certify.packed_rows(twin)
  per_row = [int(Read.of({key: x[b:b + 1] for key, x in batch.items()}, 3).count_M[1]) for b in range(certify.ROWS)]
  assert len(set(per_row)) > 5 and (np.diff(batch['segments'], axis=1) != 0).any(1).all()


def test_a_breach_is_exit_code_1(monkeypatch, capsys):
  monkeypatch.setattr(certify, 'gradients', lambda config: iter([]))
  monkeypatch.setattr(costs, 'recomputed_flops_per_token', lambda *_: 10**6)
  assert main(['certify', f'--config={CONFIGS / "tiny.py"}']) == 1
  out = capsys.readouterr().out
  assert 'BREACH' in out and '1 of 3 checks hold' in out
