"""Speed, as ratios within one run: a train step against this machine's own matmul or another step, drafting against plain autoregression."""
import dataclasses
import functools
import math
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece

from mtp_jax import chips, objective, tokenizer
from mtp_jax.config import BadInput, Config
from mtp_jax.data.corpus import open_corpus
from mtp_jax.data.files import files
from mtp_jax.data.parts import Options
from mtp_jax.data.prepare import prepare
from mtp_jax.data.records import Document, Reading
from mtp_jax.data.train_tokenizer import sample
from mtp_jax.decode.drafters import Nothing
from mtp_jax.decode.requests import choices
from mtp_jax.formats.llama import _transformers
from mtp_jax.lm import LanguageModel
from mtp_jax.mesh import make_mesh, put
from mtp_jax.model import costs
from mtp_jax.report.display import Meter, print_stderr
from mtp_jax.report.picture import picture
from mtp_jax.tokenizer import byte_lengths, check_vocabulary
from mtp_jax.train import step as training


class Steps:
  """A config's train step, compiled, and its own data: every call is one step.

  temporary_bytes: what the compiled step holds besides its arguments, on one device.
  """

  def __init__(self, config: Config, loss=objective.loss):
    tokens = tokenizer.load(config.data.tokenizer)
    check_vocabulary(config, tokens)
    corpus = open_corpus(config.data, tokens, print_stderr, Meter)
    self.config, self.mesh = config, make_mesh(config.mesh)
    self.batches = corpus.batches(corpus.rows(config.model.futures, print_stderr), config.train.batch)
    M, o = config.model.futures, config.objective
    with jax.set_mesh(self.mesh):
      self.state = jax.jit(lambda key: training.init(config, key))(jax.random.key(config.train.seed))
      self.others = jnp.asarray(byte_lengths(config, tokens)), np.float32(o.weights_M(M))
      step = functools.partial(training.step, config, active=o.active(M), loss=loss)
      self.compiled = jax.jit(step, donate_argnums=0).lower(self.state, put(next(self.batches), self.mesh), *self.others).compile()
      self.flops_per_token = costs.flops_per_token(self.state.model, config.data.length, o.active(M))['total']
      self.parameters = costs.parameters(self.state.model)['total']
    self.temporary_bytes = self.compiled.memory_analysis().temp_size_in_bytes

  def __call__(self) -> float:
    """Seconds of one step, the wait for its batch included."""
    with jax.set_mesh(self.mesh):
      start = time.perf_counter()
      self.state, _ = jax.block_until_ready(self.compiled(self.state, put(next(self.batches), self.mesh), *self.others))
      return time.perf_counter() - start

  def peak_flops(self) -> float:
    with jax.set_mesh(self.mesh):
      return chips.peak_flops()

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


