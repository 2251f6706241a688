"""A run that was killed and resumed equals one that was not, bit by bit; a bad step changes nothing."""
import dataclasses
import json
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import RUNS, experiment, log_of, random_state, same_bits, write_config_file

import mtp_jax
from mtp_jax import tokenizer
from mtp_jax.checkpoint.record import steps
from mtp_jax.config import BadInput, Config, MeshConfig
from mtp_jax.data.corpus import open_corpus
from mtp_jax.mesh import make_mesh, put
from mtp_jax.model import costs
from mtp_jax.report import goodput
from mtp_jax.report.events import read_events, split_runs
from mtp_jax.train import step as training
from mtp_jax.train.fit import Outcome, fit


def fit_to(config: Config, workdir, step: int, note=lambda line: None) -> Outcome:
  """Ends by SIGTERM at `step`; where a validation is due after the step before, in that one."""
  def noted(line):
    note(line)
    if line.startswith(f'step {step - 1}  '):
      signal.raise_signal(signal.SIGTERM)
  return fit(config, workdir, note=noted)


def state_of(config: Config, workdir) -> training.State:
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    return training.restore(config, workdir, steps(workdir)[-1], mesh)


def test_a_run_writes_what_it_says(uninterrupted):
  config, workdir = uninterrupted('parallel')
  assert steps(workdir) == [3, 6]
  assert [(record['step'], record['kind']) for record in log_of(workdir)] == [
      (1, 'train'), (2, 'train'), (2, 'validation'), (3, 'train'), (4, 'train'), (4, 'validation'),
      (5, 'train'), (6, 'train'), (6, 'validation')]
  assert Config.from_dict(json.loads((workdir / 'config.json').read_text())) == config
  state = state_of(config, workdir)
  assert [int(x)
          for x in (state.step, state.skipped, state.skipped_in_a_row,
                    state.optimizer['adam'].count, state.optimizer['learning_rate'].count)] == [
                        6, 0, 0, 6, 6]


@pytest.mark.parametrize('family, cuts',
                         [('parallel', [3]), ('parallel', [5]), ('parallel', [2, 4, 6]),
                          ('sequential', [2, 5]),
                                          ('staged parallel', [2]), ('staged parallel', [3]),
                                          ('staged parallel', [4]), ('staged sequential', [2, 4]),
                                          ('warmed up', [2]), ('warmed up', [3, 5])],
                                          ids=str)
def test_a_stopped_and_resumed_run_is_bitwise_the_uninterrupted_one(
    uninterrupted, tmp_path, family, cuts):
  config, workdir = uninterrupted(family)
  for cut in cuts:
    outcome = fit_to(config, tmp_path, cut)
    in_validation = (cut - 1) % config.train.evaluate_every == 0 and cut > 1
    assert (outcome.step, outcome.signal) == (cut - in_validation, signal.SIGTERM)
  outcome = fit(config, tmp_path, note=lambda line: None)
  assert (outcome.step, outcome.signal) == (6, 0)
  assert same_bits(state_of(config, tmp_path), state_of(config, workdir))
  assert log_of(tmp_path) == log_of(workdir)


