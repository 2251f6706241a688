"""An interrupted preparation continues where it stopped; the set is the same bytes."""
import json
import os
import random
import resource
import signal
import subprocess
import threading
import time

import kills
import pytest
from experiments import all_texts, prepare_bytes

from mtp_jax import tokenizer
from mtp_jax.config import BadInput
from mtp_jax.data import prepare as preparing
from mtp_jax.data.files import files
from mtp_jax.data.folder import Folder
from mtp_jax.data.parts import Options, Preparation
from mtp_jax.data.prepare import prepare
from mtp_jax.data.prepared_set import open_set
from mtp_jax.data.records import Reading

OPTIONS = Options(validation_share=0.2, shard_bytes=3000)


def test_preparing_again_finds_it_done(corpus, tmp_path, monkeypatch):
  prepare_bytes(corpus[0], tmp_path / 'set')
  before = kills.contents(tmp_path / 'set')
  monkeypatch.setattr(preparing, '_tokenize_missing', None)
  assert all_texts(prepare_bytes(corpus[0], tmp_path / 'set')) == corpus[1]
  assert kills.contents(tmp_path / 'set') == before


def interrupted(folder, output, after: int = 3):
  """Preparation that is interrupted in the middle of a part."""
  class Interrupting(tokenizer.Bytes):
    left = [after * 9]

    def encode(self, text):
      self.left[0] -= 1
      if self.left[0] < 0:
        raise KeyboardInterrupt
      return super().encode(text)
  with pytest.raises(KeyboardInterrupt):
    prepare(files((str(folder),), ''), Interrupting(), OPTIONS, output, 0, '')
  message = r'holds no prepared set; its preparation has not ended: run the same prepare again$'
  with pytest.raises(BadInput, match=message):
    open_set(Folder(output, '--data'), '')


CHANGES = {
    'validation_share': (dict(validation_share=0.3), r'--validation_share \(0.2 -> 0.3\)'),
    'shard_bytes': (dict(shard_bytes=4000), r'--shard_bytes \(3000 -> 4000\)'),
    'reading': (dict(reading=Reading(keep=('nul',), field='body')),
                r"--field \(text -> body\), --keep \(\[\] -> \['nul'\]\)"),
    'content': ({}, 'the inputs, such as corpus/3.txt'),
    'more': ({}, 'the inputs, such as corpus/new.txt'),
}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('state', ['a set', 'unfinished work'])
def test_other_inputs_or_options_in_the_same_folder_are_refused_and_named(corpus, tmp_path, change, state):
  (prepare_bytes if state == 'a set' else interrupted)(corpus[0], tmp_path / 'set')
  before = kills.contents(tmp_path / 'set')
  options, difference = CHANGES[change]
  if change == 'content':
    (corpus[0] / '3.txt').write_text('changed to something else')
  elif change == 'more':
    (corpus[0] / 'new.txt').write_text('x')
  message = (rf'^--output=.*/set: holds {state} that differs in {difference}; '
             'choose another folder or delete that one$')
  with pytest.raises(BadInput, match=message):
    prepare_bytes(corpus[0], tmp_path / 'set', **options)
  assert kills.contents(tmp_path / 'set') == before


@pytest.mark.parametrize('after', range(1, 20, 3))
def test_interrupted_anywhere_it_continues_and_does_no_part_twice(corpus, tmp_path, monkeypatch, after):
  prepare_bytes(corpus[0], tmp_path / 'whole')
  interrupted(corpus[0], tmp_path / 'set', after)
  done = len(list((tmp_path / 'set').glob('parts/*')))
  numbers, tokenize = [], Preparation.tokenize

  def recorded(preparation, number, count):
    numbers.append(number)
    return tokenize(preparation, number, count)
  monkeypatch.setattr(Preparation, 'tokenize', recorded)
  prepare_bytes(corpus[0], tmp_path / 'set')
  assert kills.contents(tmp_path / 'set') == kills.contents(tmp_path / 'whole')
  parts = len(json.loads((tmp_path / 'set/index.json').read_text())['splits']['train'])
  assert len(numbers) == len(set(numbers)) and done + len(numbers) == parts


