"""A prepared set is the same bytes however it came about; nothing is lost, repeated or made up."""
import dataclasses
import gzip
import itertools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import threading
import time

import kills
import numpy as np
import pytest

from mtp_jax import tokenizer
from mtp_jax.config import BadInput
from mtp_jax.data import prepare as preparing
from mtp_jax.data.files import files, name_hash
from mtp_jax.data.folder import Folder
from mtp_jax.data.parts import Options, Preparation
from mtp_jax.data.prepare import prepare, prepare_once
from mtp_jax.data.prepared_set import open_set
from mtp_jax.data.records import Reading
from mtp_jax.data.train_tokenizer import sample

BYTES = tokenizer.load('bytes')


def texts(stream) -> list[bytes]:
  return [BYTES.decode(stream.document(i)) for i in range(stream.documents)]


def everything(prepared) -> list[bytes]:
  return sorted(texts(prepared.train) + texts(prepared.validation))


@pytest.fixture
def corpus(tmp_path):
  """200 documents in JSON lines, plain and compressed, and in text files; every one another."""
  folder, rng = tmp_path / 'corpus', random.Random(0)
  folder.mkdir()
  documents = [f'{i} '.encode() + bytes(rng.choices(range(32, 127), k=rng.choice([0, 5, 300]))) for i in range(200)]
  line = lambda text: json.dumps({'text': text.decode()}).encode() + b'\n'
  (folder / 'a.jsonl').write_bytes(b''.join(map(line, documents[:120])))
  (folder / 'b.jsonl.gz').write_bytes(gzip.compress(b''.join(map(line, documents[120:180]))))
  for i, text in enumerate(documents[180:]):
    (folder / f'{i}.txt').write_bytes(text)
  return folder, sorted(documents)


def prepared(folder, output, workers=0, **options):
  return prepare(files((str(folder),), '--input'), BYTES, Options(**{'validation_share': 0.2, 'shard_bytes': 3000, 'bad_share': 1} | options), output, workers, '--input',
                 note=lambda line: None)


def test_every_document_is_there_once_between_bos_and_eos(corpus, tmp_path):
  found = prepared(corpus[0], tmp_path / 'set')
  assert everything(found) == corpus[1] and found.index['records'] == 200 and found.index['bad'] == {}
  for stream in (found.train, found.validation):
    tokens = stream.read(0, stream.tokens)
    starts, ends = np.flatnonzero(tokens == BYTES.bos), np.flatnonzero(tokens == BYTES.eos)
    assert len(starts) == len(ends) == stream.documents and tokens[0] == BYTES.bos and np.array_equal(starts[1:], ends[:-1] + 1)
    assert stream.bytes == len(tokens) - 2 * stream.documents
  assert len(found.train.shards) > 5


@pytest.mark.parametrize('workers', [1, 2, 5])
def test_the_number_of_workers_does_not_show(corpus, tmp_path, workers):
  one, other = (kills.contents(pathlib.Path(prepared(corpus[0], tmp_path / name, n).folder.url)) for name, n in (('one', 0), ('other', workers)))
  assert one == other and {'index.json', 'bad_records.jsonl'} < set(one) and not [name for name in one if 'plan' in name or 'parts' in name]


def test_nor_does_where_the_corpus_lies(corpus, tmp_path):
  shutil.copytree(corpus[0], tmp_path / 'elsewhere' / 'corpus')
  one, other = (kills.contents(pathlib.Path(prepared(folder, tmp_path / name).folder.url))
                for name, folder in (('one', corpus[0]), ('other', tmp_path / 'elsewhere' / 'corpus')))
  assert one == other


