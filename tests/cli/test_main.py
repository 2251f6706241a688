"""Help lists every command and flag; overrides reach the config; importing the package is cheap."""
import subprocess
import sys

import pytest

from mtp_jax.cli.main import COMMANDS


def test_importing_the_package_imports_neither_jax_nor_flax():
  program = ('import sys, mtp_jax; dir(mtp_jax); mtp_jax.Config(); '
             'print({"jax", "jaxlib", "flax", "orbax", "grain", "optax"} & {*sys.modules})')
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
  assert done.stdout == 'set()\n'


@pytest.mark.parametrize('command', ['', '--help', 'help', '-h', 'benchmark', 'benchmark --help'])
def test_the_overview_names_every_command(run, command):
  code, out, err = run(command)
  assert (code, err) == (0, [])
  assert all(any(line.strip().startswith(f'{name} ') for line in out) for name in COMMANDS)


@pytest.mark.parametrize('name', COMMANDS)
def test_help_lists_every_flag(run, name):
  code, out, err = run(f'{name} --help')
  assert (code, err) == (0, [])
  for flag, _, meaning in COMMANDS[name].flags:
    assert any(line.strip().startswith(f'--{flag} ') and meaning in line for line in out), flag
  assert f'python -m mtp_jax {COMMANDS[name].example}' in out
  assert any('--config.optimizer.learning_rate' in line for line in out) == (name == 'train')


@pytest.mark.parametrize('name', COMMANDS)
def test_the_example_of_a_command_has_flags_of_that_command(name):
  known = {flag for flag, *_ in COMMANDS[name].flags}
  words = COMMANDS[name].example.split(' --')
  assert words[0] == name
  assert {word.partition('=')[0].partition('.')[0] for word in words[1:]} <= known


def test_an_override_reaches_the_config(run_json):
  config = run_json('inspect --config=tiny.py --config.model.width=32 --config.optimizer.clip=2 '
                    '--config.objective.weights=1,0.3 --config.train.trackers=wandb --noconfig.model.qk_norm')['config']
  assert config['model']['width'] == 32 and config['optimizer']['clip'] == 2.0
  assert config['objective']['weights'] == [1.0, 0.3] and config['train']['trackers'] == ['wandb']
