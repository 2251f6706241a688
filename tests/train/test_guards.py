"""Bad steps are skipped as if they never happened, and too many lead back to the checkpoint; limits are those of a
brute-force median; a step that is run again agrees.
"""
import dataclasses
import functools
import json
import math
import random
import signal
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import FAMILIES, experiment, log_of, same_bits, write_config_file

from mtp_jax import tokenizer
from mtp_jax.checkpoint.record import read_record, steps
from mtp_jax.cli.main import main
from mtp_jax.config import Config
from mtp_jax.data.corpus import open_corpus
from mtp_jax.mesh import make_mesh
from mtp_jax.train import step as training
from mtp_jax.train.fit import fit
from mtp_jax.train.guards import CAUSES, NO_LIMITS, Guard, changes_loss


def quiet(line):
  pass


def state_of(config: Config, workdir) -> training.State:
  with jax.set_mesh(make_mesh(config.mesh)):
    return training.restore(config, workdir, steps(workdir)[-1], make_mesh(config.mesh))


# what is done to a step so that it is bad: a factor of the loss, or an infinite last update
BAD = {'loss not finite': math.nan, 'gradient not finite': 1e25, 'update not finite': None, 'loss spike': 50.0,
       'gradient spike': 50.0}


@pytest.mark.parametrize('family, moments', [('parallel', 'host'), ('experts', 'device')])
def test_40_steps_of_which_15_are_bad_are_bitwise_the_other_25(tmp_path, packed, family, moments):
  """Parameters, moments, their counters and the biases of experts, after each bad step and at the end."""
  model = {'vocab': 24, 'layers': 4, 'futures': 3, **FAMILIES[family]}
  config = experiment(tmp_path, model=model, data={'length': 12}, optimizer={'moments': moments},
                      train={'steps': 40, 'batch': 4, 'accumulate': 1})
  rng = random.Random(0)
  kinds = [kind for kind in BAD if moments == 'device' or kind != 'update not finite']
  bad = dict(zip(sorted(rng.sample(range(10, 40), 15)), rng.sample(kinds * 4, 15)))
  run = jax.jit(functools.partial(training.step, config, active=(True,) * 3), static_argnames=())
  ones, weight_M = jnp.ones(24, jnp.int32), jnp.array([1.0, 0.5, 0.25])

  def advance(state, k, factor=1.0, limits=NO_LIMITS):
    return run(state, packed(config.model, 4, 12, k), ones, weight_M * factor, balance_rate=0.01,
               limits=type(limits)(*map(np.float32, limits)))

  guard = Guard(8, 10.0)
  with jax.set_mesh(make_mesh(config.mesh)):
    state = clean = training.compiled_init(config, jax.random.key(0))
    for k in range(40):
      limits, kind = guard.limits(k + 1), bad.get(k)
      if kind == 'gradient spike':
        limits = limits._replace(loss=math.inf)
      before = with_infinite_update(state) if kind == 'update not finite' else state
      after, metrics = advance(before, k, BAD.get(kind) or 1.0, limits)
      guard.add(k + 1, metrics['loss'].item(), metrics['gradient_norm'].item(), int(metrics['skip_cause']))
      assert int(metrics['skip_cause']) == (1 + CAUSES.index(kind) if kind else 0), (k, kind)
      if kind:
        assert same_bits((after.model, after.optimizer), (before.model, before.optimizer)), (k, kind)
        assert metrics['update_norm'] == 0
        state = dataclasses.replace(after, optimizer=state.optimizer)
      else:
        state, (clean, _) = after, advance(clean, k)
  assert same_bits((state.model, state.optimizer), (clean.model, clean.optimizer))
  assert (int(state.step), int(state.skipped), int(clean.step)) == (40, 15, 25)
  assert guard.skipped == {kind: list(bad.values()).count(kind) for kind in kinds}
  if moments == 'host':  # all but the moments stays as it was
    before = with_infinite_update(state)
    with jax.set_mesh(make_mesh(config.mesh)):
      after, metrics = advance(before, 40)
    assert (int(metrics['skip_cause']), int(metrics['skipped_in_a_row']), metrics['update_norm']) == (3, 1, 0)
    assert same_bits(without_moments(after), without_moments(before))


def with_infinite_update(state):
  """The state with moments, of the last parameter alone, whose next update is infinite."""
  adam = state.optimizer['adam']
  leaves, structure = jax.tree.flatten(adam.mu)
  leaves[-1] = jax.device_put(np.full(leaves[-1].shape, 3e38, np.float32), leaves[-1].sharding)
  moments = type(state.optimizer)(state.optimizer, adam=adam._replace(mu=structure.unflatten(leaves)))
  return dataclasses.replace(state, optimizer=moments)


