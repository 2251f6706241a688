"""The command line: bad input is one line and exit code 2, help names every flag, --json is one object on the last line."""
import json
import os
import shutil
import subprocess
import sys

import jax
import pytest
from experiments import experiment, random_state, write

from mtp_jax import tokenizer
from mtp_jax.checkpoint.record import FOLDER
from mtp_jax.cli.main import COMMANDS, main
from mtp_jax.data.corpus import open_corpus

# ml_collections 1.1.0 loads a config file by a deprecated method of importlib.
pytestmark = pytest.mark.filterwarnings(r'ignore:the load_module\(\) method is deprecated:DeprecationWarning')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A folder with the config file tiny.py, some that are wrong, and a checkpoint in run/."""
  folder = tmp_path_factory.mktemp('main')
  config = experiment(folder)
  source = f'from mtp_jax.config import Config\n\ndef get_config():\n  return Config.from_dict({config.to_dict()!r}).to_config_dict()\n'
  (folder / 'tiny.py').write_text(source)
  (folder / 'raises.py').write_text('def get_config():\n  return 1 / 0\n')
  (folder / 'syntax.py').write_text('def get_config(:\n')
  (folder / 'lacks.py').write_text('def get_configuration():\n  pass\n')
  (folder / 'forgets.py').write_text(source.replace('.to_config_dict()', ''))
  (folder / 'empty').mkdir()
  (folder / 'bad.jsonl').write_text('{"text": "x"}\n{"text\n{"text": "y"}\n')
  write(folder / 'run', config, random_state(config), identity=open_corpus(config.data, tokenizer.load('bytes')).identity)
  others = experiment(folder / 'others', data={'cache': config.data.cache})
  (folder / 'others' / 'documents' / '3.txt').write_text('changed')
  open_corpus(others.data, tokenizer.load('bytes'))  # so that the refusal of other documents is all there is to read
  (folder / 'broken' / FOLDER).mkdir(parents=True)
  shutil.copytree(folder / 'run' / FOLDER / '3', folder / 'broken' / FOLDER / '3')
  (folder / 'broken' / FOLDER / '3' / '_CHECKPOINT_METADATA').write_text('{"custom_me')
  (folder / 'prepared-set').mkdir()
  (folder / 'prepared-set' / 'index.json').write_text('{}')
  write(folder / 'elsewhere', config, random_state(config), conventions={})
  write(folder / 'foreign', config, random_state(config), tokenizer='other')
  return folder


@pytest.fixture
def run(place, monkeypatch, capfd):
  """main(arguments) in the folder: (exit code, lines of stdout, lines of stderr)."""
  def go(*arguments):
    monkeypatch.chdir(place)
    monkeypatch.delitem(sys.modules, 'config_config', raising=False)
    capfd.readouterr()
    code = main(list(arguments))
    out, err = capfd.readouterr()
    return code, out.splitlines(), err.splitlines()
  return go


TRAIN = ['train', '--config=tiny.py', '--workdir=new']
RESUME = ['train', '--config=tiny.py', '--workdir=run']
GENERATE = ['generate', '--workdir=run', '--prompt=a']

# arguments, then what the one line must hold
BAD = {
    'unknown command': (['trian'], "trian: no such command; did you mean 'train'?"),
    'unknown benchmark': (['benchmark', 'trian'], "benchmark trian: no such command; did you mean 'benchmark train'?"),
    'unknown flag': ([*TRAIN, '--wokdir=x'], "--wokdir=x: train has no such flag; did you mean 'workdir'?"),
    'flag without =': (['train', '--config', 'tiny.py'], '--config: flags are written --name=value'),
    'stray word': ([*TRAIN, 'faster'], 'faster: not expected here; flags are written --name=value'),
    'no config': (['train', '--workdir=new'], '--config: missing'),
    'no workdir': (['train', '--config=tiny.py'], '--workdir: missing'),
    'no prompt': (['generate', '--workdir=run'], '--prompt: missing'),
    'neither to inspect': (['inspect'], 'inspect: pass either --workdir=DIR or --config=FILE'),
    'both to inspect': (['inspect', '--workdir=run', '--config=tiny.py'], 'inspect: pass either'),
    'field misspelt': ([*TRAIN, '--config.train.stepz=5'], "config.train.stepz: no such field; did you mean 'steps'?"),
    'section misspelt': ([*TRAIN, '--config.trian.steps=5'], "config.trian.steps: no such section; did you mean 'train'?"),
    'field misspelt after no': ([*TRAIN, '--noconfig.train.tensorbord'], "config.train.tensorbord: no such field; did you mean 'tensorboard'?"),
    'whole section': ([*TRAIN, '--config.model={}'], 'config.model: a section, set its fields'),
    'float for int': ([*TRAIN, '--config.train.steps=1.5'], '--config.train.steps=1.5'),
    'text for int': ([*TRAIN, '--config.train.steps=abc'], '--config.train.steps=abc'),
    'text for bool': ([*TRAIN, '--config.train.tensorboard=maybe'], '--config.train.tensorboard=maybe'),
    'choice misspelt': ([*TRAIN, '--config.model.kind=paralel'], "config.model.kind='paralel': did you mean 'parallel'?"),
    'combination': ([*TRAIN, '--config.model.layers=2'], 'config.model.layers=2: leaves no trunk'),
    'negative': ([*TRAIN, '--config.optimizer.clip=-2'], 'config.optimizer.clip=-2.0: must be positive'),
    'missing file': (['train', '--config=tony.py', '--workdir=new'], "--config=tony.py: no such file; did you mean './tiny.py'?"),
    'config that raises': (['train', '--config=raises.py', '--workdir=new'], '--config=raises.py: ZeroDivisionError: division by zero'),
    'config that is no Python': (['train', '--config=syntax.py', '--workdir=new'], '--config=syntax.py: SyntaxError: invalid syntax (syntax.py, line 1)'),
    'config without get_config': (['train', '--config=lacks.py', '--workdir=new'], "has no attribute 'get_config'"),
    'config not converted': (['train', '--config=forgets.py', '--workdir=new'], 'get_config() returned Config, but must return Config(...).to_config_dict()'),
    'profile': ([*TRAIN, '--profile_steps=3'], '--profile_steps=3: must be a:b with 0 < a < b'),
    'field said twice': ([*TRAIN, '--config.train.steps=3', '--config.train.steps=4'], '--config.train.steps: given 2 times; give it once'),
    'mesh too large': ([*TRAIN, '--config.mesh.data=16', '--config.train.batch=32'], 'data 16 x fsdp 1 x context 1 x tensor 1 x expert 1 = 16 devices, but there are 8'),
    'no documents': ([*TRAIN, '--config.data.paths=nowhere'], "config.data.paths: 'nowhere' holds no file"),
    'no tokenizer': ([*TRAIN, '--config.data.tokenizer=nowhere.model'], "config.data.tokenizer='nowhere.model': No such file or directory"),
    'vocabulary too small': ([*TRAIN, '--config.model.vocab=200'], 'config.model.vocab=200: the tokenizer bytes has 259 ids; set at least that'),
    'resume another model': ([*RESUME, '--config.model.layers=4'], 'config.model.layers=4: the checkpoint in'),
    'resume for fewer steps': ([*RESUME, '--config.train.steps=2', '--config.optimizer.warmup_steps=0'], 'config.train.steps=2: the checkpoint in'),
    'resume other documents': ([*RESUME, '--config.data.paths=others/documents', '--config.train.batch=16'], 'was trained on: source 0: tokens '),
    'resume without documents': ([*RESUME, '--config.data.paths=nowhere'], "config.data.paths: 'nowhere' holds no file"),
    'resume other conventions': (['train', '--config=tiny.py', '--workdir=elsewhere'], "conventions contradict this version in target"),
    'load other conventions': (['evaluate', '--workdir=elsewhere'], "conventions contradict this version in target"),
    'damaged checkpoint': (['inspect', '--workdir=broken'], 'lacks the record of config and conventions'),
    'resume damaged checkpoint': (['train', '--config=tiny.py', '--workdir=broken'], 'lacks the record of config and conventions'),
    'evaluate nothing': (['evaluate', '--workdir=empty'], '--workdir=empty: holds no checkpoint; train one with: python -m mtp_jax train'),
    'generate from nothing': (['generate', '--workdir=empty', '--prompt=a'], '--workdir=empty: holds no checkpoint'),
    'inspect nothing': (['inspect', '--workdir=nowhere'], '--workdir=nowhere: holds no checkpoint'),
    'benchmark nothing': (['benchmark', 'decode', '--workdir=empty'], '--workdir=empty: holds no checkpoint'),
    'another step': (['evaluate', '--workdir=run', '--step=7'], 'step 7: run holds the steps 3'),
    'negative rows': (['evaluate', '--workdir=run', '--rows=-3'], '--rows=-3: must be at least 0'),
    'rows that are no number': (['evaluate', '--workdir=run', '--rows=x'], '--rows=x'),
    'draft too large': ([*GENERATE, '--draft=2'], 'draft=2: this model has 2 futures, so 0 to 1 can draft'),
    'negative temperature': ([*GENERATE, '--temperature=-1'], 'temperature=-1: must be 0 (greedy) or a positive number'),
    'top_p of 0': ([*GENERATE, '--top_p=0'], 'top_p=0: must be above 0 and at most 1'),
    'top_p of 2': ([*GENERATE, '--top_p=2'], 'top_p=2: must be above 0 and at most 1'),
    'fewer than none': ([*GENERATE, '--max_tokens=-1'], '--max_tokens=-1: must be at least 0'),
    'empty prompt': (['generate', '--workdir=run', '--prompt='], '--prompt: empty; say what to continue'),
    'criterion misspelt': ([*GENERATE, '--criterion=lossy_topk'], "criterion=lossy_topk: no such criterion; did you mean 'lossy_top_k'?"),
    'threshold of exactness': ([*GENERATE, '--threshold=2'], 'threshold=2: for exact it must be 0'),
    'draft: prompt too long': (['generate', '--workdir=run', '--prompt=' + 'a' * 20], 'prompt: 21 tokens with the one that begins it, but max_length=16 holds them and at least one more'),
    'draft: no room': ([*GENERATE, '--max_tokens=24'], 'max_tokens=24: a prompt of 2 tokens leaves room for 14 within max_length=16'),
    'draft: other tokenizer': ([*GENERATE, '--drafter=foreign'], '--drafter=foreign: '),
    'draft: no such drafter': ([*GENERATE, '--drafter=nowhere'], "--drafter=nowhere: neither 'futures' nor 'lookup', nor the workdir of a model"),
    'draft: beyond all measure': ([*GENERATE, '--drafter=lookup', '--draft=9999999999'], 'draft=9999999999: must be between 0 and 256'),
    'draft: longest beyond all measure': ([*GENERATE, '--max_length=99999999999'], 'max_length=99999999999: must be between 2 and'),
    'draft: streamed, too long': (['generate', '--workdir=run', '--stream', '--prompt=' + 'a' * 20], 'prompt: 21 tokens'),
    'infinitely hot': ([*GENERATE, '--temperature=1e39'], 'temperature=1e+39: must be 0 (greedy) or a positive number'),
    'draft: adaptive and lossy': ([*GENERATE, '--adaptive', '--min_block=2'], 'adaptive: needs the exact criterion'),
    'batch in words': (['benchmark', 'decode', '--workdir=run', '--batch=1,two'], '--batch=1,two: must be numbers of prompts decoded at once, such as 1,8'),
    'draft: batch that does not divide': (['benchmark', 'decode', '--workdir=run', '--prompts=2', '--prompt_tokens=8', '--batch=3'], '--batch=3: 2 prompts do not divide into such batches; --prompts=3 would'),
    'decode against nobody': (['benchmark', 'decode', '--workdir=run', '--against=torch'], "--against=torch: must be 'transformers'"),
    'weight in other words': ([*TRAIN, "--config.objective.weights=(1, '0.3 until 0.5 0.1')"], "config.objective.weights=(1.0, '0.3 until 0.5 0.1'): 'until' is not step, linear or cosine"),
    'against nothing': (['benchmark', 'train', '--config=tiny.py', '--against=nowhere.py'], '--against=nowhere.py: no such file'),
    'against a config that raises': (['benchmark', 'train', '--config=tiny.py', '--against=raises.py'], '--against=raises.py: ZeroDivisionError'),
    'prepare nothing': (['prepare', '--output=set'], '--input: missing'),
    'prepare into nowhere': (['prepare', '--input=documents'], '--output: missing'),
    'prepare: no such input': (['prepare', '--input=nowhere', '--output=set'], "--input: 'nowhere' holds no file"),
    'prepare: a comma too many': (['prepare', '--input=documents,', '--output=set'], '--input=documents,: holds an empty name'),
    'prepare: no tokenizer': (['prepare', '--input=documents', '--output=set', '--tokenizer=nowhere'], "--tokenizer='nowhere': No such file or directory; give 'bytes' or"),
    'prepare: keep what cannot be kept': (['prepare', '--input=documents', '--output=set', '--keep=nul,empty'], '--keep=empty: such a record has no text to keep'),
    'prepare: format misspelt': (['prepare', '--input=documents', '--output=set', '--format=json'], "--format=json: did you mean 'jsonl'?"),
    'prepare into its input': (['prepare', '--input=documents', '--output=documents/set'], '--output=documents/set: is within the input documents'),
    'prepare: too many bad records': (['prepare', '--input=bad.jsonl', '--output=bad', '--workers=0'], '--input: 1 of 3 records are bad (1 broken_json), more than --bad_share=0.05; the first is broken_json in bad.jsonl, line 2'),
    'prepare into a folder of another': (['prepare', '--input=documents', '--output=.', '--workers=0'], 'holds files that are no prepared set, such as'),
    'prepare elsewhere without a package': (['prepare', '--input=documents', '--output=nowhere://x'], "--output: 'nowhere://x': Protocol not known: nowhere"),
    'inspect no set': (['inspect-data', '--data=documents'], "documents' holds no prepared set; make one with"),
    'inspect misspelt packing': (['inspect-data', '--data=set', '--packing=best-fit'], "--packing='best-fit': did you mean 'best_fit'?"),
    'tokenizer of another kind': (['train-tokenizer', '--input=documents', '--output=x.model', '--kind=word'], '--kind=word: must be bpe or unigram'),
    'tokenizer into nowhere': (['train-tokenizer', '--input=documents', '--output=nowhere/x.model'], '--output=nowhere/x.model: must be a new file in an existing folder'),
    'tokenizer over a file': (['train-tokenizer', '--input=documents', '--output=tiny.py'], '--output=tiny.py: must be a new file'),
    'train into documents prepared': ([*TRAIN[:-1], '--workdir=prepared-set'], 'prepared-set: holds a prepared set; choose another'),
    'train on documents that are no set': ([*TRAIN, "--config.data.sources=('documents',)", '--config.data.paths=()'], "documents' holds no prepared set"),
    'plan without topology': (['plan', '--config=tiny.py'], '--topology: missing'),
    'goodput of nothing': (['goodput', '--workdir=empty'], '--workdir=empty: no events.jsonl there'),
    'certify without config': (['certify'], '--config: missing'),
    'no steps': (['benchmark', 'train', '--config=tiny.py', '--steps=0'], '--steps=0: must be at least 1'),
    'no prompts': (['benchmark', 'decode', '--workdir=run', '--prompts=0'], '--prompts=0: must be at least 1'),
    'too many prompts': (['benchmark', 'decode', '--workdir=run', '--prompts=999'], 'but 999 prompts are wanted'),
}


@pytest.mark.parametrize('arguments, wanted', BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(run, place, arguments, wanted):
  code, out, err = run(*arguments)
  assert (code, out, len(err)) == (2, [], 1), err
  assert err[0].startswith('mtp_jax: ') and wanted in err[0]
  assert not (place / 'new').exists()


def test_bad_input_is_told_before_jax_is_imported(place):
  """One fresh interpreter, every command line that needs no more than the config file."""
  early = [arguments for name, (arguments, _) in BAD.items() if not any(word in name for word in (
      'mesh', 'documents', 'tokenizer', 'vocabulary', 'resume', 'conventions', 'checkpoint', 'nothing', 'step', 'draft', 'too many'))]
  assert len(early) > 20
  program = ('import json, os, sys\nfrom mtp_jax.cli.main import main\nos.chdir(sys.argv[2])\nfor arguments in json.loads(sys.argv[1]):\n'
             '  assert main(arguments) == 2\n  assert "jax" not in sys.modules, arguments\n')
  done = subprocess.run([sys.executable, '-c', program, json.dumps(early), str(place)], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert len(done.stderr.splitlines()) == len(early)


def test_the_module_runs_as_a_program(place):
  """An empty workdir is found out before a backend starts: one that does not exist is not missed."""
  done = subprocess.run([sys.executable, '-m', 'mtp_jax', 'evaluate', f'--workdir={place / "empty"}'], capture_output=True, text=True,
                        env={**os.environ, 'JAX_PLATFORMS': 'none'})
  assert done.returncode == 2 and done.stdout == '' and len(done.stderr.splitlines()) == 1 and done.stderr.startswith('mtp_jax: --workdir=/')


def test_importing_the_package_imports_neither_jax_nor_flax():
  program = 'import sys, mtp_jax; dir(mtp_jax); mtp_jax.Config(); print(sorted({"jax", "jaxlib", "flax", "orbax", "grain", "optax"} & {*sys.modules}))'
  assert subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True).stdout == '[]\n'


@pytest.mark.parametrize('arguments', [[], ['--help'], ['help'], ['-h'], ['benchmark'], ['benchmark', '--help']], ids=str)
def test_the_overview_names_every_command(run, arguments):
  code, out, err = run(*arguments)
  assert (code, err) == (0, []) and all(any(line.strip().startswith(f'{name} ') for line in out) for name in COMMANDS)


@pytest.mark.parametrize('name', COMMANDS)
def test_help_names_every_flag_and_imports_nothing(run, name):
  code, out, err = run(*name.split(), '--help')
  assert (code, err) == (0, [])
  for flag, _, meaning in COMMANDS[name].flags:
    assert any(line.strip().startswith(f'--{flag} ') and meaning in line for line in out), flag
  assert f'python -m mtp_jax {COMMANDS[name].example}' in out
  assert any('--config.optimizer.learning_rate' in line for line in out) == (name == 'train')


@pytest.mark.parametrize('name', COMMANDS)
def test_the_example_of_a_command_has_flags_of_that_command(name):
  known = {flag for flag, *_ in COMMANDS[name].flags}
  words = COMMANDS[name].example.split(' --')
  assert words[0] == name and {word.partition('=')[0].partition('.')[0] for word in words[1:]} <= known


def last_line(run, *arguments) -> dict:
  code, out, _ = run(*arguments, '--json')
  assert code == 0 and len(out) == 1
  return json.loads(out[-1])


def test_evaluate_prints_one_entry_a_future(run):
  found = last_line(run, 'evaluate', '--workdir=run')
  assert {'nats', 'accuracy', 'count', 'bits_per_byte'} <= found.keys() and found['step'] == 3
  assert [len(found[key]) for key in ('nats', 'accuracy', 'count')] == [2, 2, 2]
  assert [len(found[f'acceptance_{way}']) for way in ('greedy', 'sampled')] == [1, 1]
  assert [len(found[f'{key}_{way}']) for key in ('tokens_per_forward', 'speed_up') for way in ('greedy', 'sampled')] == [2] * 4
  assert found['tokens_per_forward_greedy'][0] == found['speed_up_greedy'][0] == 1 < found['tokens_per_forward_sampled'][1]
  assert [x / n for x, n in zip(found['nats_sum'], found['count'])] == found['nats'] and [x / n for x, n in zip(found['correct'], found['count'])] == found['accuracy']
  code, out, err = run('evaluate', '--workdir=run', '--nospeed')
  assert code == 0 and err == [] and out[0].split() == ['future', 'nats', 'accuracy', 'count'] and f'{found["bits_per_byte"]:.4f}' in out[3]
  assert out[-1].split()[0] == '1' and 'speed-up' not in ' '.join(out)


def test_evaluate_says_when_the_documents_are_others(run, place):
  config = experiment(place)
  write(place / 'moved', config, random_state(config))
  code, _, err = run('evaluate', '--workdir=moved', '--rows=4')
  assert code == 0 and len(err) == 1 and err[0].startswith('note: the documents here differ')


def test_generate_prints_the_same_text_for_every_draft(run):
  found = [last_line(run, *GENERATE, '--max_tokens=24', '--max_length=40', f'--draft={draft}') for draft in (0, 1, -1)]
  assert all({'text', 'tokens', 'forwards', 'tokens_per_forward', 'seconds'} <= f.keys() for f in found)
  assert found[0]['text'] == found[1]['text'] == found[2]['text'] and found[0]['tokens'] == found[0]['forwards'] == 24
  code, out, _ = run(*GENERATE, '--max_tokens=24', '--max_length=40', '--draft=1')
  assert code == 0 and 'tokens per forward' in out[-2] and out[-1].startswith('acceptance by depth: ')
  text = '\n'.join(out[:-3])
  assert text == 'a' + found[0]['text']
  code, streamed, _ = run(*GENERATE, '--max_tokens=24', '--max_length=40', '--draft=1', '--stream')
  assert code == 0 and '\n'.join(streamed[:-2]) == text


def test_what_is_lossy_says_so_and_what_is_not_does_not(run):
  plain = last_line(run, *GENERATE, '--max_tokens=10')
  assert (plain['criterion']['name'], plain['lossless']) == ('exact', True)
  lossy = last_line(run, *GENERATE, '--max_tokens=10', '--criterion=lossy_top_k', '--threshold=259')
  assert lossy['criterion'] == {'name': 'lossy_top_k', 'threshold': 259, 'min_block': 1} and (lossy['lossless'], lossy['acceptance']) == (False, [1.0])
  assert run(*GENERATE, '--max_tokens=10', '--criterion=lossy_top_k', '--threshold=259')[1][-1].startswith('lossy: lossy_top_k, threshold 259')
  assert run(*GENERATE, '--max_tokens=10', '--min_block=2')[1][-1].startswith('lossy: exact, threshold 0, blocks of 2 at least')
  assert not any('lossy' in line for line in run(*GENERATE, '--max_tokens=10')[1])


def test_inspect_prints_what_a_checkpoint_holds(run, place):
  found = last_line(run, 'inspect', '--workdir=run')
  assert {'step', 'parameters_sha256', 'parameters', 'flops_per_token', 'conventions'} <= found.keys()
  assert found['step'] == 3 and len(found['parameters_sha256']) == 64
  config = last_line(run, 'inspect', '--config=tiny.py')
  assert config['parameters'] == found['parameters'] and config['parameters_sha256'] is None
  model = random_state(experiment(place)).model
  assert found['parameters']['total'] == sum(x.size for x in jax.tree.leaves(model)) == found['twin']['parameters']['total']
  code, out, _ = run('inspect', '--workdir=run')
  assert code == 0 and found['parameters_sha256'] in out[-1]


def test_an_override_reaches_the_config(run):
  found = last_line(run, 'inspect', '--config=tiny.py', '--config.model.width=32', '--config.optimizer.clip=2', '--config.objective.weights=1,0.3',
                    '--noconfig.train.tensorboard')
  assert (found['config']['model']['width'], found['config']['optimizer']['clip'], found['config']['objective']['weights']) == (32, 2.0, [1.0, 0.3])
  assert found['config']['train']['tensorboard'] is False


@pytest.mark.slow
def test_train_and_both_benchmarks_print_one_object(run, place):
  found = last_line(run, *TRAIN, '--config.train.steps=3', '--config.train.tensorboard=true')
  assert (found['step'], found['signal'], len(found['validation']['nats'])) == (3, 0, 2)
  assert list((place / 'new' / 'tensorboard').glob('events.out.tfevents.*'))
  shutil.rmtree(place / 'new')
  found = last_line(run, 'benchmark', 'train', '--config=tiny.py', '--steps=2')
  assert {'seconds_to_first_step', 'step_seconds', 'tokens_per_second', 'mfu'} <= found.keys()
  found = last_line(run, 'benchmark', 'train', '--config=tiny.py', '--against=tiny.py', '--steps=2')
  assert found['flops_ratio'] == found['memory_ratio'] == 1 and found['time_ratio'] > 0 and found['config'].keys() == found['other'].keys()
  found = last_line(run, 'benchmark', 'train', '--config=tiny.py', '--against=dense', '--steps=1')
  assert found['flops_ratio'] == 1 and found['memory_ratio'] < 1
  found = last_line(run, 'benchmark', 'decode', '--workdir=run', '--prompts=2', '--prompt_tokens=8', '--max_tokens=8', '--repeats=1', '--batch=1,2', '--plot=decode.png')
  assert [(row['batch'], row['draft']) for row in found['rows']] == [(1, 0), (1, 1), (2, 0), (2, 1)]
  for batch in (0, 2):
    plain, drafted = found['rows'][batch:batch + 2]
    assert plain['tokens_per_forward'] == plain['speed_up'] == plain['overhead'] == 1 and plain['acceptance'] == []
    assert drafted['overhead'] * drafted['speed_up'] == pytest.approx(drafted['tokens_per_forward']) and 0 <= drafted['drafting'] < 1
  assert not any(row['differing'] for row in found['rows']) and (place / 'decode.png').read_bytes().startswith(b'\x89PNG')


def test_text_is_prepared_inspected_and_trained_on(run, place):
  """From JSON lines to a trained model, by the commands alone; the second time the set is found."""
  lines = [json.dumps({'body': f'document {i} ' + 'x' * (i % 40)}) for i in range(400)]
  (place / 'lines.jsonl').write_text('\n'.join(['{"body": ', *lines]))
  arguments = ['prepare', '--input=lines.jsonl', '--field=body', '--output=prepared', '--validation_share=0.1', '--shard_bytes=4000']
  found = last_line(run, *arguments)
  assert (found['records'], found['bad']) == (401, {'broken_json': {'skipped': 1, 'kept': 0}})
  assert found['train']['documents'] + found['validation']['documents'] == 400 and found['train']['shards'] > 3
  assert last_line(run, *arguments, '--workers=0') == found
  code, out, _ = run(*arguments)
  assert code == 0 and 'bad records: broken_json 1 skipped, 0 kept' in out and out[-1] == "train on it with: --config.data.sources=\"('prepared',)\""
  inspected = last_line(run, 'inspect-data', '--data=prepared', '--verify', '--plot=lengths.png')
  assert {key: inspected['train'][key] for key in ('documents', 'tokens', 'bytes', 'shards')} == found['train'] and inspected['damaged'] == []
  assert sum(inspected['train']['lengths'].values()) == found['train']['documents'] and inspected['train']['bytes_per_token'] == 1
  assert (place / 'lengths.png').read_bytes().startswith(b'\x89PNG')
  trained = last_line(run, *TRAIN, '--config.train.steps=3', "--config.data.sources=('prepared',)", '--config.data.paths=()', '--config.data.packing=best_fit')
  assert trained['step'] == 3
  found = last_line(run, 'goodput', '--workdir=new', '--plot=goodput.png')
  assert (found['runs'], found['steps'], found['lost_steps']) == (1, 3, 0) and 0 < found['goodput'] < 1 and (place / 'goodput.png').exists()
  assert sum(found['seconds'].values()) == pytest.approx(found['wall_seconds'])
  shutil.rmtree(place / 'new')


def test_inspection_shows_every_future_of_a_row_and_ends_it_with_the_document(run, place):
  """Documents of one letter each, four times: what the table says of the first positions, cell by cell."""
  (place / 'letters').mkdir()
  for letter in 'abcdefgh':
    (place / 'letters' / letter).write_text(letter * 4)
  run('prepare', '--input=letters', '--output=letters-set', '--validation_share=0.2', '--workers=0')
  code, out, _ = run('inspect-data', '--data=letters-set', '--length=16', '--futures=3', '--rows=1', '--positions=8')
  cells = [[cell.strip() for cell in line.split('│')[1:-1]] for line in out if line.startswith('│')]
  a, b = (row[3] for row in (cells[1], cells[-1]))
  start = int(cells[0][0])
  letters = {0: '<bos>', 5: '<eos>'}
  said = lambda k, letter: letters.get(k, letter) if k < 6 else '·'
  for t, row in enumerate(cells, start):
    document, place_in_it = divmod(t, 6)
    assert row == [str(t), str(document + 1), str(place_in_it), *(said(place_in_it + k, b if document else a) for k in range(4))]
  assert code == 0 and len(cells) == 8 and any(line.startswith('├') for line in out)


def test_a_flipped_bit_is_told_by_inspection(run, place):
  run('prepare', '--input=documents', '--output=flipped', '--validation_share=0.2', '--workers=0')
  path = place / 'flipped' / 'train-00000.array_record'
  content = bytearray(path.read_bytes())
  content[-1] ^= 1  # where ArrayRecord pads the file: harmless, yet not what was written
  path.write_bytes(content)
  code, out, _ = run('inspect-data', '--data=flipped', '--verify')
  assert code == 1 and 'train-00000.array_record: its digest is not that of the index; restore' in out[-1]
  assert run('inspect-data', '--data=flipped')[0] == 0


def test_a_tokenizer_is_trained_on_the_same_inputs(run, place):
  (place / 'lines.jsonl').write_text('\n'.join(json.dumps({'text': f'def function_{i}(x):\n    return x + {i}\n'}) for i in range(500)))
  found = last_line(run, 'train-tokenizer', '--input=lines.jsonl', '--output=code.model', '--vocab=320')
  assert found['vocab'] == 320 and found['bytes_per_token'] > 2 and 20 < found['held_out_documents'] < 80
  assert last_line(run, 'prepare', '--input=lines.jsonl', '--tokenizer=code.model', '--output=pieces', '--workers=0')['train']['tokens'] < 10_000
  code, _, err = run('train-tokenizer', '--input=lines.jsonl', '--output=other.model', '--vocab=90000')
  assert code == 2 and err[-1].startswith('mtp_jax: vocabulary of 90000: ') and not (place / 'other.model').exists()


def test_the_way_of_the_data_is_measured(run):
  found = last_line(run, 'benchmark', 'data', '--config=tiny.py', '--seconds=0.05')
  assert all(found[key] > 0 for key in ('tokens_per_second', 'rows_per_second', 'share_of_memory_speed', 'prepare_bytes_per_second',
                                        'sentencepiece_bytes_per_second', 'share_of_raw_encoding'))