@pytest.mark.slow
@pytest.mark.parametrize('kill', [kills.kill_prepare, kills.kill_train])
def test_killed_at_random_moments_nothing_is_lost_or_repeated(tmp_path, kill):
  assert kill(tmp_path, 5, random.Random(0))


def test_workers_end_with_their_parent(tmp_path):
  """A killed command leaves no process behind that still writes."""
  kills.corpus(tmp_path / 'in')
  folders = f'--input={tmp_path / "in"}', f'--output={tmp_path / "set"}'
  arguments = kills.command('prepare', *folders, '--workers=2', '--shard_bytes=100000')
  environment = os.environ | {'PYTHONPATH': str(kills.ROOT / 'src')}
  process = subprocess.Popen(arguments, cwd=kills.ROOT, env=environment,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  while not list((tmp_path / 'set').glob('parts/*')):
    time.sleep(0.01)
    assert process.poll() is None
  process.send_signal(signal.SIGKILL)
  process.communicate(timeout=20)  # its output ends when the last worker has ended
  assert process.returncode == -signal.SIGKILL and not (tmp_path / 'set/index.json').exists()
  kills.run(arguments)
  prepared = open_set(Folder(tmp_path / 'set', ''), '')
  assert prepared.train.documents + prepared.validation.documents == 5520 and not prepared.verify()


def test_a_second_process_waits_for_the_first_and_finds_it_done(corpus, tmp_path):
  entered, go = threading.Event(), threading.Event()

  class Slow(tokenizer.Bytes):
    def encode(self, text):
      entered.set()
      go.wait(60)
      return super().encode(text)
  inputs, lines, sets = files((str(corpus[0]),), ''), [], []

  def prepare_too():
    sets.append(prepare(inputs, tokenizer.Bytes(), OPTIONS, tmp_path / 'set', 0, '', lines.append))
  one = threading.Thread(target=lambda: prepare(inputs, Slow(), OPTIONS, tmp_path / 'set', 0, ''))
  one.start()
  entered.wait(60)
  two = threading.Thread(target=prepare_too)
  two.start()
  until = time.monotonic() + 30
  while not lines and time.monotonic() < until:
    time.sleep(0.01)
  assert two.is_alive() and lines == [f'another process prepares {tmp_path / "set"}; waiting for it']
  go.set()
  one.join()
  two.join()
  assert lines[1].endswith('is complete already, by names, sizes and options; nothing is written')
  assert all_texts(sets[0]) == corpus[1]


def test_work_continues_only_while_files_are_as_they_were(corpus, tmp_path):
  interrupted(corpus[0], tmp_path / 'set')
  os.utime(corpus[0] / '3.txt', (1, 1))  # of the same size, but written since
  message = 'holds unfinished work that differs in the inputs, such as corpus/3.txt'
  with pytest.raises(BadInput, match=message):
    prepare_bytes(corpus[0], tmp_path / 'set')


def test_killed_at_the_first_moment_it_begins_anew(corpus, tmp_path):
  (tmp_path / 'set').mkdir()
  (tmp_path / 'set' / '.unfinished-abc').write_bytes(b'half a plan')
  assert all_texts(prepare_bytes(corpus[0], tmp_path / 'set')) == corpus[1]
  assert not list((tmp_path / 'set').glob('.*'))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_full_disk_is_reported_with_what_to_do(corpus, tmp_path, workers):
  """Files of this process and its children are limited to 60 kB; ArrayRecord writes 64 at once."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
  message = (r'^--output=.*/set: cannot write there .*; '
             'fix that and run the same command, it goes on where it stopped$')
  try:
    with pytest.raises(OSError, match=message):
      prepare_bytes(corpus[0], tmp_path / 'set', workers)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)
  assert all_texts(prepare_bytes(corpus[0], tmp_path / 'set')) == corpus[1]
