"""A folder with config files, documents and checkpoints, and a way to run a command in it."""
import json
import shlex
import shutil
import sys

import pytest
from experiments import experiment, random_state, write

from mtp_jax import tokenizer
from mtp_jax.checkpoint.record import FOLDER
from mtp_jax.cli.main import main
from mtp_jax.data.corpus import open_corpus


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A folder with the config file tiny.py, some that are wrong, and a checkpoint in run/."""
  folder = tmp_path_factory.mktemp('main')
  config, bytes_ = experiment(folder), tokenizer.load('bytes')
  source = ('from mtp_jax.config import Config\n\ndef get_config():\n'
            f'  return Config.from_dict({config.to_dict()!r}).to_config_dict()\n')
  files = {'tiny.py': source,
           'raises.py': 'def get_config():\n  return 1 / 0\n',
           'refuses.py': 'from mtp_jax.config import BadInput\n\ndef get_config(size):\n'
                         '  raise BadInput(f"{size}: sizes are 1b and 2b")\n',
           'syntax.py': 'def get_config(:\n',
           'lacks.py': 'def get_configuration():\n  pass\n',
           'forgets.py': source.replace('.to_config_dict()', ''),
           'config.json': '{"train": {"tensorboard": false}}',
           'bad.jsonl': '{"text": "x"}\n{"text\n{"text": "y"}\n'}
  for name, text in files.items():
    (folder / name).write_text(text)
  (folder / 'empty').mkdir()
  (folder / 'prepared-set').mkdir()
  (folder / 'prepared-set' / 'index.json').write_text('{}')

  steps = ('{"time": 0, "kind": "start", "seconds": 0, "step": 0}\n'
           '{"time": 0, "kind": "step", "seconds": 9, "step": 3}\n')
  saves = '{"time": 9, "kind": "save", "seconds": 1, "step": 3}\n'
  for name, text in (('unsaved', steps), ('saved', steps + saves)):
    (folder / name).mkdir()
    (folder / name / 'events.jsonl').write_text(text)

  identity = open_corpus(config.data, bytes_).identity
  write(folder / 'run', config, random_state(config), identity=identity)
  write(folder / 'elsewhere', config, random_state(config), conventions={})
  write(folder / 'foreign', config, random_state(config), tokenizer='other')
  broken = folder / 'broken' / FOLDER
  broken.mkdir(parents=True)
  shutil.copytree(folder / 'run' / FOLDER / '3', broken / '3')
  (broken / '3' / '_CHECKPOINT_METADATA').write_text('{"custom_me')

  others = experiment(folder / 'others', data={'cache': config.data.cache})
  (folder / 'others' / 'documents' / '3.txt').write_text('changed')
  open_corpus(others.data, bytes_)  # prepared, so that a refusal of it is all that is printed
  return folder


@pytest.fixture
def run(place, monkeypatch, capfd):
  """run('inspect --workdir=run'): (exit code, lines of stdout, lines of stderr), in the folder."""
  def go(command: str) -> tuple[int, list[str], list[str]]:
    monkeypatch.chdir(place)
    monkeypatch.delitem(sys.modules, 'config_config', raising=False)
    capfd.readouterr()
    code = main(shlex.split(command))
    out, err = capfd.readouterr()
    return code, out.splitlines(), err.splitlines()
  return go


@pytest.fixture
def run_json(run):
  """run_json('inspect --workdir=run'): the object that the command prints with --json."""
  def go(command: str) -> dict:
    code, out, err = run(f'{command} --json')
    assert code == 0 and len(out) == 1, err
    return json.loads(out[0])
  return go