def without_moments(state):
  """Parameters, and the counters of the optimizer."""
  return state.model, [x for x in jax.tree.leaves(state.optimizer) if not x.ndim]


@pytest.mark.parametrize('window', [1, 2, 7])
def test_limits_are_median_and_deviation_of_the_last_good_steps_but_the_latest(window):
  """As a median computed from a sorted list gives them, also from a guard made anew at any step."""
  rng, factor = random.Random(window), 3.0
  guard, series = Guard(window, factor), []
  for n in range(1, 80):
    if rng.random() < 0.3:
      guard = Guard(window, factor, guard.state())
    good = [pair for pair, is_good in series[:max(0, n - 2)] if is_good][-window:]
    wanted = NO_LIMITS
    if len(good) == window:
      wanted = []
      for values in zip(*good):
        middle = statistics.median(values)
        deviation = 1.4826 * statistics.median(abs(value - middle) for value in values)
        wanted.append(middle + factor * max(deviation, 0.01 * middle))
    np.testing.assert_allclose(guard.limits(n), wanted, rtol=1e-6)
    pair, cause = (rng.choice([2.0, rng.random()]), rng.expovariate(1)), rng.choice([0, 0, 0, 4])
    series.append((pair, cause == 0))
    guard.add(n, *pair, cause)
  assert Guard(window, 0.0, guard.state()).limits(80) == NO_LIMITS


def test_a_jump_of_the_weights_is_not_a_spike(tmp_path):
  objective = {'weights': ('1 step 0.5 2', '0 linear 0:1 1')}
  config = experiment(tmp_path, objective=objective, train={'steps': 100})
  assert [step for step in range(100) if changes_loss(config, step)] == [50]


def poisoned(config, batches):
  """A compiled step, bad whenever the batch is one of `batches`, and the list of all batches it got."""
  original, seen = training.compiled_step, []

  def compiled_step(config, state, batch, *others):
    seen.append(np.asarray(batch['tokens']))
    if not any(np.array_equal(seen[-1], bad) for bad in batches):
      return original(config, state, batch, *others)
    kept = jax.tree.map(jnp.copy, state)
    following, metrics = original(config, dataclasses.replace(
        state, model=jax.tree.map(lambda x: x * math.nan, state.model)), batch, *others)
    return dataclasses.replace(following, model=kept.model, optimizer=kept.optimizer), metrics
  return compiled_step, seen


def batches_of(config: Config, count: int) -> list[np.ndarray]:
  """The tokens of the first batches, as a run without trouble gets them."""
  corpus = open_corpus(config.data, tokenizer.load('bytes'))
  return [batch['tokens'] for batch, _ in zip(corpus.batches(corpus.rows(2), config.train.batch), range(count))]


def numbers_of(seen, batches) -> list[int]:
  return [next(i for i, batch in enumerate(batches) if np.array_equal(tokens, batch)) for tokens in seen]


TROUBLE = {'steps': 12, 'skipped_allowed': 2, 'evaluate_every': 0}


def test_a_run_with_spikes_that_is_resumed_is_bitwise_the_uninterrupted_one(folder, tmp_path, monkeypatch):
  """With a limit so low that good steps are skipped too; no checkpoint is saved within a row of bad steps."""
  config = experiment(folder, train=TROUBLE | {'spike_factor': 0.1, 'spike_window': 3, 'skipped_allowed': 9})
  compiled_step, _ = poisoned(config, batches_of(config, 12)[5:7])
  monkeypatch.setattr('mtp_jax.train.run.compiled_step', compiled_step)
  whole = tmp_path / 'whole'
  fit(config, whole, note=quiet)
  causes = [record['skip_cause'] for record in log_of(whole) if record['kind'] == 'train']
  assert causes[5:7] == [1, 1] and {4, 5} & set(causes)
  last = log_of(whole)[-2]
  assert last['skipped'] == sum(cause > 0 for cause in causes)
  for cause in set(causes) - {0}:
    assert last['skipped_' + CAUSES[cause - 1].replace(' ', '_')] == causes.count(cause)
  for cut in (4, 6, 11):
    workdir = tmp_path / f'cut {cut}'
    stop = lambda line: line.startswith(f'step {cut - 1}  ') and signal.raise_signal(signal.SIGTERM)  # noqa: B023
    outcome = fit(config, workdir, note=stop)
    assert outcome.signal and outcome.step == max([*steps(workdir), 0])
    assert not outcome.step or causes[outcome.step - 1] == 0
    fit(config, workdir, note=quiet)
    assert same_bits(state_of(config, workdir), state_of(config, whole)) and log_of(workdir) == log_of(whole)