def data(config: Config, seconds: float) -> dict:
  """The way of the data, in one process.

  Returns:
    tokens_per_second and rows_per_second: from a config's shards to batches on the device; share_of_memory_speed: the same over that of rows
    sliced from an array in memory, timed in alternation. prepare_bytes_per_second: the standard library's source to shards, with the byte
    tokenizer; sentencepiece_bytes_per_second: with a SentencePiece model of 4,000 pieces; share_of_raw_encoding: that over what the
    library itself needs to encode the same text in memory, timed in alternation.
  """
  tokens = tokenizer.load(config.data.tokenizer)
  corpus, mesh = open_corpus(config.data, tokens, print_stderr, Meter), make_mesh(config.mesh)
  rows, B, L = corpus.rows(config.model.futures, print_stderr), config.train.batch, config.data.length
  T = L + config.model.futures
  whole = np.concatenate([source.train.read(0, 2**24) for source in corpus.sources]).astype(np.int32)
  starts = np.random.default_rng(0).permutation(max(1, (len(whole) - T) // L)) * L
  plain = np.zeros((B, T), np.int32)

  def from_memory(i: int):
    chosen = np.take(starts, range(i * B, (i + 1) * B), mode='wrap')
    batch = np.stack([whole[start:start + T] for start in chosen])
    return jax.block_until_ready(put({'tokens': batch, 'segments': plain, 'positions': plain}, mesh))

  batches = corpus.batches(rows, B, place=lambda batch: put(batch, mesh))
  speeds = []
  for _ in range(3):
    pair = []
    for draw in (lambda i: jax.block_until_ready(next(batches)), from_memory):
      count, start = 0, time.perf_counter()
      while time.perf_counter() - start < seconds / 3:
        draw(count)
        count += 1
      pair.append(count * B / (time.perf_counter() - start))
    speeds.append(pair)
  batches.close()
  rate = statistics.median(pair[0] for pair in speeds)
  inputs = files((), 'the standard library')
  size = sum(file.bytes for file in inputs)
  some, reading = inputs[::8], Reading(keep=('invalid_utf8', 'lone_surrogate', 'nul'))
  some_size = sum(file.bytes for file in some)
  texts = [found.text for found in sample(some, reading, some_size, '') if isinstance(found, Document)]
  model = tokenizer.SentencePiece(tokenizer.train(texts, 4000))
  raw, strings = sentencepiece.SentencePieceProcessor(model_proto=model.model), [text.decode('utf-8', errors='replace') for text in texts]
  with tempfile.TemporaryDirectory() as folder:
    def prepared(name: str, files: list, tokens) -> float:
      start = time.perf_counter()
      prepare(files, tokens, Options(reading, 0.05), f'{folder}/{name}', 0, '')
      return time.perf_counter() - start
    bytes_seconds = statistics.median(prepared(f'bytes-{i}', inputs, tokenizer.load('bytes')) for i in range(3))
    pairs = []
    for i in range(5):
      start = time.perf_counter()
      for string in strings:
        raw.encode(string)
      pairs.append((time.perf_counter() - start, prepared(f'pieces-{i}', some, model)))
  return {'tokens_per_second': rate * L, 'rows_per_second': rate, 'share_of_memory_speed': statistics.median(a / b for a, b in speeds),
          'prepare_bytes_per_second': size / bytes_seconds,
          'sentencepiece_bytes_per_second': some_size / statistics.median(ours for _, ours in pairs),
          'share_of_raw_encoding': statistics.median(theirs / ours for theirs, ours in pairs)}


def decode(lm: LanguageModel, prompts: int, prompt_tokens: int, max_tokens: int, repeats: int, batches: tuple[int, ...] = (1,),
           draft: int | None = None, drafter='futures', temperature: float = 0.0, against_transformers: bool = False) -> dict:
  """Continuations of held-out prompts, for every draft length 0..`draft` and every batch size, all in alternation in this process.

  Args:
    batches: prompts decoded at once.
    draft, drafter, temperature: as in `LanguageModel.generate`.
    against_transformers: time Hugging Face transformers on the same weights as well, plain decoding on the CPU.

  Returns:
    rows: for each batch size and draft length tokens_per_forward, acceptance by depth (given that all before were accepted),
    tokens_per_second, speed_up over draft 0 of the same batch size, overhead (the cost of a pass over that of a plain one,
    tokens_per_forward / speed_up), drafting (the share of a pass's time that is not verifying), and differing, continuations that are not those
    of draft 0 one at a time (none when greedy, in float32). Seconds are the median of the repeats, summed over the prompts, prefill
    included, compilation not. transformers: tokens_per_second by batch size, and differing. sample: a prompt and its continuation.
  """
  held_out = lm.held_out_prompts(prompts, prompt_tokens)
  lengths, options = range(lm.drafter(drafter, draft).depth + 1), {'drafter': drafter, 'temperature': temperature, 'max_length': 1 + prompt_tokens + max_tokens}
  runs = [functools.partial(lm.generate, max_tokens=max_tokens, draft=k, **options) for k in lengths]
  runs += [functools.partial(_transformers(lm), max_tokens=max_tokens)] if against_transformers else []
  for batch in batches:
    if len(held_out) % batch:
      raise BadInput(f'--batch={batch}: {len(held_out)} prompts do not divide into such batches; --prompts={-(-len(held_out) // batch) * batch} would')
  plain, rows, beside = [], [], []
  for batch in batches:
    groups = [held_out[i:i + batch] for i in range(0, len(held_out), batch)]
    seconds, found = _alternate(runs, groups, repeats)
    texts = [[ids for g in results for ids in g.ids] for results in found]
    plain = plain or texts[0]
    per_second = [sum(map(len, said)) / s for said, s in zip(texts, seconds)]
    differing = [sum(a != b for a, b in zip(said, plain)) for said in texts]
    for k in lengths:
      total = lambda name, results=found[k]: np.sum([getattr(g, name) for g in results], 0).tolist()
      per_forward, speed_up = total('tokens') / total('forwards'), seconds[0] / seconds[k]
      rows.append({'batch': batch, 'draft': k, 'speed_up': speed_up, 'tokens_per_forward': per_forward, 'overhead': per_forward / speed_up,
                   'tokens_per_second': per_second[k], 'drafting': _drafting(lm, groups[0], k, options),
                   'acceptance': [a / n if n else math.nan for a, n in zip(total('accepted'), total('offered'))], 'differing': differing[k]})
    if against_transformers:
      beside.append({'batch': batch, 'tokens_per_second': per_second[-1], 'differing': differing[-1]})
  return {'rows': rows, 'transformers': beside, 'sample': {'prompt': lm.tokenizer.text(held_out[0]), 'text': lm.tokenizer.text(plain[0])}}


def _alternate(runs: list, groups: list, repeats: int) -> tuple[list[float], list[list]]:
  """Every run on every group of prompts, in alternation: for each run (median seconds, summed over the groups; results)."""
  for run in runs:
    run(groups[0])  # compiles
  seconds, found = [0.0] * len(runs), [[] for _ in runs]
  for group in groups:
    timed = [[run(group) for run in runs] for _ in range(repeats)]
    for i in range(len(runs)):
      seconds[i] += statistics.median(results[i].seconds for results in timed)
      found[i].append(timed[0][i])
  return seconds, found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Given(Nothing):
  """Drafts that cost nothing: what is left of a pass is verifying."""

  def draft(self, decoder, memory, tokens_BS, length_B1, k, sampler):
    drafts_BK = jnp.zeros((len(tokens_BS), k), jnp.int32)
    return drafts_BK, sampler.certain(drafts_BK), memory


def _drafting(lm: LanguageModel, group, k: int, options: dict) -> float:
  """The share of a pass's time that its k drafts take: two loops of passes, with and without them."""
  if k == 0:
    return 0.0
  rows = [lm.row(prompt) for prompt in group]
  sampler = lm.sampler(*choices(len(rows), options['temperature']))
  engine = lambda drafter: lm.engine(drafter, sampler, (k,))
  cost = lambda drafter: float(engine(drafter).costs(rows, [options['max_length']] * len(rows), 16)[0])
  return max(0.0, 1 - cost(_Given(k)) / cost(lm.drafter(options['drafter'], k)))


def plot(found: dict, path: str) -> None:
  """Tokens per forward and speed-up by draft length, a line a batch size."""
  with picture(path, 9, 3.4, columns=2) as (left, right):
    for batch in dict.fromkeys(row['batch'] for row in found['rows']):
      rows = [row for row in found['rows'] if row['batch'] == batch]
      for axes, name in ((left, 'tokens_per_forward'), (right, 'speed_up')):
        axes.plot([row['draft'] for row in rows], [row[name] for row in rows], 'o-', label=f'batch {batch}')
    left.set(xlabel='drafts a pass', ylabel='tokens per forward', ylim=(0, None))
    right.set(xlabel='drafts a pass', ylabel='speed-up over plain decoding', ylim=(0, None))
    right.axhline(1, color='grey', linewidth=0.8)
    right.legend()
