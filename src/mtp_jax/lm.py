"""A trained language model, for notebooks and the command line: load it, generate, evaluate."""
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from mtp_jax import tokenizer
from mtp_jax.checkpoint import store
from mtp_jax.checkpoint.record import check_conventions, check_tokenizer, read_record
from mtp_jax.config import BadInput, Config, MeshConfig
from mtp_jax.data.corpus import Corpus, open_corpus
from mtp_jax.data.rows import validation_batches
from mtp_jax.decode.decoder import Decoder
from mtp_jax.decode.drafters import Drafter, Lookup, Nothing, Other, futures
from mtp_jax.decode.engine import Engine, Text
from mtp_jax.decode.requests import EXACT, Criterion, choices, per_row
from mtp_jax.decode.verify import Sampler
from mtp_jax.evaluation.held_out import evaluate
from mtp_jax.mesh import make_mesh, process_share
from mtp_jax.model.model import Model, conventions
from mtp_jax.report.display import Meter, print_stderr
from mtp_jax.tokenizer import byte_lengths, decodable
from mtp_jax.train import step as training


@dataclasses.dataclass(frozen=True)
class Generation:
  """What `LanguageModel.generate` returns: one entry a prompt, then figures over all of them.

  ids: the new tokens, without the prompt; the last one ended the row, if an end of document or a stop string did. depths: for each of
  them 0 if the model said it itself, m if its m-th draft was accepted. text: the new tokens as text, up to the stop string. tokens: how
  many. forwards: passes in which the rows took part, that over the prompt, which gives the first token, included. offered and accepted:
  by draft depth, the passes in which all drafts before it were accepted and it had room, and those in which it was as well. passes:
  of the batch, by draft length. lossless: whether the text keeps the model's law. seconds: of wall-clock time, compilation included
  on the first call of a shape.
  """
  ids: list[list[int]]
  depths: list[list[int]]
  text: list[str]
  tokens: int
  forwards: int
  offered: list[int]
  accepted: list[int]
  passes: list[int]
  lossless: bool
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

  def generate(self, prompts: str | bytes | Sequence, max_tokens: int | Sequence[int] | None = None, draft: int | None = None,
               temperature: float | Sequence[float] = 0.0, seed: int | Sequence[int] = 0, *, top_k: int | Sequence[int] = 0,
               top_p: float | Sequence[float] = 1.0, drafter: 'str | LanguageModel' = 'futures', adaptive: bool = False,
               same_seed: bool = False, criterion: Criterion = EXACT, stop: str | Sequence[str] = (), max_length: int | None = None,
               stream: Callable[[int, list[int], str], None] | None = None) -> Generation:
    """Continues one prompt or several, on one device.

    Numbers may be sequences, one entry a prompt. A row does not depend on its neighbours.

    Args:
      prompts: text, bytes, or a sequence of them, or of token ids; none may be empty.
      max_tokens: new tokens at most for each; a row ends early at its end of document or a stop string. By default what
        `max_length` leaves, at most 256.
      draft: drafts a pass, at most where `adaptive`. 0 is plain autoregression. By default all futures of this model, or 4.
      temperature: 0 is greedy. top_k, top_p: draw from so many of the likeliest tokens, or from the fewest that hold this mass.
      seed: row i samples with seed + i, or with its own entry.
      drafter: 'futures'; 'lookup', what followed when the last few tokens stood in the text before; or another, smaller model.
      adaptive: draft 1 to `draft` tokens, chosen each pass by the batch's recent acceptance and by costs, which are measured on the first
        call of a shape. Lengths then depend on timings, so samples are those of `same_seed`.
      same_seed: couple drafts and tokens by shared noise, so that a sample does not depend on the drafts, in float32; fewer are accepted.
      criterion: what accepts a draft; any but the exact one is lossy, and the text then depends on the drafts.
      stop: strings that end a row.
      max_length: tokens of a row in all, `bos` and prompt included; by default the rows that the model was trained on.
      stream: called with (row, new ids, new text) as a row grows.

    Raises:
      BadInput: when an argument is out of range.
    """
    one = isinstance(prompts, (str, bytes))
    rows = [self.row(prompt) for prompt in ([prompts] if one else prompts)]
    if not rows:
      raise BadInput('prompts=[]: pass at least one')
    B, length_B = len(rows), np.array([len(row) for row in rows], np.int32)
    max_length = self.config.data.length if max_length is None else int(per_row('max_length', max_length, 1, 2, 2**24)[0])
    room_B = max_length - length_B
    if room_B.min() < 1:
      raise BadInput(f'prompt: {length_B.max()} tokens with the one that begins it, but max_length={max_length} holds them and at least one more; '
                     'shorten it or raise max_length')
    new_B = np.minimum(room_B, 256) if max_tokens is None else per_row('max_tokens', max_tokens, B, 1, 2**24)
    if (new_B > room_B).any():
      b = int(np.argmax(new_B - room_B))
      raise BadInput(f'max_tokens={new_B[b]}: a prompt of {length_B[b]} tokens leaves room for {room_B[b]} within max_length={max_length}; '
                     'lower max_tokens or raise max_length')
    chosen = choices(B, temperature, seed, top_k, top_p)
    stop = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(text, str) and text for text in stop):
      raise BadInput(f'stop={stop!r}: must be strings, none of them empty')
    drafts = self.drafter(drafter, draft)
    if adaptive and not criterion.lossless:
      raise BadInput(f'adaptive: needs the exact criterion, for with {criterion.name} the text would depend on timings')
    sampler = self.sampler(*chosen, same_seed or adaptive, criterion)
    lengths = tuple(range(1, drafts.depth + 1)) if adaptive and drafts.depth else (drafts.depth,)
    engine, limit_B = self.engine(drafts, sampler, lengths), length_B + new_B
    if len(lengths) > 1:
      shape = drafter if isinstance(drafter, str) else id(drafter), drafts.depth, *engine.shape(rows, limit_B), sampler.greedy, sampler.truncated
      if shape not in self._costs:
        self._costs[shape] = engine.costs(rows, limit_B), drafter  # which is kept, so that no other takes its id
      engine = dataclasses.replace(engine, pass_seconds=self._costs[shape][0])
    texts = [Text(self.tokenizer, stop) for _ in rows] if stop or stream else []
    start = time.perf_counter()
    end, end_B = engine.run(rows, limit_B, texts, stream)
    seconds = time.perf_counter() - start
    ids, depths = ([row[a:b].tolist() for row, a, b in zip(x_BS, length_B, end_B)] for x_BS in (end.tokens_BS, end.depth_BS))
    return Generation(ids, depths, [text.whole for text in texts] or [self.tokenizer.text(row) for row in ids], sum(map(len, ids)), int(end.forwards_B.sum()),
                      end.offered_Bk.sum(0).tolist(), end.accepted_Bk.sum(0).tolist(), end.passes_by_length.tolist(), criterion.lossless, seconds)

  def sampler(self, temperature_B, seed_B, top_k_B, top_p_B, same_seed: bool = False, criterion: Criterion = EXACT) -> Sampler:
    """How the rows of a batch choose; see `choices`."""
    allowed_V = decodable(self.config, self.tokenizer)[:self.tokenizer.size]
    return Sampler(seed_B, temperature_B, top_k_B, top_p_B, allowed_V, not temperature_B.any(), bool(top_k_B.any() or (top_p_B < 1).any()),
                          same_seed, criterion)

  def engine(self, drafter: Drafter, sampler: Sampler, lengths: tuple[int, ...]) -> Engine:
    return Engine(self.decoder.reading(drafter.reads), drafter, sampler, self.tokenizer.eos, self.tokenizer.pad, lengths)

  def drafter(self, drafter: 'str | LanguageModel' = 'futures', draft: int | None = None) -> Drafter:
    """What `generate` calls for.

    Raises:
      BadInput: it cannot draft so many tokens, or not for this model.
    """
    if draft is not None:
      draft = int(per_row('draft', draft, 1, 0, 256)[0])
    if draft == 0:
      return Nothing()
    if drafter == 'futures':
      c, furthest = self.config.model, self.config.model.futures - 1
      if draft is not None and draft > furthest and not (c.share_modules and furthest):
        raise BadInput(f'draft={draft}: this model has {furthest + 1} futures, so 0 to {furthest} can draft')
      return futures(self.decoder, furthest if draft is None else draft)
    draft = 4 if draft is None else draft
    if drafter == 'lookup':
      return Lookup(draft)
    if not isinstance(drafter, LanguageModel):
      raise BadInput(f"drafter={drafter!r}: must be 'futures', 'lookup', or another model")
    if drafter.tokenizer.digest != self.tokenizer.digest:
      raise BadInput(f'drafter: its tokenizer, {drafter.config.data.tokenizer!r}, is not that of this model, {self.config.data.tokenizer!r}; '
                     'a draft model must share it')
    return Other(drafter.decoder, draft)

  @functools.cached_property
  def decoder(self) -> Decoder:
    """The model laid out for decoding, on one device."""
    on_one_device = jax.device_put(self.model, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    return Decoder.of(on_one_device, self.tokenizer.size)

  @functools.cached_property
  def _costs(self) -> dict:
    """Seconds of a pass for each draft length, by the shapes they were measured on."""
    return {}

  def evaluate(self, rows: int | None = None) -> dict:
    """nats, accuracy and count of each future, bits_per_byte of future 0, over the held-out documents, or `rows` rows of them at even distances."""
    batch = self.config.train.evaluate_rows
    with jax.set_mesh(self.mesh):
      held_out = self.corpus.held_out(self.config.model.futures, print_stderr)
      batches = validation_batches(held_out, batch, rows, *process_share(self.mesh))
      return evaluate(self.config, self.model, batches, byte_lengths(self.config, self.tokenizer),
                            decodable(self.config, self.tokenizer), self.mesh)

  def seconds_per_forward(self, prompt_tokens: int = 32) -> list[float]:
    """Of a greedy pass of one row on this machine, for each draft length 0..M-1: what drafting and verifying cost."""
    row = self.corpus.sources[0].validation.document(0)[:prompt_tokens]
    engine = lambda drafter: self.engine(drafter, self.sampler(*choices(1)), (drafter.depth,))
    return [float(engine(self.drafter(draft=draft)).costs([row], [self.config.data.length], 32)[0]) for draft in range(self.config.model.futures)]

  @functools.cached_property
  def corpus(self) -> Corpus:
    """The data of the config, on this machine; `identity` tells whether they are those of the training run."""
    return open_corpus(self.config.data, self.tokenizer, print_stderr, Meter)

  def held_out_prompts(self, n: int, length: int) -> list[np.ndarray]:
    """The first `length` ids of the first n held-out documents that go on for as long again."""
    found = []
    for stream in (source.validation for source in self.corpus.sources):
      for i in range(stream.documents):
        document = stream.document(i)
        if len(document) >= 2 * length:
          found.append(document[:length])
        if len(found) == n:
          return found
    raise BadInput(f'config.data: only {len(found)} held-out documents have {2 * length} tokens or more, but {n} prompts are wanted')

  def row(self, prompt: str | bytes | Sequence[int]) -> np.ndarray:
    """What decoding starts from: bos, then the ids of a prompt.

    Raises:
      BadInput: the prompt is empty, or neither text nor ids.
    """
    ids = self.tokenizer.encode(prompt) if isinstance(prompt, (str, bytes)) else np.asarray(prompt)
    if ids.ndim != 1 or ids.size and (not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= self.tokenizer.size):
      raise BadInput(f'prompts: {prompt!r} is neither text nor a sequence of ids from 0 to {self.tokenizer.size - 1}')
    if not ids.size:
      raise BadInput('prompt: empty; say what to continue')
    return np.concatenate([[self.tokenizer.bos], ids]).astype(np.int32)


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
  record = read_record(workdir, step)
  config = Config.from_dict(record['config'])
  check_conventions(conventions(config.model), record, workdir)
  tokens = tokenizer.load(config.data.tokenizer)
  check_tokenizer(f'config.data.tokenizer={config.data.tokenizer}', tokens.digest, record, 'put the original file back')
  try:
    mesh = make_mesh(config.mesh)
  except BadInput:
    mesh = make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    model = store.restore(workdir, record['step'], parameters=training.abstract(config, mesh).model)['parameters']
  return LanguageModel(config, tokens, model, record['step'], record, mesh)
