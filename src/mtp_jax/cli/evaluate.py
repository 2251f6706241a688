"""evaluate, score: what a model makes of documents, in figures."""
import math

from mtp_jax.cli.command import (
    DATA,
    JSON,
    MESH,
    STEP,
    TOKENIZER,
    WORKDIR,
    Command,
    model_of,
    need_at_least,
    print_result,
    table,
)
from mtp_jax.cli.text import typed_or_read
from mtp_jax.config import BadInput


def evaluate(flags) -> int:
  """Held-out nats and accuracy of each future, bits per byte of future 0, acceptance of drafts.

  With --input, of all text in these files instead.
  """
  need_at_least(flags, rows=0)
  from mtp_jax.evaluation.groups import groupings
  by = groupings(flags.by.split(',') if flags.by else [])
  if flags.input and flags.data:
    raise BadInput('--data: not together with --input, which takes the place of held-out documents')
  lm = model_of(flags)
  own = None
  if flags.input:
    from mtp_jax.data.texts import read
    own = [*read(flags.input.split(','), '--input')]
    if not own:
      raise BadInput(f'--input={flags.input}: there is no document; give at least one')
  results = lm.evaluate(own, rows=flags.rows or None, by=by)
  drafts = lm.config.model.futures > 1
  if drafts and flags.speed and not own:
    results |= lm.expected_speed_up(results)
  tables = [line for name in by for line in _by_table(name, results[f'by_{name}'])]
  print_result(flags, {'step': lm.step, **results},
               [*_futures_table(results), *(_drafts_table(results) if drafts else []), *tables])
  return 0


def _futures_table(results: dict) -> list[str]:
  rows = [(m, f'{nats:.4f}', f'{accuracy:.4f}', count) for m, (nats, accuracy, count) in enumerate(
      zip(results['nats'], results['accuracy'], results['count']))]
  return [*table(('future', 'nats', 'accuracy', 'count'), rows),
          f'bits per byte of future 0: {results["bits_per_byte"]:.4f}']


def _by_table(name: str, groups: dict) -> list[str]:
  """Tokens, nats and acceptance of each group."""
  from mtp_jax.report.display import format_numbers
  total = sum(figures['tokens'] for figures in groups.values())
  rows = [(group, f'{figures["tokens"]:,}', f'{figures["tokens"] / total:.1%}', format_numbers(figures['nats']),
           format_numbers(figures['acceptance_greedy']), format_numbers(figures['acceptance_sampled']))
          for group, figures in groups.items()]
  head = name, 'tokens', 'share', 'nats by future', 'greedy: acceptance by depth', 'speculative sampling: acceptance'
  return ['', *table(head, rows)]


def _drafts_table(results: dict) -> list[str]:
  """Acceptance, tokens per forward and, if measured, speed-up by draft length."""
  columns = [('draft', range(len(results['tokens_per_forward_greedy'])))]
  for choice, name in (('greedy', 'greedy'), ('sampled', 'speculative sampling')):
    acceptance = ['', *(f'{a:.3f}' for a in results[f'acceptance_{choice}'])]
    tokens_per_forward = [f'{n:.3f}' for n in results[f'tokens_per_forward_{choice}']]
    columns += [(f'{name}: acceptance', acceptance), ('tokens/forward', tokens_per_forward)]
    if f'speed_up_{choice}' in results:
      columns.append(('speed-up', [f'{gain:.2f}' for gain in results[f'speed_up_{choice}']]))
  headings, cells = zip(*columns)
  title = ('decoding these documents, expected by draft length; acceptance: of the draft of '
           'this depth, given that all before it were accepted')
  lines = ['', title, *table(headings, zip(*cells))]
  if 'seconds_per_forward' in results:
    seconds = results['seconds_per_forward']
    plain = seconds[0]
    costs = ' '.join(f'{s / plain:.2f}' for s in seconds)
    lines.append('speed-up: tokens per forward over the cost of a forward, measured here on one '
                 f'prompt: {costs}')
  return lines


def score(flags) -> int:
  """The log-probability of every token of --text, or of the content of --text_file, in nats.

  The text stands at the beginning of a document. One longer than the rows of training is read in
  windows that overlap.
  """
  need_at_least(flags, top=0, overlap=-1)
  if flags.text is None and flags.text_file is None:
    raise BadInput("--text: give either --text='def main():' or --text_file=FILE")
  text = typed_or_read(flags, 'text')
  if not text:
    raise BadInput('--text: is empty, it has no token to score')
  from mtp_jax.report.display import format_numbers
  lm = model_of(flags)
  found, = lm.score(text, futures=lm.config.model.futures if flags.futures else 1, top=flags.top,
                    overlap=None if flags.overlap < 0 else flags.overlap)
  piece = lambda i: lm.tokenizer.text([i])
  alternatives = [[{'text': piece(i), 'id': int(i), 'logprob': float(x)} for i, x in zip(ids, logprobs)]
                  for ids, logprobs in zip(found.top_ids[0], found.top_logprobs[0])]
  values = {'step': lm.step, 'tokens': len(found.ids), 'bytes': found.bytes, 'logprob': found.logprob,
            'nats': found.nats, 'bits_per_byte': found.bits_per_byte, 'ids': found.ids.tolist(),
            'texts': list(map(piece, found.ids)), 'logprobs': found.logprobs.tolist(),
            'likeliest': found.likeliest.tolist(), **({'top': alternatives} if flags.top else {})}
  rows = [(repr(piece(i)), *('' if math.isnan(x) else f'{x:.3f}' for x in logprobs_M),
           ' '.join(f'{other["text"]!r} {other["logprob"]:.2f}' for other in others))
          for i, logprobs_M, others in zip(found.ids, found.logprobs.T, alternatives)]
  head = 'token', *(f'future {m}' for m in range(len(found.logprobs))), 'likeliest' if flags.top else ''
  print_result(flags, values, [
      *(table(head, rows) if flags.tokens else []), '',
      f'{len(found.ids):,} tokens, log-probability {found.logprob:.3f}, nats a token {format_numbers(found.nats)}, '
      f'bits per byte {found.bits_per_byte:.4f}'])
  return 0


COMMANDS = {
    'evaluate': Command(
        evaluate, 'held-out nats, accuracy, bits per byte',
        (WORKDIR, STEP, TOKENIZER, DATA, MESH,
         ('input', '', 'files and folders of your own, separated by commas; all of their text is read'),
         ('rows', 0, 'number of rows, evenly spaced; 0: all'),
         ('by', '', 'also nats and acceptance by kind (of token in source code), by position (in the context), or by '
                    'kind,position'),
         ('speed', True, 'time a forward of each draft length, for the expected speed-up; not with --input'),
         JSON),
        'evaluate --workdir=runs/tiny'),
    'score': Command(
        score, 'log-probability of every token of a text',
        (WORKDIR, STEP, TOKENIZER, MESH,
         ('text', None, 'text to score'),
         ('text_file', None, 'a file that holds it; -: stdin'),
         ('escapes', False, r'read \n, \t, \xHH and such in --text as in C'),
         ('futures', False, 'under every future, not future 0 alone'),
         ('top', 0, 'so many likeliest alternatives to each token'),
         ('overlap', -1, 'tokens that two neighbouring windows share; -1: half a row'),
         ('tokens', True, 'print a line for each token'),
         JSON),
        "score --workdir=runs/tiny --text='import os' --top=3"),
}
