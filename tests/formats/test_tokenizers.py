"""tokenizer.json gives the ids that the tokenizer here gives, of a corpus of texts that are hard to split."""
import json
import pathlib

import numpy as np
import pytest

from mtp_jax import tokenizer
from mtp_jax.formats.tokenizers import tokenizer_files

STDLIB = pathlib.Path(json.__file__).parents[1]
NASTY = [
    '', ' ', '  ', '\n', '\n\n\n', '\t\t', '\r\n', ' a', 'a ', '  a  b  ', 'a\u00a0b', '\u3000', '\u200b\u200d',
    '\ufeff x',
    'é', 'e\u0301', '\u1e9e', 'ﬁ', '①②', 'ÀÉÎ', 'Ω≈ç√∫', '你好，世界', 'こんにちは', '한국어', 'สวัสดี', 'हिन्दी', 'مرحبا',
    '👩‍👩‍👧‍👦', '🏳️‍🌈', '\U0010ffff', '\x00', 'a\x00b', '\x1b[0m', '\x7f',
    '1234567890', '3.14159e-10', '0xdeadBEEF', 'x' * 300,
    ' ' * 70, 'ab' * 200, '-' * 80, '#' * 79 + '\n', 'def f(x):\n    return x  # y\n',
    '"""doc"""', "'\\''", '\\n\\t\\\\',
    '<pad', '<|endoftext|>', '[INST]', '<0x41>', '&amp;', 'http://a.b/c?d=e&f=g#h', 'camelCaseName', 'snake_case_name',
    'SCREAMING', 'don\'t I\'ll', '«quotes»', '“q” ‘r’', '…', '—–-', '\u2028\u2029', '\ud7ff\ue000', 'naïve café',
    'Straße',
    *((STDLIB / name).read_text()[start:start + 400] for name in ('ast.py', 'heapq.py')
      for start in range(0, 8000, 800)),
]


def models(sentencepiece_model) -> dict:
  text = [(STDLIB / name).read_bytes() for name in ('ast.py', 'bisect.py', 'calendar.py')]
  return {'bytes': tokenizer.load('bytes'), 'bpe': tokenizer.SentencePiece(sentencepiece_model),
          'unigram': tokenizer.SentencePiece(tokenizer.train(text, 500, 'unigram'))}


@pytest.mark.parametrize('kind', ['bytes', 'bpe', 'unigram'])
def test_ids_and_texts_are_the_same(tmp_path, sentencepiece_model, kind):
  package = pytest.importorskip('tokenizers')
  ours = models(sentencepiece_model)[kind]
  for name, content in tokenizer_files(ours, 64).items():
    (tmp_path / name).write_bytes(content)
  theirs = package.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  wrong = {text: (theirs.encode(text).ids[1:], ours.encode(text).tolist()) for text in NASTY
           if theirs.encode(text).ids != [ours.bos, *ours.encode(text)]}
  if kind == 'unigram':  # two ways to split of the same score, such as 'a a a' with pieces 'a ' and ' a'
    scores = dict(enumerate(score for _, score in json.loads(theirs.to_str())['model']['vocab']))
    total = lambda ids: sum(scores[i] for i in ids)
    wrong = {text: both for text, both in wrong.items() if abs(total(both[0]) - total(both[1])) > 1e-4}
  assert not wrong
  for text in NASTY:
    assert theirs.decode(theirs.encode(text).ids) == text
  assert theirs.get_vocab_size() == ours.size


def test_every_byte_has_a_character_of_its_own_and_its_id():
  files = tokenizer_files(tokenizer.load('bytes'), 64)
  vocabulary = json.loads(files['tokenizer.json'])['model']['vocab']
  assert sorted(vocabulary.values()) == list(range(256)) and vocabulary['a'] == 97 and vocabulary['Ġ'] == 32
  assert set(files) == {'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json'}
  special = json.loads(files['tokenizer.json'])['added_tokens']
  assert [(token['id'], token['content']) for token in special] == [(256, '<s>'), (257, '</s>'), (258, '<pad>')]


def test_a_sentencepiece_model_comes_along_with_its_pieces(sentencepiece_model):
  ours = tokenizer.SentencePiece(sentencepiece_model)
  files = tokenizer_files(ours, 64)
  assert files['tokenizer.model'] == sentencepiece_model
  content = json.loads(files['tokenizer.json'])
  assert len(content['model']['vocab']) == ours.size and content['model']['byte_fallback']
  pieces = content['model']['vocab']
  assert all(a + b in pieces for a, b in content['model']['merges']) and len(content['model']['merges']) >= 100
  assert np.array_equal(sorted(pieces.values()), np.arange(ours.size))


@pytest.mark.filterwarnings('ignore')  # those of other packages
@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
def test_transformers_finds_the_tokenizer_and_its_special_tokens(tmp_path, sentencepiece_model, kind):
  transformers = pytest.importorskip('transformers')
  ours = models(sentencepiece_model)[kind]
  for name, content in tokenizer_files(ours, 64).items():
    (tmp_path / name).write_bytes(content)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in ('def f(x):\n  return x', '  é 你好'):
    assert theirs(text)['input_ids'] == [ours.bos, *ours.encode(text)]
    assert theirs.decode(theirs(text)['input_ids'], skip_special_tokens=True) == text
  assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos, ours.eos, ours.pad)
