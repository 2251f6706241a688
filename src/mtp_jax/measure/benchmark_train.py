"""Speed of the train step, against this machine's own matrix product or against another step."""
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import chips, objective, tokenizer
from mtp_jax.config import Config
from mtp_jax.data.corpus import open_corpus
from mtp_jax.mesh import make_mesh, put
from mtp_jax.model import costs
from mtp_jax.report.display import Meter, print_stderr
from mtp_jax.tokenizer import byte_lengths, check_vocabulary
from mtp_jax.train import step as training


class Steps:
  """A config's compiled train step on its own data; each call runs one step.

  temporary_bytes: what the compiled step holds besides its arguments, on one device.
  """

  def __init__(self, config: Config, loss=objective.loss):
    tokens = tokenizer.load(config.data.tokenizer)
    check_vocabulary(config, tokens)
    corpus = open_corpus(config.data, tokens, print_stderr, Meter)
    self.config, self.mesh = config, make_mesh(config.mesh)
    self.batches = corpus.batches(corpus.rows(config.model.futures, print_stderr),
                                  config.train.batch)
    M, o = config.model.futures, config.objective
    with jax.set_mesh(self.mesh):
      self.state = training.compiled_init(config, jax.random.key(config.train.seed))
      self.others = jnp.asarray(byte_lengths(config, tokens)), np.float32(o.weights_M(M))
      step = jax.jit(functools.partial(training.step, config, active=o.active(M), loss=loss),
                     donate_argnums=0)
      batch = put(next(self.batches), self.mesh)
      self.compiled = step.lower(self.state, batch, *self.others).compile()
      self.flops_per_token, self.flops_per_token_causal = (
          costs.flops_per_token(config.model, config.data.length, o.active(M), causal)['total']
          for causal in (False, True))
      self.parameters = costs.parameters(self.state.model)['total']
    self.temporary_bytes = self.compiled.memory_analysis().temp_size_in_bytes

  def __call__(self) -> float:
    """Runs a step and returns its seconds, including the wait for its batch."""
    with jax.set_mesh(self.mesh):
      start = time.perf_counter()
      batch = put(next(self.batches), self.mesh)
      self.state, _ = jax.block_until_ready(self.compiled(self.state, batch, *self.others))
      return time.perf_counter() - start

  @property
  def flops(self) -> int:
    """Model FLOPs of a step."""
    return self.flops_per_token * self.config.train.batch * self.config.data.length

  def peak_flops(self) -> float:
    """FLOP/s of one device of the mesh."""
    with jax.set_mesh(self.mesh):
      return chips.peak_flops()

  def report(self, seconds: list[float], peak: float) -> dict:
    """What the steps that took `seconds` amount to; peak: FLOP/s of one device."""
    c, step_seconds = self.config, statistics.median(seconds)
    tokens_per_second = c.train.batch * c.data.length / step_seconds
    all_peak = peak * self.mesh.size
    return {'step_seconds': step_seconds, 'tokens_per_second': tokens_per_second,
            'flops_per_token': self.flops_per_token,
            'flops_per_token_causal': self.flops_per_token_causal,
            'parameters': self.parameters,
            'temporary_bytes': self.temporary_bytes, 'peak_flops': peak,
            'mfu': tokens_per_second * self.flops_per_token / all_peak,
            'mfu_causal': tokens_per_second * self.flops_per_token_causal / all_peak}


def benchmark_train(config: Config, steps: int, started: float) -> dict:
  """Times `steps` train steps on the config's own data.

  Args:
    started: time.perf_counter() when the process began.

  Returns:
    seconds_to_first_step: imports, data and compilation included;
    step_seconds: the median; tokens_per_second; parameters;
    flops_per_token, flops_per_token_causal: model FLOPs with attention over the whole length, and
      over half of it;
    temporary_bytes: of the compiled step, on one device;
    peak_flops: the better of two measurements, before and after the steps, of one device;
    mfu, mfu_causal: model FLOPs per second over the peak of all devices, by either count.
  """
  step = Steps(config)
  step()
  seconds_to_first_step = time.perf_counter() - started
  peak_before = step.peak_flops()
  seconds = [step() for _ in range(steps)]
  peak = max(peak_before, step.peak_flops())
  step.batches.close()
  return {'seconds_to_first_step': seconds_to_first_step, **step.report(seconds, peak)}


def benchmark_against(config: Config, other: Config | None, steps: int) -> dict:
  """Times steps of two configs in alternation, in this process.

  Args:
    other: None: the same model with a dense objective, all logits at once.

  Returns:
    config, other: values as `benchmark_train` returns, without seconds_to_first_step;
    time_ratio: median of the ratios of neighbouring steps, config over other;
    flops_ratio: of model FLOPs per step; memory_ratio: of temporary bytes.
  """
  ours, theirs = Steps(config), Steps(other or config, objective.loss if other else objective.dense)
  ours()
  theirs()
  pairs = [(ours(), theirs()) for _ in range(steps)]
  peak = max(ours.peak_flops(), theirs.peak_flops())
  ours.batches.close()
  theirs.batches.close()
  our_seconds, their_seconds = zip(*pairs)
  return {'config': ours.report(our_seconds, peak), 'other': theirs.report(their_seconds, peak),
          'time_ratio': statistics.median(a / b for a, b in pairs),
          'flops_ratio': ours.flops / theirs.flops,
          'memory_ratio': ours.temporary_bytes / theirs.temporary_bytes}
