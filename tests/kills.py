"""Kills `prepare`, `train` and a job of two processes at random moments, and compares with a run that was not killed.

    python tests/kills.py --kills=50

`prepare` must write the same folder, byte for byte. `train` must log the same loss at every step, to the last bit, so
that no batch was repeated or lost. When one process of a job is killed, the other one must end by itself.
Prints a line per kill; exit code 1 if anything differs.
"""
import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from xla_flags import FAST

from mtp_jax.checkpoint.record import steps
from mtp_jax.config.paths import remove

ROOT = pathlib.Path(__file__).parents[1]
FIELDS = {
    'model.width': 16, 'model.heads': 2, 'model.kv_heads': 1, 'model.head_width': 8,
    'model.feed_forward': 32, 'model.layers': 3, 'model.futures': 2, 'data.length': 32,
    'train.batch': 2, 'train.steps': 100, 'train.log_every': 1, 'train.checkpoint_every': 5,
    'train.evaluate_every': 0, 'train.evaluate_rows': 2,
    'train.trackers': (), 'optimizer.warmup_steps': 0}
JOB = FIELDS | {'model.kv_heads': 2, 'mesh.fsdp': 4, 'mesh.tensor': 2, 'train.batch': 8,
                'train.evaluate_rows': 8, 'train.steps': 12, 'train.checkpoint_every': 3,
                'train.heartbeat_seconds': 5}
DEVICES = 4  # of each of the two processes
PATIENCE_SECONDS = 400  # a process waits 300 seconds at the start for one that was killed before it came
ANOTHER_ENDED = ('mtp_jax: .*another process of this job (has|may have) ended.*[:;] '
                 'run the same command on all of them to resume')


def corpus(folder: pathlib.Path, seed: int = 0) -> None:
  """JSON lines of some size, a compressed file, and a few text files."""
  import gzip
  rng = random.Random(seed)
  folder.mkdir()
  line = lambda: json.dumps({'text': ''.join(rng.choice('abcdefgh \n')
                                             for _ in range(rng.randint(1, 3000)))}) + '\n'
  (folder / 'a.jsonl').write_text(''.join(line() for _ in range(5000)) + '{"broken\n')
  with gzip.GzipFile(folder / 'b.jsonl.gz', 'wb', mtime=0) as file:
    file.write(''.join(line() for _ in range(500)).encode())
  for i in range(20):
    (folder / f'{i}.txt').write_text(line())


def command(name: str, *arguments) -> list[str]:
  return [sys.executable, '-m', 'mtp_jax', name, *map(str, arguments)]


def train(workdir: pathlib.Path, cache: pathlib.Path, fields: dict) -> list[str]:
  config = ROOT / 'configs' / 'tiny.py'
  return command('train', f'--workdir={workdir}', f'--config={config}',
                 f'--config.data.cache={cache}',
                 *(f'--config.{name}={value}' for name, value in fields.items()))


def run(arguments: list[str], seconds: float | None = None,
        programs: pathlib.Path | str = '') -> subprocess.Popen:
  """Runs a command to its end, or kills it after `seconds` and waits until its workers have ended too.

  Args:
    programs: JAX's compilation cache.
  """
  process = _start(arguments, programs)
  try:
    _wait(process, seconds)
  except subprocess.TimeoutExpired:
    process.send_signal(signal.SIGKILL)
    _wait(process)  # returns when the last worker has closed its end of the pipes
  return process


def _wait(process: subprocess.Popen, seconds: float | None = None) -> None:
  """Waits for the end. Sets `out`, its stdout, where Gloo writes too, and `output`, stdout and then stderr."""
  process.out, err = process.communicate(timeout=seconds)
  process.output = process.out + err