def test_a_batch_that_warms_up_reads_every_row_once_and_is_told(uninterrupted, tmp_path):
  config, workdir = uninterrupted('warmed up')
  rows = [4, 4, 4, 8, 8, 8]
  assert [config.train.rows_at(step) for step in range(6)] == rows
  whole = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_share=1.0))
  tokens = tokenizer.load('bytes')
  corpus = open_corpus(config.data, tokens)
  ids = lambda c, steps: np.concatenate([batch['tokens'] for batch, _ in zip(
      corpus.batches(corpus.rows(2), c.train.batch, rows_before=c.train.rows_before), range(steps))])
  np.testing.assert_array_equal(ids(config, 6)[:32], ids(whole, 4))
  counts = [record['count'][0] for record in log_of(workdir) if record['kind'] == 'train']
  assert [-(-count // 16) for count in counts] == rows
  lines = []
  fit(config, tmp_path, note=lines.append)
  assert [line for line in lines if 'batches of' in line] == ['step 1: batches of 4 rows', 'step 4: batches of 8 rows']


def test_a_stage_is_noted_and_the_log_has_weights_and_nothing_of_a_future_without(
    uninterrupted, tmp_path):
  config, _ = uninterrupted('staged parallel')
  lines = []
  fit(config, tmp_path, note=lines.append)
  assert [line for line in lines if 'are computed' in line] == [
      'step 1: futures 0 2 are computed, the others have weight 0',
      'step 4: futures 0 1 are computed, the others have weight 0']
  training = [record for record in log_of(tmp_path) if record['kind'] == 'train']
  validations = [record for record in log_of(tmp_path) if record['kind'] == 'validation']
  wanted = [[1 - i / 6, 0, 0.5] if i < 3 else [1 - i / 6, 1, 0] for i in range(6)]
  # float32
  np.testing.assert_allclose([record['weight'] for record in training], wanted, rtol=1e-6)
  for record, weights in zip(training, wanted, strict=True):
    for key in ('nats', 'accuracy'):
      assert [value is None for value in record[key]] == [weight == 0 for weight in weights]
    assert [count == 0 for count in record['count']] == [weight == 0 for weight in weights]
    assert record['loss'] == pytest.approx(sum(w * nats for w, nats in zip(weights, record['nats'])
                                               if w), rel=1e-5)
  # which computes them all
  assert len(validations) == 3
  assert all(nats > 0 for record in validations for nats in record['nats'])


def test_a_head_whose_future_has_no_weight_yet_stays_as_it_was_drawn(folder, tmp_path):
  config = experiment(folder, **RUNS['staged parallel'], optimizer={'weight_decay': 0.0},
                      train={'evaluate_every': 0})
  fit_to(config, tmp_path, 3)
  with jax.set_mesh(make_mesh(config.mesh)):
    state = training.compiled_init(config, jax.random.key(config.train.seed))  # as `fit` does
  start = state.model.futures
  after = mtp_jax.load(tmp_path, 3).model.futures
  for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(start)):
    np.testing.assert_array_equal(a[1], b[1])
    assert np.any(a[0] != b[0]) and np.any(a[2] != b[2])


def test_a_run_that_ended_can_be_run_again(uninterrupted, tmp_path):
  config, workdir = uninterrupted('parallel')
  before = log_of(workdir)
  outcome = fit(config, workdir, note=lambda line: None)
  assert outcome.step == 6
  assert outcome.validation == {key: value for key, value in before[-1].items()
                                if key not in ('step', 'kind')}
  assert log_of(workdir) == before


def test_a_process_stopped_by_sigterm_ctrl_c_and_sigkill_ends_as_if_uninterrupted(folder, tmp_path):
  """Three processes in turn, each ended at a random moment after saving a checkpoint; then a run to the end."""
  config = experiment(folder,
                      train={'steps': 120, 'checkpoint_every': 4, 'evaluate_every': 0,
                             'log_every': 1})
  fit(config, tmp_path / 'whole', note=lambda line: None)
  write_config_file(tmp_path / 'config.py', config)
  cut, waits = tmp_path / 'cut', random.Random()
  for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
    before = max(steps(cut), default=0)
    process = subprocess.Popen([sys.executable, '-m', 'mtp_jax', 'train',
                                f'--config={tmp_path / "config.py"}', f'--workdir={cut}'],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while max(steps(cut), default=0) == before and process.poll() is None:
      time.sleep(0.01)
    wait = waits.uniform(0, 0.3)
    time.sleep(wait)
    process.send_signal(number)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == code, errors
    assert 'Traceback' not in errors
    assert before < steps(cut)[-1] < 120, f'{number!r} after {wait} s'
    lines = log_of(cut) if number != signal.SIGKILL else []
    assert not lines or lines[-1]['step'] == steps(cut)[-1]
  fit(config, cut, note=lambda line: None)
  assert same_bits(state_of(config, cut), state_of(config, tmp_path / 'whole'))
  digests = [costs.parameters_sha256(mtp_jax.load(path).model) for path in (cut, tmp_path / 'whole')]
  assert digests[0] == digests[1]
  assert log_of(cut) == log_of(tmp_path / 'whole')


def test_a_run_and_its_resumption_tell_where_their_time_went(uninterrupted, tmp_path):
  config, _ = uninterrupted('parallel')
  fit(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4)), tmp_path,
      note=lambda line: None)
  fit(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=6)), tmp_path,
      note=lambda line: None)
  events = read_events(tmp_path)
  assert [(run[0]['step'], run[-1]['step']) for run in split_runs(events)] == [(0, 4), (4, 6)]
  found = goodput.account(events)
  assert {kind for kind, seconds in found['seconds'].items() if seconds} >= {
      'step', 'data_wait', 'evaluation', 'save', 'compile', 'restore', 'setup'}
  assert (found['runs'], found['steps'], found['lost_steps'], found['seconds']['lost']) == (
      2, 6, 0, 0)
  assert 0 < found['goodput'] < 1
  assert found['seconds']['other'] < 0.2 * found['wall_seconds']


