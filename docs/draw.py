"""Draws the pictures of the README: the two kinds of futures, and text in the colours of its drafts.

    python docs/draw.py futures                        docs/futures.svg
    python docs/draw.py drafts --workdir=runs/tiny     docs/drafts.svg, from the model of `make train`

--output=FILE writes elsewhere; its ending chooses the format (svg, png, pdf).
Needs matplotlib: pip install -e '.[report]'.
"""
import argparse
import pathlib

import matplotlib

matplotlib.use('Agg')
from matplotlib import patches, pyplot

from mtp_jax.report.drafted import COLOURS as FUTURES  # of future m: of its head, and of the tokens that it drafted
from mtp_jax.report.spans import GREY, INK

FOLDER = pathlib.Path(__file__).parent
TRUNK, SHARED = '#d8dee4', '#eef1f4'
WORDS = ['sat', 'on', 'the', 'mat']
COLUMNS = [1.0, 2.7, 4.4, 6.1]  # x of the futures
COLUMNS_OF_TEXT = 88
BOX, HIGH = 1.3, 0.62  # width of a box, and its height

matplotlib.rcParams.update({'font.family': 'DejaVu Sans', 'svg.fonttype': 'path', 'svg.hashsalt': 'mtp_jax'})


def save(figure, path: str) -> None:
  """Writes the same bytes for the same figure."""
  metadata = {'Date': None} if path.endswith('.svg') else None
  figure.savefig(path, dpi=150, facecolor='white', metadata=metadata)
  pyplot.close(figure)


def box(axes, x: float, y: float, text: str, colour: str, width: float = BOX, height: float = HIGH, size: float = 9.5):
  """A box with text, centred at x, y."""
  corner = x - width / 2, y - height / 2
  axes.add_patch(patches.FancyBboxPatch(corner, width, height, boxstyle='round,pad=0,rounding_size=0.1',
                                        facecolor=colour, edgecolor=INK, linewidth=0.9))
  axes.text(x, y, text, ha='center', va='center', size=size, color=INK)


def arrow(axes, *points: tuple[float, float]) -> None:
  """A line through the points, with a head at the last one."""
  xs, ys = zip(*points)
  axes.plot(xs[:-1], ys[:-1], color=GREY, linewidth=1.1, solid_capstyle='butt')
  axes.annotate('', points[-1], points[-2],
                arrowprops={'arrowstyle': '-|>', 'color': GREY, 'linewidth': 1.1, 'shrinkA': 0, 'shrinkB': 0})


def panel(axes, title: str, paper: str) -> None:
  """What both kinds have: a trunk over one token, and a shared unembedding that predicts four words."""
  axes.set(xlim=(-0.1, 7.2), ylim=(-1.05, 8.15), aspect='equal')
  axes.axis('off')
  axes.text(3.55, 7.95, title, ha='center', va='center', size=13, weight='bold', color=INK)
  axes.text(3.55, 7.5, paper, ha='center', va='center', size=9.5, color=GREY)
  for m, x in enumerate(COLUMNS):
    box(axes, x, 6.55, WORDS[m], FUTURES[m], height=0.5, size=10.5)
    axes.text(x, 7.0, f'token t+{m + 1}', ha='center', va='center', size=9, color=GREY)
    arrow(axes, (x, 5.86), (x, 6.3))
  box(axes, 3.55, 5.55, 'unembedding, shared by all futures', SHARED, width=6.4)


def trunk(axes, x: float, width: float) -> None:
  """Blocks of the trunk from y = 0.85 to 2.45, over the embedding of the token at t."""
  for layer in range(5):
    axes.add_patch(patches.Rectangle((x - width / 2, 0.85 + 0.32 * layer), width, 0.32, facecolor=TRUNK,
                                     edgecolor='white', linewidth=1.5))
  axes.add_patch(patches.Rectangle((x - width / 2, 0.85), width, 1.6, fill=False, edgecolor=INK, linewidth=0.9))
  axes.text(x, 1.65, 'trunk: N blocks', ha='center', va='center', size=10.5, color=INK)
  arrow(axes, (x, 0.51), (x, 0.85))
  box(axes, x, 0.2, 'embedding', SHARED)
  arrow(axes, (x, -0.4), (x, -0.11))
  axes.text(x, -0.65, '… the cat     (token t)', ha='center', va='center', size=10, color=INK)


def parallel(axes) -> None:
  panel(axes, 'parallel futures', 'independent heads · Gloeckle et al. 2024')
  trunk(axes, 3.55, 3.2)
  axes.plot([3.55, 3.55], [2.45, 3.1], color=GREY, linewidth=1.1)
  axes.plot([COLUMNS[0], COLUMNS[-1]], [3.1, 3.1], color=GREY, linewidth=1.1, solid_capstyle='projecting')
  for m, x in enumerate(COLUMNS):
    arrow(axes, (x, 3.1), (x, 3.84))
    box(axes, x, 4.15, f'head {m}', FUTURES[m])
    arrow(axes, (x, 4.46), (x, 5.24))


