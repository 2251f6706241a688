"""Both tokenizers give every byte back. SentencePiece models are trained here, on a few files."""
import io
import pathlib
import re
import sysconfig

import hypothesis
import numpy as np
import pytest
import sentencepiece
from hypothesis import strategies as st

from mtp_jax import tokenizer
from mtp_jax.config import BadInput

FITTING = dict(byte_fallback=True, normalization_rule_name='identity', remove_extra_whitespaces=False,
               add_dummy_prefix=False)
STDLIB = pathlib.Path(sysconfig.get_path('stdlib'))
FILES = [(STDLIB / name).read_bytes() for name in ('ast.py', 'bisect.py', 'calendar.py')]

NASTY = {
    'empty': b'',
    'nul': b'a\0b\0',
    'line ends': b'a\r\nb\rc\n\n',
    'tabs': b'\tif x:\t\t\n',
    'runs of spaces': b'   a    b  ',
    'one space': b' ',
    'the space of SentencePiece': 'a\u2581\u2581b \u2581'.encode(),
    'not UTF-8': b'caf\xe9 \xff\xfe ok',
    'a cut character': 'naïve 🙂'.encode()[:-1],
    'lone surrogates': b'\xed\xa0\x80 \xed\xb3\xbf',
    'overlong': b'\xc0\x80\xf8\x88\x80\x80\x80',
    'emoji': '👩\u200d👩\u200d👧 🙂'.encode(),
    'what NFKC changes': 'ﬁ Ａ ½ e\u0301 \u00a0\u3000\ufeff\ufffd'.encode(),
    'spelled pieces': b'<0x41><s></s><unk><pad>',
    'all bytes': bytes(range(256)) * 2,
    'code': b'def f(self, x):\n  return x + 1\n',
}


def train(path: pathlib.Path, **options) -> pathlib.Path:
  lines = [line for content in FILES for line in content.decode().splitlines()]
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model,
                                           minloglevel=2, vocab_size=400, **options)
  path.write_bytes(model.getvalue())
  return path


def ours(path: pathlib.Path, kind: str) -> pathlib.Path:
  path.write_bytes(tokenizer.train(FILES, 600, kind))
  return path


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  folder = tmp_path_factory.mktemp('models')
  return {
      'fitting': train(folder / 'fitting', **FITTING),
      'as shipped': train(folder / 'as shipped', model_type='bpe', byte_fallback=True, pad_id=3, bos_id=-1,
                          user_defined_symbols=['def f', '\u2581x']),
      'same size': train(folder / 'same size', model_type='bpe', **FITTING),
      'bos in the text': train(folder / 'bos in the text', user_defined_symbols=['<s>'], **FITTING),
      'bpe of ours': ours(folder / 'bpe of ours', 'bpe'),
      'unigram of ours': ours(folder / 'unigram of ours', 'unigram'),
      'no bytes': train(folder / 'no bytes', hard_vocab_limit=False),
  }


@pytest.fixture(scope='module', params=[
    'bytes', 'fitting', 'as shipped', 'bos in the text', 'bpe of ours', 'unigram of ours'])
def t(request, models):
  return tokenizer.load(str(models.get(request.param, 'bytes')))


def test_bytes_are_their_own_ids():
  t = tokenizer.load('bytes')
  assert (t.size, t.bos, t.eos, t.pad) == (259, 256, 257, 258)
  assert t.encode('aé\n').tolist() == [97, 0xc3, 0xa9, 10]
  assert t.encode('').dtype == t.encode('a').dtype == np.int32
  assert t.decode([256, 104, 105, 257, 258, 258, -1, 259]) == b'hi'
  assert t.text([0xc3, 0xa9, 0xff]) == 'é\ufffd'


@pytest.mark.parametrize('text', NASTY.values(), ids=NASTY)
def test_nasty_bytes_come_back(t, text):
  ids = t.encode(text)
  assert ids.dtype == np.int32 and t.decode(ids) == text
  assert t.byte_lengths[ids].sum() == len(text)
  assert not set(ids.tolist()) & {t.bos, t.eos, t.pad}