def test_accumulation_changes_nothing_but_memory(folder):
  """Up to the order of float32 sums: a few 1e-7 of a gradient, a few 1e-4 of Adam's first update."""
  config = experiment(folder)
  tokens = tokenizer.load('bytes')
  batch = open_corpus(config.data, tokens).rows(2).batch(range(8))
  batch['segments'][5:, 4:] = 0  # rows count unequally
  mesh, byte_length_V = make_mesh(config.mesh), jnp.asarray(np.pad(tokens.byte_lengths, (0, 5)))
  state = random_state(config)
  state = dataclasses.replace(state, optimizer=jax.tree.map(jnp.abs, state.optimizer))
  found = {}
  with jax.set_mesh(mesh):
    for k in (1, 2):
      c = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=k))
      found[k] = jax.device_get(training.compiled_step(
          c, jax.tree.map(jnp.copy, state), put(batch, mesh), byte_length_V, 0.0))
  assert found[1][1]['count'].tolist() == found[2][1]['count'].tolist()
  assert found[1][1]['count'][0] < 8 * 16
  for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(found[2])):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_a_run_on_a_mesh_is_the_run_on_one_device(uninterrupted, tmp_path):
  config, workdir = uninterrupted('parallel')
  fit(dataclasses.replace(config, mesh=MeshConfig(fsdp=2, tensor=2)), tmp_path,
      note=lambda line: None)
  for mine, other in zip(log_of(tmp_path), log_of(workdir), strict=True):
    assert mine.keys() == other.keys()
    for key, value in mine.items():
      if key != 'kind':
        # float32, sums in another order over six Adam steps
        np.testing.assert_allclose(value, other[key], rtol=1e-4, err_msg=key)


def test_moments_that_rest_in_the_host_change_nothing_but_how_xla_rounds(
    folder, tmp_path, assert_close):
  """Stopped and resumed besides: the checkpoint does not know where they rested.

  Two programs, so that gradients differ by some 1e-7. With its usual epsilon, Adam would turn a
  gradient that is nothing but rounding into a whole step.
  """
  config, workdir = experiment(folder, optimizer={'epsilon': 1e-2}), tmp_path / 'on device'
  fit(config, workdir, note=lambda line: None)
  wanted_state = jax.device_get(state_of(config, workdir))
  config = dataclasses.replace(config,
                               optimizer=dataclasses.replace(config.optimizer, moments='host'))
  tmp_path = tmp_path / 'in host'
  fit_to(config, tmp_path, 3)
  fit(config, tmp_path, note=lambda line: None)
  state = state_of(config, tmp_path)
  assert {x.sharding.memory_kind for x in jax.tree.leaves(state.optimizer)
          if x.ndim} == {'pinned_host'}
  assert_close(jax.device_get(state), wanted_state, 5e-6)
  found, wanted = log_of(tmp_path), log_of(workdir)
  assert len(found) == len(wanted)
  assert all(one['nats'] == pytest.approx(other['nats'], rel=1e-6)
             for one, other in zip(found, wanted))


def test_a_future_that_no_document_is_long_enough_for_is_nan_and_the_run_goes_on(folder, tmp_path):
  documents = [tmp_path / f'{i}.txt' for i in range(20)]
  for path, letter in zip(documents, 'abcdefghijklmnopqrst'):
    path.write_text(letter)  # <bos> a <eos>: two targets of future 0, one of future 1
  config = experiment(folder, data={'paths': tuple(map(str, documents))},
                      model={'futures': 3, 'layers': 5})
  outcome = fit(config, tmp_path / 'run', note=lambda line: None)
  assert outcome.step == config.train.steps
  for record in log_of(tmp_path / 'run'):
    assert record['nats'][2] is None and record['accuracy'][2] is None and record['count'][2] == 0
    assert record['nats'][1] > 0


def test_a_workdir_that_cannot_be_a_folder_is_refused_before_anything_is_done(folder, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(BadInput, match=r'^--workdir=.*file: cannot be a folder'):
    fit(experiment(folder), tmp_path / 'file')