def test_a_document_is_held_out_if_the_hash_of_its_name_says_so(tmp_path):
  folder = tmp_path / 'corpus'
  folder.mkdir()
  for i in range(100):
    (folder / f'{i}.txt').write_text(str(i))
  found = prepared(folder, tmp_path / 'set')
  held_out = sorted(str(i).encode() for i in range(100) if name_hash(f'corpus/{i}.txt') < 0.2 * 2**64)
  assert sorted(texts(found.validation)) == held_out and len(held_out) > 10
  order = sorted(range(100), key=lambda i: name_hash(f'corpus/{i}.txt'))
  assert texts(found.train) == [str(i).encode() for i in order if str(i).encode() not in held_out]
  (folder / 'other.txt').write_text('other')
  assert set(texts(prepared(folder, tmp_path / 'more').validation)) - {b'other'} == set(held_out)


@pytest.mark.parametrize('kind', ['text', 'lines'])
def test_the_very_first_document_is_held_out_however_small_the_share(tmp_path, kind):
  (tmp_path / 'in').mkdir()
  for i in range(5):
    (tmp_path / 'in' / f'{i}{".jsonl" if kind == "lines" else ""}').write_text(str(i) if kind == 'text' else f'{{"text": "{i}a"}}\n{{"text": "{i}b"}}\n')
  found = prepared(tmp_path / 'in', tmp_path / 'set', validation_share=1e-9)
  first = min((file.hash, file.name) for file in files((str(tmp_path / 'in'),), ''))[1]
  assert texts(found.validation) == [first.removeprefix('in/').replace('.jsonl', 'a').encode()]
  assert found.train.documents == (4 if kind == 'text' else 9)


@pytest.mark.parametrize('content, share, split', [('', 0.2, 'train'), ('{"text": "one"}', 0.2, 'train'), ('{"text": "one"}\n' * 9, 1 - 1e-9, 'train')])
def test_an_empty_split_is_one_line(tmp_path, content, share, split):
  (tmp_path / 'in.jsonl').write_text(content)
  with pytest.raises(BadInput, match=rf'^--input: of {content.count("one")} records none is left for the {split} split; give at least two documents'):
    prepared(tmp_path / 'in.jsonl', tmp_path / 'set', validation_share=share)


def test_large_vocabularies_take_four_bytes(corpus, tmp_path):
  class Large(tokenizer.Bytes):
    def encode(self, text):
      return super().encode(text) + 65_500
  found = prepare(files((str(corpus[0]),), ''), Large(size=65_800, digest='large'), Options(validation_share=0.2), tmp_path / 'set', 0, '', note=print)
  assert found.index['dtype'] == '<u4' and found.train.read(0, 1000).max() > 65_535
  assert everything_shifted(found) == corpus[1]


def everything_shifted(found) -> list[bytes]:
  return sorted(bytes((stream.document(i) - 65_500).astype(np.uint8)) for stream in (found.train, found.validation) for i in range(stream.documents))


def test_preparing_again_finds_it_done(corpus, tmp_path, monkeypatch):
  before = kills.contents(pathlib.Path(prepared(corpus[0], tmp_path / 'set').folder.url))
  monkeypatch.setattr(preparing, '_tokenize_missing', None)
  assert everything(prepared(corpus[0], tmp_path / 'set')) == corpus[1]
  assert kills.contents(tmp_path / 'set') == before


@pytest.mark.parametrize('change, said', [
    (dict(validation_share=0.3), r'--validation_share \(0.2 -> 0.3\)'), (dict(shard_bytes=4000), r'--shard_bytes \(3000 -> 4000\)'),
    (dict(reading=Reading(keep=('nul',), field='body')), r"--field \(text -> body\), --keep \(\[\] -> \['nul'\]\)"), ('content', 'the inputs, such as corpus/3.txt'), ('more', 'the inputs, such as corpus/new.txt')])
@pytest.mark.parametrize('state', ['a set', 'unfinished work'])
def test_other_inputs_or_options_in_the_same_folder_are_refused_and_named(corpus, tmp_path, change, said, state):
  prepared(corpus[0], tmp_path / 'set') if state == 'a set' else interrupted(corpus[0], tmp_path / 'set')
  before = kills.contents(tmp_path / 'set')
  if change == 'content':
    (corpus[0] / '3.txt').write_text('changed to something else')
  elif change == 'more':
    (corpus[0] / 'new.txt').write_text('x')
  with pytest.raises(BadInput, match=rf'^--output=.*/set: holds {state} that differs in {said}; choose another folder or delete that one$'):
    prepared(corpus[0], tmp_path / 'set', **(change if isinstance(change, dict) else {}))
  assert kills.contents(tmp_path / 'set') == before


