"""The page of runs: the numbers of their logs, all text escaped, nothing loaded, readable colours."""
import dataclasses
import html.parser
import importlib.resources
import math
import re

import numpy as np
import pytest
from colours import contrast

from mtp_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from mtp_jax.report import figures
from mtp_jax.report.charts import POINTS, Line, line_chart, thinned
from mtp_jax.report.goodput import ACCOUNTS
from mtp_jax.report.page import Run, Sample, page

HOSTILE = '<script>alert("x")</script>\'"><img src=x onerror=alert(1)> $\\frac{$ & _run'


def run(name: str, futures: int = 3, steps: int = 4, **config) -> Run:
  """A run whose numbers are all different."""
  records = []
  for step in range(1, steps + 1):
    each = [step + m / 10 for m in range(futures)]
    records.append({'step': step, 'kind': 'train', 'loss': sum(each), 'nats': each, 'bits_per_byte': each[0] / 2,
                    'learning_rate': step / 1e3, 'gradient_norm': 1 / step, 'tokens_per_second': 100.0 * step})
    if step % 2 == 0:
      depths = [(10 * step + k) / 100 for k in range(futures - 1)]
      records.append({'step': step, 'kind': 'validation', 'nats': each, 'accuracy': each, 'bits_per_byte': each[0],
                      'acceptance_greedy': depths, 'acceptance_sampled': depths,
                      'tokens_per_forward_greedy': each, 'tokens_per_forward_sampled': each})
  account = {'seconds': dict.fromkeys(ACCOUNTS, 2.0), 'wall_seconds': 2.0 * len(ACCOUNTS), 'goodput': 0.1, 'runs': 2,
             'steps': steps, 'lost_steps': 1}
  parts = {'embedding': 10, 'trunk': 20, 'futures': 30, 'unembedding': 40, 'total': 100}
  return Run(name, Config(model=ModelConfig(futures=futures), **config), records, account, parts, parts,
             Sample('a<b', [b'x', b'<y>'], [0, 1], 'two tokens'))


class Parsed(html.parser.HTMLParser):
  """Elements, attributes and text of a page."""

  def __init__(self, text: str):
    super().__init__()
    self.tags, self.attributes, self.text = [], [], ''
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.attributes += attributes

  def handle_data(self, data):
    self.text += data

  def values(self, name: str) -> list[str]:
    return [value for key, value in self.attributes if key == name]


@pytest.fixture(scope='module')
def hostile() -> Parsed:
  """A page whose every text from data tries to be more than text."""
  data = DataConfig(paths=(HOSTILE,))
  runs = [run(HOSTILE, data=data), dataclasses.replace(run('b', 2), sample=HOSTILE),
          dataclasses.replace(run('c', 1), sample=Sample(HOSTILE, [HOSTILE.encode()], [2], HOSTILE))]
  return Parsed(page(runs))


def test_text_from_data_is_never_markup(hostile):
  assert not {'script', 'img', 'iframe', 'object', 'foreignobject'} & set(hostile.tags)
  assert not [name for name, _ in hostile.attributes if name.startswith('on')]
  assert hostile.text.count(HOSTILE) >= 12


def test_the_page_loads_nothing(hostile):
  links = hostile.values('href') + hostile.values('src') + hostile.values('xlink:href')
  assert links and all(link.startswith('#') or link == 'data:,' for link in links)
  urls = re.findall(r'url\(([^)]*)\)', str(hostile.attributes))
  assert urls and all(url.startswith('#') for url in urls)
  assert '@import' not in hostile.text and 'url(' not in hostile.text
  assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in hostile.values('content')


def test_names_within_the_page_are_unique_and_those_referred_to_exist(hostile):
  names = hostile.values('id')
  used = {link[1:] for link in hostile.values('href') if link.startswith('#')}
  used |= set(re.findall(r'url\(#([^)]*)\)', str(hostile.attributes)))
  assert len(names) == len(set(names)) and used <= set(names)


def lines_of(monkeypatch, draw, runs) -> dict[str, list[Line]]:
  """The lines of each chart, by its title."""
  charts = {}
  monkeypatch.setattr(figures, 'line_chart', lambda title, x_label, lines, **_: charts.setdefault(title, lines))
  draw(runs)
  return charts


