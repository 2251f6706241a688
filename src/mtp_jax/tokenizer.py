"""Text to token ids and back without loss: raw bytes, or a SentencePiece model (Kudo and Richardson
2018, arXiv:1808.06226).

Every id stands for a fixed string of bytes (bos, eos and pad for the empty one), so for any bytes x

    decode(encode(x)) == x,    decode(a + b) == decode(a) + decode(b),    sum(byte_lengths[encode(x)]) == len(x).

Bits per byte are therefore exact with any tokenizer. Ids are int32[n], n the number of tokens;
there is no <unk>.
"""
import dataclasses
import functools
import hashlib
import io
import os
import re
import stat
import typing
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece

from mtp_jax.config import BadInput, Config, expanded


class Tokenizer(typing.Protocol):
  """What both tokenizers offer.

  size: number of ids, bos, eos and pad included.
  digest: sha256 of what the mapping depends on.
  byte_lengths: int32[size], how many bytes each id stands for.
  model: content of the model file; b'' for bytes.
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
    """The exact bytes; bos, eos, pad and numbers that are not ids give none."""

  def text(self, ids: Sequence[int]) -> str:
    """`decode` for display, with U+FFFD for what is not UTF-8."""


def load(name: str, where: str = 'config.data.tokenizer') -> Tokenizer:
  """The tokenizer of a name.

  Args:
    name: 'bytes', or the path of a SentencePiece model file.
    where: the flag or field that gave it, for messages.

  Raises:
    BadInput: the file is missing, is not a SentencePiece model, or loses bytes.
  """
  if name == 'bytes':
    return Bytes()
  path = expanded(name, where)
  try:
    if stat.S_IFMT(os.stat(path).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):  # whose end may never come
      raise BadInput("is no regular file; give 'bytes' or the path of a SentencePiece model")
    with open(path, 'rb') as file:
      return SentencePiece(file.read())
  except OSError as error:
    raise BadInput(f"{where}={name!r}: {error.strerror}; "
                   "give 'bytes' or the path of a SentencePiece model") from error
  except BadInput as error:
    raise BadInput(f'{where}={name!r}: {error}') from error


def train(documents: Iterable[bytes], size: int, kind: str = 'bpe') -> bytes:
  """The content of a new SentencePiece model file, for code as well as prose.

  Nothing is normalised; spaces and tabs are kept, and several spaces may be one piece; every digit
  is a piece of its own; all bytes have pieces, so that `SentencePiece` gives every byte back.

  Args:
    documents: the sample; what is not UTF-8 in it is read as U+FFFD.
    size: of the vocabulary, bos, eos and pad included.
    kind: 'bpe' or 'unigram'.

  Raises:
    BadInput: the sample is too small for that many pieces, or size too small for the 256 bytes.
  """
  model = io.BytesIO()
  texts = (document.decode('utf-8', errors='replace').replace('\0', ' ') for document in documents)
  sentences = (chunk for text in texts for chunk in _chunks(text, _SENTENCE))
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=model, model_type=kind, vocab_size=size,
        byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
        normalization_rule_name='identity', remove_extra_whitespaces=False, add_dummy_prefix=False,
        pad_id=3, max_sentence_length=8 * _SENTENCE, train_extremely_large_corpus=True, minloglevel=3)
  except RuntimeError as error:
    raise BadInput(f'vocabulary of {size}: {_bound(str(error))}') from error
  return model.getvalue()


def _bound(text: str) -> str:
  """The words of SentencePiece about a vocabulary that is too small or too large, without its flags."""
  if least := re.search(r'required_chars\. \d+ vs (\d+)', text):
    return f'too small for the characters of the sample; give at least {least[1]}'
  if most := re.search(r'set it to a value <= (\d+)', text):
    return f'too large for the sample; give at most {most[1]}, or more text'
  return ' '.join(text.split()).rpartition('] ')[2]


_SENTENCE = 4096  # characters of a sentence to train on
_SEGMENTED = 2**20  # characters segmented at once; SentencePiece needs about 65 bytes of memory for each


def _chunks(text: str, size: int) -> Iterator[str]:
  """The text in chunks of at most `size` characters, of whole lines where these are not longer."""
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
    return np.frombuffer(as_bytes(text), np.uint8).astype(np.int32)

  def decode(self, ids: Sequence[int]) -> bytes:
    ids = np.asarray(ids, np.int64)
    return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes()

  def text(self, ids: Sequence[int]) -> str:
    return self.decode(ids).decode('utf-8', errors='replace')


class SentencePiece:
  """A trained model, used as a fixed table of id -> bytes.

  The model's normaliser (dummy prefix, merged spaces, NFKC) would lose information, so it is
  switched off: the model segments the text as it is. What its pieces cannot hold (bytes that are
  not UTF-8, U+2581) is encoded byte by byte with its 256 pieces <0x00>..<0xFF>. bos, eos and pad
  are the model's; those it lacks get new ids after its last one.

  Args:
    model: content of the model file.

  Raises:
    BadInput: it is not a model, or has no byte pieces.
  """

  def __init__(self, model: bytes):
    self.model = model
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_NORMALISER)
      pieces = [self._model.id_to_piece(i) for i in range(self._model.get_piece_size())]
    except (RuntimeError, UnicodeDecodeError) as error:
      raise BadInput("not a SentencePiece model; "
                     "give 'bytes' or the file that SentencePieceTrainer wrote") from error
    byte_ids = {int(piece[1:-1], 16): i for i, piece in enumerate(pieces) if self._model.is_byte(i)}
    if len(byte_ids) < 256:
      raise BadInput("has no byte pieces, so it loses characters it does not know; "
                     "train it with byte_fallback=True, normalization_rule_name='identity', "
                     "remove_extra_whitespaces=False, add_dummy_prefix=False")
    self._byte_ids = [byte_ids[b] for b in range(256)]
    self._strings = [piece.replace(_SPACE, ' ').encode() for piece in pieces]
    for b, i in byte_ids.items():
      self._strings[i] = bytes([b])
    for i in range(len(pieces)):
      if self._model.is_control(i) or self._model.is_unknown(i):
        self._strings[i] = b''
    special = []
    for i in (self._model.bos_id(), self._model.eos_id(), self._model.pad_id()):
      if i < 0:
        i = len(self._strings)
        self._strings.append(b'')
      self._strings[i] = b''
      special.append(i)
    self.bos, self.eos, self.pad = special
    self.size = len(self._strings)
    self.byte_lengths = np.array([len(string) for string in self._strings], np.int32)
    special_ids = f'bos {self.bos}, eos {self.eos}, pad {self.pad}'
    self.digest = hashlib.sha256(model + special_ids.encode()).hexdigest()

  def encode(self, text: str | bytes) -> np.ndarray:
    text = as_bytes(text).decode('utf-8', errors='surrogateescape')
    parts = [text] if text.isascii() else _FOREIGN.split(text)
    ids = []
    for i, part in enumerate(parts):
      encode = self._encode_bytes if i % 2 else self._segment
      for chunk in _chunks(part, _SEGMENTED):
        ids += encode(chunk)
    return np.array(ids, np.int32)

  def decode(self, ids: Sequence[int]) -> bytes:
    return b''.join(self._strings[i] for i in np.asarray(ids, np.int64).tolist() if 0 <= i < self.size)

  def text(self, ids: Sequence[int]) -> str:
    return self.decode(ids).decode('utf-8', errors='replace')

  def _segment(self, text: str) -> list[int]:
    """The model's ids; if the model changed the text after all, those of its bytes."""
    ids = self._model.encode(text)
    intact = b''.join(map(self._strings.__getitem__, ids)) == text.encode()
    return ids if intact else self._encode_bytes(text)

  def _encode_bytes(self, text: str) -> list[int]:
    return [self._byte_ids[b] for b in text.encode('utf-8', errors='surrogateescape')]