def interrupted(folder, output, after: int = 3):
  """Preparation that fails in the middle of a part."""
  class Failing(tokenizer.Bytes):
    left = [after * 9]

    def encode(self, text):
      self.left[0] -= 1
      if self.left[0] < 0:
        raise KeyboardInterrupt
      return super().encode(text)
  with pytest.raises(KeyboardInterrupt):
    prepare(files((str(folder),), ''), Failing(), Options(validation_share=0.2, shard_bytes=3000), output, 0, '', note=lambda line: None)
  with pytest.raises(BadInput, match=r'holds no prepared set; its preparation has not ended: run the same prepare again$'):
    open_set(Folder(output, '--data'), '')


@pytest.mark.parametrize('after', range(1, 20, 3))
def test_interrupted_anywhere_it_goes_on_and_does_no_part_twice(corpus, tmp_path, monkeypatch, after):
  prepared(corpus[0], tmp_path / 'whole')
  interrupted(corpus[0], tmp_path / 'set', after)
  done = len(list((tmp_path / 'set' / 'parts').glob('*'))) if (tmp_path / 'set' / 'parts').exists() else 0
  numbers, tokenize = [], Preparation.tokenize
  monkeypatch.setattr(Preparation, 'tokenize', lambda work, number, count: numbers.append(number) or tokenize(work, number, count))
  prepared(corpus[0], tmp_path / 'set')
  assert kills.contents(tmp_path / 'set') == kills.contents(tmp_path / 'whole')
  assert len(numbers) == len(set(numbers)) and done + len(numbers) == len(json.loads((tmp_path / 'set/index.json').read_text())['splits']['train'])


@pytest.mark.slow
@pytest.mark.parametrize('kill', [kills.kill_prepare, kills.kill_train])
def test_killed_at_random_moments_nothing_is_lost_or_repeated(tmp_path, kill):
  assert kill(tmp_path, 5, random.Random(0))


def test_workers_end_with_their_parent(tmp_path):
  """A killed command leaves no process behind that still writes."""
  kills.corpus(tmp_path / 'in')
  arguments = kills.command('prepare', f'--input={tmp_path / "in"}', f'--output={tmp_path / "set"}', '--workers=2', '--shard_bytes=100000')
  process = subprocess.Popen(arguments, cwd=kills.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             env=os.environ | {'PYTHONPATH': str(kills.ROOT / 'src')})
  while not list((tmp_path / 'set').glob('parts/*')):
    time.sleep(0.01)
    assert process.poll() is None
  process.send_signal(signal.SIGKILL)
  process.communicate(timeout=20)  # its output ends when the last worker has ended
  assert process.returncode == -signal.SIGKILL and not (tmp_path / 'set/index.json').exists()
  kills.run(arguments)
  found = open_set(Folder(tmp_path / 'set', ''), '')
  assert found.train.documents + found.validation.documents == 5520 and not found.verify()


def test_a_second_process_waits_for_the_first_and_finds_it_done(corpus, tmp_path):
  said, entered, go = [], threading.Event(), threading.Event()

  class Slow(tokenizer.Bytes):
    def encode(self, text):
      entered.set()
      go.wait(60)
      return super().encode(text)
  options = Options(validation_share=0.2, shard_bytes=3000)
  inputs = files((str(corpus[0]),), '')
  one = threading.Thread(target=lambda: prepare(inputs, Slow(), options, tmp_path / 'set', 0, '', note=print))
  one.start()
  entered.wait(60)
  two = threading.Thread(target=lambda: said.append(prepare(inputs, BYTES, options, tmp_path / 'set', 0, '', note=said.append)))
  two.start()
  until = time.monotonic() + 30
  while not said and time.monotonic() < until:
    time.sleep(0.01)
  assert two.is_alive() and said == [f'another process prepares {tmp_path / "set"}; waiting for it']
  go.set()
  one.join()
  two.join()
  assert said[1].endswith('is complete already, by names, sizes and options; nothing is written') and everything(said[2]) == corpus[1]


