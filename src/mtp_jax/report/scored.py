"""A scored text as HTML, each token the darker the less the model expected it."""
import bisect
from collections.abc import Sequence

from mtp_jax.report.spans import PAPER, block, characters, legend, span

BOUNDS = (0.5, 1.0, 2.0, 4.0)  # nats, between the colours
COLOURS = (PAPER, '#fff1c9', '#ffdc8a', '#ffb35c', '#ff8f6b')


def text_html(tokens: Sequence[bytes], nats: Sequence[float], hints: Sequence[str] = ()) -> str:
  """The text; a character of several tokens has the sum of their nats.

  Args:
    tokens: what each stands for.
    nats: minus the log-probability of each.
    hints: shown beside the nats under the mouse, one a token.
  """
  spans = []
  for text, numbers in characters(tokens):
    sum_nats = sum(nats[i] for i in numbers)
    hint = '; '.join([f'{sum_nats:.2f} nats', *(hints[i] for i in numbers if hints)])
    spans.append(span(text, COLOURS[bisect.bisect_right(BOUNDS, sum_nats)], hint))
  return block(spans)


def legend_html() -> str:
  """The nats that each colour stands for."""
  meanings = [f'below {BOUNDS[0]:g} nats', *(f'{a:g} to {b:g}' for a, b in zip(BOUNDS, BOUNDS[1:])),
              f'{BOUNDS[-1]:g} and more']
  return legend(zip(COLOURS, meanings))
