"""How much faster drafting decodes than plain autoregression, timed in alternation."""
import dataclasses
import functools
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import BadInput
from mtp_jax.decode.drafters import NoDrafts
from mtp_jax.decode.engine import Engine, measure_pass_seconds
from mtp_jax.decode.requests import sampling_parameters
from mtp_jax.formats import against
from mtp_jax.lm import LanguageModel
from mtp_jax.report.plot import picture


def benchmark_decode(
    lm: LanguageModel, prompts: int, prompt_tokens: int, max_tokens: int, repeats: int,
    batches: tuple[int, ...] = (1,), draft: int | None = None, drafter='futures',
    temperature: float = 0.0, against_transformers: bool = False) -> dict:
  """Decodes held-out prompts with every draft length 0..`draft` and every batch size.

  Times are medians of the repeats, summed over the prompts, with the prefill, without compilation.

  Args:
    batches: numbers of prompts decoded at once.
    draft, drafter, temperature: as in `LanguageModel.generate`.
    against_transformers: also time plain decoding by Hugging Face transformers on the CPU.

  Returns:
    rows: for each batch size and draft length
      tokens_per_forward, tokens_per_second,
      acceptance: by depth, given that all drafts before were accepted,
      speed_up: over draft 0 of the same batch size,
      overhead: cost of a pass over that of a plain one, tokens_per_forward / speed_up,
      floor_seconds: of a bare forward of draft + 1 tokens, trunk, caches, logits and argmax, timed in
        alternation with a pass,
      over_floor: time of a pass over that,
      drafting: fraction of a pass's time that is spent on drafts,
      differing: continuations that are not those of draft 0 and batch 1; 0 if greedy in float32.
    adaptive: for each batch size, with lengths chosen pass by pass, speed_up, tokens_per_forward,
      tokens_per_second, mean_draft, differing; empty without drafts.
    transformers: for each batch size tokens_per_second, differing.
    sample: a prompt and its continuation.

  Raises:
    BadInput: the prompts do not divide into such batches, or what `LanguageModel.generate` refuses.
  """
  held_out = lm.held_out_prompts(prompts, prompt_tokens)
  lengths = range(lm.drafter(drafter, draft).depth + 1)
  options = {'drafter': drafter, 'temperature': temperature,
             'max_length': 1 + prompt_tokens + max_tokens}
  runs = [functools.partial(lm.generate, max_tokens=max_tokens, draft=k, **options)
          for k in lengths]
  if len(lengths) > 1:
    runs.append(functools.partial(lm.generate, max_tokens=max_tokens, draft=lengths[-1], adaptive=True, **options))
  ours = len(runs)
  if against_transformers:
    runs.append(functools.partial(against.transformers_decoder(lm), max_tokens=max_tokens))
  for batch in batches:
    if len(held_out) % batch:
      enough = -(-len(held_out) // batch) * batch
      raise BadInput(f'--batch={batch}: {len(held_out)} prompts do not divide into such batches; '
                     f'--prompts={enough} would')
  plain, rows, adaptive_rows, transformers_rows = [], [], [], []
  for batch in batches:
    groups = [held_out[i:i + batch] for i in range(0, len(held_out), batch)]
    seconds, results = _alternate(runs, groups, repeats)
    texts = [[ids for generation in generations for ids in generation.ids]
             for generations in results]
    plain = plain or texts[0]
    per_second = [sum(map(len, text)) / s for text, s in zip(texts, seconds)]
    differing = [sum(ids != plain_ids for ids, plain_ids in zip(text, plain)) for text in texts]
    figures = [{'batch': batch, 'speed_up': seconds[0] / seconds[i], 'tokens_per_second': per_second[i],
                'tokens_per_forward': total['tokens'] / total['forwards'], 'differing': differing[i]}
               for i, total in enumerate(map(_totals, results[:ours]))]
    for k in lengths:
      row, total = figures[k], _totals(results[k])
      floor, free, drafting = _pass_seconds(lm, groups[0], k, options)
      rows.append(row | {
          'draft': k, 'overhead': row['tokens_per_forward'] / row['speed_up'],
          'floor_seconds': floor, 'over_floor': drafting / floor,
          'drafting': max(0.0, 1 - free / drafting) if k else 0.0,
          'acceptance': [accepted / offered if offered else math.nan
                         for accepted, offered in zip(total['accepted'], total['offered'])]})
    for row, generations in zip(figures[len(lengths):], results[len(lengths):]):
      mean_draft = statistics.mean(generation.mean_draft for generation in generations)
      adaptive_rows.append(row | {'mean_draft': mean_draft})
    if against_transformers:
      transformers_rows.append({'batch': batch, 'tokens_per_second': per_second[-1],
                                'differing': differing[-1]})
  sample = {'prompt': lm.tokenizer.text(held_out[0]), 'text': lm.tokenizer.text(plain[0])}
  return {'rows': rows, 'adaptive': adaptive_rows, 'transformers': transformers_rows, 'sample': sample}


def _totals(generations: list) -> dict:
  """Sums of the generations' numbers; accepted and offered by depth."""
  names = 'tokens', 'forwards', 'accepted', 'offered'
  return {name: np.sum([getattr(generation, name) for generation in generations], 0).tolist()
          for name in names}


def _alternate(runs: list, groups: list, repeats: int) -> tuple[list[float], list[list]]:
  """Each run's median seconds, summed over the groups of prompts, and its results on each group."""
  for run in runs:
    run(groups[0])  # compiles
  seconds, results = [0.0] * len(runs), [[] for _ in runs]
  for group in groups:
    timed = [[run(group) for run in runs] for _ in range(repeats)]
    for i in range(len(runs)):
      seconds[i] += statistics.median(repeat[i].seconds for repeat in timed)
      results[i].append(timed[0][i])
  return seconds, results


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _FreeDrafts(NoDrafts):
  """Drafts that cost nothing, so that a pass only verifies."""

  def draft(self, decoder, memory, tokens_BS, length_B1, k, sampler):
    drafts_Bk = jnp.zeros((len(tokens_BS), k), jnp.int32)
    return drafts_Bk, sampler.one_hot(drafts_Bk), memory


@dataclasses.dataclass(frozen=True)
class _BareForwards:
  """In place of an engine: forwards of k + 1 tokens alone, one after the other."""
  engine: Engine
  k: int

  def seconds_of(self, rows, limit_B, passes: int) -> float:
    """Seconds of so many, on the shapes that rows and limit_B have in the engine."""
    decoder, (B, p, S) = self.engine.decoder, self.engine.shape(rows, limit_B)
    tokens_Bi = jnp.zeros((B, self.k + 1), jnp.int32)
    positions_Bi = p + jnp.broadcast_to(jnp.arange(self.k + 1), tokens_Bi.shape)
    caches = jax.tree.map(jnp.copy, decoder.caches(B, S))  # each a buffer of its own, since they are donated
    inputs = jax.block_until_ready((tokens_Bi, positions_Bi, caches))
    program = self.engine.program(_bare_forwards, (*tokens_Bi.shape, S), ('caches',))
    start = time.perf_counter()
    jax.block_until_ready(program(decoder, *inputs, np.int32(passes)))
    return time.perf_counter() - start


def _bare_forwards(decoder, tokens_Bi, positions_Bi, caches, passes):
  def forward(_, carried):
    tokens_Bi, caches = carried
    forward, caches = decoder.forward(tokens_Bi, positions_Bi, caches)
    return jnp.argmax(decoder.logits(forward.next_BiD), -1).astype(jnp.int32), caches

  return jax.lax.fori_loop(0, passes, forward, (tokens_Bi, caches))


def _pass_seconds(lm: LanguageModel, group: list, k: int, options: dict) -> list[float]:
  """Seconds of a bare forward, of a pass whose drafts are free, and of one with k drafts, timed in alternation."""
  rows = [lm.row(prompt) for prompt in group]
  sampler = lm.sampler(*sampling_parameters(len(rows), options['temperature']))
  free, drafting = (lm.engine(drafter, sampler, (k,))
                    for drafter in (_FreeDrafts(k), lm.drafter(options['drafter'], k)))
  limits = [options['max_length']] * len(rows)
  return measure_pass_seconds([_BareForwards(free, k), free, drafting], rows, limits, 6).tolist()


def plot(values: dict, path: str) -> None:
  """Draws tokens per forward and speed-up by draft length, one line per batch size."""
  with picture(path, 9, 3.4, columns=2) as (left, right):
    for batch in dict.fromkeys(row['batch'] for row in values['rows']):
      rows = [row for row in values['rows'] if row['batch'] == batch]
      drafts = [row['draft'] for row in rows]
      left.plot(drafts, [row['tokens_per_forward'] for row in rows], 'o-', label=f'batch {batch}')
      right.plot(drafts, [row['speed_up'] for row in rows], 'o-', label=f'batch {batch}')
    left.set(xlabel='drafts a pass', ylabel='tokens per forward', ylim=(0, None))
    right.set(xlabel='drafts a pass', ylabel='speed-up over plain decoding', ylim=(0, None))
    right.axhline(1, color='grey', linewidth=0.8)
    right.legend()
