"""A trained language model, for notebooks and the command line: load it, generate, evaluate."""
import dataclasses
import functools
import math
import pathlib
import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np

from mtp_jax import checkpoint, data, decode, tokenizer, train
from mtp_jax.config import BadInput, Config, MeshConfig
from mtp_jax.model import Model, conventions
from mtp_jax.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class Generation:
  """What `LanguageModel.generate` returns: one entry a prompt, then figures over all of them.

  ids: the new tokens, without the prompt. depths: for each of them 0 if future 0 spoke, m if a draft of future m was accepted.
  text: the new tokens as text. tokens: how many. forwards: passes of the decode loop in which the rows took part, the pass over
  the prompts not counted. offered and accepted: by draft depth, the passes in which all drafts before it were accepted, and those in
  which it was as well. seconds: of wall-clock time,
  compilation included on the first call of a shape.
  """
  ids: list[list[int]]
  depths: list[list[int]]
  text: list[str]
  tokens: int
  forwards: int
  offered: list[int]
  accepted: list[int]
  seconds: float

  @property
  def acceptance(self) -> list[float]:
    """Of draft depth m, given that all before it were accepted; nan where none was offered."""
    return [a / n if n else math.nan for a, n in zip(self.accepted, self.offered)]

  @property
  def tokens_per_forward(self) -> float:
    return self.tokens / max(1, self.forwards)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A checkpoint at hand: config, tokenizer, model (its parameters), step, and the record that travelled with it."""
  config: Config
  tokenizer: tokenizer.Tokenizer
  model: Model
  step: int
  record: dict
  mesh: jax.sharding.Mesh

  def generate(self, prompts: str | bytes | Sequence, max_tokens: int = 256, draft: int | None = None, temperature: float = 0.0, seed: int = 0) -> Generation:
    """Continues one prompt or several; in float32 the output does not depend on `draft`, only the number of forwards does.

    Args:
      prompts: text, bytes, or a sequence of them, or of token ids.
      max_tokens: new tokens at most for each; a row ends early at its end of document.
      draft: how many futures draft, 0 (plain autoregression) to M-1, which is the default.
      temperature: 0 is greedy. seed: row i samples with seed + i.

    Raises:
      BadInput: when an argument is out of range. Runs on one device.
    """
    one = isinstance(prompts, (str, bytes))
    furthest = self.config.model.futures - 1
    draft = furthest if draft is None else draft
    if not 0 <= draft <= furthest:
      raise BadInput(f'draft={draft}: this model has {furthest + 1} futures, so 0 to {furthest} can draft')
    if max_tokens < 1:
      raise BadInput(f'max_tokens={max_tokens}: must be at least 1')
    if not 0 <= temperature < float('inf'):
      raise BadInput(f'temperature={temperature}: must be 0 (greedy) or a positive number')
    if not 0 <= seed < 2**31:
      raise BadInput(f'seed={seed}: must lie between 0 and 2^31 - 1')
    rows = [np.concatenate([[self.tokenizer.bos], self._ids(prompt)]).astype(np.int32) for prompt in ([prompts] if one else prompts)]
    if not rows:
      raise BadInput('prompts=[]: pass at least one')
    length_B = np.array([len(row) for row in rows], np.int32)
    P = _round_up(length_B.max(), 64)
    prompts_BP = np.full((len(rows), P), self.tokenizer.pad, np.int32)
    for row, ids in zip(prompts_BP, rows):
      row[:len(ids)] = ids
    allowed_V = train.emitted(self.config, self.tokenizer)
    start = time.perf_counter()
    end = decode.generate(self._on_one_device, prompts_BP, length_B, length_B + max_tokens, (np.arange(len(rows)) + seed).astype(np.uint32),
                          np.float32(max(temperature, 1e-6)), allowed_V, np.int32(self.tokenizer.eos),
                          slots=_round_up(P + max_tokens, 64), draft=draft, sample=temperature > 0)
    end = jax.device_get(dataclasses.replace(end, memory=None))
    seconds = time.perf_counter() - start
    new = lambda x_BS: [row[a:b].tolist() for row, a, b in zip(x_BS, length_B, end.length_B)]
    accepted = end.accepted_BK.sum(0)
    offered = np.concatenate([[np.maximum(end.forwards_B - 1, 0).sum()], accepted[:-1]]) if draft else accepted  # the first pass has no drafts yet
    return Generation(new(end.tokens_BS), new(end.depth_BS), [self.tokenizer.text(ids) for ids in new(end.tokens_BS)],
                      int((end.length_B - length_B).sum()), int(end.forwards_B.sum()), offered.tolist(), accepted.tolist(), seconds)

  def evaluate(self, rows: int | None = None) -> dict:
    """nats, accuracy and count of each future, bits_per_byte of future 0, over the held-out documents, or `rows` rows of them at even distances."""
    batch = self.config.train.evaluate_rows
    with jax.set_mesh(self.mesh):
      held_out = data.Rows(self.prepared.validation, self.config.data.length, self.config.model.futures, self.tokenizer.pad)
      batches = data.validation_batches(held_out, batch, rows, jax.process_index(), jax.process_count())
      return train.evaluate(self.config, self.model, batches, train.byte_lengths(self.config, self.tokenizer),
                            train.emitted(self.config, self.tokenizer), self.mesh)

  def seconds_per_forward(self, prompt_tokens: int = 32, max_tokens: int = 96, repeats: int = 3) -> list[float]:
    """Of a decoding pass on this machine, one prompt at a time, for each draft length 0..M-1: what drafting and verifying cost."""
    prompt, lengths = self.prepared.validation.document(0)[:prompt_tokens], range(self.config.model.futures)
    run = lambda draft, tokens: self.generate([prompt], tokens, draft)
    seconds = {draft: [] for draft in lengths}
    for i in range(repeats + 1):  # the first run compiles
      for draft in lengths:
        found = run(draft, max_tokens)
        seconds[draft] += [found.seconds / found.forwards] if i else []
    return [statistics.median(seconds[draft]) for draft in lengths]

  @functools.cached_property
  def prepared(self) -> data.Prepared:
    """The documents of the config, on this machine; `fingerprint` tells whether they are those of the training run."""
    return data.prepare(self.config.data, self.tokenizer)

  def held_out_prompts(self, n: int, length: int) -> list[np.ndarray]:
    """The first `length` ids of the first n held-out documents that go on for as long again."""
    split, found = self.prepared.validation, []
    for i in range(split.documents):
      if split.offsets[i + 1] - split.offsets[i] >= 2 * length + 2:
        found.append(split.document(i)[:length])
      if len(found) == n:
        return found
    raise BadInput(f'config.data: only {len(found)} held-out documents have {2 * length} tokens or more, but {n} prompts are wanted')

  @functools.cached_property
  def _on_one_device(self) -> Model:
    return jax.device_put(self.model, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))

  def _ids(self, prompt):
    if isinstance(prompt, (str, bytes)):
      return self.tokenizer.encode(prompt)
    ids = np.asarray(prompt)
    if ids.ndim != 1 or ids.size and (not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= self.tokenizer.size):
      raise BadInput(f'prompts: {prompt!r} is neither text nor a sequence of ids from 0 to {self.tokenizer.size - 1}')
    return ids


def load(workdir, step: int | None = None) -> LanguageModel:
  """Loads the parameters of a checkpoint, whatever number of devices saved it.

  They go onto the config's mesh when there are devices enough, else onto one device.

  Args:
    workdir: of a training run.
    step: the newest checkpoint unless given.

  Raises:
    BadInput: when there is no such checkpoint, or its record and its arrays disagree.
  """
  workdir = pathlib.Path(workdir).expanduser().absolute()
  record = checkpoint.metadata(workdir, step)
  config = Config.from_dict(record['config'])
  checkpoint.check_conventions(conventions(config.model), record, workdir)
  tokens = tokenizer.load(config.data.tokenizer)
  checkpoint.check_same(f'config.data.tokenizer={config.data.tokenizer}', tokens.digest, record, 'tokenizer', 'put the original file back')
  try:
    mesh = make_mesh(config.mesh)
  except BadInput:
    mesh = make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    model = checkpoint.restore(workdir, record['step'], parameters=train.abstract(config, mesh).model)['parameters']
  return LanguageModel(config, tokens, model, record['step'], record, mesh)


def _round_up(n, multiple: int) -> int:
  return -(-int(n) // multiple) * multiple