@hypothesis.settings(deadline=None, max_examples=200, database=None)
@hypothesis.given(text=st.one_of(
    st.binary(), st.text().map(str.encode), st.lists(st.sampled_from(list(NASTY.values()))).map(b''.join)))
def test_any_bytes_come_back(t, text):
  ids = t.encode(text)
  assert t.decode(ids) == text and t.byte_lengths[ids].sum() == len(text)


def test_strings_encode_as_their_utf8(t):
  assert t.encode('naïve 🙂').tolist() == t.encode('naïve 🙂'.encode()).tolist()
  assert t.text(t.encode('naïve 🙂')) == 'naïve 🙂'
  assert t.text(t.encode(b'a\xffb')) == 'a\ufffdb'
  assert t.decode(t.encode('\udc80')) == b'\xed\xb2\x80'


def test_special_ids_differ_and_stand_for_no_bytes(t):
  special = [t.bos, t.eos, t.pad]
  assert len(set(special)) == 3 and max(special) < t.size == len(t.byte_lengths)
  assert t.byte_lengths.dtype == np.int32 and not t.byte_lengths[special].any()
  inside = t.encode('in the middle')
  assert t.decode([t.bos, *inside, t.eos, t.pad, -1, -9, t.size, 10**9]) == b'in the middle'


def test_every_id_decodes_to_the_bytes_it_counts(t):
  assert [len(t.decode([i])) for i in range(t.size)] == t.byte_lengths.tolist()


def test_special_ids_are_those_of_the_model_or_follow_it(models):
  fitting, shipped = (tokenizer.load(str(models[name])) for name in ('fitting', 'as shipped'))
  assert (fitting.bos, fitting.eos, fitting.pad, fitting.size) == (1, 2, 400, 401)
  assert (shipped.bos, shipped.eos, shipped.pad, shipped.size) == (400, 2, 3, 401)


def test_a_fitting_model_segments_as_sentencepiece_does(models):
  text = (STDLIB / 'bisect.py').read_text(encoding='utf-8')
  plain = sentencepiece.SentencePieceProcessor(model_file=str(models['fitting']))
  assert tokenizer.load(str(models['fitting'])).encode(text).tolist() == plain.encode(text)
  assert len(plain.encode(text)) < len(text)


def test_the_normaliser_of_a_model_is_switched_off(models):
  t = tokenizer.load(str(models['as shipped']))
  pieces = [t.decode([i]) for i in t.encode('  return  self ﬁ')]
  assert pieces[-3:] == [b'\xef', b'\xac', b'\x81'] and len(pieces) < len('  return  self ﬁ'.encode()) - 4


def test_a_model_that_still_changes_text_gives_it_back(models, monkeypatch):
  monkeypatch.setattr(tokenizer, '_NO_NORMALISER', b'')
  t = tokenizer.load(str(models['as shipped']))
  assert all(t.decode(t.encode(text)) == text for text in NASTY.values())


def test_digests_tell_tokenizers_apart(models):
  names = ['bytes', *(str(models[name]) for name in ('fitting', 'same size', 'as shipped', 'bos in the text'))]
  assert len({tokenizer.load(name).digest for name in names}) == 5
  assert all(tokenizer.load(name).digest == tokenizer.load(name).digest for name in names)


def test_a_model_without_byte_pieces_is_refused_with_the_way_to_train_one(models):
  with pytest.raises(BadInput, match=r"^config\.data\.tokenizer='.*no bytes': .*byte_fallback=True.*identity.*$"):
    tokenizer.load(str(models['no bytes']))


def test_a_missing_file_is_one_line_with_a_fix(tmp_path):
  message = r"^config\.data\.tokenizer='.*spm\.model': No such file or directory; give 'bytes' or .*$"
  with pytest.raises(BadInput, match=message):
    tokenizer.load(str(tmp_path / 'spm.model'))
  with pytest.raises(BadInput, match='directory'):
    tokenizer.load(str(tmp_path))


