"""Text to token ids and back without loss: raw bytes, or a SentencePiece model (Kudo and Richardson 2018, arXiv:1808.06226).

Every id stands for a fixed string of bytes, the empty one for bos, eos and pad, so that for any bytes x at all

    decode(encode(x)) == x,    decode(a + b) == decode(a) + decode(b),    sum(byte_lengths[encode(x)]) == len(x).

That makes bits per byte exact, whatever the tokenizer. Ids are int32[n], n the number of tokens; there is no <unk>.
"""
import dataclasses
import functools
import hashlib
import io
import os
import re
import typing
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece

from mtp_jax.config import BadInput, Config


class Tokenizer(typing.Protocol):
  """The face of both tokenizers.

  size counts all ids, bos, eos and pad included; digest is the sha256 of what fixes the mapping; byte_lengths, int32[size],
  says how many bytes each id stands for; model is the file it comes from, b'' for none.
  """
  size: int
  bos: int
  eos: int
  pad: int
  digest: str
  byte_lengths: np.ndarray
  model: bytes

  def encode(self, text: str | bytes) -> np.ndarray:
    """int32[n], without bos and eos."""

  def decode(self, ids: Sequence[int]) -> bytes:
    """The exact bytes; bos, eos, pad and numbers that are no ids stand for none."""

  def text(self, ids: Sequence[int]) -> str:
    """For the eye: `decode`, with what is not UTF-8 shown as U+FFFD."""


def load(name: str, where: str = 'config.data.tokenizer') -> Tokenizer:
  """'bytes', or the path of a SentencePiece model file.

  Args:
    where: the flag or field that names it, for messages.

  Raises:
    BadInput: the file is missing, is no SentencePiece model, or cannot give all bytes back.
  """
  if name == 'bytes':
    return Bytes()
  try:
    with open(os.path.expanduser(name), 'rb') as file:
      return SentencePiece(file.read())
  except OSError as error:
    raise BadInput(f"{where}={name!r}: {error.strerror}; give 'bytes' or the path of a SentencePiece model") from error
  except BadInput as error:
    raise BadInput(f'{where}={name!r}: {error}') from error


def train(documents: Iterable[bytes], size: int, kind: str = 'bpe') -> bytes:
  """A SentencePiece model file, made for code as well as prose: nothing is normalised, spaces and tabs are kept and runs of spaces are pieces,
  digits stand alone, and there are pieces for all bytes, so that `SentencePiece` gives every byte back.

  Args:
    documents: the sample. What is not UTF-8 in it counts as U+FFFD.
    size: of the vocabulary, bos, eos and pad included.
    kind: 'bpe' or 'unigram'.

  Raises:
    BadInput: the sample is too small for so many pieces, or size for the 256 bytes.
  """
  model = io.BytesIO()
  texts = (document.decode('utf-8', errors='replace').replace('\0', ' ') for document in documents)
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(stretch for text in texts for stretch in _stretches(text, _STRETCH)), model_writer=model,
        model_type=kind, vocab_size=size, byte_fallback=True, split_digits=True,
        normalization_rule_name='identity', remove_extra_whitespaces=False, add_dummy_prefix=False, allow_whitespace_only_pieces=True,
        pad_id=3, max_sentence_length=8 * _STRETCH, train_extremely_large_corpus=True, minloglevel=3)
  except RuntimeError as error:
    raise BadInput(f'vocabulary of {size}: {" ".join(str(error).split()).rpartition("] ")[2]}') from error
  return model.getvalue()


_STRETCH, _LONG = 4096, 2**20  # characters of a sentence to train on, and of what is segmented at once


def _stretches(text: str, size: int) -> Iterator[str]:
  """The text in stretches of at most `size` characters, of whole lines where lines are no longer than that."""
  start = 0
  while start < len(text):
    stop = start + size
    if stop < len(text):
      stop = text.rfind('\n', start, stop) + 1 or stop
    yield text[start:stop]
    start = stop


@dataclasses.dataclass(frozen=True)
class Bytes:
  """Ids 0..255 are the bytes, then bos, eos and pad."""
  size: int = 259
  bos: int = 256
  eos: int = 257
  pad: int = 258
  digest: str = hashlib.sha256(b'bytes 0..255, bos 256, eos 257, pad 258').hexdigest()
  model: bytes = b''

  @functools.cached_property
  def byte_lengths(self) -> np.ndarray:
    return (np.arange(self.size) < 256).astype(np.int32)

  def encode(self, text: str | bytes) -> np.ndarray:
    return np.frombuffer(_bytes(text), np.uint8).astype(np.int32)

  def decode(self, ids: Sequence[int]) -> bytes:
    ids = np.asarray(ids, np.int64)
    return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes()

  def text(self, ids: Sequence[int]) -> str:
    return self.decode(ids).decode('utf-8', errors='replace')