BAD = b'{"text": "good"}\n' * 6 + b'{"text": \n' + b'{"text": ""}\n' + b'{"text": "a\\u0000"}\n' + b'{"text": "better"}\n'


def test_bad_records_are_counted_and_listed_with_file_and_line(tmp_path):
  (tmp_path / 'in.jsonl').write_bytes(BAD * 30)
  for name, keep in (('all', ()), ('nul', ('nul',))):
    found = prepared(tmp_path / 'in.jsonl', tmp_path / name, shard_bytes=1000, reading=Reading(keep=keep))
    lines = [json.loads(line) for line in (tmp_path / name / 'bad_records.jsonl').read_text().splitlines()]
    assert lines == [{'kind': kind, 'file': 'in.jsonl', 'line': 10 * i + line, 'kept': kind in keep, 'detail': ''}
                     for i in range(30) for kind, line in (('broken_json', 7), ('empty', 8), ('nul', 9))]
    assert found.index['bad'] == {kind: {'skipped': 0, 'kept': 30} if kind in keep else {'skipped': 30, 'kept': 0} for kind in ('broken_json', 'empty', 'nul')}
    assert found.train.documents + found.validation.documents == (240 if keep else 210) and found.index['records'] == 300


def test_too_many_bad_records_stop_the_work_which_goes_on_when_more_are_allowed(tmp_path, monkeypatch):
  (tmp_path / 'in.jsonl').write_bytes(BAD * 30)
  said = (r'^--input: 90 of 300 records are bad \(30 broken_json, 30 empty, 30 nul\), more than --bad_share=0.29; the first is broken_json in in.jsonl, '
          r'line 7; all are listed in .*/set/bad_records.jsonl; fix them, or allow more and run again$')
  with pytest.raises(BadInput, match=said):
    prepared(tmp_path / 'in.jsonl', tmp_path / 'set', bad_share=0.29)
  assert len((tmp_path / 'set/bad_records.jsonl').read_text().splitlines()) == 90 and not (tmp_path / 'set/index.json').exists()
  monkeypatch.setattr(Preparation, 'tokenize', None)  # every part is done
  assert prepared(tmp_path / 'in.jsonl', tmp_path / 'set', bad_share=0.3).train.documents > 100


def test_a_wrong_field_is_told_with_those_that_are_there(tmp_path):
  (tmp_path / 'in.jsonl').write_text('{"content": "x", "id": 1}\n' * 9)
  with pytest.raises(BadInput, match=r'the first is missing_field in in.jsonl, line 1 \(fields: content, id; --field=text\)'):
    prepared(tmp_path / 'in.jsonl', tmp_path / 'set', bad_share=0.05)


def test_hopeless_inputs_stop_early(tmp_path):
  (tmp_path / 'in.jsonl').write_bytes(b'no JSON\n' * 5000)
  with pytest.raises(BadInput, match=r'^--input: ([\d,]+) of \1 records are bad') as error:
    prepared(tmp_path / 'in.jsonl', tmp_path / 'set', bad_share=0.5)
  assert 'of 5,000' not in str(error.value)


def test_bad_records_all_in_one_place_do_not_stop_the_work_while_they_are_few_of_all(tmp_path):
  (tmp_path / 'in.jsonl').write_bytes(b'no JSON\n' * 40 + b'{"text": "x"}\n' * 1000)
  assert prepared(tmp_path / 'in.jsonl', tmp_path / 'set', bad_share=0.05, shard_bytes=300).index['bad'] == {'broken_json': {'skipped': 40, 'kept': 0}}


