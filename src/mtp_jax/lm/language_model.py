"""A trained language model, for notebooks and the command line: generate, evaluate, score."""
import dataclasses
import functools
import os
import pathlib
import time
import types
from collections.abc import Callable, Sequence

import jax
import numpy as np

from mtp_jax.config import BadInput, Config
from mtp_jax.data.corpus import Corpus, open_corpus
from mtp_jax.data.rows import SourceRows, validation_batches
from mtp_jax.data.texts import own_rows, read
from mtp_jax.decode.decoder import Decoder
from mtp_jax.decode.detokenizer import Detokenizer
from mtp_jax.decode.drafters import Drafter, DraftModel, NoDrafts, PromptLookup, futures
from mtp_jax.decode.engine import Engine, Stream, batch_size, measure_pass_seconds
from mtp_jax.decode.generation import Generation
from mtp_jax.decode.placement import decoding_mesh
from mtp_jax.decode.requests import (
  EXACT,
  Criterion,
  check_is,
  lengths_after_decoding,
  number,
  one_or_several,
  prompt_ids,
  sampling_parameters,
  stop_strings,
  text_ids,
)
from mtp_jax.decode.verify import Sampler
from mtp_jax.evaluation.breakdown import breakdown
from mtp_jax.evaluation.groups import groupings
from mtp_jax.evaluation.held_out import evaluate
from mtp_jax.evaluation.scoring import Score, score
from mtp_jax.mesh import process_share, row_parts
from mtp_jax.model.model import Model
from mtp_jax.report.display import Count, Meter, print_stderr
from mtp_jax.tokenizer import Tokenizer, byte_lengths, decodable


