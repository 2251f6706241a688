"""The certificate holds for the tiny configs, and every check of it fails when what it guards is broken."""
import dataclasses
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

pytestmark = pytest.mark.filterwarnings(r'ignore:the load_module\(\) method is deprecated:DeprecationWarning')
CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


@pytest.mark.slow
@pytest.mark.parametrize('name', ['tiny', 'tiny_ntp', 'tiny_sequential'])
def test_the_tiny_configs_are_certified(name, capsys):
  assert main(['certify', f'--config={CONFIGS / name}.py', '--json']) == 0
  found = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert found['holds'] and len(found['findings']) >= 11
  assert all(word in ' '.join(f['check'] for f in found['findings']) for word in
             ('accumulation 2', 'accumulation 4', 'fsdp 8', 'fsdp 4 x tensor 2', 'data 2 x fsdp 2 x tensor 2', 'context 2 x fsdp 4', 'remat full', 'leakage', 'FLOPs'))


@pytest.fixture
def twin() -> Config:
  return certify.small(Config(ModelConfig(futures=3, layers=5)))


@pytest.fixture
def one_way(monkeypatch):
  """The gradients check, in a single way that differs from the reference."""
  def check(config, way):
    monkeypatch.setattr(certify, 'ways', lambda config: {'broken': way})
    found, = certify.gradients(config)
    return found
  return check


def test_a_mean_of_means_under_accumulation_is_a_breach(twin, one_way, monkeypatch):
  """Each microbatch divided by its own counts, as peers did."""
  assert one_way(twin, {'accumulate': 2}).holds
  loss = objective.loss

  def per_microbatch(model, batch, coefficient_M, *rest):
    return loss(model, batch, 20 * coefficient_M / jnp.maximum(objective.counts(batch, model.config.futures), 1), *rest)

  monkeypatch.setattr(objective, 'loss', per_microbatch)
  assert not one_way(twin, {'accumulate': 2}).holds


def test_a_gradient_that_is_not_summed_over_devices_is_a_breach(twin, one_way, monkeypatch):
  way = {'sizes': MeshConfig(fsdp=8)}
  assert one_way(twin, way).holds
  monkeypatch.setattr(objective, 'summed', lambda x_PDV, letters: objective.place(x_PDV[0] if x_PDV.shape[0] == 1 else 1.1 * jnp.sum(x_PDV, 0), letters))
  assert not one_way(twin, way).holds


def test_targets_of_another_future_are_a_breach(twin, one_way, monkeypatch):
  way = {'loss': objective.dense}
  assert one_way(twin, way).holds
  weighted = objective._weighted
  monkeypatch.setattr(objective, '_weighted', lambda batch, m_G, *rest: weighted(batch, jnp.maximum(m_G - 1, 0), *rest))
  assert not one_way(twin, way).holds


def test_a_wrong_slope_is_a_breach(twin, one_way, monkeypatch):
  einsum = objective.einsum
  monkeypatch.setattr(objective, 'einsum', lambda letters, *rest: einsum(letters, *rest) * (1.01 if letters == 'PTV,VD->PTD' else 1))
  assert not one_way(twin, {'loss': objective.dense}).holds


def test_every_future_has_predictions_to_map():
  for M in (1, 4, 9):
    _, allowed = certify.influence(certify.small(Config(ModelConfig(futures=M, layers=M + 2))))
    assert allowed.any((0, 2)).all()


def test_rematerialisation_of_something_else_is_a_breach(twin, one_way, monkeypatch):
  assert one_way(twin, {'remat': 'full'}).holds
  slightly = lambda x: 1.001 * x if jnp.issubdtype(x.dtype, jnp.floating) else x
  plain = model.remat
  changed = lambda c, f: plain(c, f) if c.remat == 'none' else lambda *inputs: jax.checkpoint(f)(*jax.tree.map(slightly, inputs))
  for module in (model, objective):
    monkeypatch.setattr(module, 'remat', changed)
  assert not one_way(twin, {'remat': 'full'}).holds


def test_heads_at_once_that_share_a_state_wrongly_are_a_breach(twin, one_way, monkeypatch):
  assert one_way(twin, {'head_batch': 3}).holds
  advance = model.Futures.advance
  monkeypatch.setattr(model.Futures, 'advance', lambda self, head, m, x, *rest: advance(self, head, m, x * (1 + 0.01 * (self.config.head_batch > 1)), *rest))
  assert not one_way(twin, {'head_batch': 3}).holds


@pytest.mark.parametrize('kind', ['parallel', 'sequential'])
def test_attention_across_documents_is_a_leak(twin, kind, monkeypatch):
  twin = dataclasses.replace(twin, model=dataclasses.replace(twin.model, kind=kind))
  assert next(certify.leakage(twin)).holds
  monkeypatch.setattr(objective, 'documents', lambda segments_BL: documents(jnp.minimum(segments_BL, 1)))
  found = next(certify.leakage(twin))
  assert not found.holds and not found.found.startswith('0 leaks')
  assert any('L' in line for line in certify.pictures(twin)[1:-1])


@pytest.mark.parametrize('shift', [-1, 1])
def test_a_shifted_target_is_a_breach(twin, shift, monkeypatch):
  original = objective.targets
  monkeypatch.setattr(objective, 'targets', lambda batch, m, futures: original(batch, m + shift, futures))
  assert not next(certify.leakage(twin)).holds


def test_a_sequential_module_that_is_told_its_target_is_a_leak(twin, monkeypatch):
  twin = dataclasses.replace(twin, model=dataclasses.replace(twin.model, kind='sequential'))
  advance = model.Futures.advance
  monkeypatch.setattr(model.Futures, 'advance', lambda self, head, m, *rest: advance(self, head, m + 1, *rest))
  assert not next(certify.leakage(twin)).holds


def test_flops_that_are_not_counted_are_a_breach(twin, monkeypatch):
  assert all(finding.holds for finding in certify.flops(twin, twin))
  count = costs.flops_per_token

  def without_the_futures_unembedding(*arguments):
    found = count(*arguments)
    return found | {'total': found['total'] - found['unembedding'] * 2 // 3}

  monkeypatch.setattr(costs, 'flops_per_token', without_the_futures_unembedding)
  assert not any(finding.holds for finding in certify.flops(twin, twin))


@pytest.mark.parametrize('kind', ['parallel', 'linear', 'causal', 'anticausal', 'sequential'])
def test_flops_are_counted_for_every_kind(kind):
  config = Config(ModelConfig(kind=kind))
  assert all(finding.holds for finding in certify.flops(config, certify.small(config)))


def test_the_rows_of_the_twin_count_unequally(twin):
  batch = certify.packed_rows(twin)
  per_row = [int(objective.counts({key: x[b:b + 1] for key, x in batch.items()}, 3)[1]) for b in range(certify.ROWS)]
  assert len(set(per_row)) > 5 and (np.diff(batch['segments'], axis=1) != 0).any(1).all()


def test_a_breach_is_exit_code_1(monkeypatch, capsys):
  monkeypatch.setattr(certify, 'gradients', lambda config: iter([]))
  monkeypatch.setattr(costs, 'recomputed_flops_per_token', lambda *_: 10**6)
  assert main(['certify', f'--config={CONFIGS / "tiny.py"}']) == 1
  out = capsys.readouterr().out
  assert 'BREACH' in out and '1 of 3 checks hold' in out
