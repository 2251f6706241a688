"""A prepared set as a person sees it: what it holds, and what a model reads of it."""
import math

import jax
import numpy as np

from mtp_jax.data.prepared_set import Prepared
from mtp_jax.data.rows import SourceRows
from mtp_jax.objective import Read
from mtp_jax.report.plot import picture
from mtp_jax.report.tables import Column, render
from mtp_jax.tokenizer import Tokenizer

COLOURS = ('green', 'cyan', 'yellow', 'magenta', 'blue', 'red', 'bright_green', 'bright_cyan')


def summary(prepared: Prepared) -> dict:
  """What a prepared set holds.

  Returns:
    fingerprint, records, bad (records by kind), and for each split: shards, documents, tokens,
    bytes, bytes_per_token (of text; bos and eos not counted) and lengths: {k: documents of 2**k to
    2**(k+1)-1 tokens}.
  """
  values = {'fingerprint': prepared.fingerprint, 'records': prepared.index['records'],
            'bad': prepared.index['bad']}
  for split, stream in (('train', prepared.train), ('validation', prepared.validation)):
    documents = np.zeros(40, int)  # by the power of two of their length
    for shard in range(len(stream.shards)):
      documents += np.bincount(np.frexp(stream.lengths(shard))[1] - 1, minlength=40)
    text_tokens = stream.tokens - 2 * stream.documents
    values[split] = {**stream.counts, 'bytes_per_token': stream.bytes / max(1, text_tokens),
                     'lengths': {k: int(count) for k, count in enumerate(documents) if count}}
  return values


def bars(lengths: dict[int, int], width: int = 50) -> list[str]:
  """A histogram of `lengths` (see `summary`) in text, one line per power of two."""
  if not lengths:
    return []
  longest, lines = max(lengths.values()), []
  for k in range(min(lengths), max(lengths) + 1):
    count = lengths.get(k, 0)
    bar = '█' * math.ceil(width * count / longest)
    lines.append(f'{2**k:>12,} tokens and more  {count:>12,}  {bar}')
  return lines


def plot(values: dict, path: str) -> None:
  """Draws the histograms of lengths that `summary` returned."""
  with picture(path, 7, 3.4) as axes:
    for split in ('train', 'validation'):
      lengths, documents = values[split]['lengths'], values[split]['documents']
      tokens = [2.0**k for k in lengths]
      axes.step(tokens, list(lengths.values()), where='post',
                label=f'{split}: {documents:,} documents')
    axes.set(yscale='log', xlabel='tokens of a document', ylabel='documents')
    axes.set_xscale('log', base=2)
    axes.legend()


def shown(rows: SourceRows, tokenizer: Tokenizer, futures: int, count: int, positions: int,
          colour: bool) -> list[str]:
  """Tables of rows as the objective reads them: at each position its document, its input, the
  target of each future.

  Args:
    count: rows to show, evenly spaced; in place of each, the next row within 64 in which a document
      begins.
    positions: to show of each row, around its first document boundary.
    colour: whether the lines carry the terminal's colour codes.

  Returns:
    Lines of text; '·' where a future has no target.
  """
  lines = []
  for i in np.unique(np.arange(count) * len(rows) // count).tolist():
    candidates = rows.batch(range(i, min(i + 64, len(rows))))
    i += int(np.argmax(candidates['segments'].max(axis=1) > 1))  # 0 if none holds two documents
    lines += [*_row_table(rows, i, tokenizer, futures, positions, colour), '']
  return lines


def _row_table(rows: SourceRows, i: int, tokenizer: Tokenizer, futures: int, positions: int,
               colour: bool) -> list[str]:
  batch = rows.batch([i])
  read = jax.device_get(Read.of(batch, futures))
  segments = batch['segments'][0, :-futures]  # of the inputs
  boundaries = np.flatnonzero(np.diff(segments)) + 1
  first = max(0, min(int(boundaries[0]) if len(boundaries) else 0, len(segments)) - positions // 2)
  sections = []  # one a document
  for t in range(first, min(first + positions, len(segments))):
    if t == first or segments[t] != segments[t - 1]:
      sections.append([])
    document, position = (str(batch[name][0, t]) if segments[t] else ''
                          for name in ('segments', 'positions'))
    targets_M, counted_M = read.targets_MBL[:, 0, t], read.counted_MBL[:, 0, t]
    future_tokens = [_token(target, tokenizer) if counted else '·'
                     for target, counted in zip(targets_M, counted_M)]
    token = _token(batch['tokens'][0, t], tokenizer)
    sections[-1].append([str(t), document, position, token, *future_tokens])
  columns = [Column('position', right=True), Column('document', right=True),
             Column('in it', right=True), Column('input')]
  columns += [Column(f'future {m}', colour=COLOURS[m % len(COLOURS)]) for m in range(futures)]
  padding = (segments == 0).sum()
  title = f'row {i:,} of {len(rows):,}: {segments.max()} documents, {padding} inputs of padding'
  return render(title, columns, sections, max(100, 40 + 14 * futures), colour)


def _token(token: int, tokenizer: Tokenizer) -> str:
  """The text of one token, with names for bos, eos and pad, and spaces made visible."""
  special = {tokenizer.bos: '<bos>', tokenizer.eos: '<eos>', tokenizer.pad: '<pad>'}
  return special.get(int(token)) or repr(tokenizer.text([int(token)]))[1:-1].replace(' ', '␣')
