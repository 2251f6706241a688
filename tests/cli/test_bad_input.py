"""Bad input of every command: one line on stderr that says what to fix, and exit code 2."""
import json
import os
import shlex
import subprocess
import sys

import pytest

TRAIN = 'train --config=tiny.py --workdir=new'
RESUME = 'train --config=tiny.py --workdir=run'
OR_BUCKET = ' or gs://BUCKET/FOLDER'
GENERATE = 'generate --workdir=run --prompt=a'

# name: (command line, what the message must hold)
BAD = {
    'unknown command': ('trian', "trian: no such command; did you mean 'train'?"),
    'unknown benchmark': (
        'benchmark trian',
        "benchmark trian: no such command; did you mean 'benchmark train'?"),
    'unknown flag': (
        f'{TRAIN} --wokdir=x',
        "--wokdir=x: train has no such flag; did you mean 'workdir'?"),
    'flag without =': ('train --config tiny.py', '--config: flags are written --name=value'),
    'stray word': (f'{TRAIN} faster', 'faster: not expected here; flags are written --name=value'),
    'no config': ('train --workdir=new', '--config: missing'),
    'no workdir': ('train --config=tiny.py', '--workdir: missing'),
    'no prompt': ('generate --workdir=run', '--prompt: give either --prompt='),
    'neither to inspect': ('inspect', 'inspect: pass either --workdir=DIR or --config=FILE'),
    'both to inspect': ('inspect --workdir=run --config=tiny.py', 'inspect: pass either'),
    'field misspelt': (
        f'{TRAIN} --config.train.stepz=5',
        "config.train.stepz: no such field; did you mean 'steps'?"),
    'section misspelt': (
        f'{TRAIN} --config.trian.steps=5',
        "config.trian.steps: no such section; did you mean 'train'?"),
    'field misspelt after no': (
        f'{TRAIN} --noconfig.model.qk_nrm',
        "config.model.qk_nrm: no such field; did you mean 'qk_norm'?"),
    'field of an earlier version': (
        f'{TRAIN} --noconfig.train.tensorboard',
        "config.train.tensorboard: no such field any more; set config.train.trackers=('tensorboard',), or () for none"),
    'no such tracker': (
        f'{TRAIN} --config.train.trackers=tensorboard,comet',
        "config.train.trackers=('tensorboard,comet',): 'tensorboard,comet': must be tensorboard or wandb, both as "),
    'whole section': (f'{TRAIN} --config.model={{}}', 'config.model: a section, set its fields'),
    'float for int': (f'{TRAIN} --config.train.steps=1.5', '--config.train.steps=1.5'),
    'text for int': (f'{TRAIN} --config.train.steps=abc', '--config.train.steps=abc'),
    'text for bool': (
        f'{TRAIN} --config.model.qk_norm=maybe',
        '--config.model.qk_norm=maybe'),
    'choice misspelt': (
        f'{TRAIN} --config.model.kind=paralel',
        "config.model.kind='paralel': did you mean 'parallel'?"),
    'combination': (f'{TRAIN} --config.model.layers=2', 'config.model.layers=2: leaves no trunk'),
    'negative': (
        f'{TRAIN} --config.optimizer.clip=-2',
        'config.optimizer.clip=-2.0: must be positive'),
    'missing file': (
        'train --config=tony.py --workdir=new',
        "--config=tony.py: no such file; did you mean './tiny.py'?"),
    'config that raises': (
        'train --config=raises.py --workdir=new',
        '--config=raises.py: ZeroDivisionError: division by zero (line 2)'),
    'config that refuses its argument': (
        'train --config=refuses.py:3b --workdir=new',
        'mtp_jax: --config=refuses.py:3b: 3b: sizes are 1b and 2b'),
    'config without its argument': (
        'train --config=refuses.py --workdir=new',
        'get_config(size) needs an argument; write refuses.py:ARGUMENT'),
    'config with an argument too many': (
        'train --config=tiny.py:4b --workdir=new',
        'get_config() takes no argument; write tiny.py'),
    'empty workdir': ('generate --workdir= --prompt=a', '--workdir=: empty; give a path'),
    'empty output': ('prepare --input=documents --output=', '--output=: empty; give a path'),
    'home of nobody': (
        'evaluate --workdir=~nobody-here/run',
        '--workdir=~nobody-here/run: there is no home directory for ~nobody-here here'),
    'prompt and file': (f'{GENERATE} --prompt_file=tiny.py', '--prompt_file: not together with --prompt'),
    'prompt file that is not there': (
        'generate --workdir=run --prompt_file=nowhere', '--prompt_file=nowhere: No such file or directory'),
    'empty prompt file': ('generate --workdir=run --prompt_file=/dev/null', '--prompt_file: empty'),
    'escape of no kind': (f"{GENERATE} --escapes '--stop=\\q'", 'no such escape'),
    'resume inside a checkpoint': (
        'train --config=tiny.py --workdir=run/checkpoints/3', 'is inside the run'),
    'another step than that of the path: nothing': (
        'evaluate --workdir=run/checkpoints/3 --step=2', 'is step 3, not 2'),
    'config that is no Python': (
        'train --config=syntax.py --workdir=new',
        '--config=syntax.py: SyntaxError: invalid syntax (syntax.py, line 1)'),
    'config without get_config': (
        'train --config=lacks.py --workdir=new',
        '--config=lacks.py: has no function get_config'),
    'config not converted': (
        'train --config=forgets.py --workdir=new',
        'get_config() returned Config, but must return Config(...).to_config_dict()'),
    'profile': (f'{TRAIN} --profile_steps=3', '--profile_steps=3: must be a:b with 0 < a < b'),
    'field said twice': (
        f'{TRAIN} --config.train.steps=3 --config.train.steps=4',
        '--config.train.steps: given 2 times; give it once'),
    **{f'flag given twice: {name}': (command, message) for name, (command, message) in {
        'input': ('prepare --input=a --output=x --input=b', '--input: given 2 times; give it once'),
        'prompt': ('generate --workdir=run --prompt=a --prompt=b --prompt=c', '--prompt: given 3 times; give it once'),
        'json': ('inspect --config=tiny.py --json --nojson', '--json: given 2 times; give it once'),
        'config': ('inspect --config=tiny.py --config=raises.py', '--config: given 2 times; give it once')}.items()},
    **{f'an address: {command}': (command, f'{text}: must be a path on this machine{or_else}, no address; {fix}')
       for command, text, or_else, fix in (
           ('train --config=tiny.py --workdir=s3://bucket/run', '--workdir=s3://bucket/run', OR_BUCKET, 'mount it'),
           ('evaluate --workdir=az://bucket/run', '--workdir=az://bucket/run', OR_BUCKET, 'mount it'),
           ('goodput --workdir=file:///a/run', '--workdir=file:///a/run', OR_BUCKET, 'write /a/run'),
           ('goodput --workdir=run --plot=gs://b/x.png', '--plot=gs://b/x.png', '', 'mount it'),
           ('generate --workdir=run --prompt_file=gs://b/x', '--prompt_file=gs://b/x', '', 'mount it'),
           (f'{GENERATE} --drafter=hdfs://b/x', '--drafter=hdfs://b/x', OR_BUCKET, 'mount it'),
           ('inspect --config=tiny.py --config.data.cache=gs://b/c', 'config.data.cache=gs://b/c', '', 'mount it'))},
    'a bucket alone': ('verify --workdir=gs://bucket', '--workdir=gs://bucket: a bucket without a folder; write gs://'),
    'config is a folder': ('inspect --config=.', '--config=.: is a folder; give a Python file, such as ./'),
    'config is a device': ('inspect --config=/dev/null', '--config=/dev/null: is no regular file; give a Python file'),
    'config is empty': ('inspect --config=', '--config: empty; give a Python file, such as configs/tiny.py'),
    'config is JSON': ('inspect --config=config.json', '--config=config.json: is JSON; a config is a Python file'),
    'config has a name that is too long': (f'inspect --config={"x" * 300}', 'no file can have such a name'),
    'workdir has a name that is too long': (f'inspect --workdir={"x" * 300}', 'no file can have such a name'),
    'mesh too large': (
        f'{TRAIN} --config.mesh.data=16 --config.train.batch=32',
        'data 16 x fsdp 1 x context 1 x tensor 1 x expert 1 = 16 devices, but there are 8'),
    'no documents': (
        f'{TRAIN} --config.data.paths=nowhere',
        "config.data.paths: 'nowhere' holds no file"),
    'no tokenizer': (
        f'{TRAIN} --config.data.tokenizer=nowhere.model',
        "config.data.tokenizer='nowhere.model': No such file or directory"),
    'vocabulary too small': (
        f'{TRAIN} --config.model.vocab=200',
        'config.model.vocab=200: the tokenizer bytes has 259 ids; set at least that'),
    'resume another model': (
        f'{RESUME} --config.model.layers=4',
        'config.model.layers=4: the checkpoint in'),
    'resume for fewer steps': (
        f'{RESUME} --config.train.steps=2 --config.optimizer.warmup_steps=0',
        'config.train.steps=2: the checkpoint in'),
    'resume other documents': (
        f'{RESUME} --config.data.paths=others/documents --config.train.batch=16',
        'was trained on: source 0: '),
    'resume without documents': (
        f'{RESUME} --config.data.paths=nowhere',
        "config.data.paths: 'nowhere' holds no file"),
    'resume other conventions': (
        'train --config=tiny.py --workdir=elsewhere',
        'conventions contradict this version in target'),
    'load other conventions': (
        'evaluate --workdir=elsewhere',
        'conventions contradict this version in target'),
    'damaged checkpoint': (
        'inspect --workdir=broken',
        'lacks the record of config and conventions'),
    'resume damaged checkpoint': (
        'train --config=tiny.py --workdir=broken',
        'is damaged, _CHECKPOINT_METADATA has 11 bytes, not '),
    'evaluate nothing': (
        'evaluate --workdir=empty',
        '--workdir=empty: holds no checkpoint; train one with: python -m mtp_jax train'),
    'generate from nothing': (
        'generate --workdir=empty --prompt=a',
        '--workdir=empty: holds no checkpoint'),
    'inspect nothing': ('inspect --workdir=nowhere', '--workdir=nowhere: holds no checkpoint'),
    'benchmark nothing': (
        'benchmark decode --workdir=empty',
        '--workdir=empty: holds no checkpoint'),
    'another step': ('evaluate --workdir=run --step=7', 'step 7: run holds the steps 3'),
    'negative rows': ('evaluate --workdir=run --rows=-3', '--rows=-3: must be at least 0'),
    'rows that are no number': ('evaluate --workdir=run --rows=x', '--rows=x'),
    'draft too large': (
        f'{GENERATE} --draft=2',
        'draft=2: this model has 2 futures, so 0 to 1 can draft'),
    'negative temperature': (
        f'{GENERATE} --temperature=-1',
        'temperature=-1: must be 0 (greedy) or a positive number'),
    'mesh without sizes': (f'{GENERATE} --mesh=tensor', '--mesh=tensor: must be the devices along each axis, such as'),
    'mesh of no such axis': (f'{GENERATE} --mesh=tensr=2', "no axis 'tensr'; did you mean 'tensor'?"),
    'mesh that does not divide': (f'{GENERATE} --mesh=tensor=4', 'tensor=4 does not divide config.model.heads=2'),
    'top_p of 0': (f'{GENERATE} --top_p=0', 'top_p=0: must be above 0 and at most 1'),
    'top_p of 2': (f'{GENERATE} --top_p=2', 'top_p=2: must be above 0 and at most 1'),
    'fewer than none': (f'{GENERATE} --max_tokens=-1', '--max_tokens=-1: must be at least 0'),
    'empty prompt': ('generate --workdir=run --prompt=', '--prompt: empty; pass the text to continue'),
    'criterion misspelt': (
        f'{GENERATE} --criterion=lossy_topk',
        "criterion=lossy_topk: no such criterion; did you mean 'lossy_top_k'?"),
    'threshold of exactness': (f'{GENERATE} --threshold=2', 'threshold=2: for exact it must be 0'),
    'draft: prompt too long': (
        'generate --workdir=run --prompt=aaaaaaaaaaaaaaaaaaaa',
        'prompt: 21 tokens with the one that begins it, but max_length=16 holds them and at least '
        'one more'),
    'draft: no room': (
        f'{GENERATE} --max_tokens=24',
        'max_tokens=24: a prompt of 2 tokens leaves room for 14 within max_length=16'),
    'draft: other tokenizer': (f'{GENERATE} --drafter=foreign', '--drafter=foreign: '),
    'draft: no such drafter': (
        f'{GENERATE} --drafter=nowhere',
        "--drafter=nowhere: neither 'futures' nor 'lookup', nor the workdir of a model"),
    'draft: beyond all measure': (
        f'{GENERATE} --drafter=lookup --draft=9999999999',
        'draft=9999999999: must be between 0 and 256'),
    'draft: longest beyond all measure': (
        f'{GENERATE} --max_length=99999999999',
        'max_length=99999999999: must be between 2 and'),
    'draft: streamed, too long': (
        'generate --workdir=run --stream --prompt=aaaaaaaaaaaaaaaaaaaa',
        'prompt: 21 tokens'),
    'infinitely hot': (
        f'{GENERATE} --temperature=1e39',
        'temperature=1e+39: must be 0 (greedy) or a positive number'),
    'draft: adaptive and lossy': (
        f'{GENERATE} --adaptive --min_block=2',
        'adaptive: needs the exact criterion'),
    'batch in words': (
        'benchmark decode --workdir=run --batch=1,two',
        '--batch=1,two: must be numbers of prompts decoded at once, such as 1,8'),
    'draft: batch that does not divide': (
        'benchmark decode --workdir=run --prompts=2 --prompt_tokens=8 --batch=3',
        '--batch=3: 2 prompts do not divide into such batches; --prompts=3 would'),
    'decode against nobody': (
        'benchmark decode --workdir=run --against=torch',
        "--against=torch: must be 'transformers'"),
    'weight in other words': (
        f'{TRAIN} "--config.objective.weights=(1, \'0.3 until 0.5 0.1\')"',
        "config.objective.weights=(1.0, '0.3 until 0.5 0.1'): 'until' is not step, linear or "
        "cosine"),
    'against nothing': (
        'benchmark train --config=tiny.py --against=nowhere.py',
        '--against=nowhere.py: no such file'),
    'against a config that raises': (
        'benchmark train --config=tiny.py --against=raises.py',
        '--against=raises.py: ZeroDivisionError'),
    'prepare nothing': ('prepare --output=set', '--input: missing'),
    'prepare into nowhere': ('prepare --input=documents', '--output: missing'),
    'prepare: no such input': (
        'prepare --input=nowhere --output=set',
        "--input: 'nowhere' holds no file"),
    'prepare: a comma too many': (
        'prepare --input=documents, --output=set',
        '--input=documents,: holds an empty name'),
    'prepare: no tokenizer': (
        'prepare --input=documents --output=set --tokenizer=nowhere',
        "--tokenizer='nowhere': No such file or directory; give 'bytes' or"),
    'prepare: keep what cannot be kept': (
        'prepare --input=documents --output=set --keep=nul,empty',
        '--keep=empty: such a record has no text to keep'),
    'prepare: format misspelt': (
        'prepare --input=documents --output=set --format=json',
        "--format=json: did you mean 'jsonl'?"),
    'prepare into its input': (
        'prepare --input=documents --output=documents/set',
        '--output=documents/set: is within the input documents'),
    'prepare: too many bad records': (
        'prepare --input=bad.jsonl --output=bad --workers=0',
        '--input: 1 of 3 records are bad (1 broken_json), more than --bad_share=0.05; the first '
        'is broken_json in bad.jsonl, line 2'),
    'prepare into a folder of another': (
        'prepare --input=documents --output=. --workers=0',
        'holds files that are no prepared set, such as'),
    'prepare elsewhere without a package': (
        'prepare --input=documents --output=nowhere://x',
        "--output: 'nowhere://x': Protocol not known: nowhere"),
    'inspect no set': (
        'inspect-data --data=documents',
        "documents' holds no prepared set; make one with"),
    'inspect misspelt packing': (
        'inspect-data --data=set --packing=best-fit',
        "--packing='best-fit': did you mean 'best_fit'?"),
    'tokenizer of another kind': (
        'train-tokenizer --input=documents --output=x.model --kind=word',
        '--kind=word: must be bpe or unigram'),
    'tokenizer into nowhere': (
        'train-tokenizer --input=documents --output=nowhere/x.model',
        '--output=nowhere/x.model: must be a new file in an existing folder'),
    'tokenizer over a file': (
        'train-tokenizer --input=documents --output=tiny.py',
        '--output=tiny.py: must be a new file'),
    'train into documents prepared': (
        'train --config=tiny.py --workdir=prepared-set',
        'prepared-set: holds a prepared set; choose another'),
    'train on documents that are no set': (
        f'{TRAIN} "--config.data.sources=(\'documents\',)" --config.data.paths=()',
        "documents' holds no prepared set"),
    'plan without topology': ('plan --config=tiny.py', '--topology: missing'),
    'plan for failures without a save': (
        'plan --config=tiny.py --mtbf_hours=100 --restart_seconds=60 --step_seconds=1', '--save_seconds: missing'),
    'plan for failures without their hours': (
        'plan --config=tiny.py --topology=v5p:2x2x2 --save_seconds=3',
        '--save_seconds: only together with --mtbf_hours'),
    'plan for failures while decoding': (
        'plan --config=tiny.py --decode --mtbf_hours=1 --save_seconds=1 --restart_seconds=1 --step_seconds=1',
        '--mtbf_hours=1: takes one topology, without --sweep and --decode'),
    **{f'plan for failures every {hours} hours': (
        f'plan --config=tiny.py --mtbf_hours={hours} --save_seconds=3 --restart_seconds=60 --step_seconds=1',
        f'mtbf_hours={hours}: must be between 0.01 and') for hours in ('nan', '-1', '0', '-inf')},
    'goodput of hosts without their hours': (
        'goodput --workdir=run --chips_per_host=4', '--chips_per_host: only together with --mtbf_hours'),
    'goodput without a save, for failures': (
        'goodput --workdir=unsaved --mtbf_hours=100', '--workdir=unsaved: events.jsonl holds no save'),
    'goodput for failures that never come': ('goodput --workdir=saved --mtbf_hours=nan', 'mtbf_hours=nan: must be'),
    'goodput of nothing': ('goodput --workdir=empty', '--workdir=empty: no events.jsonl there'),
    'certify without config': ('certify', '--config: missing'),
    'no steps': ('benchmark train --config=tiny.py --steps=0', '--steps=0: must be at least 1'),
    'no prompts': ('benchmark decode --workdir=run --prompts=0', '--prompts=0: must be at least 1'),
    'too many prompts': (
        'benchmark decode --workdir=run --prompts=999',
        'but 999 prompts are wanted'),
}


