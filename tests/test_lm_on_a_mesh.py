"""A model is loaded onto a mesh, generates and is evaluated there, as on one device."""
import dataclasses

import jax
import numpy as np
import pytest
from experiments import experiment, generate_clearly, random_state, write

import mtp_jax
from mtp_jax.config import BadInput

PROMPTS, MESH = ['a', 'the 12 é', '.'], {'fsdp': 4, 'tensor': 2}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The workdir of a model of three sequential futures; its 259 ids divide over no mesh."""
  folder = tmp_path_factory.mktemp('lm')
  config = experiment(folder, model={'layers': 4, 'futures': 3, 'kind': 'sequential'}, data={'length': 128},
                      train={'evaluate_rows': 4})
  write(folder / 'run', config, random_state(config, seed=5))
  return folder / 'run'


@pytest.fixture(scope='module')
def lm(run):
  return mtp_jax.load(run)


def test_a_model_on_a_mesh_generates_and_is_evaluated_as_on_one_device(run, lm):
  on_mesh = mtp_jax.load(run, mesh=MESH)
  assert lm.mesh.size == 1 and on_mesh.mesh.size == 8
  matrix = on_mesh.decoder.layers[0].feed_forward.gate_DF[...]
  assert matrix.addressable_shards[0].data.size == matrix.size / 8
  for options in ({}, {'draft': 0}, {'temperature': 0.8, 'same_seed': True}, {'adaptive': True},
                  {'drafter': lm, 'draft': 3}):  # a drafter that lies on one device
    expected = generate_clearly(lm, PROMPTS, max_tokens=12, **options | {'adaptive': False})
    assert on_mesh.generate(PROMPTS, max_tokens=12, **options).ids == expected.ids
  drafted_from_mesh = lm.generate(PROMPTS, max_tokens=12, drafter=on_mesh, draft=3)
  assert drafted_from_mesh.ids == expected.ids
  ours, theirs = (model.evaluate(rows=6) for model in (on_mesh, lm))
  np.testing.assert_allclose(ours['nats'], theirs['nats'], rtol=1e-5)
  ours, theirs = (model.score(['import os', 'a']) for model in (on_mesh, lm))
  for one, other in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-4)


def test_any_number_of_devices_that_divides_the_model_evaluates_it(run, lm):
  """Also one that does not divide config.train.evaluate_rows, 4."""
  three = mtp_jax.load(run, mesh={'data': 3}).evaluate()
  np.testing.assert_allclose(three['nats'], lm.evaluate()['nats'], rtol=1e-5)
  assert three['count'] == lm.evaluate()['count']


def test_a_run_trained_on_a_mesh_is_decoded_from_it_and_on_fewer_devices_from_one(run, lm, monkeypatch):
  config = dataclasses.replace(lm.config, mesh=dataclasses.replace(lm.config.mesh, **MESH))
  write(run.parent / 'sharded', config, random_state(config, seed=5))
  assert mtp_jax.load(run.parent / 'sharded').decoder.mesh.shape == {'data': 1, 'context': 1, 'expert': 1, **MESH}
  one_device = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *_: one_device)
  assert mtp_jax.load(run.parent / 'sharded').decoder.mesh is None


@pytest.mark.parametrize('mesh, message', [
    ({'tensors': 2}, "no axis 'tensors'; did you mean 'tensor'?"),
    ({'expert': 2}, "no axis 'expert'"),
    ({3: 2}, 'no axis 3'),
    ({'tensor': 0}, 'tensor must be a whole number from 1 on'),
    ({'tensor': 2.0}, 'tensor must be a whole number'),
    ({'tensor': 4}, 'tensor=4 does not divide config.model.heads=2'),
    ({'fsdp': 3}, 'fsdp=3 does not divide config.model.width=16'),
    ({'context': 3}, 'context=3 does not divide config.data.length=128'),
    ({'data': 4, 'fsdp': 4}, 'needs 16 devices, but there are 8'),
    ('tensor=2', 'give the devices along each axis, such as'),
    (8, 'give the devices along each axis, such as'),
], ids=str)
def test_a_mesh_that_does_not_fit_is_bad_input(run, mesh, message):
  with pytest.raises(BadInput) as error:
    mtp_jax.load(run, mesh=mesh)
  assert message in str(error.value) and str(error.value).startswith(f'mesh={mesh!r}: ')
