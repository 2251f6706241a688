"""Line charts as SVG for a page that is read in light and in dark.

matplotlib draws them in stand-in colours, which become the CSS variables of the page (page.css):
--ink, --faint and the series --s0 to --s7. All that a chart says in words besides its axes, such as
the names of runs, stands in the page's HTML.
"""
import dataclasses
import io
import math
import re
from collections.abc import Sequence

from mtp_jax.config import BadInput

SERIES = 8  # colours; later ones begin again
POINTS = 400  # of a line, at most; it then shows means of neighbours, and a band their range
_INK, _FAINT = '#aa00f0', '#aa00f1'
_STAND_INS = {_INK: 'var(--ink)', _FAINT: 'var(--faint)',
              **{f'#aa00{i:02d}': f'var(--s{i})' for i in range(SERIES)}}


@dataclasses.dataclass(frozen=True)
class Line:
  """A line of a chart.

  x, y: of its points; nan in y is a gap.
  colour: number of a series. style: 'line', 'thin' (with a band where points were many), 'dots' (a
  line with a dot at each point), 'dashed' (the same, dashed) or 'bound' (grey and dotted).
  label: in the legend; '' for none.
  """
  x: Sequence[float]
  y: Sequence[float]
  colour: int
  style: str
  label: str = ''


@dataclasses.dataclass(frozen=True)
class Chart:
  """A drawn chart. keys: (label, CSS variable, style) of its legend."""
  title: str
  svg: str
  keys: list[tuple[str, str, str]]


def line_chart(title: str, x_label: str, lines: Sequence[Line], *, log_y: bool = False,
               from_zero: bool = False, whole_x: bool = False) -> Chart:
  """Draws lines over one axis.

  Args:
    log_y: a logarithmic y axis. from_zero: y begins at 0. whole_x: x holds whole numbers.

  Raises:
    BadInput: matplotlib is missing.
  """
  try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
  except ImportError as error:
    raise BadInput(f"report: {error}; pip install -e '.[report]'") from None
  look = {'svg.fonttype': 'none', 'svg.hashsalt': title, 'text.parse_math': False, 'font.family': 'DejaVu Sans',
          'font.size': 9, 'text.color': _INK, 'axes.labelcolor': _INK, 'axes.edgecolor': _FAINT,
          'axes.spines.top': False, 'axes.spines.right': False, 'xtick.color': _FAINT, 'ytick.color': _FAINT,
          'xtick.labelcolor': _INK, 'ytick.labelcolor': _INK, 'axes.grid': True, 'grid.color': _FAINT,
          'grid.alpha': 0.25, 'grid.linewidth': 0.7, 'axes.facecolor': 'none', 'figure.facecolor': 'none',
          'axes.xmargin': 0.02}
  with matplotlib.rc_context(look):
    figure = Figure(figsize=(5.2, 2.9), layout='constrained')
    axes = figure.subplots()
    for line in lines:
      _draw(axes, line)
    axes.set_xlabel(x_label)
    if log_y:
      axes.set_yscale('log')
      axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
      axes.yaxis.set_major_formatter('{x:g}')
      axes.yaxis.set_minor_formatter(NullFormatter())
    elif from_zero:
      axes.set_ylim(bottom=0)
    if whole_x:
      axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
      axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    file = io.StringIO()
    figure.savefig(file, format='svg', metadata={'Date': None})
  keys = {}  # one for each label and colour, whatever the styles
  for line in lines:
    key = line.label, f's{line.colour % SERIES}'
    if line.label:
      keys.setdefault(key, (*key, line.style))
  return Chart(title, _for_page(file.getvalue(), title), list(keys.values()))


def _draw(axes, line: Line) -> None:
  colour = f'#aa00{line.colour % SERIES:02d}'
  x, y, low, high = thinned(line.x, line.y)
  if line.style == 'thin':
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, y, color=colour, linewidth=0.9, alpha=0.75)
  elif line.style == 'bound':
    axes.plot(x, y, color=_FAINT, linewidth=1.2, linestyle=':')
  else:
    marker = '' if line.style == 'line' else 'o'
    axes.plot(x, y, color=colour, linewidth=1.6, marker=marker, markersize=4,
              linestyle='--' if line.style == 'dashed' else '-')


def thinned(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> tuple[list[float], ...]:
  """(x, mean of y, least y, largest y) of at most `points` runs of neighbours; nan is left out of
  them, and stays where there is nothing else."""
  size = max(1, math.ceil(len(x) / points))
  groups = [(x[i:i + size], [v for v in y[i:i + size] if not math.isnan(v)] or [math.nan])
            for i in range(0, len(x), size)]
  return tuple([f(xs, ys) for xs, ys in groups] for f in (
      lambda xs, ys: sum(xs) / len(xs), lambda xs, ys: sum(ys) / len(ys),
      lambda xs, ys: min(ys), lambda xs, ys: max(ys)))


def _for_page(svg: str, title: str) -> str:
  """The <svg> element, in the page's colours, without names that two charts of a page could share."""
  svg = svg[svg.index('<svg'):]
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  svg = re.sub(r' id="[\w.]+_\d+"', '', svg)  # groups, which nothing refers to
  svg = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{title}">', svg,
               flags=re.DOTALL)
  svg = svg.replace('xlink:href', 'href')
  for stand_in, colour in _STAND_INS.items():
    svg = svg.replace(stand_in, colour)
  return svg
