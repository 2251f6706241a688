"""Config files and overrides: written in one word or in two, and whatever stands in them one line that says what."""
import dataclasses
import os

import pytest

from mtp_jax.config import SECTIONS, BadInput, files
from mtp_jax.config.errors import explain

CONFIG_DICT = 'import ml_collections\ndef get_config():\n  c = ml_collections.ConfigDict('
FILES = {  # content, and what the line must hold
    'empty': (b'', 'has no function get_config'),
    'NUL': (b'\0' * 100, 'ValueError|SyntaxError'),
    'binary': (bytes(range(256)) * 50, 'ValueError|SyntaxError'),
    'UTF-16': ('def get_config(): pass'.encode('utf-16'), 'SyntaxError'),
    'no such coding': (b'# coding: nonsense\n', 'SyntaxError'),
    'nested deeply': (b'x = ' + b'(' * 5000 + b')' * 5000, 'SyntaxError|MemoryError|RecursionError'),
    'nested more deeply': (b'x = ' + b'-' * 200_000 + b'1', 'SyntaxError|MemoryError|RecursionError'),
    'JSON nested deeply': (b'[' * 200_000, 'SyntaxError'),
    'YAML': (b'model:\n  layers: 4\n', 'SyntaxError'),
    'of another package': (b'import no_such_module\n', "No module named 'no_such_module'"),
    'recursion': (b'def get_config():\n  return get_config()\n', 'RecursionError'),
    'exit': (b'import sys\nsys.exit(0)\n', 'SystemExit: 0'),
    'no Exception': (b'class Odd(BaseException): pass\nraise Odd(1)\n', r'Odd: 1 \(line 2\)'),
    'lines in a message': (b'def get_config(): raise ValueError("x\\n" * 100000)\n', r'ValueError: x x .* \.\.\. '),
    'half a character in a message': (b'def get_config(): raise ValueError("\\udcff")\n', 'ValueError: '),
    'a group of errors': (b'def get_config(): raise ExceptionGroup("a\\nb", [ValueError()])\n', 'ExceptionGroup: a b'),
    'no function': (b'get_config = 5\n', 'has no function get_config'),
    'two arguments': (b'def get_config(a, b): pass\n', r'get_config\(a, b\) needs an argument'),
    'nothing returned': (b'def get_config(): pass\n', 'returned NoneType, but must return'),
    'a dict returned': (b'def get_config(): return {"train": {}}\n', 'returned dict, but must return'),
    'a generator': (b'def get_config(): yield 1\n', 'returned generator, but must return'),
    'no section': (f'{CONFIG_DICT})\n  return c\n'.encode(), 'lacks a field that is set .*train.*; get_config.. must'),
    'no field': (f'{CONFIG_DICT}{{"train": {{}}}})\n  return c\n'.encode(), 'lacks a field that is set .*steps'),
    'a number for a section': (f'{CONFIG_DICT}{{"train": 5}})\n  return c\n'.encode(), 'lacks a field that is set'),
    'itself': (f'{CONFIG_DICT})\n  c.train = c\n  return c\n'.encode(), 'lacks a field that is set'),
    'to be filled in': (
        f'{CONFIG_DICT}{{"train": {{"steps": ml_collections.config_dict.required_placeholder(int)}}}})\n  return c\n'
        .encode(), 'None value found in required reference'),
}


@pytest.mark.parametrize('content, message', FILES.values(), ids=FILES)
def test_a_file_that_is_no_config_is_one_line(tmp_path, content, message):
  (tmp_path / 'x.py').write_bytes(content)
  with pytest.raises(BadInput, match=f'^--config={tmp_path}/x.py: .*({message})') as raised:
    files.load([f'--config={tmp_path}/x.py', '--config.train.steps=3'])
  assert len(str(raised.value).splitlines()) == 1 and len(str(raised.value)) <= 1000


def test_what_is_no_file_is_one_line(tmp_path):
  (tmp_path / 'folder.py').mkdir()
  os.mkfifo(tmp_path / 'pipe.py')
  (tmp_path / 'loop.py').symlink_to('loop.py')
  (tmp_path / 'to nowhere.py').symlink_to('nowhere.py')
  for name in ('folder.py', 'pipe.py', 'loop.py', 'to nowhere.py', '\udcff.py', 'a\nb.py', 'a\0b.py', '', ':',
               'x' * 300):
    with pytest.raises(BadInput) as raised:
      files.split([f'--config={tmp_path}/{name}'])
    assert len(str(raised.value).splitlines()) == 1


EXTREMES = ['nan', '-1', str(2**63), '9' * 400, '', 'None', '(None,)', '[[1]]', 'x' * 100_000]


def check(folder, name: str, values: list[str]) -> None:
  """Each value of the field is taken, or refused in one line that names it."""
  source = 'from mtp_jax.config import Config\ndef get_config(): return Config().to_config_dict()\n'
  (folder / 'x.py').write_text(source)
  for text in values:
    try:
      files.load([f'--config={folder}/x.py', f'--config.{name}={text}'])
    except BadInput as error:
      line, code = explain(error)
      assert name.partition('.')[2] in line and len(line.splitlines()) == 1 and code == 2


@pytest.mark.parametrize('section', SECTIONS)
def test_a_value_without_measure_is_taken_or_refused_in_one_line(tmp_path, section):
  for field in dataclasses.fields(SECTIONS[section]):
    check(tmp_path, f'{section}.{field.name}', EXTREMES)


@pytest.mark.parametrize('name', ['objective.weights', 'data.weights', 'data.sources', 'train.trackers'])
def test_a_tuple_without_measure_is_taken_or_refused_in_one_line(tmp_path, name):
  check(tmp_path, name, [f'({"1," * 20_000})', '(' + "'a'," * 20_000 + ')', '(' * 300, '(' * 20_000,
                         '(nan,)', '()'])


def test_the_value_of_an_override_may_be_the_next_word_unless_the_field_is_a_switch():
  arguments = ['--config.train.steps', '60', '--config.data.accept_changed', '--step', '3', '--config.data.seed=4']
  assert files.split(arguments) == (
      ['--config.train.steps=60', '--config.data.accept_changed', '--config.data.seed=4'], ['--step', '3'])
