"""What the docstring of a config file states, recomputed from the config; configs/README.md against the docstrings."""
import ast
import functools
import importlib.util
import pathlib
import re

import jax
import pytest

from mtp_jax.config import Config
from mtp_jax.measure.counts import next_token_twin
from mtp_jax.model import costs
from mtp_jax.model.model import Model

FOLDER = pathlib.Path(__file__).parents[1] / 'configs'
GLOECKLE = ('0.3b', '0.6b', '1.3b', '3b', '7b', '13b')
NAMES = sorted(path.stem for path in FOLDER.glob('*.py'))
LABELS = ('paper', 'parameters', 'FLOPs', 'data', 'hardware', 'time', 'expect', 'command')


def read(name: str, *argument) -> tuple[str, Config]:
  """The docstring of a config file, and the config."""
  spec = importlib.util.spec_from_file_location(name, FOLDER / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.__doc__, Config.from_dict(module.get_config(*argument).to_dict())


def line_of(doc: str, label: str) -> str:
  """The text after a label of a docstring, on one line."""
  return ' '.join(re.search(rf'^{label} +(.*(?:\n  +.*)*)', doc, re.MULTILINE).group(1).split())


def number_of(text: str, label: str = '') -> tuple[float, float]:
  """The number after a label, and half of its last digit."""
  number, unit = re.search(rf'(?<![\w.]){re.escape(label)}([\d,]+(?:\.\d+)?)(?: ([MGBT])\b)?', text).groups()
  scale = {None: 1, 'M': 1e6, 'G': 1e9, 'B': 1e9, 'T': 1e12}[unit]
  number = number.rstrip(',').replace(',', '')
  return float(number) * scale, scale * 10.0 ** -len(number.partition('.')[2]) / 2


def stated(doc: str, line: str, label: str = '') -> tuple[float, float]:
  return number_of(line_of(doc, line), label)


def is_about(value: float, number: tuple[float, float]) -> bool:
  """Whether a value rounds to a number as it is written."""
  return abs(value - number[0]) <= number[1]


def parameters(c: Config) -> int:
  return costs.parameters(jax.eval_shape(lambda: Model(c.model, jax.random.key(0))))['total']


def flops(c: Config, causal: bool = False) -> int:
  return costs.flops_per_token(c.model, c.data.length, causal=causal)['total']


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'gloeckle'])
def test_a_config_costs_what_it_says(name):
  doc, c = read(name)
  assert parameters(c) == stated(doc, 'parameters')[0]
  assert is_about(flops(c), stated(doc, 'FLOPs'))
  assert is_about(flops(c, causal=True), stated(doc, 'FLOPs', 'causal '))
  assert is_about(c.train.rows_before(c.train.steps) * c.data.length, stated(doc, 'data'))


def test_deepseek_v3_has_the_parameters_that_its_paper_states():
  """671 B in all and 37 B a token, without the module; of Table 4's smaller model 15.7 B and 2.4 B."""
  for which, total, active in (('671b', 671e9, 37e9), ('16b', 15.7e9, 2.4e9)):
    c = next_token_twin(read('deepseek_v3', which)[1].model)
    found = costs.parameters(jax.eval_shape(functools.partial(Model, c), jax.random.key(0)))
    assert abs(found['total'] / total - 1) < 0.001
    assert abs(found['active'] / active - 1) < 0.025


def tables() -> list[list[dict[str, str]]]:
  """The tables of configs/README.md: rows as {head of the column: cell}."""
  text = (FOLDER / 'README.md').read_text()
  blocks = re.findall(r'(?:^\|.*\n)+', text, re.MULTILINE)
  split = [[[cell.strip() for cell in line.strip().strip('|').split('|')] for line in block.splitlines()]
           for block in blocks]
  return [[dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]] for lines in split]


def test_every_config_has_one_row():
  assert sorted(row['config'] for row in tables()[0]) == [f'[{name}.py]({name}.py)' for name in NAMES]