@pytest.mark.parametrize('bad, wanted', [
    ((6, 7), [*range(6), *range(8, 14)]),  # right after the checkpoint of step 6
    ((7, 8), [*range(6), *range(9, 15)]),  # the good batch 6 goes as well
    ((0, 1), [*range(2, 14)]),  # before any checkpoint
    ((6, 7, 9, 10), [*range(6), *range(11, 17)]),  # twice from the same one
], ids=str)
def test_a_roll_back_leaves_out_just_the_rows_since_the_checkpoint(folder, tmp_path, bad, wanted, monkeypatch):
  config = experiment(folder, train=TROUBLE)
  batches = batches_of(config, 20)
  compiled_step, seen = poisoned(config, [batches[i] for i in bad])
  monkeypatch.setattr('mtp_jax.train.run.compiled_step', compiled_step)
  lines = []
  fit(config, tmp_path / 'run', note=lines.append)
  told = [line for line in lines if 'roll-back' in line]
  assert len(told) == len(bad) // 2
  start = 6 if bad[0] else 0
  place, rows = 'step 6' if start else 'the beginning', 8 * (bad[1] + 1 - start)
  assert told[0] == (f'step {bad[1] + 1}: 2 bad steps in a row, the last one: loss not finite; roll-back 1 of 2 to '
                     f'{place}, without the {rows} rows read since')
  numbers = numbers_of(seen, batches)
  assert numbers[-(12 - start):] == wanted[start:]
  record = read_record(tmp_path / 'run')
  assert sum(rows for _, rows in record['skipped_rows']) == 8 * (wanted[-1] - 11)
  assert {step for step, _ in record['skipped_rows']} == {start}
  assert log_of(tmp_path / 'run')[-1]['step'] == 12 and state_of(config, tmp_path / 'run').skipped == 0

  # killed after the roll-back, before the next checkpoint; then stopped after that and resumed
  calls = []
  def killed(*arguments):
    calls.append(1)
    if len(calls) == len(numbers) - (12 - start) + 2:
      raise KeyboardInterrupt
    return compiled_step(*arguments)
  monkeypatch.setattr('mtp_jax.train.run.compiled_step', killed)
  with pytest.raises(KeyboardInterrupt):
    fit(config, tmp_path / 'cut', note=quiet)
  fit(config, tmp_path / 'cut', note=lambda line: line.startswith('step 10  ') and signal.raise_signal(signal.SIGTERM))
  assert steps(tmp_path / 'cut')[-1] == 11
  fit(config, tmp_path / 'cut', note=quiet)
  assert same_bits(state_of(config, tmp_path / 'cut'), state_of(config, tmp_path / 'run'))
  assert log_of(tmp_path / 'cut') == log_of(tmp_path / 'run')


@pytest.mark.parametrize('trouble', [None, 'in a replay', 'in the run'])
def test_a_step_run_again_tells_a_machine_that_errs_from_bad_data(folder, tmp_path, trouble, monkeypatch, capsys):
  """Step 8 is bad, after a roll-back to step 5; parameters change by a millionth before a step of the run, or of one
  replay.
  """
  config = experiment(folder, train=TROUBLE | {'checkpoint_every': 5})
  batches = batches_of(config, 20)
  compiled_step, _ = poisoned(config, [batches[i] for i in (6, 7, 10)])
  calls, flips = [], {'in a replay': 5, 'in the run': 13}

  def flipping(config, state, *others):
    """The machine: it errs in one call, counted from the beginning of a `fit` or `replay`."""
    calls.append(1)
    if len(calls) == flips.get(trouble):
      state = dataclasses.replace(state, model=jax.tree.map(lambda x: x * (1 + 2**-20), state.model))
    return compiled_step(config, state, *others)

  monkeypatch.setattr('mtp_jax.train.run.compiled_step', flipping if trouble == 'in the run' else compiled_step)
  monkeypatch.setattr('mtp_jax.train.replay.compiled_step', flipping if trouble == 'in a replay' else compiled_step)
  fit(config, tmp_path / 'run', note=quiet)
  write_config_file(tmp_path / 'config.py', config)
  files = {path: path.stat().st_mtime_ns for path in (tmp_path / 'run').rglob('*')}
  calls.clear()
  arguments = ['train', f'--config={tmp_path / "config.py"}', f'--workdir={tmp_path / "run"}']
  step = 10 if trouble == 'in the run' else 8
  assert main([*arguments, f'--replay_step={step}', '--json']) == (0 if trouble is None else 1)
  found = json.loads(capsys.readouterr().out)
  assert (found['start'], found['logged'], found['same'], found['agrees']) == (
      5, True, trouble != 'in a replay', trouble is None)
  if step == 8:
    assert (found['cause'], found['loss'], found['logged_loss']) == ('loss not finite', None, None)
  else:
    assert found['cause'] == '' and 0 < abs(found['loss'] - found['logged_loss'])
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / 'run').rglob('*')} == files
