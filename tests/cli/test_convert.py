"""export and import: a checkpoint leaves, comes back, and goes on."""
import json

import jax
import numpy as np

import mtp_jax


def test_a_checkpoint_leaves_and_comes_back_and_training_goes_on_from_it(run, run_json, place):
  done = run_json('export --workdir=run --format=llama --output=out')
  assert done['step'] == 3 and done['files'] and (place / 'out' / 'README.md').exists()
  values = run_json('import --input=out --workdir=back')
  assert values['format'] == 'llama'
  found, wanted, opened = (mtp_jax.load(place / name) for name in ('back', 'run', 'out'))
  assert found.step == 0 and opened.step == 3
  for lm in (found, opened):
    assert lm.config.model == wanted.config.model
    same = lambda a, b: np.array_equal(np.asarray(a), np.asarray(b))
    assert all(map(same, *map(jax.tree.leaves, (lm.model, wanted.model))))
  command = 'score --text=abc --workdir='
  assert run_json(command + 'out')['logprobs'] == run_json(command + 'back')['logprobs']
  train = ('train --config=back/config.py --workdir=back --config.data.paths="(\'documents\',)" --config.train.batch=8 '
           '--config.data.validation_share=0.3 --config.train.steps=2 --config.optimizer.warmup_steps=1')
  assert run_json(train)['step'] == 2


def test_inspect_tells_which_formats_can_hold_a_config_before_training(run, run_json):
  formats = run_json('inspect --config=tiny.py')['formats']
  assert formats['llama'] == [] and formats['meta'] == [] and formats['deepseek_v3']
  _, out, _ = run('inspect --config=tiny.py')
  assert 'export --format=llama: yes' in out
  assert 'export --format=qwen3: queries and keys are not normed (qk_norm)' in out


def test_what_cannot_be_exported_or_imported_is_told_in_a_line(run, place):
  (place / 'theirs').mkdir()
  (place / 'theirs' / 'config.json').write_text(json.dumps({'model_type': 'gpt2'}))
  for command, why in {
      'export --workdir=run --format=qwen3 --output=o': 'cannot hold this model: queries and keys are not normed',
      'export --workdir=run --format=lama --output=o': "no such format; did you mean 'llama'?",
      'export --workdir=run --format=llama --output=run': '--output=run: is there already; give a new folder',
      'export --workdir=run --format=llama --output=o --dtype=float16': '--dtype=float16: must be float32 or bfloat16',
      'import --input=theirs --workdir=w': 'is of model_type gpt2, which is not read here',
      'import --input=empty --workdir=w': 'has no config.json, nor params.json',
      'import --input=theirs --workdir=run': '--workdir=run: is there already; give a new folder',
      'import --input=nowhere --workdir=w': 'no such folder'}.items():
    code, _, err = run(command)
    assert code == 2 and len(err) == 1 and why in err[0], command
