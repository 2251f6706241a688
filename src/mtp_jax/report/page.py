"""One HTML page about one run or several, laid over each other: a single file without scripts, that
loads nothing.

All text that comes from data goes through `html.escape`; the page's own policy forbids scripts.
"""
import dataclasses
import html
import importlib.resources
from collections.abc import Iterable, Sequence

from mtp_jax.config import Config
from mtp_jax.report import figures
from mtp_jax.report.charts import Chart
from mtp_jax.report.drafted import legend_html, text_html
from mtp_jax.report.events import KINDS
from mtp_jax.report.goodput import ACCOUNTS

# CSS variables of page.css.
PART_COLOURS = {'embedding': 's1', 'trunk': 's2', 'futures': 's3', 'unembedding': 's5'}
TIME_COLOURS = {kind: f's{1 + i % 7}' for i, kind in enumerate(KINDS)}
TIME_COLOURS |= {'lost': 'bad', 'other': 'faint', 'down': 'rule'}


@dataclasses.dataclass(frozen=True)
class Sample:
  """A generated text: the prompt, what each new token stands for, the depth of each, and figures in
  words.
  """
  prompt: str
  tokens: list[bytes]
  depths: list[int]
  about: str


@dataclasses.dataclass(frozen=True)
class Run:
  """What the page shows of a run.

  records: of the metrics log. account: of its time (goodput.py); None without an event log.
  parameters, flops_per_token: by part, and in all as 'total'.
  sample: a text, or why there is none.
  """
  name: str
  config: Config
  records: list[dict]
  account: dict | None
  parameters: dict[str, int]
  flops_per_token: dict[str, int]
  sample: Sample | str

  def of(self, kind: str) -> list[dict]:
    """Its records of a kind, 'train' or 'validation'."""
    return [record for record in self.records if record['kind'] == kind]

  def tokens(self, record: dict) -> int:
    """Trained on up to a record, as the config of the run has it."""
    return self.config.train.rows_before(record['step']) * self.config.data.length


def page(runs: Sequence[Run]) -> str:
  """The page as HTML."""
  style = importlib.resources.files('mtp_jax.report').joinpath('page.css').read_text()
  title, balance = ', '.join(run.name for run in runs), figures.experts(runs)
  sections = (
      ('', _summary(runs)),
      ('Loss', _charts(figures.loss(runs), 'Thin: training, a batch at a time. Dots: validation, on held-out '
                       'documents.')),
      ('Futures', _charts(figures.futures(runs), 'Future m at position t predicts token t+1+m. Thin: training. Dots: '
                          'validation.')),
      ('Optimizer', _charts(figures.optimizer(runs), '')),
      *([('Experts', _charts(balance, 'Of each block with experts: how evenly the tokens of a step are spread over '
                             'them.'))] if balance else []),
      ('Drafts', _charts(figures.drafts(runs), 'Acceptance at depth k: of the drafts of future k, given that all '
                         'before them were accepted, on held-out documents. Solid: greedy. Dashed: sampling at '
                         'temperature 1.')),
      ('Time', _time(runs)),
      ('Memory and FLOPs', _parts(runs)),
      ('A sample', ''.join(_sample(run, len(runs) > 1) for run in runs)),
      ('Config', _config(runs)))
  body = ''.join(f'<section>{f"<h2>{name}</h2>" if name else ""}{content}</section>' for name, content in sections)
  return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
          '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
          'style-src \'unsafe-inline\'; img-src data:">'
          '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
          f'<title>{html.escape(title)}</title><style>{style}</style></head>\n'
          f'<body><h1>{html.escape(title)}</h1>{body}</body></html>\n')


def _table(head: Sequence[str], rows: Iterable[Sequence], kind: str = '') -> str:
  """A table of cells, which are escaped here."""
  line = lambda tag, cells: f'<tr>{"".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)}</tr>'
  lines = line('th', head) + ''.join(line('td', row) for row in rows)
  return f'<div class="scroll"><table class="{kind}">{lines}</table></div>'


def _keys(keys: Iterable[tuple[str, str, str]]) -> str:
  """A legend of (label, CSS variable, style)."""
  marks = ''.join(f'<span class="key"><i class="{style}" style="color:var(--{colour})"></i>{html.escape(label)}</span>'
                  for label, colour, style in keys)
  return f'<div class="keys">{marks}</div>' if marks else ''


def _charts(charts: Sequence[Chart], caption: str) -> str:
  if not charts:
    return '<p>Nothing was recorded yet.</p>'
  drawn = ''.join(f'<figure><h3>{html.escape(chart.title)}</h3>{_keys(chart.keys)}{chart.svg}</figure>'
                  for chart in charts)
  return f'{f"<p>{caption}</p>" if caption else ""}<div class="charts">{drawn}</div>'


