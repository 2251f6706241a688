"""evaluate and generate print what the functions behind them return."""
import json

from experiments import experiment, generate_clearly, random_state, write

import mtp_jax
from mtp_jax.checkpoint import store

GENERATE = 'generate --workdir=run --prompt=a'


def flip_last_byte(folder):
  """Of the largest file in a folder."""
  path = max((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
  content = path.read_bytes()
  path.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))


def test_evaluate_prints_one_entry_a_future(run, run_json):
  values = run_json('evaluate --workdir=run')
  assert {'nats', 'accuracy', 'count', 'bits_per_byte'} <= values.keys() and values['step'] == 3
  assert [len(values[key]) for key in ('nats', 'accuracy', 'count')] == [2, 2, 2]
  for choice in ('greedy', 'sampled'):
    assert len(values[f'acceptance_{choice}']) == 1
    assert len(values[f'tokens_per_forward_{choice}']) == len(values[f'speed_up_{choice}']) == 2
  assert values['tokens_per_forward_greedy'][0] == values['speed_up_greedy'][0] == 1
  assert values['tokens_per_forward_sampled'][1] > 1
  for mean, total in (('nats', 'nats_sum'), ('accuracy', 'correct')):
    assert [x / n for x, n in zip(values[total], values['count'])] == values[mean]
  code, out, err = run('evaluate --workdir=run --nospeed')
  assert code == 0 and err == [] and out[0].split() == ['future', 'nats', 'accuracy', 'count']
  assert f'{values["bits_per_byte"]:.4f}' in out[3]
  assert out[-1].split()[0] == '1' and 'speed-up' not in ' '.join(out)


def test_evaluate_says_when_the_documents_are_others(run, place):
  config = experiment(place)
  write(place / 'moved', config, random_state(config))
  code, _, err = run('evaluate --workdir=moved --rows=4')
  assert code == 0 and len(err) == 1 and err[0].startswith('note: the documents here differ')


def test_generate_prints_the_same_text_for_every_draft(run, run_json, place):
  generate_clearly(mtp_jax.load(place / 'run'), 'a', max_tokens=24, max_length=40, draft=0)
  sized = f'{GENERATE} --max_tokens=24 --max_length=40'
  plain, one, longest = (run_json(f'{sized} --draft={draft}') for draft in (0, 1, -1))
  for values in (plain, one, longest):
    assert {'text', 'tokens', 'forwards', 'tokens_per_forward', 'seconds'} <= values.keys()
  assert plain['text'] == one['text'] == longest['text']
  assert plain['tokens'] == plain['forwards'] == 24
  code, out, _ = run(f'{sized} --draft=1')
  assert code == 0
  assert 'tokens per forward' in out[-2] and out[-1].startswith('acceptance by depth: ')
  text = '\n'.join(out[:-3])
  assert text == 'a' + plain['text']
  code, streamed, _ = run(f'{sized} --draft=1 --stream')
  assert code == 0 and '\n'.join(streamed[:-2]) == text


def test_generate_on_a_mesh_prints_the_text_of_one_device(run, run_json):
  alone = run_json(f'{GENERATE} --max_tokens=8')['text']
  assert run_json(f'{GENERATE} --max_tokens=8 --mesh=fsdp=4,tensor=2')['text'] == alone
  assert run_json(f'{GENERATE} --max_tokens=8 --mesh=data=2 --drafter=run')['text'] == alone


def test_what_is_lossy_says_so_and_what_is_not_does_not(run, run_json):
  short, top_k = f'{GENERATE} --max_tokens=10', '--criterion=lossy_top_k --threshold=259'
  exact, lossy = run_json(short), run_json(f'{short} {top_k}')
  assert (exact['criterion']['name'], exact['lossless']) == ('exact', True)
  assert lossy['criterion'] == {'name': 'lossy_top_k', 'threshold': 259, 'min_block': 1}
  assert (lossy['lossless'], lossy['acceptance']) == (False, [1.0])
  last_line = lambda command: run(command)[1][-1]
  assert last_line(f'{short} {top_k}').startswith('lossy: lossy_top_k, threshold 259')
  blocks = 'lossy: exact, threshold 0, blocks of 2 at least'
  assert last_line(f'{short} --min_block=2').startswith(blocks)
  assert not any('lossy' in line for line in run(short)[1])


def test_verify_tells_of_each_checkpoint_whether_it_is_whole(run, run_json, place):
  config = experiment(place)
  writer = store.Writer(place / 'several', 3)
  for step in (2, 4, 6):
    write(place / 'several', config, random_state(config), step, writer=writer)
  writer.close()
  assert run('verify --workdir=several')[0] == 0
  checkpoints = place / 'several' / 'checkpoints'
  flip_last_byte(checkpoints / '4')
  (checkpoints / '6' / 'commit_success.txt').unlink()
  code, out, err = run('verify --workdir=several')
  assert code == 1 and not err
  assert [line.split()[0] for line in out] == ['step', '2', '4', '6'] and out[1].endswith(' whole')
  assert 'is damaged, ' in out[2] and out[2].endswith('holds other bytes than were saved')
  assert out[3].endswith('incomplete, it was never committed')
  code, out, _ = run('verify --workdir=several --step=2 --json')
  assert code == 0 and json.loads(out[-1])['whole'] == 1
  for path in (checkpoints / '2').glob('manifest*'):
    path.unlink()
  assert run('verify --workdir=several --step=2')[1][1].endswith('it has no manifest')
  steps_held = 'step 3: several holds the steps 2, 4, 6'
  for where, message in (('several --step=3', steps_held), ('none', 'holds no checkpoint')):
    code, _, (line,) = run(f'verify --workdir={where}')
    assert code == 2 and message in line


def test_evaluate_and_generate_use_the_newest_checkpoint_that_is_whole(run, run_json, place):
  config = experiment(place)
  writer = store.Writer(place / 'flipped', 3)
  for step in (2, 4):
    write(place / 'flipped', config, random_state(config, seed=step), step, writer=writer)
  writer.close()
  flip_last_byte(place / 'flipped/checkpoints/4/parameters')
  for command in ('evaluate --workdir=flipped --rows=4', 'generate --workdir=flipped --prompt=a --max_tokens=2'):
    code, _, err = run(command)
    assert code == 0 and len([line for line in err if line.endswith('; an older checkpoint is used')]) == 1, err
    code, _, err = run(f'{command} --step=4')
    assert code == 2 and err[-1].endswith('; other checkpoints are of the steps 2'), err
  assert run_json('evaluate --workdir=flipped --rows=4')['step'] == 2