def sequential(axes) -> None:
  panel(axes, 'sequential futures', 'a causal chain of modules · DeepSeek-V3')
  trunk(axes, COLUMNS[0], 1.9)
  arrow(axes, (COLUMNS[0], 2.45), (COLUMNS[0], 5.24))
  for k, x in enumerate(COLUMNS[1:], 1):
    arrow(axes, (COLUMNS[k - 1] + (BOX / 2 if k > 1 else 0), 4.15), (x - BOX / 2, 4.15))
    box(axes, x, 4.15, f'module {k}', FUTURES[k])
    arrow(axes, (x, 4.46), (x, 5.24))
    arrow(axes, (x, 3.41), (x, 3.84))
    box(axes, x, 3.1, 'embedding', SHARED)
    arrow(axes, (x, 2.45), (x, 2.79))
    axes.text(x, 2.2, f'{WORDS[k - 1]}', ha='center', va='center', size=10, color=INK)
    axes.text(x, 1.85, f'(token t+{k})', ha='center', va='center', size=9, color=GREY)
  axes.text(4.55, 0.7, 'A module joins the state before it with the embedding\n'
                       'of the token in between, and runs one block. In decoding\n'
                       'this token is the one that was just generated or drafted.',
            ha='center', va='center', size=8.5, color=GREY, linespacing=1.5)


def draw_futures(path: str) -> None:
  figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 6.9), layout='constrained')
  parallel(left)
  sequential(right)
  save(figure, path)


def cells(tokens: list[bytes], depths: list[int], columns: int) -> list[tuple[int, int, str, int]]:
  """(line, column, text, depth) of every token; lines end at a newline, or when they are full."""
  laid_out, line, column = [], 0, 0
  for token, depth in zip(tokens, depths):
    text = token.decode(errors='replace').replace('\n', '⏎')
    if column + len(text) > columns:
      line, column = line + 1, 0
    laid_out.append((line, column, text, depth))
    column += len(text)
    if text.endswith('⏎'):
      line, column = line + 1, 0
  return laid_out


def draw_drafts(workdir: str, prompt: str, temperature: float, seed: int, max_tokens: int, path: str) -> None:
  """Generates a text and draws each token in the colour of the future that drafted it."""
  import mtp_jax
  lm = mtp_jax.load(workdir)
  result = lm.generate(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)
  new = [(lm.tokenizer.decode([token]), depth) for token, depth in zip(result.ids[0], result.depths[0])]
  new = [(token, depth) for token, depth in new if token]  # an end of document has no text
  shown = [(bytes([byte]), -1) for byte in prompt.encode()] + new
  laid_out = cells(*map(list, zip(*shown)), columns=COLUMNS_OF_TEXT)
  lines = laid_out[-1][0] + 1

  figure = pyplot.figure(figsize=(11, 0.27 * (lines + 4.1)))
  axes = figure.add_axes((0, 0, 1, 1))
  axes.set(xlim=(-1, COLUMNS_OF_TEXT + 1), ylim=(lines + 0.4, -3.7))
  axes.axis('off')
  column = 0
  for m in range(lm.config.model.futures):
    meaning = (', generated by the pass itself', ', drafted and accepted', '')[min(m, 2)]
    count = sum(depth == m for _, depth in new)
    axes.add_patch(patches.Rectangle((column, -3.1), 1.6, 0.94, facecolor=FUTURES[m], edgecolor=GREY, linewidth=0.6))
    axes.text(column + 2.1, -2.6, f'future {m}{meaning}: {count}', va='center_baseline', size=9.5, color=INK)
    column += (33, 32, 13)[min(m, 2)]
  axes.text(0, -1.2, f'{result.tokens} tokens in {result.forwards} passes, {result.tokens_per_forward:.2f} a pass, '
            f'temperature {temperature:g}. Bold: the prompt. ⏎: a new line.',
            va='center_baseline', size=9.5, color=GREY)
  for line, column, text, depth in laid_out:
    if depth > 0:
      axes.add_patch(patches.Rectangle((column, line), len(text), 0.94, facecolor=FUTURES[depth], linewidth=0))
    axes.text(column + len(text) / 2, line + 0.5, text, ha='center', va='center_baseline', size=12.5,
              color=GREY if text == '⏎' else INK, family='DejaVu Sans Mono', weight='bold' if depth < 0 else 'normal')
  save(figure, path)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('picture', choices=['futures', 'drafts'])
  parser.add_argument('--workdir', default='runs/tiny')
  parser.add_argument('--prompt', default='class Tree:\n    def __init__(self')
  parser.add_argument('--temperature', type=float, default=0.8)
  parser.add_argument('--seed', type=int, default=7)
  parser.add_argument('--max_tokens', type=int, default=200)
  parser.add_argument('--output')
  a = parser.parse_args()
  path = a.output or str(FOLDER / f'{a.picture}.svg')
  if a.picture == 'futures':
    draw_futures(path)
  else:
    draw_drafts(a.workdir, a.prompt, a.temperature, a.seed, a.max_tokens, path)


if __name__ == '__main__':
  main()