# These need the data, the tokenizer, a checkpoint or the devices, so they import JAX.
LATE = ('mesh', 'documents', 'tokenizer', 'vocabulary', 'resume', 'conventions', 'checkpoint',
        'nothing', 'step', 'draft', 'too many')


@pytest.mark.parametrize('command, message', BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(run, place, command, message):
  code, out, err = run(command)
  assert (code, out, len(err)) == (2, [], 1), err
  assert err[0].startswith('mtp_jax: ') and message in err[0]
  assert not (place / 'new').exists()


def test_bad_input_is_reported_before_jax_is_imported(place):
  """One fresh interpreter, every command line that needs no more than the config file."""
  early = [shlex.split(command) for name, (command, _) in BAD.items()
           if not any(word in name for word in LATE)]
  assert len(early) > 20
  program = ('import json, os, sys\nfrom mtp_jax.cli.main import main\nos.chdir(sys.argv[2])\n'
             'for arguments in json.loads(sys.argv[1]):\n'
             '  assert main(arguments) == 2\n  assert "jax" not in sys.modules, arguments\n')
  command = [sys.executable, '-c', program, json.dumps(early), str(place)]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert len(done.stderr.splitlines()) == len(early)


@pytest.mark.parametrize('command', [
    'inspect --config=tiny.py --json', 'inspect --config=tiny.py', 'train --help', 'help'])
def test_a_stdout_that_cannot_be_written_is_one_line(place, command):
  with open('/dev/full', 'w') as full:
    done = subprocess.run([sys.executable, '-m', 'mtp_jax', *shlex.split(command)], stdout=full,
                          stderr=subprocess.PIPE, text=True, cwd=place)
  assert (done.returncode, done.stderr) == (
      1, 'mtp_jax: stdout: cannot be written (No space left on device); print to another place\n')


def test_the_module_runs_as_a_program(place):
  """An empty workdir is refused before a backend starts: one that does not exist is not missed."""
  command = [sys.executable, '-m', 'mtp_jax', 'evaluate', f'--workdir={place / "empty"}']
  environment = {**os.environ, 'JAX_PLATFORMS': 'none'}
  done = subprocess.run(command, capture_output=True, text=True, env=environment)
  assert done.returncode == 2 and done.stdout == ''
  assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith('mtp_jax: --workdir=/')
