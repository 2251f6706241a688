"""A step that is not finite changes nothing; too many end the run with evidence, after roll-backs."""
import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import experiment, log_of, random_state, same_bits, write_config_file

import mtp_jax
from mtp_jax.checkpoint.record import steps
from mtp_jax.cli.main import main
from mtp_jax.mesh import make_mesh, put
from mtp_jax.train import step as training
from mtp_jax.train.fit import NotFinite, fit


def poisoned(steps):
  """A compiled step whose parameters are infinite at some steps, as after an overflow."""
  original = training.compiled_step

  def compiled_step(config, state, *others):
    if int(state.step) + 1 not in steps:
      return original(config, state, *others)
    state = jax.tree.map(jnp.copy, state)
    bad = jax.tree.map(jnp.copy, state)
    bad = dataclasses.replace(bad, model=jax.tree.map(lambda x: x * math.inf, bad.model))
    following, metrics = original(config, bad, *others)
    return dataclasses.replace(following, model=state.model), metrics
  return compiled_step


def test_a_non_finite_step_leaves_parameters_moments_and_counters_alone(folder):
  config = experiment(folder)
  batch = {name: np.tile(np.arange(1, 19, dtype=np.int32), (8, 1))
           for name in ('tokens', 'positions')} | {'segments': np.ones((8, 18), np.int32)}
  mesh = make_mesh(config.mesh)
  state = random_state(config)
  state = dataclasses.replace(state, optimizer=jax.tree.map(jnp.abs, state.optimizer),
                              skipped=jnp.int32(2), skipped_in_a_row=jnp.int32(1),
                              step=jnp.int32(5))

  def with_nan(path, x):
    """The embedding with one entry that is nan; any other parameter as it is."""
    if '.embed_VD' not in jax.tree_util.keystr(path):
      return x
    spoilt = np.where(np.arange(x.size).reshape(x.shape) == 50, np.nan, x).astype(x.dtype)
    return jax.device_put(spoilt, x.sharding)

  nan = jax.tree.map(jnp.copy, state)
  nan = dataclasses.replace(nan, model=jax.tree_util.tree_map_with_path(with_nan, nan.model))
  with jax.set_mesh(mesh):
    advance = functools.partial(training.compiled_step, config)
    byte_length_V = jnp.ones(config.model.vocab, jnp.int32)
    before = jax.tree.map(np.array, nan)
    after, found = advance(nan, put(batch, mesh), byte_length_V, 0.0)
    assert same_bits((after.model, after.optimizer), (before.model, before.optimizer))
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (6, 3, 2)
    assert math.isnan(found['loss']) and float(found['update_norm']) == 0
    before = jax.tree.map(np.array, state)
    # a good step ends the row, and moves everything
    after, found = advance(state, put(batch, mesh), byte_length_V, 0.0)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (6, 2, 0)
    assert all((np.asarray(a) != b).any()
               for a, b in zip(jax.tree.leaves((after.model, after.optimizer)),
                               jax.tree.leaves((before.model, before.optimizer))))


def test_a_few_non_finite_steps_are_counted_and_survived(folder, tmp_path, monkeypatch):
  monkeypatch.setattr('mtp_jax.train.run.compiled_step', poisoned({3, 4}))
  config = experiment(folder, train={'skipped_allowed': 3})
  fit(config, tmp_path, note=lambda line: None)
  records = [record for record in log_of(tmp_path) if record['kind'] == 'train']
  assert [record['skipped'] for record in records] == [0, 0, 1, 2, 2, 2]
  assert [record['skipped_in_a_row'] for record in records] == [0, 0, 1, 2, 0, 0]
  # the schedule waits
  assert [record['learning_rate'] for record in records[2:5]] == [records[2]['learning_rate']] * 3
  assert sorted(path.name for path in (tmp_path / 'nonfinite').iterdir()) == [
      'step-3.json', 'step-3.npz', 'step-4.json', 'step-4.npz']


def test_too_many_non_finite_steps_end_the_run_with_evidence_and_a_good_checkpoint(
    folder, uninterrupted, tmp_path, monkeypatch, capsys):
  _, workdir = uninterrupted('parallel')
  monkeypatch.setattr('mtp_jax.train.run.compiled_step', poisoned({4, 5}))
  config = experiment(folder, train={'skipped_allowed': 2})
  lines, arrays = [], []

  def note(line):
    lines.append(line)
    if 'roll-back' in line:
      arrays.append(len(jax.live_arrays()))

  before = len(jax.live_arrays())
  with pytest.raises(NotFinite, match='step 5: 2 bad steps in a row, .* after 2 roll-backs to step 3'):
    fit(config, tmp_path / 'run', note=note)
  assert [line[:67] for line in lines if 'roll-back' in line] == [
      f'step 5: 2 bad steps in a row, the last one: loss not finite; roll-back {n} of 2'[:67] for n in (1, 2)]
  assert max(arrays) < before + 10  # the state of before is gone when that of the checkpoint comes
  assert steps(tmp_path / 'run') == [3]
  assert same_bits(mtp_jax.load(tmp_path / 'run').model, mtp_jax.load(workdir, 3).model)
  evidence = np.load(tmp_path / 'run' / 'nonfinite' / 'step-5.npz')
  assert {name: evidence[name].shape
          for name in evidence} == dict.fromkeys(('tokens', 'segments', 'positions'), (8, 18))
  assert json.loads((tmp_path / 'run' / 'nonfinite' / 'step-5.json').read_text())['skipped_in_a_row'] == 2

  write_config_file(tmp_path / 'config.py', config)
  arguments = ['train', f'--config={tmp_path / "config.py"}', f'--workdir={tmp_path / "run"}']
  assert main(arguments) == 1
  assert capsys.readouterr().err.splitlines()[-1].startswith('mtp_jax: step 5: 2 bad steps in a row')
  assert main([*arguments, '--config.train.rollbacks_allowed=0']) == 1
  assert ' roll-back 1' not in capsys.readouterr().err


def test_evidence_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch):
  config, lines = experiment(tmp_path, train={'evaluate_every': 0}), []
  monkeypatch.setattr('mtp_jax.train.run.compiled_step', poisoned({3}))

  def full(*_, **__):
    raise OSError(28, 'No space left on device', 'a/file')

  monkeypatch.setattr(np, 'savez', full)
  assert fit(config, tmp_path / 'run', note=lines.append).step == 6
  assert any('step 3 skipped' in line and line.endswith('no evidence is kept (a/file: No space left on device)')
             for line in lines), lines