class SentencePiece:
  """A trained model, read as a fixed table of id -> bytes.

  The model's own normaliser (dummy prefix, squeezed spaces, NFKC) loses what it changes, so it is switched off: the model then
  segments the text as it is, and bytes it cannot hold (not UTF-8, U+2581) are spelled with its 256 pieces <0x00>..<0xFF>.
  bos, eos and pad are the model's; those it lacks are appended after its last id.

  Args:
    model: the bytes of the model file.

  Raises:
    BadInput: they are no model, or one without byte pieces.
  """

  def __init__(self, model: bytes):
    self.model = model
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_NORMALISER)
    except RuntimeError as error:
      raise BadInput("not a SentencePiece model; give 'bytes' or the file that SentencePieceTrainer wrote") from error
    pieces = [self._model.id_to_piece(i) for i in range(self._model.get_piece_size())]
    bytes_at = {int(piece[1:-1], 16): i for i, piece in enumerate(pieces) if self._model.is_byte(i)}
    if len(bytes_at) < 256:
      raise BadInput("has no byte pieces, so it loses characters it does not know; train it with byte_fallback=True, "
                     "normalization_rule_name='identity', remove_extra_whitespaces=False, add_dummy_prefix=False")
    self._bytes_at = [bytes_at[b] for b in range(256)]
    self._strings = [piece.replace(_SPACE, ' ').encode() for piece in pieces]
    for b, i in bytes_at.items():
      self._strings[i] = bytes([b])
    for i in range(len(pieces)):
      if self._model.is_control(i) or self._model.is_unknown(i):
        self._strings[i] = b''
    special = []
    for i in (self._model.bos_id(), self._model.eos_id(), self._model.pad_id()):
      special.append(i if i >= 0 else len(self._strings))
      self._strings[special[-1]:special[-1] + 1] = [b'']  # in place, or one more
    self.bos, self.eos, self.pad = special
    self.size = len(self._strings)
    self.byte_lengths = np.array([len(string) for string in self._strings], np.int32)
    self.digest = hashlib.sha256(model + f'bos {self.bos}, eos {self.eos}, pad {self.pad}'.encode()).hexdigest()

  def encode(self, text: str | bytes) -> np.ndarray:
    text = _bytes(text).decode('utf-8', errors='surrogateescape')
    parts = [text] if text.isascii() else _FOREIGN.split(text)
    ids = []
    for i, part in enumerate(parts):
      for stretch in _stretches(part, _LONG):  # SentencePiece needs some 65 bytes of memory for each of text
        ids += self._spell(stretch) if i % 2 else self._segment(stretch)
    return np.array(ids, np.int32)

  def decode(self, ids: Sequence[int]) -> bytes:
    return b''.join(self._strings[i] for i in np.asarray(ids, np.int64).tolist() if 0 <= i < self.size)

  def text(self, ids: Sequence[int]) -> str:
    return self.decode(ids).decode('utf-8', errors='replace')

  def _segment(self, part: str) -> list[int]:
    """The model's own ids, checked: should it change the text after all, the text is spelled."""
    ids = self._model.encode(part)
    return ids if b''.join(map(self._strings.__getitem__, ids)) == part.encode() else self._spell(part)

  def _spell(self, part: str) -> list[int]:
    return [self._bytes_at[b] for b in part.encode('utf-8', errors='surrogateescape')]


# SentencePiece writes a space as U+2581 inside its pieces, so a U+2581 of the text is foreign to it, as are bytes that are not
# UTF-8, which 'surrogateescape' shows as U+DC80..U+DCFF. The group keeps them: odd parts of a split are foreign.
_SPACE = '\u2581'
_FOREIGN = re.compile('([\u2581\udc80-\udcff]+)')

# Protocol buffers merge when they are concatenated, the last value winning: ModelProto.normalizer_spec (field 3) with
# precompiled_charsmap (2) empty, add_dummy_prefix (3) and remove_extra_whitespaces (4) false.
_NO_NORMALISER = bytes([3 << 3 | 2, 6, 2 << 3 | 2, 0, 3 << 3, 0, 4 << 3, 0])


def _bytes(text: str | bytes) -> bytes:
  return text.encode('utf-8', errors='surrogatepass') if isinstance(text, str) else bytes(text)


def decodable(config: Config, tokens) -> np.ndarray:
  """bool[V]: ids that a decoder may emit, whatever stands for bytes, and eos."""
  allowed_V = byte_lengths(config, tokens) > 0
  allowed_V[tokens.eos] = True
  return allowed_V


def check_vocabulary(config: Config, tokens) -> None:
  if config.model.vocab < tokens.size:
    raise BadInput(f'config.model.vocab={config.model.vocab}: the tokenizer {config.data.tokenizer} has {tokens.size} ids; set at least that')


def byte_lengths(config: Config, tokens) -> np.ndarray:
  """int32[V]: the bytes each id stands for, 0 for rows of the embedding past the tokenizer's ids."""
  return np.pad(tokens.byte_lengths, (0, config.model.vocab - tokens.size))