@dataclasses.dataclass(frozen=True, repr=False)
class LanguageModel:
  """A loaded checkpoint: config, tokenizer, model (the parameters), step, record saved with it."""
  config: Config
  tokenizer: Tokenizer
  model: Model
  step: int
  record: dict
  mesh: jax.sharding.Mesh

  def __repr__(self) -> str:
    c, t = self.config.model, self.config.data.tokenizer
    parameters = sum(x.size for x in jax.tree.leaves(self.model))
    device = self.mesh.devices.flat[0].device_kind
    return (f'LanguageModel of step {self.step:,}: futures {c.futures} ({c.kind}), trunk layers {c.trunk_layers}, '
            f'width {c.width}, parameters {parameters:,}, {c.dtype}\n'
            f'tokenizer {t} of {self.tokenizer.size:,} ids, rows of {self.config.data.length:,} tokens, '
            f'devices {self.mesh.size} ({device})')

  def generate(self, prompts: str | bytes | Sequence | None = None,
               max_tokens: int | Sequence[int] | None = None,
               draft: int | None = None,
               temperature: float | Sequence[float] = 0.0,
               seed: int | Sequence[int] = 0, *,
               n: int = 1,
               top_k: int | Sequence[int] = 0,
               top_p: float | Sequence[float] = 1.0,
               drafter: 'str | LanguageModel' = 'futures',
               adaptive: bool = False,
               same_seed: bool = False,
               criterion: Criterion = EXACT,
               stop: str | bytes | Sequence[str | bytes] | None = (),
               max_length: int | None = None,
               stream: Stream | None = None) -> Generation:
    """Continues one prompt or several, on the devices that hold the model.

    Numbers may be sequences, one entry a prompt. A row does not depend on its neighbours.
    Row p * n + i is sample i of prompt p.

    Args:
      prompts: text, bytes, or a sequence of them, or of token ids; none may be empty. By default
        no prompt: a document from its beginning, `bos`.
      max_tokens: new tokens of each row at most; a row ends early at its end of document or a stop
        string. By default what `max_length` leaves, at most 256.
      draft: drafts in a pass, or the most of them if `adaptive`. 0 is plain autoregression. By
        default all futures of this model, or 4 with another drafter.
      temperature: 0 is greedy.
      seed: of all rows, whose numbers in the batch make their random numbers differ; or an entry a
        prompt, whose samples are then those that it would have alone.
      n: samples of each prompt; at temperature 0 they are equal.
      top_k, top_p: draw from so many of the likeliest tokens, or from the fewest that hold this
        mass.
      drafter: 'futures'; 'lookup', which copies what followed an earlier occurrence of the last few
        tokens; or another, smaller model.
      adaptive: in each pass draft 0 to `draft` tokens, chosen from the recent acceptance of the
        batch and from costs, which are measured on the first call with a shape. The lengths depend
        on timings, so it implies `same_seed`.
      same_seed: drafts and tokens share their random numbers, so that a sample does not depend on
        the drafts, in float32; fewer drafts are accepted.
      criterion: what accepts a draft. All but the exact one are lossy: the text then depends on the
        drafts.
      stop: strings that end a row, text or bytes; None or () for none.
      max_length: tokens of a row, `bos` and prompt included. By default the row length of training.
      stream: called with (row, new ids, new text) while a row grows.

    Raises:
      BadInput: an argument is out of range.
      KeyboardInterrupt: soon after Ctrl-C, between passes.
    """
    if prompts is None:
      rows = [np.array([self.tokenizer.bos], np.int32)]
    else:
      rows = [self.row(prompt) for prompt in one_or_several('prompts', prompts, (str, bytes))]
    n = number('n', n, 1, 2**16)
    check_is((bool, np.bool_), adaptive=adaptive, same_seed=same_seed)
    check_is(Criterion, criterion=criterion)
    check_is((Callable, types.NoneType), stream=stream)
    if not rows:
      raise BadInput('prompts=[]: pass at least one')
    if max_length is None:
      max_length = self.config.data.length
    else:
      max_length = number('max_length', max_length, 2, 2**24)
    length_B = np.array([len(row) for row in rows], np.int32)
    limit_B = lengths_after_decoding(length_B, max_tokens, max_length)
    parameters = sampling_parameters(len(rows), temperature, seed, top_k, top_p, n)
    rows, limit_B = [row for row in rows for _ in range(n)], np.repeat(limit_B, n)
    stop = stop_strings(stop)
    checked_drafter = self.drafter(drafter, draft)
    if adaptive and not criterion.lossless:
      raise BadInput(f'adaptive: needs the exact criterion; with {criterion.name} the text would '
                     'depend on timings')
    sampler = self.sampler(*parameters, same_seed or adaptive, criterion)
    if adaptive and checked_drafter.depth:
      engine = self._adaptive_engine(checked_drafter, sampler, rows, limit_B)
    else:
      engine = self.engine(checked_drafter, sampler, (checked_drafter.depth,))
    texts = [Detokenizer(self.tokenizer, stop) for _ in rows] if stop or stream else []
    return self._run(engine, rows, limit_B, texts, stream)

  def _run(self, engine: Engine, rows: list[np.ndarray], limit_B, texts, stream) -> Generation:
    """Decodes rows whose arguments have been checked; texts as in `Engine.run`."""
    start = time.perf_counter()
    state, end_B = engine.run(rows, limit_B, texts, stream)
    return Generation.of(rows, state, end_B, engine, self.tokenizer, texts, time.perf_counter() - start)

  def sampler(self, temperature_B, seed_B2, top_k_B, top_p_B, same_seed: bool = False,
              criterion: Criterion = EXACT) -> Sampler:
    """How the rows of a batch choose their tokens; see `sampling_parameters`.

    The batch is filled up to a `batch_size` by copies of the last row.
    """
    order_B = np.arange(batch_size(len(seed_B2))).clip(max=len(seed_B2) - 1)
    temperature_B, seed_B2, top_k_B, top_p_B = (
        x_B[order_B] for x_B in (temperature_B, seed_B2, top_k_B, top_p_B))
    allowed_V = decodable(self.config, self.tokenizer)[:self.tokenizer.size]
    greedy, truncated = not temperature_B.any(), bool(top_k_B.any() or (top_p_B < 1).any())
    return Sampler(seed_B2, temperature_B, top_k_B, top_p_B, allowed_V, greedy, truncated, same_seed,
                   criterion)

  def engine(self, drafter: Drafter, sampler: Sampler, lengths: tuple[int, ...]) -> Engine:
    """This model with a drafter; each pass makes one of `lengths` drafts."""
    decoder = self.decoder.with_futures_in_forward(drafter.futures_in_forward)
    return Engine(decoder, drafter, sampler, self.tokenizer.eos, self.tokenizer.pad, lengths)

  def _adaptive_engine(self, drafter: Drafter, sampler: Sampler, rows, limit_B) -> Engine:
    """An engine that chooses 0 to drafter.depth drafts a pass; costs are measured once for each
    shape.
    """
    engine = self.engine(drafter, sampler, tuple(range(drafter.depth + 1)))
    key = engine.key(rows, limit_B)
    if key not in self._pass_costs:
      self._pass_costs[key] = measure_pass_seconds(engine.of_each_length(), rows, limit_B)
    return dataclasses.replace(engine, pass_costs=self._pass_costs[key])

  @functools.cached_property
  def _pass_costs(self) -> dict:
    """Seconds of a pass with each draft length, by the shapes they were measured on."""
    return {}

  def drafter(self, drafter: 'str | LanguageModel' = 'futures',
              draft: int | None = None) -> Drafter:
    """The drafter that `generate` uses for these arguments.

    Raises:
      BadInput: it cannot make so many drafts, or not for this model.
    """
    if draft is not None:
      draft = number('draft', draft, 0, 256)
    if draft == 0:
      return NoDrafts()
    name = drafter if isinstance(drafter, str) else ''
    if name == 'futures':
      return self._futures_drafter(draft)
    draft = 4 if draft is None else draft
    if name == 'lookup':
      return PromptLookup(draft)
    if not isinstance(drafter, LanguageModel):
      raise BadInput(f"drafter={drafter!r}: must be 'futures', 'lookup', or another model")
    if drafter.tokenizer.digest != self.tokenizer.digest:
      raise BadInput(f'drafter: its tokenizer, {drafter.config.data.tokenizer!r}, is not that of '
                     f'this model, {self.config.data.tokenizer!r}; a draft model must share it')
    return DraftModel(drafter.decoder_on(self.mesh), draft)

  def _futures_drafter(self, draft: int | None) -> Drafter:
    c = self.config.model
    trained = c.futures - 1
    if draft is not None and draft > trained and not (c.share_modules and trained):
      raise BadInput(f'draft={draft}: this model has {c.futures} futures, '
                     f'so 0 to {trained} can draft')
    return futures(self.decoder, trained if draft is None else draft)

  @property
  def decoder(self) -> Decoder:
    """The model arranged for decoding, where its parameters are."""
    return self.decoder_on(self.mesh)

  def decoder_on(self, mesh: jax.sharding.Mesh) -> Decoder:
    """The model arranged for decoding, on the devices of a mesh."""
    if mesh not in self._decoders:
      device = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
      model = jax.device_put(self.model, device) if mesh.size == 1 else self.model
      self._decoders[mesh] = Decoder.of(model, self.tokenizer.size, decoding_mesh(mesh))
    return self._decoders[mesh]

  @functools.cached_property
  def _decoders(self) -> dict:
    """By mesh."""
    return {}

  def evaluate(self, texts: str | bytes | pathlib.Path | Sequence | None = None, *, rows: int | None = None,
               by: str | Sequence[str] = ()) -> dict:
    """Results on the held-out documents, or on texts of one's own; see `evaluation.held_out.evaluate`.

    Among them nats, accuracy and count of each future, bits_per_byte of future 0,
    tokens_per_forward_greedy and tokens_per_forward_sampled by draft length.

    Args:
      texts: text, bytes or ids, a `pathlib.Path` of files in any format that `prepare` reads, or a
        sequence of these; packed into rows as held-out documents are. A text is no file name.
      rows: how many rows to read, at even distances; by default all.
      by: 'kind' (of token in source code: indentation, names, ...), 'position' (in the context), or
        both: adds nats and acceptance of each group as by_kind, by_position; see
        `evaluation.groups`. Costs as much again.

    Raises:
      BadInput: an argument is out of range, or a file cannot be read.
    """
    rows = None if rows is None else number('rows', rows, 1, 2**31 - 1)
    by = groupings(one_or_several('by', by, (str,)))
    own = None if texts is None else self._own_rows(texts)
    c, futures = self.config, self.config.model.futures
    with jax.set_mesh(self.mesh):
      source = self.corpus.held_out(futures, print_stderr) if own is None else own
      rows = len(source) if rows is None else min(rows, len(source))
      batch = self._evaluation_batch(rows)
      allowed_V, lengths_V = decodable(c, self.tokenizer), byte_lengths(c, self.tokenizer)
      batches = validation_batches(source, batch, rows, *process_share(self.mesh))
      with Count('evaluate', -(-rows // batch), 'batches') as shown:
        results = evaluate(c, self.model, batches, lengths_V, allowed_V, self.mesh, shown)
      if by:
        groups = breakdown(c, self.model, source, batch, rows, self.tokenizer, allowed_V, self.mesh, by)
        results |= {f'by_{name}': figures for name, figures in groups.items()}
    return results

  def _own_rows(self, texts) -> SourceRows:
    """The rows of documents of one's own, packed as held-out documents are."""
    documents = []
    for text in one_or_several('texts', texts, (str, bytes, pathlib.Path)):
      if isinstance(text, pathlib.Path):
        documents += [self.tokenizer.encode(document) for document in read([text], 'texts')]
      elif isinstance(text, str) and os.path.isfile(text):
        raise BadInput(f'texts={text!r}: is a file; pass pathlib.Path({text!r}) for its content')
      else:
        documents.append(text_ids('texts', text, self.tokenizer))
    if not documents:
      raise BadInput(f'texts={texts!r}: there is no document; pass at least one')
    return own_rows(documents, self.config.data, self.tokenizer, self.config.model.futures)

  def score(self, texts: str | bytes | Sequence, *, futures: int = 1, top: int = 0,
            overlap: int | None = None) -> list[Score]:
    """The log-probability of every token of one text or several; see `evaluation.scoring`.

    Args:
      texts: text, bytes, or a sequence of them, or of token ids. Each stands at the beginning of a
        document, after `bos`; its end is not scored.
      futures: how many to compute, from future 0 on.
      top: alternatives to each token, the likeliest ones.
      overlap: tokens that two neighbouring windows of a text longer than a row share; every token
        beyond the first row is predicted from at least as many. By default half a row.

    Raises:
      BadInput: an argument is out of range.
    """
    ids = [text_ids('texts', text, self.tokenizer) for text in one_or_several('texts', texts, (str, bytes))]
    c, L = self.config, self.config.data.length
    allowed_V, lengths_V = decodable(c, self.tokenizer), byte_lengths(c, self.tokenizer)
    futures = number('futures', futures, 1, c.model.futures)
    top = number('top', top, 0, int(allowed_V.sum()))
    overlap = L // 2 if overlap is None else number('overlap', overlap, 0, L - 1)
    if not ids:
      raise BadInput('texts=[]: pass at least one')
    with jax.set_mesh(self.mesh):
      return score(c, self.model, ids, self.tokenizer.bos, lengths_V, allowed_V, self.mesh, self._evaluation_batch,
                   futures, top, overlap, 'score')

  def _evaluation_batch(self, rows: int) -> int:
    """Rows of a batch: config.train.evaluate_rows, or as few as hold so many rows on this mesh."""
    groups = row_parts(self.mesh)
    most = max(1, self.config.train.evaluate_rows // groups)
    return groups * min(most, batch_size(-(-max(1, rows) // groups)))

  def seconds_per_forward(self, prompt_tokens: int = 32) -> list[float]:
    """Seconds of a greedy pass of one row on this machine, by draft length 0..M-1, timed in
    alternation.
    """
    prompt_tokens = number('prompt_tokens', prompt_tokens, 1, 2**24)
    prompt = self.corpus.validation[0].document(0)[:prompt_tokens]
    sampler = self.sampler(*sampling_parameters(1))
    engines = [self.engine(self.drafter(draft=draft), sampler, (draft,))
               for draft in range(self.config.model.futures)]
    return measure_pass_seconds(engines, [prompt], [self.config.data.length], 6).tolist()

  def expected_speed_up(self, evaluation: dict | None = None) -> dict:
    """Speed over plain decoding to expect on the held-out documents, by draft length 0..M-1.

    tokens per forward / (seconds of a forward / seconds of a forward without drafts), on this
    machine.

    Args:
      evaluation: what `evaluate` returned; evaluated now if not given.

    Raises:
      BadInput: the evaluation is something else.

    Returns:
      speed_up_greedy, speed_up_sampled (speculative sampling at temperature 1), and
      seconds_per_forward, measured on one prompt.
    """
    evaluation = self.evaluate() if evaluation is None else evaluation
    if not (isinstance(evaluation, dict) and 'tokens_per_forward_sampled' in evaluation):
      raise BadInput(f'evaluation={evaluation!r}: must be what evaluate() returned')
    seconds = self.seconds_per_forward()
    speed_ups = {}
    for choice in ('greedy', 'sampled'):
      tokens_per_forward = evaluation[f'tokens_per_forward_{choice}']
      speed_up = [n * seconds[0] / s for n, s in zip(tokens_per_forward, seconds)]
      speed_ups[f'speed_up_{choice}'] = speed_up
    return {**speed_ups, 'seconds_per_forward': seconds}

  @functools.cached_property
  def corpus(self) -> Corpus:
    """The config's data, as they are on this machine; a note on stderr says if they differ from those
    of the training run.
    """
    corpus = open_corpus(self.config.data, self.tokenizer, print_stderr, Meter)
    ours, theirs = corpus.identity, {'validation': []} | self.record['identity']
    if any(ours[key] != theirs.get(key) for key in ('sources', 'validation')):
      print_stderr('note: the documents here differ from those of the training run, so some held-out '
                   'ones may have been trained on')
    return corpus

  def held_out_prompts(self, n: int, length: int) -> list[np.ndarray]:
    """The first `length` ids of the first n held-out documents that have at least twice as many.

    Raises:
      BadInput: there are fewer such documents.
    """
    n, length = number('n', n, 1, 2**31 - 1), number('length', length, 1, 2**31 - 1)
    return self.corpus.beginnings(n, length)

  def row(self, prompt: str | bytes | Sequence[int]) -> np.ndarray:
    """What decoding starts from: bos, then the ids of a prompt.

    Raises:
      BadInput: the prompt is empty, or neither text nor ids.
    """
    ids = prompt_ids(prompt, self.tokenizer)
    return np.concatenate([[self.tokenizer.bos], ids]).astype(np.int32)