def _start(arguments: list[str], programs: pathlib.Path | str,
           **variables: str) -> subprocess.Popen:
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': FAST,
                              'PYTHONPATH': str(ROOT / 'src'),
                              'JAX_COMPILATION_CACHE_DIR': str(programs),
                              'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'} | variables
  return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def job(programs: pathlib.Path, *commands: list[str]) -> Iterator[list[subprocess.Popen]]:
  """The processes of one job, one per command. Those that still run at the end are killed."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  processes = []
  try:
    for index, arguments in enumerate(commands):
      processes.append(_start(arguments, programs,
                              XLA_FLAGS=f'--xla_force_host_platform_device_count={DEVICES} {FAST}',
                              JAX_COORDINATOR_ADDRESS=address,
                              JAX_NUM_PROCESSES=str(len(commands)), JAX_PROCESS_ID=str(index)))
    yield processes
  finally:
    for process in processes:
      with contextlib.suppress(ProcessLookupError):
        for pid in workers(process):
          os.kill(pid, signal.SIGKILL)
      process.kill()
    for process in processes:
      process.communicate(timeout=60)


def workers(process: subprocess.Popen) -> list[int]:
  """The children of a process, if it runs: the one that does its work."""
  path = pathlib.Path(f'/proc/{process.pid}/task/{process.pid}/children')
  return [int(pid) for pid in path.read_text().split()] if process.poll() is None else []


def ended(processes: Sequence[subprocess.Popen], seconds: float) -> list[int]:
  """Waits for all processes and their workers; their exit codes. Raises TimeoutExpired."""
  until = time.monotonic() + seconds
  for process in processes:
    _wait(process, max(0.01, until - time.monotonic()))
  return [process.returncode for process in processes]


def undisturbed_job(folder: pathlib.Path) -> dict[int, str]:
  """The losses of JOB in folder / 'whole'; runs it the first time."""
  if not (folder / 'whole').exists():
    with job(folder / 'programs',
             *[train(folder / 'whole', folder / 'cache', JOB)] * 2) as processes:
      codes = ended(processes, PATIENCE_SECONDS)
    assert codes == [0, 0], [process.output for process in processes]
  return losses(folder / 'whole')


def contents(folder: pathlib.Path) -> dict[str, str]:
  """SHA-256 of every file, by its path in the folder."""
  return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
          for path in sorted(folder.rglob('*')) if path.is_file()}


def losses(workdir: pathlib.Path) -> dict[int, str]:
  """The loss of every step in the log, in all its digits."""
  log = workdir / 'metrics.jsonl'
  lines = log.read_text().splitlines() if log.exists() else []
  records = [json.loads(line) for line in lines if line.endswith('}')]
  return {record['step']: repr(record['loss']) for record in records if record['kind'] == 'train'}


def checkpoints(workdir: pathlib.Path) -> list[int]:
  """Steps with a complete checkpoint, oldest first."""
  return steps(workdir)


def kill_prepare(folder: pathlib.Path, kills: int, rng: random.Random, note=print) -> bool:
  """Whether the set is always the same, however often `prepare` was killed."""
  corpus(folder / 'in')
  prepare = lambda output, workers: command('prepare', f'--input={folder / "in"}',
                                            f'--output={output}', '--shard_bytes=400000',
                                            f'--workers={workers}')
  start = time.perf_counter()
  whole = run(prepare(folder / 'whole', 1))
  seconds = time.perf_counter() - start
  assert whole.returncode == 0, whole.output
  expected = contents(folder / 'whole')
  same, done, n = True, 0, 0
  while done < kills:
    output, n = folder / f'killed-{n}', n + 1
    while done < kills and not (output / 'index.json').exists():
      workers = rng.choice([0, 2, 3])
      killed = run(prepare(output, workers), rng.uniform(0.3, 1) * seconds)
      if killed.returncode == -signal.SIGKILL:
        done += 1
        note(f'prepare killed {done} times; {len(list(output.glob("parts/*")))} parts are done')
    last = run(prepare(output, 2))
    files = contents(output)
    differing = [name for name in expected | files if expected.get(name) != files.get(name)]
    same &= last.returncode == 0 and not differing
    note(f'finished: {f"OTHER BYTES: {differing}" if differing else "the same bytes"} '
         + (last.output if last.returncode else ''))
    shutil.rmtree(output)
  return same


def kill_train(folder: pathlib.Path, kills: int, rng: random.Random, note=print, home=None) -> bool:
  """Whether the loss of every step is always the same, however often `train` was killed.

  Args:
    home: where the workdirs are, as `folder_path` gives it; by default in `folder`.
  """
  home = home or folder
  train_in = lambda name: train(home / name, folder / 'cache', FIELDS)
  programs = folder / 'programs'
  run(train_in('first'), None, programs)
  start = time.perf_counter()
  whole = run(train_in('whole'), None, programs)
  seconds = time.perf_counter() - start
  assert whole.returncode == 0, whole.output
  expected = losses(home / 'whole')
  same, done, n = losses(home / 'first') == expected, 0, 0
  while done < kills:
    workdir, n = home / f'killed-{n}', n + 1
    while done < kills:
      killed = run(train_in(workdir.name), rng.uniform(0.3, 1.1) * seconds, programs)
      if killed.returncode != -signal.SIGKILL:
        same &= killed.returncode == 0
        break
      done += 1
      note(f'train killed {done} times; checkpoints {checkpoints(workdir)}')
    last = run(train_in(workdir.name), None, programs)
    is_same = losses(workdir) == expected
    same &= last.returncode == 0 and is_same
    note(f'finished: {"the same losses" if is_same else "OTHER LOSSES"} '
         + (last.output if last.returncode else ''))
    remove(workdir)
  return same


def kill_job(folder: pathlib.Path, kills: int, rng: random.Random, note=print) -> bool:
  """Whether the losses of both processes are always the same, and the one that was not killed ended by itself.

  One of the two, or its worker, is killed some steps after both have started: earlier, the other one would wait five
  minutes for it. The other one must end with a message.
  """
  expected = undisturbed_job(folder)
  same = len(expected) == JOB['train.steps'] and losses(folder / 'whole' / 'process-1') == expected
  done, n = 0, 0
  while done < kills:
    workdir, n = folder / f'killed-{n}', n + 1
    start = lambda workdir=workdir: job(folder / 'programs', *[train(workdir, folder / 'cache', JOB)] * 2)
    while done < kills:
      before = _starts(workdir)
      step = max([0, *checkpoints(workdir)]) + rng.randint(0, 6)
      with start() as processes:
        _wait_for_step(processes, workdir, before, step)
        time.sleep(rng.uniform(0, 1))
        if _any_has_ended(processes):
          same &= ended(processes, PATIENCE_SECONDS) == [0, 0]
          break
        began, victim, kind = time.perf_counter(), rng.choice([0, 1]), rng.choice(['process', 'worker'])
        if kind == 'process':
          processes[victim].kill()
        else:
          for pid in workers(processes[victim]):
            os.kill(pid, signal.SIGKILL)
        codes, done = ended(processes, PATIENCE_SECONDS), done + 1
        seconds, survivor = time.perf_counter() - began, processes[1 - victim]
        fine = _ended_well(survivor)
        same &= fine
        message = (survivor.output.splitlines() or [''])[-1] if fine else f'NO CLEAR END: {survivor.output}'
        note(f'job: {kind} {victim} killed, {done} times; exit codes {codes} after {seconds:.1f} s; '
             f'checkpoints {checkpoints(workdir)}; {message}')
    with start() as processes:
      codes = ended(processes, PATIENCE_SECONDS)
    is_same = [losses(workdir), losses(workdir / 'process-1')] == [expected, expected]
    same &= codes == [0, 0] and is_same
    note(f'finished: {"the same losses" if is_same else "OTHER LOSSES"} '
         + str([process.output for process in processes] if any(codes) else ''))
    shutil.rmtree(workdir)
  return same


def _starts(workdir: pathlib.Path) -> int:
  """How often both processes have started."""
  logs = [folder / 'events.jsonl' for folder in (workdir, workdir / 'process-1')]
  return min(log.read_text().count('"start"') if log.exists() else 0 for log in logs)


def _wait_for_step(processes, workdir: pathlib.Path, starts: int, step: int) -> None:
  """Waits until both processes have started once more and logged the step, or until one has ended."""
  until = time.monotonic() + PATIENCE_SECONDS
  while not _any_has_ended(processes) and time.monotonic() < until:
    if _starts(workdir) > starts and (step == 0 or step in losses(workdir)):
      return
    time.sleep(0.02)


def _any_has_ended(processes: Sequence[subprocess.Popen]) -> bool:
  return any(process.poll() is not None for process in processes)


def _ended_well(survivor: subprocess.Popen) -> bool:
  """Whether the other process of a killed one had finished, or noticed it and said so."""
  last = (survivor.output.splitlines() or [''])[-1]
  is_ours = f'File "{ROOT}/src/' in survivor.output  # tracebacks of Orbax's threads do not lead through this project
  noticed = re.fullmatch(ANOTHER_ENDED, last) is not None and not is_ours
  return survivor.returncode == 0 or (survivor.returncode == 1 and noticed)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--kills', type=int, default=50, help='of each command')
  parser.add_argument('--seed', type=int, default=0)
  given = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    same = {}
    for kill in (kill_prepare, kill_train, kill_job):
      name = kill.__name__.removeprefix('kill_')
      pathlib.Path(folder, name).mkdir()
      same[name] = kill(pathlib.Path(folder, name), given.kills, random.Random(given.seed))
  print('; '.join(f'{name}: {"the same" if is_same else "DIFFERENT"}'
                  for name, is_same in same.items()))
  sys.exit(not all(same.values()))