def _summary(runs: Sequence[Run]) -> str:
  head = ('run', 'step', 'tokens', 'parameters', 'loss', 'bits per byte', 'tokens per forward', 'tokens/s', 'goodput')
  rows = []
  for run in runs:
    train, validation = run.of('train')[-1:], run.of('validation')[-1:]
    last = max((record['step'] for record in run.records), default=0)
    per_forward = [max(enumerate(v['tokens_per_forward_greedy']), key=lambda pair: pair[1] or 0) for v in validation]
    rows.append((
        run.name, f'{last:,} of {run.config.train.steps:,}', f'{run.tokens({"step": last}):,}',
        f'{run.parameters["total"]:,}', *(figures.text(r['loss'], '.3f') for r in train or [{'loss': None}]),
        *(figures.text(r['bits_per_byte'], '.3f') for r in validation or [{'bits_per_byte': None}]),
        *([f'{figures.text(n, ".2f")} with {k} drafts' for k, n in per_forward] or ['–']),
        *(figures.text(r['tokens_per_second'], ',.0f') for r in train or [{'tokens_per_second': None}]),
        figures.text(run.account and run.account['goodput'], '.1%')))
  keys = _keys((run.name, f's{figures.run_colour(r)}', 'line') for r, run in enumerate(runs)) if len(runs) > 1 else ''
  return (f'<p>Loss and speed of the last record; bits per byte and tokens per forward (greedy) of the last '
          f'validation.</p>{keys}{_table(head, rows)}')


def _bar(name: str, shares: dict[str, float], colours: dict[str, str]) -> str:
  """A name, and a bar of parts as wide as their shares of the whole."""
  whole = sum(shares.values()) or 1
  parts = ''.join(f'<b style="width:{100 * share / whole:.3f}%;background:var(--{colours[part]})" '
                  f'title="{part} {share / whole:.1%}"></b>' for part, share in shares.items() if share)
  return f'<div class="name">{html.escape(name)}</div><div class="bar">{parts}</div>'


def _time(runs: Sequence[Run]) -> str:
  timed = [run for run in runs if run.account]
  if not timed:
    return '<p>No event log.</p>'
  used = [kind for kind in ACCOUNTS if any(run.account['seconds'][kind] for run in timed)]
  bars = ''.join(_bar(run.name, run.account['seconds'], TIME_COLOURS) for run in timed)
  rows = [(kind, *(f'{run.account["seconds"][kind]:,.1f} s, '
                   f'{run.account["seconds"][kind] / (run.account["wall_seconds"] or 1):.1%}' for run in timed))
          for kind in used]
  rows.append(('in all', *(f'{run.account["wall_seconds"]:,.1f} s' for run in timed)))
  rows.append(('starts', *(run.account['runs'] for run in timed)))
  rows.append(('steps lost', *(f'{run.account["lost_steps"]:,}' for run in timed)))
  keys = _keys((kind, TIME_COLOURS[kind], 'block') for kind in used)
  return ('<p>Where the time went, over all restarts; goodput is the share of <em>step</em>. <em>lost</em>: steps '
          f'that a restart repeated; <em>down</em>: between two starts.</p>{keys}{bars}'
          f'{_table(("", *(run.name for run in timed)), rows)}')


def _parts(runs: Sequence[Run]) -> str:
  content = ''
  for run in runs:
    state = {part: 16 * count for part, count in run.parameters.items() if part in PART_COLOURS}
    flops = {part: count for part, count in run.flops_per_token.items() if part != 'total'}
    total = max(1, run.flops_per_token['total'])
    rows = [(part, f'{run.parameters[part]:,}', f'{16 * run.parameters[part] / 2**20:,.2f}',
             f'{run.flops_per_token.get(part, 0):,}', f'{run.flops_per_token.get(part, 0) / total:.1%}')
            for part in (*PART_COLOURS, 'total')]
    if run.config.model.experts:
      rows.append(('active', f'{run.parameters["active"]:,}', '', '', ''))
    content += (f'<h3>{html.escape(run.name)}</h3>' if len(runs) > 1 else '')
    content += _bar('memory of the training state', state, PART_COLOURS)
    content += _bar('FLOPs of a token', flops, PART_COLOURS)
    content += _table(('part', 'parameters', 'MiB', 'FLOPs/token', ''), rows)
  keys = _keys((part, colour, 'block') for part, colour in PART_COLOURS.items())
  return ('<p>The training state is a float32 for each parameter, its gradient and its two moments, over all devices. '
          'FLOPs are those of the forward and backward pass; activations and recomputation are not counted.</p>'
          + keys + content)


def _sample(run: Run, named: bool) -> str:
  name = f'<h3>{html.escape(run.name)}</h3>' if named else ''
  if isinstance(run.sample, str):
    return f'{name}<p>{html.escape(run.sample)}</p>'
  s = run.sample
  return (f'{name}<p>{html.escape(s.about)}</p>{legend_html(s.depths, run.config.model.futures)}'
          f'{text_html(s.prompt, s.tokens, s.depths)}')


def _config(runs: Sequence[Run]) -> str:
  """Where the runs differ from each other, and where from the defaults."""
  values, defaults = [figures.fields(run.config) for run in runs], figures.fields(Config())
  names = [run.name for run in runs]
  rows = lambda wanted: [(f'config.{field}', *(repr(v[field]) for v in values)) for field in defaults if wanted(field)]
  between = rows(lambda field: any(v[field] != values[0][field] for v in values))
  changed = [(*row, repr(defaults[row[0].removeprefix('config.')]))
             for row in rows(lambda field: any(v[field] != defaults[field] for v in values))]
  content = ''
  if len(runs) > 1:
    content = _table(('field', *names), between, 'text') if between else '<p>The runs have the same config.</p>'
  table = _table(('field', *names, 'default'), changed, 'text')
  opened = ' open' if len(runs) == 1 else ''
  return f'{content}<details{opened}><summary>fields that are not at their default</summary>{table}</details>'
