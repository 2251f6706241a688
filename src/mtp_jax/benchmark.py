"""Speed, as ratios within one run: a train step against this machine's own matmul, drafting against plain autoregression."""
import math
import statistics
import time

import jax
import jax.numpy as jnp

from mtp_jax import data, metrics, tokenizer
from mtp_jax import train as training
from mtp_jax.config import Config
from mtp_jax.lm import LanguageModel
from mtp_jax.sharding import make_mesh


def train(config: Config, steps: int, started: float) -> dict:
  """Times `steps` steps on the config's own data.

  Args:
    started: time.perf_counter() when the process began.

  Returns:
    seconds_to_first_step (imports, data, compilation included), step_seconds (median), tokens_per_second, flops_per_token,
    peak_flops (best of measurements before and after, per device), mfu.
  """
  tokens = tokenizer.load(config.data.tokenizer)
  training.check_vocabulary(config, tokens)
  rows = data.Rows(data.prepare(config.data, tokens).train, config.data.length, config.model.futures, tokens.pad)
  batches = data.batches(rows, config.train.batch, config.data.seed)
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    state = jax.jit(lambda key: training.init(config, key))(jax.random.key(config.train.seed))
    byte_length_V = jnp.asarray(training.byte_lengths(config, tokens))
    advance = training.compiled_step(config)
    state, _ = jax.block_until_ready(advance(state, training.put(next(batches), mesh), byte_length_V))
    first = time.perf_counter() - started
    peaks, seconds = [metrics.peak_flops()], []
    for _ in range(steps):
      start = time.perf_counter()
      state, _ = jax.block_until_ready(advance(state, training.put(next(batches), mesh), byte_length_V))
      seconds.append(time.perf_counter() - start)
    peaks.append(metrics.peak_flops())
    flops = metrics.flops_per_token(state.model, config.data.length)['total']
  batches.close()
  step_seconds = statistics.median(seconds)
  rate = config.train.batch * config.data.length / step_seconds
  return {'seconds_to_first_step': first, 'step_seconds': step_seconds, 'tokens_per_second': rate, 'flops_per_token': flops,
          'parameters': metrics.parameters(state.model)['total'], 'peak_flops': max(peaks), 'mfu': rate * flops / (max(peaks) * mesh.size)}


def decode(lm: LanguageModel, prompts: int, prompt_tokens: int, max_tokens: int, repeats: int) -> dict:
  """Greedy continuations of held-out prompts, one prompt at a time, for every draft length in alternation.

  Returns:
    drafts: for each draft length tokens_per_forward, acceptance by depth, tokens_per_second, speed_up over draft 0 and
    overhead, the cost of a pass over that of a plain one: tokens_per_forward / speed_up; differing, continuations that are not
    those of draft 0 (none in float32). Seconds are the median of the
    repeats, summed over the prompts, prefill included, compilation not. sample: a prompt and its continuation.
  """
  held_out = lm.held_out_prompts(prompts, prompt_tokens)
  lengths = range(lm.config.model.futures)
  run = lambda prompt, draft: lm.generate([prompt], max_tokens, draft)
  for draft in lengths:
    run(held_out[0], draft)  # compiles
  seconds, found = dict.fromkeys(lengths, 0.0), {draft: [] for draft in lengths}
  for prompt in held_out:
    timed = {draft: [] for draft in lengths}
    for _ in range(repeats):
      for draft in lengths:
        timed[draft].append(run(prompt, draft))
    for draft in lengths:
      seconds[draft] += statistics.median(g.seconds for g in timed[draft])
      found[draft].append(timed[draft][0])
  rows = []
  for draft in lengths:
    tokens, forwards = sum(g.tokens for g in found[draft]), sum(g.forwards for g in found[draft])
    speed_up = seconds[0] / seconds[draft]
    by_depth = zip(*([*zip(g.accepted, g.offered)] for g in found[draft]))
    accepted_offered = [[sum(numbers) for numbers in zip(*pairs)] for pairs in by_depth]
    rows.append({'draft': draft, 'tokens_per_forward': tokens / forwards, 'speed_up': speed_up, 'overhead': tokens / forwards / speed_up,
                 'tokens_per_second': tokens / seconds[draft], 'acceptance': [a / n if n else math.nan for a, n in accepted_offered],
                 'differing': sum(g.ids != plain.ids for g, plain in zip(found[draft], found[0]))})
  return {'drafts': rows, 'sample': {'prompt': lm.tokenizer.text(held_out[0]), 'text': found[0][0].text[0]}}