@pytest.mark.parametrize('content', [b'', b'hello', bytes(100)], ids=['empty', 'text', 'zeros'])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
  (tmp_path / 'model').write_bytes(content)
  with pytest.raises(BadInput, match=r'^config\.data\.tokenizer=.*: not a SentencePiece model; give'):
    tokenizer.load(str(tmp_path / 'model'))


def test_half_a_model_is_refused(models, tmp_path):
  whole = models['fitting'].read_bytes()
  (tmp_path / 'model').write_bytes(whole[:len(whole) // 2])
  with pytest.raises(BadInput):
    tokenizer.load(str(tmp_path / 'model'))


def test_a_damaged_model_is_refused_in_one_line_or_still_gives_every_byte_back(models):
  """Some bytes of a model are others, or its end is missing. A piece that changed is another piece, as long as no
  byte of a text is lost.
  """
  whole, random, refused = models['fitting'].read_bytes(), np.random.default_rng(0), 0
  for number in range(600):
    damaged = bytearray(whole)
    for place in random.integers(len(whole), size=1 + number % 6):
      damaged[place] = random.integers(256)
    if number % 5 == 0:
      del damaged[random.integers(len(whole)):]
    try:
      t = tokenizer.SentencePiece(bytes(damaged))
    except BadInput as error:
      assert len(str(error).splitlines()) == 1
      refused += 1
      continue
    for text in (NASTY['code'], NASTY['not UTF-8'], NASTY['lone surrogates'], NASTY['emoji']):
      ids = t.encode(text)
      assert t.decode(ids) == text and t.byte_lengths[ids].sum() == len(text)
  assert 100 < refused < 600


@pytest.mark.parametrize('name', ['', '.', 'a\0b', '\udcff', '\ud800', 'x' * 300, '~nobody-here/x', 'a\nb'])
def test_a_name_of_no_model_is_refused_in_one_line(name):
  with pytest.raises(BadInput, match='^config.data.tokenizer=') as raised:
    tokenizer.load(name)
  assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_a_model_of_ours_is_made_for_code(models, kind):
  t = tokenizer.load(str(models[f'{kind} of ours']))
  pieces = [t.decode([i]) for i in range(t.size)]
  assert t.size == 600 and (t.bos, t.eos, t.pad) == (1, 2, 3)
  assert not [piece for piece in pieces if len(piece) > 1 and any(48 <= b < 58 for b in piece)]  # digits stand alone
  assert b'    ' in pieces and any(b'\n' in piece for piece in pieces)
  plain = sentencepiece.SentencePieceProcessor(model_file=str(models[f'{kind} of ours']))
  text = (STDLIB / 'heapq.py').read_text(encoding='utf-8')
  assert t.encode(text).tolist() == plain.encode(text) and len(text) / len(t.encode(text)) > 1.5


def test_long_lines_are_trained_on_too():
  text = 'αβγδ' * 40_960  # one line; each chunk of it has more bytes than SentencePiece takes by default
  model = tokenizer.SentencePiece(tokenizer.train([text.encode()] * 3 + [bytes(range(32, 127))] * 20, 380))
  assert any('αβγδ'.encode() in string for string in model._strings)


@pytest.mark.parametrize('size, fix', [
    (100, 'too small for the characters of the sample; give at least '),
    (262, 'too small for the characters of the sample; give at least '),
    (100_000, 'too large for the sample; give at most ')])
def test_a_vocabulary_that_does_not_fit_its_sample_names_one_that_does(size, fix):
  texts = [b'a few words ' * 9] * 20
  with pytest.raises(BadInput, match=rf'^vocabulary of {size}: {fix}(\d+)') as raised:
    tokenizer.train(texts, size)
  assert '--' not in str(raised.value)
  bound = int(re.search(rf'{fix}(\d+)', str(raised.value))[1])
  assert tokenizer.SentencePiece(tokenizer.train(texts, bound)).size == bound
