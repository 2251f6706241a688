"""A run can be moved: what it needs is in its workdir, and what is elsewhere can be named again."""
import json
import pathlib
import shutil

import pytest
from experiments import experiment, random_state, write

import mtp_jax
from mtp_jax import chips, tokenizer
from mtp_jax.checkpoint.record import locate, steps
from mtp_jax.cli.main import main
from mtp_jax.config import BadInput
from mtp_jax.train.fit import fit


@pytest.fixture(scope='module')
def moved(tmp_path_factory):
  """(moved workdir, config, folder of the documents): trained in one folder by relative names, opened in another."""
  folder = tmp_path_factory.mktemp('first')
  sample = [f'{i} {i * i} word{i}\n'.encode() for i in range(600)]
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    patch.setattr(chips, 'peak_flops', lambda: 1e9)
    (folder / 'mine.model').write_bytes(tokenizer.train(sample, 280))
    config = experiment(folder, model={'vocab': 280}, data={'tokenizer': 'mine.model', 'paths': ('documents',)})
    fit(config, 'run', note=lambda line: None)
    patch.chdir(tmp_path_factory.mktemp('second'))
    (folder / 'mine.model').rename(folder / 'hidden.model')
    yield pathlib.Path(shutil.move(folder / 'run', 'run')).absolute(), config, folder


def test_a_moved_run_loads_generates_evaluates_and_goes_on(moved, capfd):
  workdir, config, folder = moved
  lm = mtp_jax.load(workdir)
  assert lm.generate('1', max_tokens=2, draft=0).tokens > 0
  with pytest.raises(BadInput, match="config.data.paths: 'documents' holds no file"):
    lm.evaluate()
  there = mtp_jax.load(workdir, data=str(folder / 'documents'))
  assert there.evaluate(rows=4)['count'][0] > 0
  assert there.corpus.identity['sources'] == lm.record['identity']['sources']
  code = main(['evaluate', f'--workdir={workdir}', f'--data={folder / "documents"}', '--rows=4', '--nospeed', '--json'])
  assert code == 0 and json.loads(capfd.readouterr().out)['step'] == 6
  code = main(['generate', f'--workdir={workdir}', f'--tokenizer={folder / "hidden.model"}', '--prompt=1',
               '--max_tokens=2', '--draft=0'])
  assert code == 0
  lines = []
  data = mtp_jax.DataConfig(**vars(config.data) | {'paths': (str(folder / 'documents'),)})
  outcome = fit(mtp_jax.Config(**vars(config) | {'data': data}), workdir, note=lines.append)
  assert outcome.step == 6 and any('tokenizer.model is used' in line for line in lines)


def test_another_tokenizer_is_refused(moved, tmp_path):
  workdir, _, _ = moved
  other = tmp_path / 'other.model'
  other.write_bytes(tokenizer.train([f'{i} other{i}\n'.encode() for i in range(600)], 280))
  with pytest.raises(BadInput, match='tokenizer=.*other.model: digest .* differs'):
    mtp_jax.load(workdir, tokenizer=str(other))


@pytest.mark.parametrize('inside, step', [
    ('', None), ('checkpoints', None), ('checkpoints/3', 3), ('checkpoints/3/parameters', 3), ('metrics.jsonl', None)])
def test_a_path_inside_a_workdir_is_understood(tmp_path, monkeypatch, inside, step):
  config = experiment(tmp_path)
  for saved in (3, 4):
    write(tmp_path / 'run', config, random_state(config), step=saved)
  (tmp_path / 'run' / 'metrics.jsonl').write_text('')
  monkeypatch.setenv('HOME', str(tmp_path))
  for given in (tmp_path / 'run' / inside, f'~/run/{inside}'):
    workdir, found = locate(given)
    assert (workdir, found) == (tmp_path / 'run', step)
  assert steps(workdir) == [3, 4] and mtp_jax.load(tmp_path / 'run' / inside).step == (step or 4)


@pytest.mark.parametrize('command', [
    'evaluate --workdir=~/nowhere', 'goodput --workdir=~/nowhere', 'inspect-data --data=~/nowhere',
    'train --config=~/nowhere.py --workdir=x', 'prepare --input=~/nowhere --output=~/x',
    'generate --workdir=x --prompt_file=~/nowhere', 'benchmark train --config=~/nowhere.py',
    'prepare --input=x --output=~/y --tokenizer=~/nowhere'])
def test_a_tilde_is_the_home_directory_in_every_path(tmp_path, monkeypatch, capfd, command):
  """Those that name it as the user did are refused all the same: nothing called ~ is made."""
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  assert main(command.split()) == 2 and 'nowhere' in capfd.readouterr().err
  assert not (tmp_path / '~').exists()


def test_without_a_home_a_tilde_is_refused_in_one_line(monkeypatch, capfd):
  monkeypatch.setattr('os.path.expanduser', lambda path: path)
  assert main(['evaluate', '--workdir=~/run']) == 2
  assert 'there is no home directory' in capfd.readouterr().err