# SentencePiece writes a space as U+2581 inside its pieces, so they cannot hold a U+2581 of the text,
# nor bytes that are not UTF-8, which 'surrogateescape' turns into U+DC80..U+DCFF. Because of the
# group, a split has these as every second part.
_SPACE = '\u2581'
_FOREIGN = re.compile('([\u2581\udc80-\udcff]+)')

# Concatenated protocol buffers are merged, and the last value counts: ModelProto.normalizer_spec
# (field 3) with precompiled_charsmap (2) empty, add_dummy_prefix (3) and remove_extra_whitespaces (4)
# false.
_NO_NORMALISER = bytes([3 << 3 | 2, 6, 2 << 3 | 2, 0, 3 << 3, 0, 4 << 3, 0])


def as_bytes(text: str | bytes) -> bytes:
  """UTF-8 of a text, lone surrogates included; bytes as they are."""
  return text.encode('utf-8', errors='surrogatepass') if isinstance(text, str) else bytes(text)


def decodable(config: Config, tokens) -> np.ndarray:
  """bool[V]: the ids that may be generated: those that stand for bytes, and eos."""
  allowed_V = byte_lengths(config, tokens) > 0
  allowed_V[tokens.eos] = True
  return allowed_V


def check_vocabulary(config: Config, tokens) -> None:
  """Raises BadInput if the model has fewer ids than the tokenizer."""
  if config.model.vocab < tokens.size:
    raise BadInput(f'config.model.vocab={config.model.vocab}: the tokenizer {config.data.tokenizer} has '
                   f'{tokens.size} ids; set at least that')


def byte_lengths(config: Config, tokens) -> np.ndarray:
  """int32[V]: how many bytes each id stands for; 0 for ids that only the embedding has."""
  return np.pad(tokens.byte_lengths, (0, config.model.vocab - tokens.size))
