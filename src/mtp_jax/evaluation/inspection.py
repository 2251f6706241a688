"""A prepared set as a person sees it: what it holds, how long its documents are, and what a model is shown of it."""
import io
import math

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from mtp_jax import objective
from mtp_jax.data.prepared_set import Prepared
from mtp_jax.data.rows import SourceRows
from mtp_jax.report.picture import picture
from mtp_jax.tokenizer import Tokenizer

COLOURS = ('green', 'cyan', 'yellow', 'magenta', 'blue', 'red', 'bright_green', 'bright_cyan')


def summary(prepared: Prepared) -> dict:
  """By split: shards, documents, tokens, bytes, bytes_per_token (of text, bos and eos not counted), and `lengths`: documents of 2**k to
  2**(k+1)-1 tokens, by k. And fingerprint, records, bad records by kind."""
  found = {'fingerprint': prepared.fingerprint, 'records': prepared.index['records'], 'bad': prepared.index['bad']}
  for split, stream in (('train', prepared.train), ('validation', prepared.validation)):
    counts = np.zeros(40, int)
    for s in range(len(stream.shards)):
      counts += np.bincount(np.frexp(stream.lengths(s))[1] - 1, minlength=40)
    text_tokens = stream.tokens - 2 * stream.documents
    found[split] = {**stream.counts, 'bytes_per_token': stream.bytes / max(1, text_tokens), 'lengths': {k: int(n) for k, n in enumerate(counts) if n}}
  return found


def bars(lengths: dict[int, int], width: int = 50) -> list[str]:
  """A histogram in text, a line for each power of two."""
  if not lengths:
    return []
  top, keys = max(lengths.values()), range(min(lengths), max(lengths) + 1)
  return [f'{2**k:>12,} tokens and more  {lengths.get(k, 0):>12,}  {"█" * math.ceil(width * lengths.get(k, 0) / top)}' for k in keys]


def plot(found: dict, path: str) -> None:
  """The histograms of lengths."""
  with picture(path, 7, 3.4) as axes:
    for split in ('train', 'validation'):
      lengths = found[split]['lengths']
      axes.step([2.0**k for k in lengths], list(lengths.values()), where='post', label=f'{split}: {found[split]["documents"]:,} documents')
    axes.set(yscale='log', xlabel='tokens of a document', ylabel='documents')
    axes.set_xscale('log', base=2)
    axes.legend()


def shown(rows: SourceRows, tokenizer: Tokenizer, futures: int, count: int, positions: int, colour: bool) -> list[str]:
  """`count` rows at even distances (or the next one in which a document begins, if it is near), `positions` of each, around that place: at every
  position its document, its input and the target of each future, as the objective makes them; '·' where a future has none."""
  lines = []
  for i in np.unique(np.arange(count) * len(rows) // count).tolist():
    near = rows.batch(range(i, min(i + 64, len(rows))))
    i += int(np.argmax(near['segments'].max(axis=1) > 1))  # the first with two documents, if there is one
    batch = rows.batch([i])
    targets = [jax.device_get(objective.targets(batch, m, futures)) for m in range(futures)]
    segments = batch['segments'][0, :-futures]
    starts = np.flatnonzero(np.diff(segments)) + 1
    first = max(0, min(int(starts[0]) if len(starts) else 0, len(segments)) - positions // 2)
    table = Table(title=f'row {i:,} of {len(rows):,}: {segments.max()} documents, {(segments == 0).sum()} inputs of padding', title_justify='left')
    for name in ('position', 'document', 'in it', 'input'):
      table.add_column(name, justify='right' if name != 'input' else 'left')
    for m in range(futures):
      table.add_column(f'future {m}', style=COLOURS[m % len(COLOURS)])
    for t in range(first, min(first + positions, len(segments))):
      said = [_said(y[0, t], tokenizer) if counted[0, t] else '·' for y, counted in targets]
      if t > first and segments[t] != segments[t - 1]:
        table.add_section()
      document, place = (str(batch[name][0, t]) if segments[t] else '' for name in ('segments', 'positions'))
      table.add_row(str(t), document, place, _said(batch['tokens'][0, t], tokenizer), *said)
    text = io.StringIO()
    Console(file=text, force_terminal=colour, width=max(100, 40 + 14 * futures), highlight=False, markup=False).print(table)
    lines += text.getvalue().splitlines() + ['']
  return lines


def _said(token: int, tokenizer: Tokenizer) -> str:
  special = {tokenizer.bos: '<bos>', tokenizer.eos: '<eos>', tokenizer.pad: '<pad>'}
  return special.get(int(token)) or repr(tokenizer.text([int(token)]))[1:-1].replace(' ', '␣')
