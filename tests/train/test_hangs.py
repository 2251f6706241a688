"""What hangs ends the process with exit code 1, with every stack and a line that says what was waited for."""
import os
import re
import signal
import subprocess
import sys
import time

import kills
import pytest
from experiments import experiment
from kills import JOB, ended

from mtp_jax.config import BadInput, DataConfig
from mtp_jax.data.corpus import load_tokenizer, open_corpus
from mtp_jax.tokenizer import Bytes

SECONDS = 5.0
LAST_WORDS = ('the stacks of all threads are above; run the same command to resume, with a higher '
              'config.train.hang_seconds if it is only slow')


def run(code: str, **streams) -> subprocess.CompletedProcess:
  """Runs a program that must end by itself."""
  return subprocess.run([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True, timeout=300, **streams)


def assert_ended(done, what: str, function: str) -> None:
  """It ended with the stacks of all threads, one of them in that function, and a line that names what it waited for."""
  assert done.returncode == 1, done.stderr
  assert 'most recent call first' in done.stderr and f' in {function}' in done.stderr, done.stderr
  assert re.fullmatch(f'mtp_jax: waited [0-9.]+ seconds for {what}; {LAST_WORDS}', done.stderr.splitlines()[-1])


BLOCKS = {
    'a wait': "with watched(1, 'the other one'):\n    wait()",
    'a wait in another one': "with watched(60, 'both'), watched(1, 'the other one'):\n    wait()",
    'a wait around another one': "with watched(1, 'the other one'):\n    with watched(60, 'x'):\n      pass\n"
                                 '    wait()',
    'the last of many parts': "with watched(2, 'the other one') as goes_on:\n    for _ in range(4):\n"
                              "      time.sleep(0.8)\n      goes_on()\n    print('here', flush=True)\n    wait()",
}


@pytest.mark.parametrize('block', BLOCKS)
def test_a_block_that_takes_too_long_ends_the_process(block):
  done = run(f'import time\nfrom mtp_jax.train.watch import watched\ndef wait():\n  time.sleep(600)\n'
             f'if True:\n  {BLOCKS[block]}', stdout=subprocess.PIPE)
  assert_ended(done, 'the other one', 'wait')
  assert done.stdout == ('here\n' if block == 'the last of many parts' else '')


def test_blocks_that_end_in_time_end_nothing_and_nothing_is_watched_between_them():
  done = run("import time\nfrom mtp_jax.train.watch import watched\nfor seconds in (2, 2, 0):\n"
             "  with watched(seconds, 'x'):\n    time.sleep(0.5 if seconds else 3)\n  time.sleep(1.5)")
  assert (done.returncode, done.stderr) == (0, '')


def test_it_ends_where_python_itself_hangs():
  """A C function that keeps the interpreter's lock."""
  done = run('import ctypes\nfrom mtp_jax.train import watch\nwatch.GRACE_SECONDS = 1\n'
             "with watch.watched(1, 'x'):\n  ctypes.PyDLL(None).sleep(600)")
  assert done.returncode == 1 and 'Timeout' in done.stderr and 'most recent call first' in done.stderr, done.stderr


HANGS = {
    # what hangs: the function that sleeps from its fourth call on, and the line
    'the data': ('rows.Rows', 'batch', r'the batch of step \d'),
    'the device': ('recording.Recorder', '_record', r'the devices to end step 4'),
}


@pytest.mark.parametrize('where, checkpoint_every', [('the data', 100), ('the device', 100), ('the device', 1)])
def test_a_step_that_hangs_ends_the_process(tmp_path, where, checkpoint_every):
  """The fourth batch, or the fourth step's figures, never come, whatever waits for them."""
  config = experiment(tmp_path, train={'hang_seconds': SECONDS, 'steps': 9, 'evaluate_every': 0,
                                       'checkpoint_every': checkpoint_every})
  owner, name, what = HANGS[where]
  done = run(f'''
import time
from mtp_jax.config import *
from mtp_jax.data import rows
from mtp_jax.train import recording
from mtp_jax.train.fit import fit
calls, function = [], {owner}.{name}
def hang(*arguments):
  calls.append(1)
  time.sleep(600 * (len(calls) > 3))
  return function(*arguments)
{owner}.{name} = hang
fit({config!r}, {str(tmp_path / 'run')!r})
''')
  assert_ended(done, what, 'hang')
  assert 'step 2 ' in done.stderr and 'step 4 ' not in done.stderr


DATASET = '''
import multiprocessing, os, time, grain
class Asking:
  """Document 3 comes from a worker process that never answers."""
  def __len__(self):
    return 50
  def __getitem__(self, i):
    return ask() if i == 3 else f'document {i} ' * 20
def ask():
  ours, theirs = multiprocessing.Pipe()
  multiprocessing.get_context('fork').Process(target=be_silent, args=(os.getpid(),), daemon=True).start()
  return ours.recv()
def be_silent(parent):
  os.close(2)  # which the test reads to its end
  while os.getppid() == parent:
    time.sleep(0.1)
def asking(config):
  return grain.MapDataset.source(Asking())
def filtered(config):
  return grain.MapDataset.source([f'document {i} ' * 20 for i in range(50)]).filter(lambda document: False)
def empty(config):
  return grain.MapDataset.source([''] * 50)
'''


@pytest.fixture
def datasets(tmp_path, monkeypatch):
  """A config of a dataset of the module above."""
  (tmp_path / 'hanging_datasets.py').write_text(DATASET)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setenv('PYTHONPATH', f'{tmp_path}:{os.environ.get("PYTHONPATH", "")}')
  return lambda name: DataConfig(dataset=f'hanging_datasets:{name}', length=16, cache=str(tmp_path / 'cache'))


def test_a_worker_process_that_never_answers_ends_the_start(datasets):
  done = run(f'''
import functools
from mtp_jax.config import *
from mtp_jax.data.corpus import open_corpus
from mtp_jax.tokenizer import Bytes
from mtp_jax.train.watch import watched
open_corpus({datasets('asking')!r}, Bytes(), waiting=functools.partial(watched, 2.0))
''')
  assert_ended(done, "document 3 of config.data.dataset='hanging_datasets:asking'", 'ask')


def test_a_document_that_never_comes_ends_the_start():
  """One that meter.show never tells of."""
  done = run('''
import time
from mtp_jax.train.opening import WatchedMeter
def read():
  time.sleep(600)
with WatchedMeter(2.0, 100, 0) as meter:
  for n in range(6):
    time.sleep(0.7)
    meter.show(n, n, n)
  read()
''')
  assert_ended(done, 'the next document of config.data.paths', 'read')


@pytest.mark.parametrize('name', ['filtered', 'empty'])
def test_a_dataset_that_yields_nothing_is_refused_in_one_line(datasets, name):
  with pytest.raises(BadInput, match=r'^config\.data\.dataset=.*: of 0 documents none is left for the train split'):
    open_corpus(datasets(name), Bytes())


@pytest.mark.parametrize('content', ['', '\n', '{"text": ""}\n' * 9])
def test_files_that_hold_nothing_are_refused_in_one_line(tmp_path, content):
  (tmp_path / 'a.jsonl').write_text(content)
  with pytest.raises(BadInput, match=r'^config\.data\.paths: '):
    open_corpus(DataConfig(paths=(str(tmp_path / 'a.jsonl'),), cache=str(tmp_path / 'cache')), Bytes())


@pytest.mark.parametrize('prefix', ['', 'file://'])
def test_a_pipe_that_nobody_writes_to_is_refused_as_data_and_as_tokenizer(tmp_path, prefix):
  pipe = tmp_path / 'pipe'
  os.mkfifo(pipe)
  with pytest.raises(BadInput, match=r'^config\.data\.paths: .*pipe.* it is a pipe or a device'):
    open_corpus(DataConfig(paths=(f'{prefix}{pipe}',), cache=str(tmp_path / 'cache')), Bytes())
  with pytest.raises(BadInput, match=r'^config\.data\.tokenizer=.*pipe.*: is no regular file; give '):
    load_tokenizer(f'{prefix}{pipe}')


BARRIER = '''
import sys, time
from mtp_jax.train import processes
def work():
  import jax
  if jax.process_index() == 1:
    time.sleep(600)
  processes.check_same(5.0, config='x')
  return 0
sys.exit(processes.run(work, 300, 300))
'''


def test_a_process_that_never_comes_to_a_barrier_ends_the_others(tmp_path):
  with kills.job(tmp_path / 'programs', *[[sys.executable, '-c', BARRIER]] * 2) as two:
    kills._wait(two[0], 300)
  done = subprocess.CompletedProcess([], two[0].returncode, stderr=without_last(two[0].output))
  assert_ended(done, 'the other processes of this job to compare config', '_gathered')


def without_last(output: str) -> str:
  """What the worker of a job printed, without the line of its parent."""
  return ''.join(output.splitlines(keepends=True)[:-1])


@pytest.mark.slow
@pytest.mark.parametrize('index', [0, 1])
@pytest.mark.parametrize('notices', ['hang_seconds', 'heartbeat_seconds'])
def test_a_process_that_is_stopped_ends_the_other(tmp_path, index, notices):
  """By its heartbeats, or where these are patient by what the other one waits for."""
  fields = JOB | {'train.steps': 100_000, 'train.hang_seconds': 600, 'train.heartbeat_seconds': 300}
  fields[f'train.{notices}'] = 20
  workdir = tmp_path / 'run'
  with kills.job(tmp_path / 'programs', *[kills.train(workdir, tmp_path / 'cache', fields)] * 2) as two:
    until = time.monotonic() + 400
    while 2 not in kills.losses(workdir):
      assert [process.poll() for process in two] == [None] * 2 and time.monotonic() < until
      time.sleep(0.05)
    for pid in kills.workers(two[index]):
      os.kill(pid, signal.SIGSTOP)
    other = two[1 - index]
    assert ended([other], 120) == [1], other.output
  if notices == 'hang_seconds':
    done = subprocess.CompletedProcess([], 1, stderr=without_last(other.output))
    assert_ended(done, '(the devices to .*|the other processes .*|the checkpoint .*)', 'fit')
  else:
    assert 'another process of this job has ended or hangs, so this one ended too' in other.output
