"""A step that is run twice gives the same, bit by bit, and changes no bit of a run; where it does not, the run ends."""
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import experiment, log_of, same_bits, write_config_file

from mtp_jax.checkpoint.fingerprint import fingerprint, fingerprints
from mtp_jax.checkpoint.record import steps
from mtp_jax.cli.main import main
from mtp_jax.config import MeshConfig
from mtp_jax.mesh import make_mesh
from mtp_jax.train import self_check
from mtp_jax.train import step as training
from mtp_jax.train.fit import NotReproducible, fit


def quiet(line):
  pass


def with_every(config, every: int):
  return dataclasses.replace(config, train=dataclasses.replace(config.train, self_check_every=every))


def state_of(config, workdir) -> training.State:
  with jax.set_mesh(make_mesh(config.mesh)):
    return training.restore(config, workdir, steps(workdir)[-1], make_mesh(config.mesh))


def erring(call: int):
  """A compiled step of which one call flips the lowest bit of one parameter; and the list of its calls."""
  original, calls = training.compiled_step, []

  def compiled_step(*arguments):
    state, metrics = original(*arguments)
    calls.append(int(state.step))
    if len(calls) == call:
      leaves, structure = jax.tree.flatten(state.model)
      values = np.array(leaves[0])
      values.reshape(-1).view(np.uint32)[0] ^= 1
      leaves[0] = jax.device_put(values, leaves[0].sharding)
      state = dataclasses.replace(state, model=structure.unflatten(leaves))
    return state, metrics
  return compiled_step, calls


@pytest.mark.parametrize('moments', ['device', 'host'])
def test_a_run_that_checks_itself_is_bitwise_the_one_that_does_not(folder, tmp_path, moments, monkeypatch):
  config = experiment(folder, optimizer={'moments': moments}, mesh={'data': 2})
  compiled_step, calls = erring(0)
  monkeypatch.setattr(self_check, 'compiled_step', compiled_step)
  fit(config, tmp_path / 'whole', note=quiet)
  assert not calls
  fit(with_every(config, 2), tmp_path / 'checked', note=quiet)
  assert calls == [2, 2, 4, 4, 6, 6]
  assert same_bits(state_of(config, tmp_path / 'checked'), state_of(config, tmp_path / 'whole'))
  assert log_of(tmp_path / 'checked') == log_of(tmp_path / 'whole')


def test_a_step_with_two_results_ends_the_run_and_the_last_checkpoint_stays(folder, tmp_path, monkeypatch, capsys):
  config = with_every(experiment(folder), 2)
  compiled_step, calls = erring(4)  # the second one of step 4
  monkeypatch.setattr(self_check, 'compiled_step', compiled_step)
  write_config_file(tmp_path / 'config.py', config)
  assert main(['train', f'--config={tmp_path / "config.py"}', f'--workdir={tmp_path / "run"}']) == 1
  line = capsys.readouterr().err.splitlines()[-1]
  assert line.startswith('mtp_jax: step 4: run twice from the same state and batch, it gave two results (')
  assert 'the machine does not compute the same each time; run the same command on another machine' in line
  assert calls == [2, 2, 4, 4] and steps(tmp_path / 'run') == [3]
  assert [record['step'] for record in log_of(tmp_path / 'run')][-1] == 3
  fit(config, tmp_path / 'run', note=quiet)
  fit(experiment(folder), tmp_path / 'whole', note=quiet)
  assert log_of(tmp_path / 'run') == log_of(tmp_path / 'whole')


def test_all_processes_end_where_one_of_them_computes_two_results(folder, tmp_path, monkeypatch):
  counted_by_another = types.SimpleNamespace(total=lambda number, hang_seconds: number + 1)
  monkeypatch.setattr(self_check, 'processes', counted_by_another)
  with pytest.raises(NotReproducible, match='^step 2: .* it gave two results, on another process of this job: '):
    fit(with_every(experiment(folder), 2), tmp_path / 'run', note=quiet)


def test_a_copy_that_differs_on_one_device_changes_the_fingerprint_of_that_device():
  mesh = make_mesh(MeshConfig(data=4, fsdp=2))
  values = np.arange(6, dtype=np.float32)
  with jax.set_mesh(mesh):
    sharding = jax.NamedSharding(mesh, jax.P('fsdp'))
    whole = jax.device_put(values, sharding)
    copies = [np.array(shard.data) for shard in whole.addressable_shards]
    wanted = fingerprint({'x': whole})
    assert fingerprints({'x': whole, 'y': jnp.zeros(())}) == [fingerprint({'x': whole, 'y': jnp.zeros(())})] * 8
    assert fingerprints({'x': whole}) == [wanted] * 8
    copies[5].view(np.uint32)[0] ^= 1
    arrays = [jax.device_put(copy, shard.device) for copy, shard in zip(copies, whole.addressable_shards)]
    found = fingerprints({'x': jax.make_array_from_single_device_arrays((6,), sharding, arrays)})
  differing = [i for i, one in enumerate(found) if one != wanted]
  assert 5 in differing and len(differing) == 2  # it, and the other half of the same copy
