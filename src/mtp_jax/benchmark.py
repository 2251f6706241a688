"""Speed, as ratios within one run: a train step against this machine's own matmul or another step, drafting against plain autoregression."""
import functools
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import data, metrics, objective, tokenizer
from mtp_jax import train as training
from mtp_jax.config import Config
from mtp_jax.lm import LanguageModel
from mtp_jax.sharding import make_mesh


class Steps:
  """A config's train step, compiled, and its own data: every call is one step.

  temporary_bytes: what the compiled step holds besides its arguments, on one device.
  """

  def __init__(self, config: Config, loss=objective.loss):
    tokens = tokenizer.load(config.data.tokenizer)
    training.check_vocabulary(config, tokens)
    rows = data.Rows(data.prepare(config.data, tokens).train, config.data.length, config.model.futures, tokens.pad)
    self.config, self.mesh = config, make_mesh(config.mesh)
    self.batches = data.batches(rows, config.train.batch, config.data.seed)
    M, o = config.model.futures, config.objective
    with jax.set_mesh(self.mesh):
      self.state = jax.jit(lambda key: training.init(config, key))(jax.random.key(config.train.seed))
      self.others = jnp.asarray(training.byte_lengths(config, tokens)), np.float32(o.weights_M(M))
      step = functools.partial(training.step, config, active=o.active(M), loss=loss)
      self.compiled = jax.jit(step, donate_argnums=0).lower(self.state, training.put(next(self.batches), self.mesh), *self.others).compile()
      self.flops_per_token = metrics.flops_per_token(self.state.model, config.data.length, o.active(M))['total']
      self.parameters = metrics.parameters(self.state.model)['total']
    self.temporary_bytes = self.compiled.memory_analysis().temp_size_in_bytes

  def __call__(self) -> float:
    """Seconds of one step, the making of its batch included."""
    with jax.set_mesh(self.mesh):
      start = time.perf_counter()
      self.state, _ = jax.block_until_ready(self.compiled(self.state, training.put(next(self.batches), self.mesh), *self.others))
      return time.perf_counter() - start

  def peak_flops(self) -> float:
    with jax.set_mesh(self.mesh):
      return metrics.peak_flops()

  def report(self, seconds: list[float], peak: float) -> dict:
    c, step_seconds = self.config, statistics.median(seconds)
    rate = c.train.batch * c.data.length / step_seconds
    return {'step_seconds': step_seconds, 'tokens_per_second': rate, 'flops_per_token': self.flops_per_token, 'parameters': self.parameters,
            'temporary_bytes': self.temporary_bytes, 'peak_flops': peak, 'mfu': rate * self.flops_per_token / (peak * self.mesh.size)}


def train(config: Config, steps: int, started: float) -> dict:
  """Times `steps` steps on the config's own data.

  Args:
    started: time.perf_counter() when the process began.

  Returns:
    seconds_to_first_step (imports, data, compilation included), step_seconds (median), tokens_per_second, flops_per_token,
    temporary_bytes of the compiled step, peak_flops (best of measurements before and after, per device), mfu.
  """
  step = Steps(config)
  step()
  first = time.perf_counter() - started
  peaks = [step.peak_flops()]
  seconds = [step() for _ in range(steps)]
  peaks.append(step.peak_flops())
  step.batches.close()
  return {'seconds_to_first_step': first, **step.report(seconds, max(peaks))}


def against(config: Config, other: Config | None, steps: int) -> dict:
  """Steps of two configs in alternation, in this process; without another config, against a dense objective of the same model.

  Returns:
    config and other, reports like that of `train`; time_ratio (median of the ratios of neighbouring steps), and beside it flops_ratio
    (analytic, a step) and memory_ratio (temporary bytes of the compiled steps): config over other.
  """
  sides = Steps(config), Steps(other or config, objective.loss if other else objective.dense)
  for side in sides:
    side()
  seconds = [(sides[0](), sides[1]()) for _ in range(steps)]
  peak = max(side.peak_flops() for side in sides)
  one, two = (side.report([pair[i] for pair in seconds], peak) for i, side in enumerate(sides))
  step_flops = lambda side: side.flops_per_token * side.config.train.batch * side.config.data.length
  for side in sides:
    side.batches.close()
  return {'config': one, 'other': two, 'time_ratio': statistics.median(a / b for a, b in seconds), 'flops_ratio': step_flops(sides[0]) / step_flops(sides[1]),
          'memory_ratio': one['temporary_bytes'] / two['temporary_bytes']}


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
