"""Speed of the input pipeline: batches on the device, and preparation of text."""
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import sentencepiece

from mtp_jax import tokenizer
from mtp_jax.config import Config
from mtp_jax.data.corpus import Corpus, open_corpus
from mtp_jax.data.files import files
from mtp_jax.data.parts import Options
from mtp_jax.data.prepare import prepare
from mtp_jax.data.records import Document, Reading
from mtp_jax.data.train_tokenizer import sample
from mtp_jax.mesh import make_mesh, put
from mtp_jax.report.display import Meter, print_stderr

READING = Reading(keep=('invalid_utf8', 'lone_surrogate', 'nul'))


def benchmark_data(config: Config, seconds: float) -> dict:
  """Times the pipeline of a config's data, and `prepare` on the standard library's source.

  Args:
    seconds: to spend on each of the two ways to make batches.

  Returns:
    rows_per_second, tokens_per_second: from shards to batches on the device;
    share_of_memory_speed: the same over that of rows in memory, in alternation;
    prepare_bytes_per_second: text to shards, with the byte tokenizer;
    sentencepiece_bytes_per_second: the same with a SentencePiece model of 4,000 pieces;
    share_of_raw_encoding: the latter over encoding alone, in memory, in alternation.
  """
  return _batches(config, seconds) | _preparation()


def _batches(config: Config, seconds: float) -> dict:
  corpus = open_corpus(config.data, tokenizer.load(config.data.tokenizer), print_stderr, Meter)
  mesh, B, M = make_mesh(config.mesh), config.train.batch, config.model.futures
  batches = corpus.batches(corpus.rows(M, print_stderr), B, place=lambda batch: put(batch, mesh))
  from_memory = _batches_in_memory(corpus, B, config.data.length, M)
  pairs = []
  for _ in range(3):
    from_shards = _batches_per_second(lambda: next(batches), seconds / 3)
    pairs.append((from_shards, _batches_per_second(lambda: put(from_memory(), mesh), seconds / 3)))
  batches.close()
  rows_per_second = B * statistics.median(from_shards for from_shards, _ in pairs)
  return {'tokens_per_second': rows_per_second * config.data.length,
          'rows_per_second': rows_per_second,
          'share_of_memory_speed': statistics.median(shards / memory for shards, memory in pairs)}


def _batches_in_memory(corpus: Corpus, B: int, L: int, M: int) -> Callable[[], dict]:
  """Draws batches of random rows of up to 16 Mi tokens of each source, in memory."""
  T = L + M
  read = [source.train.read(0, 2**24) for source in corpus.sources]
  tokens = np.concatenate(read).astype(np.int32)
  starts = np.random.default_rng(0).permutation(max(1, (len(tokens) - T) // L)) * L
  zeros_BT, step = np.zeros((B, T), np.int32), 0

  def draw() -> dict:
    nonlocal step
    chosen = np.take(starts, range(step * B, (step + 1) * B), mode='wrap')
    step += 1
    tokens_BT = np.stack([tokens[start:start + T] for start in chosen])
    return {'tokens': tokens_BT, 'segments': zeros_BT, 'positions': zeros_BT}

  return draw


def _batches_per_second(draw: Callable[[], dict], seconds: float) -> float:
  count, start = 0, time.perf_counter()
  while time.perf_counter() - start < seconds:
    jax.block_until_ready(draw())
    count += 1
  return count / (time.perf_counter() - start)


def _preparation() -> dict:
  library = files((), 'the standard library')
  some = library[::8]
  library_bytes, some_bytes = (sum(file.bytes for file in inputs) for inputs in (library, some))
  texts = [record.text for record in sample(some, READING, some_bytes, '')
           if isinstance(record, Document)]
  pieces = tokenizer.SentencePiece(tokenizer.train(texts, 4000))
  processor = sentencepiece.SentencePieceProcessor(model_proto=pieces.model)
  strings = [text.decode('utf-8', errors='replace') for text in texts]
  to_bytes = tokenizer.load('bytes')
  bytes_seconds = statistics.median(_prepare_seconds(library, to_bytes) for _ in range(3))
  pairs = []
  for _ in range(5):
    start = time.perf_counter()
    for string in strings:
      processor.encode(string)
    encode_seconds = time.perf_counter() - start
    pairs.append((encode_seconds, _prepare_seconds(some, pieces)))
  prepare_seconds = [prepare for _, prepare in pairs]
  ratios = [encode / prepare for encode, prepare in pairs]
  return {'prepare_bytes_per_second': library_bytes / bytes_seconds,
          'sentencepiece_bytes_per_second': some_bytes / statistics.median(prepare_seconds),
          'share_of_raw_encoding': statistics.median(ratios)}


def _prepare_seconds(inputs: list, tokens: tokenizer.Tokenizer) -> float:
  with tempfile.TemporaryDirectory() as folder:
    start = time.perf_counter()
    prepare(inputs, tokens, Options(READING, 0.05), f'{folder}/set', 0, '')
    return time.perf_counter() - start