def test_a_line_holds_the_numbers_of_the_log_over_tokens(monkeypatch):
  one = run('one', data=DataConfig(length=16), train=TrainConfig(batch=2, evaluate_rows=2))
  charts = lines_of(monkeypatch, figures.futures, [one])
  train, validation = charts['Nats of each future'][:3], charts['Nats of each future'][3:]
  for m in range(3):
    assert list(train[m].x) == [32 * step for step in (1, 2, 3, 4)] and train[m].y == [s + m / 10 for s in (1, 2, 3, 4)]
    assert list(validation[m].x) == [64, 128] and validation[m].y == [2 + m / 10, 4 + m / 10]
    assert (validation[m].label, validation[m].colour) == (f'future {m}', m)


def test_runs_are_laid_over_each_other_each_in_its_colour(monkeypatch):
  charts = lines_of(monkeypatch, figures.futures, [run('a', 3), run('b', 2)])
  assert [len({line.colour for line in lines}) for lines in charts.values()] == [2, 2, 1]
  assert {line.label: line.colour for line in charts['Nats of future 0'] if line.label} == {'a': 1, 'b': 2}


def test_drafts_are_those_of_the_last_validation_and_a_plain_model_has_none(monkeypatch):
  charts = lines_of(monkeypatch, figures.drafts, [run('a', 3)])
  bound, greedy, sampled = charts['Tokens per forward by drafts, last validation']
  assert list(bound.y) == [1, 2, 3] and greedy.y == sampled.y == [4.0, 4.1, 4.2]
  assert [list(line.y) for line in charts['Acceptance of drafts by depth'][:2]] == [[0.2, 0.4], [0.21, 0.41]]
  assert figures.drafts([run('plain', 1)]) == []


def test_what_is_not_finite_is_a_gap_and_a_run_without_records_has_a_page(monkeypatch):
  one = run('one')
  one.records[0] |= {'loss': None, 'nats': [None, 1.0, None]}
  loss, = lines_of(monkeypatch, figures.loss, [one])['Loss: nats, summed over the futures by their weights']
  assert math.isnan(loss.y[0]) and not any(map(math.isnan, loss.y[1:]))
  empty = dataclasses.replace(one, records=[], account=None, sample='none')
  assert 'Nothing was recorded yet.' in page([empty])


def test_a_long_line_is_thinned_to_means_and_ranges_of_neighbours():
  y = np.random.default_rng(0).normal(size=4 * POINTS)
  y[:6] = np.nan
  x, mean, low, high = thinned(range(len(y)), y.tolist())
  groups = y.reshape(POINTS, 4)
  assert np.isnan(mean[0]) and np.isnan(low[0])
  np.testing.assert_allclose(mean[1:], np.nanmean(groups[1:], 1), rtol=1e-12)
  np.testing.assert_array_equal([low[1:], high[1:]], [np.nanmin(groups[1:], 1), np.nanmax(groups[1:], 1)])
  np.testing.assert_array_equal(x, np.arange(len(y)).reshape(POINTS, 4).mean(1))
  assert thinned([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0], [3.0, 4.0], [3.0, 4.0])


def test_a_chart_has_the_colours_of_the_page_and_no_others():
  lines = [Line([0, 1], [1.0, 2.0], colour, style) for colour in range(9)
           for style in ('line', 'thin', 'dots', 'dashed', 'bound')]
  svg = line_chart('every style', 'x', lines, log_y=True).svg
  assert {f'--s{i}' for i in range(8)} | {'--ink', '--faint'} == set(re.findall(r'var\((--\w+)\)', svg))
  assert not re.findall('#[0-9a-f]{6}', svg) and 'mathdefault' not in svg


def test_the_config_is_shown_where_it_differs():
  shown = Parsed(page([run('a', train=TrainConfig(steps=1234)), run('b', train=TrainConfig(steps=4321))])).text
  assert 'config.train.steps12344321' in shown and 'config.train.batch' not in shown


@pytest.mark.parametrize('theme', [0, 1], ids=['light', 'dark'])
def test_text_and_lines_are_seen_in_light_and_in_dark(theme):
  css = importlib.resources.files('mtp_jax.report').joinpath('page.css').read_text()
  colours = dict(re.findall(r'--(\w+): (#\w{6})', css.split('@media')[theme]))
  for ground in (colours['ground'], colours['card']):
    assert min(contrast(colours[name], ground) for name in ('ink', 'faint')) >= 4.5
    assert min(contrast(colours[f's{i}'], ground) for i in range(8)) >= 3 and contrast(colours['bad'], ground) >= 3
