"""score, and evaluate on one's own files, print what the functions behind them return."""
import pytest

import mtp_jax


def test_score_prints_a_line_a_token(run, run_json, place):
  expected, = mtp_jax.load(place / 'run').score('the 12', futures=2, top=3)
  values = run_json("score --workdir=run --text='the 12' --futures --top=3")
  assert values['ids'] == expected.ids.tolist() and ''.join(values['texts']) == 'the 12'
  assert values['logprobs'][0] == expected.logprobs[0].tolist() and values['logprobs'][1][0] is None
  assert values['likeliest'] == expected.likeliest.tolist()
  assert [[other['id'] for other in others] for others in values['top']] == expected.top_ids[0].tolist()
  assert (values['logprob'], values['bits_per_byte']) == (expected.logprob, expected.bits_per_byte)
  code, out, err = run("score --workdir=run --text='the 12' --futures --top=3")
  assert code == 0 and err == [] and len(out) == 1 + 6 + 2
  assert out[0].split() == ['token', 'future', '0', 'future', '1', 'likeliest']
  assert out[4].split()[:2] == ["'", "'"] and f'{expected.logprobs[0, 3]:.3f}' in out[4]
  assert out[-1].startswith('6 tokens, log-probability ') and f'{expected.bits_per_byte:.4f}' in out[-1]


def test_a_file_is_scored_as_its_content(run_json, run, place):
  (place / 'long.txt').write_text('0123456789' * 5)
  typed = run_json(f'score --workdir=run --text={"0123456789" * 5}')
  assert run_json('score --workdir=run --text_file=long.txt') == typed
  assert run_json('score --workdir=run --text_file=long.txt --overlap=0')['logprob'] != typed['logprob']
  assert len(run('score --workdir=run --text_file=long.txt --notokens')[1]) == 2
  assert run_json(r'score --workdir=run --escapes --text=\\x41')['ids'] == [65]


def test_evaluate_takes_ones_own_files_and_groups(run, run_json, place):
  (place / 'mine').mkdir()
  (place / 'own.txt').write_text('0123456789' * 5)
  (place / 'mine' / 'a.py').write_text('def f(x):\n  return x\n')
  own = run_json('evaluate --workdir=run --input=mine,own.txt --by=kind,position')
  assert own['count'][0] == 21 + 1 + 50 + 1 and 'speed_up_greedy' not in own
  assert sum(group['tokens'] for group in own['by_kind'].values()) == own['count'][0]
  code, out, err = run('evaluate --workdir=run --input=mine,own.txt --by=kind,position')
  assert code == 0 and err == []
  for heading, groups in (('kind ', own['by_kind']), ('position ', own['by_position'])):
    start = next(i for i, line in enumerate(out) if line.startswith(heading))
    assert [line.split('  ')[0] for line in out[start + 1:start + 1 + len(groups)]] == list(groups)


@pytest.mark.parametrize('command, message', [
    ("score --workdir=run --text=''", '--text: is empty, it has no token to score'),
    ('score --workdir=run', '--text: give either --text='),
    ('score --workdir=run --text=a --text_file=tiny.py', '--text_file: not together with --text'),
    ('score --workdir=run --text_file=nowhere', '--text_file=nowhere: No such file'),
    ('score --workdir=run --text=a --top=-1', '--top=-1: must be at least 0'),
    ('score --workdir=run --text=a --top=300', 'top=300: must be between 0 and 257'),
    ('score --workdir=run --text=a --overlap=16', 'overlap=16: must be between 0 and 15'),
    ('score --workdir=nowhere --text=a', '--workdir=nowhere: holds no checkpoint'),
    ('evaluate --workdir=run --by=kin', "by='kin': no such grouping; did you mean 'kind'?"),
    ('evaluate --workdir=run --input=nowhere', "--input: 'nowhere' "),
    ('evaluate --workdir=run --input=nowhere://b/x', "--input: 'nowhere://b/x': "),
    ('evaluate --workdir=run --input=tiny.py --data=documents', '--data: not together with --input'),
    ('generate --workdir=run --prompt=a --n=0', '--n=0: must be at least 1'),
    ('generate --workdir=run --prompt=a --n=2 --stream', '--stream: shows one sample, but --n=2'),
    ('generate --workdir=run --prompt=a --unconditional', '--unconditional: begins a document'),
])
def test_bad_input_is_one_line(run, command, message):
  code, out, err = run(command)
  assert code == 2 and out == [] and len(err) == 1 and message in err[0]


def test_generate_shows_every_sample_and_begins_a_document(run, run_json):
  values = run_json('generate --workdir=run --unconditional --n=3 --temperature=1 --max_tokens=8 --seed=2')
  assert len(values['texts']) == len(set(values['texts'])) == 3 and values['text'] == values['texts'][0]
  assert {*values['finish_reason']} <= {'eos', 'length'} and len(values['finish_reason']) == 3
  code, out, _ = run('generate --workdir=run --prompt=a --n=2 --temperature=1 --max_tokens=4')
  assert code == 0 and [line for line in out if line.startswith('--- ')] == ['--- 0', '--- 1']
