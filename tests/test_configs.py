"""What a config file's docstring promises, recomputed from the config it returns."""
import importlib.util
import pathlib
import re

import jax
import pytest

from mtp_jax.config import Config
from mtp_jax.model import costs
from mtp_jax.model.model import Model

FOLDER = pathlib.Path(__file__).parents[1] / 'configs'
GLOECKLE = ('0.3b', '0.6b', '1.3b', '3b', '7b', '13b')


def read(name: str, *argument) -> tuple[str, Config]:
  """The docstring of a config file, and the config."""
  found = importlib.util.spec_from_file_location(name, FOLDER / f'{name}.py')
  module = importlib.util.module_from_spec(found)
  found.loader.exec_module(module)
  return module.__doc__, Config.from_dict(module.get_config(*argument).to_dict())


def stated(doc: str, line: str, label: str) -> tuple[float, float]:
  """The number after a label in a line of a docstring, and half of its last digit."""
  text = re.search(rf'^{line} +(.*(?:\n  +.*)*)', doc, re.MULTILINE).group(1)
  number, unit = re.search(rf'(?<![\w.]){re.escape(label)}([\d,]+(?:\.\d+)?)(?: ([MGBT])\b)?', text).groups()
  scale = {None: 1, 'M': 1e6, 'G': 1e9, 'B': 1e9, 'T': 1e12}[unit]
  number = number.rstrip(',').replace(',', '')
  return float(number) * scale, scale * 10.0 ** -len(number.partition('.')[2]) / 2


def cost(c: Config) -> tuple[int, int]:
  shapes = jax.eval_shape(lambda: Model(c.model, jax.random.key(0)))
  return costs.parameters(shapes)['total'], costs.flops_per_token(c.model, c.data.length)['total']


@pytest.mark.parametrize('name', sorted(path.stem for path in FOLDER.glob('*.py') if path.stem != 'gloeckle'))
def test_a_config_costs_what_it_says(name):
  doc, c = read(name)
  parameters, flops = cost(c)
  assert parameters == stated(doc, 'parameters', '')[0]
  said, half = stated(doc, 'FLOPs', '')
  assert abs(flops - said) <= half
  if re.search('^data', doc, re.MULTILINE):
    said, half = stated(doc, 'data', '')
    assert abs(c.train.steps * c.train.batch * c.data.length - said) <= half


@pytest.mark.parametrize('size', [*GLOECKLE, '7b_bytes'])
def test_models_of_the_paper_cost_what_they_say_whatever_the_futures(size):
  doc = read('gloeckle', f'{size},4')[0]
  for futures in (1, 2, 4, 8):
    c = read('gloeckle', f'{size},{futures}')[1]
    parameters, flops = cost(c)
    assert parameters == stated(doc, 'parameters', f'{size} ')[0] and c.model.futures == futures
    if re.search(rf'(?<![\w.]){size},{futures} ', doc):
      said, half = stated(doc, 'FLOPs', f'{size},{futures} ')
      assert abs(flops - said) <= half


@pytest.mark.parametrize('size, width, layers, heads, millions', [  # Table S14; non-embedding parameters by the paper's own count, 12 x layers x width^2
    ('0.3b', 1024, 18, 16, 226), ('0.6b', 1280, 27, 20, 531), ('1.3b', 2048, 24, 16, 1208), ('3b', 2560, 36, 20, 2831), ('7b', 4096, 32, 32, 6442),
    ('13b', 5120, 40, 40, 12583)])
def test_the_papers_shapes_and_hyperparameters(size, width, layers, heads, millions):
  c = read('gloeckle', f'{size},4')[1]
  m, o = c.model, c.optimizer
  assert (m.width, m.layers, m.heads, m.kv_heads) == (width, layers, heads, heads) and m.trunk_layers == layers - 4
  assert abs(12 * layers * width**2 / 1e6 - millions) <= 0.5
  without_tables = cost(c)[0] - 2 * m.vocab * m.width
  assert 1 <= without_tables / (12 * layers * width**2) < 1.04  # the feed-forward width is rounded up to a multiple of 256
  assert c.train.batch * c.data.length == 8 * 2**20 and (o.b1, o.b2, o.weight_decay, o.clip, o.learning_rate, o.final_ratio) == (0.9, 0.95, 0.1, 1.0, 3e-4, 0.03)


def test_eight_byte_futures_of_the_paper():
  c = read('gloeckle', '7b_bytes,8')[1]
  assert c.train.batch * c.data.length == 12 * 2**20 and c.train.steps == 25_000 and c.data.length == 8192 and c.model.vocab >= 259


def test_a_second_prediction_the_way_of_deepseek():
  c = read('deepseek_7b')[1]
  assert (c.model.kind, c.model.futures, c.model.modules, c.model.trunk_layers) == ('sequential', 2, 1, 30)
  switch = 10 / 14.8
  assert [c.objective.weights_M(2, fraction) for fraction in (0, switch - 0.001, switch + 0.001, 1)] == [(1, 0.3), (1, 0.3), (1, 0.1), (1, 0.1)]