@pytest.mark.parametrize('name', NAMES)
def test_a_row_repeats_the_docstring_of_its_config(name):
  doc = ast.get_docstring(ast.parse((FOLDER / f'{name}.py').read_text()))
  row = next(row for row in tables()[0] if row['config'].startswith(f'[{name}.py]'))
  assert row['what it is'] + '.' == doc.splitlines()[0]
  lines = {label: line_of(doc, label) for label in LABELS}
  assert re.findall(r'arxiv.org/abs/([\d.]+\d)', row['paper']) == re.findall(r'arXiv:([\d.]+\d)', lines['paper'])
  assert (row['hardware'], row['time'], row['expected result']) == (lines['hardware'], lines['time'], lines['expect'])
  command = row[next(head for head in row if head.startswith('command'))]
  assert command == '`' + lines['command'].removeprefix('python -m mtp_jax ') + '`'
  counts = row['parameters'], row['FLOPs a token']
  assert counts == (('next table',) * 2 if name == 'gloeckle' else (lines['parameters'], lines['FLOPs']))


def test_the_table_of_sizes_costs_what_it_says():
  rows = {row['size']: row for row in tables()[1]}
  assert list(rows) == [*GLOECKLE, '7b_bytes']
  doc = read('gloeckle')[0]
  for size, row in rows.items():
    assert number_of(row['parameters']) == stated(doc, 'parameters', f'{size} ')  # which the next test recomputes
    for futures, head in ((1, 'FLOPs a token, 1 future'), (4, '4 futures'), (8, '8 futures')):
      c = read('gloeckle', f'{size},{futures}')[1]
      assert is_about(flops(c), number_of(row[head]))
      assert is_about(flops(c, causal=True), number_of(row[head], 'causal '))


@pytest.mark.parametrize('size', [*GLOECKLE, '7b_bytes'])
def test_models_of_the_paper_cost_what_they_say_whatever_the_futures(size):
  doc = read('gloeckle', f'{size},4')[0]
  for futures in (1, 2, 4, 8):
    c = read('gloeckle', f'{size},{futures}')[1]
    assert parameters(c) == stated(doc, 'parameters', f'{size} ')[0] and c.model.futures == futures
    if re.search(rf'(?<![\w.]){size},{futures} ', doc):
      assert is_about(flops(c), stated(doc, 'FLOPs', f'{size},{futures} '))


# Table S14; non-embedding parameters by the paper's own count, 12 x layers x width^2.
@pytest.mark.parametrize('size, width, layers, heads, millions', [
    ('0.3b', 1024, 18, 16, 226), ('0.6b', 1280, 27, 20, 531), ('1.3b', 2048, 24, 16, 1208),
    ('3b', 2560, 36, 20, 2831), ('7b', 4096, 32, 32, 6442), ('13b', 5120, 40, 40, 12583)])
def test_the_papers_shapes_and_hyperparameters(size, width, layers, heads, millions):
  c = read('gloeckle', f'{size},4')[1]
  m, o = c.model, c.optimizer
  assert (m.width, m.layers, m.heads, m.kv_heads) == (width, layers, heads, heads) and m.trunk_layers == layers - 4
  assert abs(12 * layers * width**2 / 1e6 - millions) <= 0.5
  without_tables = parameters(c) - 2 * m.vocab * m.width
  # The feed-forward width is rounded up to a multiple of 256.
  assert 1 <= without_tables / (12 * layers * width**2) < 1.04
  assert c.train.batch * c.data.length == 8 * 2**20
  assert (o.b1, o.b2, o.weight_decay, o.clip, o.learning_rate, o.final_ratio) == (0.9, 0.95, 0.1, 1.0, 3e-4, 0.03)


def test_eight_byte_futures_of_the_paper():
  c = read('gloeckle', '7b_bytes,8')[1]
  assert c.train.batch * c.data.length == 12 * 2**20
  assert c.train.steps == 25_000 and c.data.length == 8192 and c.model.vocab >= 259


def test_a_second_prediction_like_that_of_deepseek():
  c = read('deepseek_7b')[1]
  assert (c.model.kind, c.model.futures, c.model.own_heads, c.model.trunk_layers) == ('sequential', 2, 1, 30)
  switch = 10 / 14.8
  weights = [c.objective.weights_M(2, fraction) for fraction in (0, switch - 0.001, switch + 0.001, 1)]
  assert weights == [(1, 0.3), (1, 0.3), (1, 0.1), (1, 0.1)]