def test_inputs_that_change_while_they_are_read_are_refused(corpus, tmp_path):
  inputs = files((str(corpus[0]),), '')
  for name, content in (('a.jsonl', b'{"text": "shorter"}\n'), ('3.txt', b'longer ' * 999)):
    before = (corpus[0] / name).read_bytes()
    (corpus[0] / name).write_bytes(content)
    with pytest.raises(BadInput, match=rf"^--input: '.*/{name}' had {len(before):,} bytes, and {len(content):,} when it was read; delete .* and run again"):
      prepare(inputs, BYTES, Options(validation_share=0.2, shard_bytes=3000), tmp_path / f'set-{name}', 0, '--input', note=print)
    (corpus[0] / name).write_bytes(before)


def test_work_goes_on_only_while_files_are_as_they_were(corpus, tmp_path):
  interrupted(corpus[0], tmp_path / 'set')
  os.utime(corpus[0] / '3.txt', (1, 1))  # of the same size, but written since
  with pytest.raises(BadInput, match='holds unfinished work that differs in the inputs, such as corpus/3.txt'):
    prepared(corpus[0], tmp_path / 'set')


def test_killed_at_the_first_moment_it_begins_anew(corpus, tmp_path):
  (tmp_path / 'set').mkdir()
  (tmp_path / 'set' / '.unfinished-abc').write_bytes(b'half a plan')
  assert everything(prepared(corpus[0], tmp_path / 'set')) == corpus[1] and not list((tmp_path / 'set').glob('.*'))


def test_a_damaged_input_stops_with_its_name(corpus, tmp_path):
  (corpus[0] / 'b.jsonl.gz').write_bytes((corpus[0] / 'b.jsonl.gz').read_bytes()[:-30])
  with pytest.raises(BadInput, match=r"^--input: '.*b.jsonl.gz' is damaged or cut off after line \d+, .*; fetch it again or leave it out$"):
    prepared(corpus[0], tmp_path / 'set', workers=2)


@pytest.mark.parametrize('where', ['a file', 'full'])
def test_a_folder_that_is_none_of_ours_is_left_alone(corpus, tmp_path, where):
  if where == 'a file':
    (tmp_path / 'set').write_text('mine')
  else:
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set/mine.txt').write_text('mine')
  with pytest.raises(BadInput, match=r'^--output=.*/set: (cannot be a folder|holds files that are no prepared set, such as mine.txt; choose an empty folder)'):
    prepared(corpus[0], tmp_path / 'set')


@pytest.mark.parametrize('options, message', [
    (dict(validation_share=0.0), '--validation_share=0.0: must be above 0 and below 1'), (dict(bad_share=1.1), '--bad_share=1.1: must be at least 0 and at most 1'),
    (dict(shard_bytes=-1), '--shard_bytes=-1: must not be negative; 0 chooses by the size of the inputs')])
def test_bad_options_are_one_line(options, message):
  with pytest.raises(BadInput) as error:
    Options(**options)
  assert str(error.value) == message


def test_a_set_may_be_written_elsewhere(corpus, tmp_path, memory):
  prepared(corpus[0], tmp_path / 'here')
  prepared(corpus[0], 'memory://bucket/set')
  written = {path.rpartition('/')[2]: memory.cat_file(path) for path in memory.find('/bucket/set')}
  assert written == {path.name: path.read_bytes() for path in (tmp_path / 'here').iterdir()}
  assert everything(open_set(Folder('memory://bucket/set', ''), str(tmp_path / 'cache'))) == corpus[1]


