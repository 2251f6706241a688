"""A tokenizer as tokenizer.json and the files beside it, as transformers, vLLM and SGLang read
them.

Bytes become a byte-level BPE without merges, a SentencePiece model a BPE whose merges are those of
its pieces, best score first, or a unigram model; both fall back on bytes. Nothing is normalised, no
space is put before the text, and a text begins with bos, as here. Two things differ: `<s>` in a
text is the special token there, and U+2581 is a space.
"""
import json

import sentencepiece

from mtp_jax.config import BadInput
from mtp_jax.tokenizer import Tokenizer

NAMES = {'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '<pad>'}
SPACE = '\u2581'
NEVER = -1e5  # score of a piece that only falling back on bytes may use: '<0x41>' in a text is no A
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType of SentencePiece


def tokenizer_files(tokens: Tokenizer, length: int) -> dict[str, bytes]:
  """Files by name, SentencePiece's own model among them.

  Args:
    length: of a text at most, as config.data.length.

  Raises:
    BadInput: a SentencePiece model is of another kind than BPE or unigram.
  """
  ids = {'bos_token': tokens.bos, 'eos_token': tokens.eos, 'pad_token': tokens.pad}
  names, parts = dict(NAMES), _of_bytes()
  if tokens.model:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokens.model)
    size = processor.get_piece_size()
    names |= {name: processor.id_to_piece(i) for name, i in ids.items() if i < size}
    parts = _of_sentencepiece(tokens.model, processor)
  content = {'version': '1.0', 'truncation': None, 'padding': None,
             'added_tokens': [_special(ids[name], names[name]) for name in sorted(ids,
                                                                                  key=ids.get)],
             'post_processor': _with_bos(names['bos_token'], tokens.bos), **parts}
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', **names, 'model_max_length': length,
            'clean_up_tokenization_spaces': False}
  files = {'tokenizer.json': content, 'tokenizer_config.json': config,
           'special_tokens_map.json': names}
  encoded = lambda value: (json.dumps(value, ensure_ascii=False, indent=1) + '\n').encode()
  written = {name: encoded(value) for name, value in files.items()}
  return written | ({'tokenizer.model': tokens.model} if tokens.model else {})


def _special(i: int, name: str) -> dict:
  return {'id': i, 'content': name, 'single_word': False, 'lstrip': False, 'rstrip': False,
          'normalized': False,
          'special': True}


def _with_bos(name: str, i: int) -> dict:
  bos, text = {'SpecialToken': {'id': name, 'type_id': 0}}, lambda name: {'Sequence': {'id': name,
                                                                                       'type_id': 0}}
  return {'type': 'TemplateProcessing', 'single': [bos, text('A')], 'pair': [bos, text('A'), bos,
                                                                             text('B')],
          'special_tokens': {name: {'id': name, 'ids': [i], 'tokens': [name]}}}


def byte_characters() -> list[str]:
  """The character that stands for each byte in byte-level BPE (GPT-2): itself where it can be
  printed, else one from U+0100 on.
  """
  printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'),
                                                                                      ord('ÿ') + 1)]
  others = iter(range(256, 512))
  return [chr(b if b in printable else next(others)) for b in range(256)]


def _of_bytes() -> dict:
  vocabulary = {character: b for b, character in enumerate(byte_characters())}
  level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
  return {'normalizer': None, 'pre_tokenizer': level, 'decoder': level, 'model': _bpe(vocabulary,
                                                                                      [], None,
                                                                                      False)}


def _bpe(vocabulary: dict[str, int], merges: list, unknown: str | None,
         byte_fallback: bool) -> dict:
  return {'type': 'BPE', 'dropout': None, 'unk_token': unknown, 'continuing_subword_prefix': None,
          'end_of_word_suffix': None, 'fuse_unk': byte_fallback, 'byte_fallback': byte_fallback,
          'ignore_merges': False, 'vocab': vocabulary, 'merges': merges}


def _of_sentencepiece(proto: bytes, model) -> dict:
  kind = _field(_field(proto, 2), 3) or UNIGRAM
  pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
  scores = [model.get_score(i) for i in range(len(pieces))]
  unknown = pieces[model.unk_id()]
  if kind == BPE:
    plain = {piece: i for i, piece in enumerate(pieces)
             if not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i))}
    part = _bpe({piece: i for i, piece in enumerate(pieces)}, _merges(plain, scores), unknown, True)
  elif kind == UNIGRAM:
    scores = [NEVER if model.is_byte(i) else score for i, score in enumerate(scores)]
    part = {'type': 'Unigram', 'unk_id': model.unk_id(), 'vocab': list(zip(pieces, scores)),
            'byte_fallback': True}
  else:
    raise BadInput('tokenizer: its SentencePiece model is neither BPE nor unigram, which tokenizer.json can hold')
  return {'normalizer': {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE},
          'pre_tokenizer': None,
          'decoder': {'type': 'Sequence', 'decoders': [
              {'type': 'Replace', 'pattern': {'String': SPACE}, 'content': ' '},
              {'type': 'ByteFallback'},
              {'type': 'Fuse'}]},
          'model': part}


def _merges(pieces: dict[str, int], scores: list[float]) -> list[list[str]]:
  """All pairs of pieces that make a piece, in the order in which SentencePiece merges them."""
  found = []
  for piece, i in pieces.items():
    splits = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
    pairs = [(a, b) for a, b in splits if a in pieces and b in pieces]
    found += [(-scores[i], pieces[a], pieces[b], [a, b]) for a, b in pairs]
  return [pair for *_, pair in sorted(found)]


def _field(message: bytes, number: int):
  """The last value of a field of a protocol buffer: an int, bytes, or b'' if it is not there."""
  value, at = b'', 0

  def varint() -> int:
    nonlocal at
    total = shift = 0
    while True:
      byte = message[at]
      at, total, shift = at + 1, total | (byte & 127) << shift, shift + 7
      if byte < 128:
        return total

  while at < len(message):
    key = varint()
    kind = key & 7
    if kind == 0:
      found = varint()
    else:
      size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
      found, at = message[at:at + size], at + size
    value = found if key >> 3 == number else value
  return value
