"""What the charts of the report show: lines of numbers out of the metrics logs of runs.

With one run a colour stands for a future or a depth. With several it stands for the run, and every
future and depth has a chart of its own.
"""
import math
from collections.abc import Callable, Sequence

from mtp_jax.config import Config
from mtp_jax.report.charts import Chart, Line, line_chart


def run_colour(r: int) -> int:
  """The series of the run number r; series 0 is the colour of text."""
  return 1 + r % 7


def text(value: float | None, form: str) -> str:
  """A number for a table; a dash where there is none."""
  return '–' if value is None else format(value, form)


def fields(config: Config) -> dict:
  """{'model.width': 128, ...}"""
  return {f'{section}.{field}': value for section, values in config.to_dict().items()
          for field, value in values.items()}


def loss(runs) -> list[Chart]:
  """Training loss; bits per byte of training and validation."""
  bits = (_over_tokens(runs, 'train', 'bits_per_byte', 'thin')
          + _over_tokens(runs, 'validation', 'bits_per_byte', 'dots'))
  return _drawn([('Loss: nats, summed over the futures by their weights', _over_tokens(runs, 'train', 'loss', 'thin')),
                 ('Bits per byte of future 0', bits)])


def futures(runs) -> list[Chart]:
  """Nats and accuracy of each future."""
  if len(runs) == 1:
    nats = _each(runs[0], 'train', 'nats', 'thin', '') + _each(runs[0], 'validation', 'nats', 'dots', 'future')
    return _drawn([('Nats of each future', nats),
                   ('Accuracy of each future', _each(runs[0], 'validation', 'accuracy', 'dots', 'future'))])
  return _drawn([(f'Nats of future {m}', _over_tokens(runs, 'train', 'nats', 'thin', m)
                  + _over_tokens(runs, 'validation', 'nats', 'dots', m))
                 for m in range(max(run.config.model.futures for run in runs))])


def optimizer(runs) -> list[Chart]:
  """Learning rate and gradient norm."""
  rate = [('Learning rate', _over_tokens(runs, 'train', 'learning_rate', 'line'))]
  norm = [('Gradient norm, before clipping', _over_tokens(runs, 'train', 'gradient_norm', 'thin'))]
  return _drawn(rate, from_zero=True) + _drawn(norm, log_y=True)


def experts(runs) -> list[Chart]:
  """Load, its entropy and the biases of the blocks with experts."""
  charts = [('Load of the busiest expert over the mean, of the worst block', 'expert_load', max),
            ('Entropy of the shares of the load, of the worst block; 1 is an even load', 'expert_entropy', min),
            ('Largest bias minus smallest, of the widest block', 'expert_bias', max)]
  worst = lambda key, choose: lambda record: choose((v for v in record.get(key) or () if v is not None), default=None)
  return _drawn([(title, [line for r, run in enumerate(runs)
                          for line in _line(run, 'train', worst(key, choose), run_colour(r), 'thin',
                                            run.name if len(runs) > 1 else '')]) for title, key, choose in charts])


def drafts(runs) -> list[Chart]:
  """Acceptance by depth over training; tokens per forward by draft length at the end."""
  M = max(run.config.model.futures for run in runs)
  if len(runs) == 1:
    acceptance = [('Acceptance of drafts by depth',
                   _each(runs[0], 'validation', 'acceptance_greedy', 'dots', 'depth', 1)
                   + _each(runs[0], 'validation', 'acceptance_sampled', 'dashed', '', 1))]
  else:
    acceptance = [(f'Acceptance of drafts of depth {k + 1}',
                   _over_tokens(runs, 'validation', 'acceptance_greedy', 'dots', k)
                   + _over_tokens(runs, 'validation', 'acceptance_sampled', 'dashed', k)) for k in range(M - 1)]
  lines = [Line(range(M), range(1, M + 1), 0, 'bound', 'all accepted')]
  for r, run in enumerate(runs):
    for validation in run.of('validation')[-1:]:
      for choice, style in (('greedy', 'dots'), ('sampled', 'dashed')):
        values = numbers(validation[f'tokens_per_forward_{choice}'])
        label = choice if len(runs) == 1 else run.name
        lines.append(Line(range(len(values)), values, run_colour(r), style, label))
  forwards = [('Tokens per forward by drafts, last validation', lines)] if M > 1 and len(lines) > 1 else []
  return _drawn(acceptance, from_zero=True) + _drawn(forwards, 'drafts', from_zero=True, whole_x=True)


def numbers(values: Sequence[float | None]) -> list[float]:
  """The values; nan for null."""
  return [math.nan if value is None else value for value in values]


def _line(run, kind: str, value: Callable, colour: int, style: str, label: str) -> list[Line]:
  """The line of a value of each record, over tokens; none if no record has it."""
  records = run.of(kind)
  y = numbers([value(record) for record in records])
  x = [run.tokens(record) for record in records]
  return [Line(x, y, colour, style, label)] if any(map(math.isfinite, y)) else []


def _entry(key: str, i: int | None) -> Callable:
  """What a record has under a key, or the i-th of the list there; None if it is not there."""
  def value(record):
    found = record.get(key)
    if i is None or found is None:
      return found
    return found[i] if i < len(found) else None
  return value


def _over_tokens(runs, kind: str, key: str, style: str, i: int | None = None) -> list[Line]:
  """A line for each run, labelled with its name if there are several."""
  return [line for r, run in enumerate(runs)
          for line in _line(run, kind, _entry(key, i), run_colour(r), style, run.name if len(runs) > 1 else '')]


def _each(run, kind: str, key: str, style: str, noun: str, first: int = 0) -> list[Line]:
  """A line for each future or depth of a run, labelled 'noun number'."""
  count = max((len(record.get(key) or ()) for record in run.of(kind)), default=0)
  return [line for i in range(count)
          for line in _line(run, kind, _entry(key, i), i + first, style, f'{noun} {i + first}' if noun else '')]


def _drawn(charts, x_label: str = 'tokens', **options) -> list[Chart]:
  """The charts of (title, lines) that have a line."""
  return [line_chart(title, x_label, lines, **options) for title, lines in charts if lines]