def test_the_fingerprint_tells_contents_names_tokenizers_and_options_apart(corpus, tmp_path):
  number = itertools.count()
  fingerprint = lambda **options: prepared(corpus[0], tmp_path / str(next(number)), **options).fingerprint
  found = [fingerprint(), fingerprint(validation_share=0.3), fingerprint(reading=Reading(keep=('nul',)))]
  found.append(prepare(files((str(corpus[0]),), ''), dataclasses.replace(BYTES, digest='x'), Options(validation_share=0.2, shard_bytes=3000),
                       tmp_path / str(next(number)), 0, '', note=print).fingerprint)
  content = (corpus[0] / '3.txt').read_bytes()
  (corpus[0] / '3.txt').write_bytes(content[:-1] + b'\1')  # as long as before
  found.append(fingerprint())
  (corpus[0] / '3.txt').write_bytes(content)
  (corpus[0] / '3.txt').rename(corpus[0] / 'new.txt')
  found.append(fingerprint())
  assert len(set(found)) == 6
  (corpus[0] / 'new.txt').rename(corpus[0] / '3.txt')
  assert fingerprint() == found[0]


def test_text_is_prepared_once_for_each_content(corpus, tmp_path, monkeypatch):
  (corpus[0] / 'a.jsonl').unlink(), (corpus[0] / 'b.jsonl.gz').unlink()
  once = lambda share=0.2: prepare_once((str(corpus[0]),), BYTES, share, str(tmp_path / 'cache'), 'config.data.paths')
  first = once()
  other = once(0.3)
  monkeypatch.setattr(preparing, '_tokenize_missing', None)
  os.utime(corpus[0] / '3.txt')
  again = once()
  assert again.folder.url == first.folder.url != other.folder.url and len(everything(again)) == 20
  monkeypatch.undo()
  (corpus[0] / '3.txt').write_bytes(b'changed')
  assert once().folder.url != first.folder.url


def test_a_cache_that_cannot_be_written_is_named(corpus, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(BadInput, match=r"^config\.data\.cache='.*/file': cannot write there .*; give a folder"):
    prepare_once((str(corpus[0]),), BYTES, 0.2, str(tmp_path / 'file'), 'config.data.paths')


@pytest.mark.parametrize('workers', [0, 2])
def test_a_full_disk_is_told_with_what_to_do(corpus, tmp_path, workers):
  """Files of this process and its children may have 60 kB, of which ArrayRecord wants 64 at once."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
  try:
    with pytest.raises(OSError, match=r'^--output=.*/set: cannot write there .*; fix that and run the same command, it goes on where it stopped$'):
      prepared(corpus[0], tmp_path / 'set', workers)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)
  assert everything(prepared(corpus[0], tmp_path / 'set')) == corpus[1]


def test_a_sample_is_from_all_over_the_inputs(corpus):
  inputs = files((str(corpus[0]),), '')
  whole = [found.text for found in sample(inputs, Reading(), 10**9, '')]
  some = [found.text for found in sample(inputs, Reading(), 5000, '')]
  assert sorted(whole) == corpus[1] and some == whole[:len(some)] and 5000 <= sum(map(len, some)) < 5400


def test_a_sample_takes_no_more_of_a_file_than_its_share(tmp_path):
  for i in range(4):
    (tmp_path / f'{i}.jsonl.gz').write_bytes(gzip.compress(b''.join(b'{"text": "%d%s"}\n' % (i, b'x' * 1000) for _ in range(200))))
  some = [found.text[:1] for found in sample(files((str(tmp_path),), ''), Reading(), 300_000, '')]
  assert [some.count(b'%d' % i) for i in range(4)] == [75, 75, 75, 75]


def test_sentencepiece_sets_carry_their_model(corpus, tmp_path, sentencepiece_model):
  tokens = tokenizer.SentencePiece(sentencepiece_model)
  inputs, options = files((str(corpus[0]),), ''), Options(validation_share=0.2, shard_bytes=3000)
  one, two = (prepare(inputs, tokens, options, tmp_path / str(n), n, '', note=print) for n in (0, 2))
  assert kills.contents(tmp_path / '0') == kills.contents(tmp_path / '2')
  assert (tmp_path / '0/tokenizer.model').read_bytes() == sentencepiece_model and one.index['tokenizer'] == 'tokenizer.model'
  assert sorted(tokens.decode(s.document(i)) for s in (one.train, one.validation) for i in range(s.documents)) == corpus[1]
