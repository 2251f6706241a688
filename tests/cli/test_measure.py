"""inspect and the benchmarks print what the functions behind them return."""
import shutil

import jax
import pytest
from experiments import experiment, random_state


def test_inspect_prints_what_a_checkpoint_holds(run, run_json, place):
  values = run_json('inspect --workdir=run')
  keys = {'step', 'parameters_sha256', 'parameters', 'flops_per_token', 'conventions', 'twin'}
  assert keys <= values.keys()
  assert values['step'] == 3 and len(values['parameters_sha256']) == 64
  of_config = run_json('inspect --config=tiny.py')
  assert of_config['parameters'] == values['parameters'] and of_config['parameters_sha256'] is None
  parameters = sum(x.size for x in jax.tree.leaves(random_state(experiment(place)).model))
  totals = [side['parameters']['total'] for side in (values, values['twin'])]
  assert totals == [parameters, parameters]
  code, out, _ = run('inspect --workdir=run')
  assert code == 0 and values['parameters_sha256'] in out[-1]


def test_train_and_its_benchmark_print_one_object(run_json, place):
  train = 'train --config=tiny.py --workdir=new'
  values = run_json(f'{train} --config.train.steps=3 --config.train.trackers=tensorboard')
  assert (values['step'], values['signal'], len(values['validation']['nats'])) == (3, 0, 2)
  assert list((place / 'new' / 'tensorboard').glob('events.out.tfevents.*'))
  shutil.rmtree(place / 'new')
  benchmark = 'benchmark train --config=tiny.py'
  values = run_json(f'{benchmark} --steps=2')
  assert {'seconds_to_first_step', 'step_seconds', 'tokens_per_second', 'mfu'} <= values.keys()
  flops_ratio = values['flops_per_token_causal'] / values['flops_per_token']
  assert values['mfu_causal'] == pytest.approx(values['mfu'] * flops_ratio) and flops_ratio < 1
  values = run_json(f'{benchmark} --against=tiny.py --steps=2')
  assert values['flops_ratio'] == values['memory_ratio'] == 1 and values['time_ratio'] > 0
  assert values['config'].keys() == values['other'].keys()
  values = run_json(f'{benchmark} --against=dense --steps=1')
  assert values['flops_ratio'] == 1 and values['memory_ratio'] < 1


def test_drafts_are_timed_beside_plain_decoding(run_json, place):
  values = run_json('benchmark decode --workdir=run --prompts=2 --prompt_tokens=8 --max_tokens=8 '
                    '--repeats=1 --batch=1,2 --plot=decode.png')
  rows = values['rows']
  assert [(row['batch'], row['draft']) for row in rows] == [(1, 0), (1, 1), (2, 0), (2, 1)]
  for plain, drafted in (rows[:2], rows[2:]):
    assert plain['tokens_per_forward'] == plain['speed_up'] == plain['overhead'] == 1
    assert plain['acceptance'] == []
    tokens_per_forward = drafted['overhead'] * drafted['speed_up']
    assert tokens_per_forward == pytest.approx(drafted['tokens_per_forward'])
    assert 0 <= drafted['drafting'] < 1 and plain['drafting'] == 0
    assert all(row['floor_seconds'] > 0 and row['over_floor'] > 0 for row in (plain, drafted))
  assert not any(row['differing'] for row in (*rows, *values['adaptive']))
  assert [row['batch'] for row in values['adaptive']] == [1, 2]
  assert all(row['speed_up'] > 0 and 0 <= row['mean_draft'] <= 1 for row in values['adaptive'])
  assert (place / 'decode.png').read_bytes().startswith(b'\x89PNG')


def test_the_speed_of_the_data_is_measured(run_json):
  values = run_json('benchmark data --config=tiny.py --seconds=0.05')
  assert set(values) == {
      'tokens_per_second', 'rows_per_second', 'share_of_memory_speed', 'prepare_bytes_per_second',
      'sentencepiece_bytes_per_second', 'share_of_raw_encoding'}
  assert all(value > 0 for value in values.values())
