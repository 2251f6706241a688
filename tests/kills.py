"""Kills `prepare`, `train` and a training job of two processes at random moments, over and over, and compares what comes out with what an undisturbed run gives.

    python tests/kills.py --kills=50

Of `prepare` the folder must be the same, byte for byte. Of `train` every line of the log must tell the same loss to the last bit, hence the same batches:
nothing repeated, nothing lost. Of a job one process is killed, and the other must end by itself. Prints a line a kill; exit code 1 on any difference.
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

ROOT = pathlib.Path(__file__).parents[1]
FIELDS = {
    'model.width': 16, 'model.heads': 2, 'model.kv_heads': 1, 'model.head_width': 8,
    'model.feed_forward': 32, 'model.layers': 3, 'model.futures': 2, 'data.length': 32,
    'train.batch': 2, 'train.steps': 100, 'train.log_every': 1, 'train.checkpoint_every': 5,
    'train.evaluate_every': 0, 'train.evaluate_rows': 2,
    'train.tensorboard': False, 'optimizer.warmup_steps': 0}
JOB = FIELDS | {'model.kv_heads': 2, 'mesh.fsdp': 4, 'mesh.tensor': 2, 'train.batch': 8,
                'train.evaluate_rows': 8, 'train.steps': 12, 'train.checkpoint_every': 3,
                'train.heartbeat_seconds': 5}
DEVICES, PATIENCE_SECONDS = 4, 400  # of each of two processes; beyond the 300 seconds that one waits at the start for one that was killed before it came
ANOTHER_ENDED = 'mtp_jax: .*another process of this job (has|may have) ended.*[:;] run the same command on all of them to resume'
# compilation takes most of the time of so small a job
FAST = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'


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
  """Runs to the end, or for so long, and then kills it and waits until nothing of it is left. programs: where JAX keeps what it compiled."""
  process = _start(arguments, programs)
  try:
    _hear(process, seconds)
  except subprocess.TimeoutExpired:
    process.send_signal(signal.SIGKILL)
    _hear(process)  # ends when the last worker has closed its end
  return process


def _hear(process: subprocess.Popen, seconds: float | None = None) -> None:
  """What it said until its end: `out`, where Gloo also writes, from threads of its own and at any time; `output`, that and then stderr."""
  process.out, err = process.communicate(timeout=seconds)
  process.output = process.out + err


def _start(arguments: list[str], programs: pathlib.Path | str,
           **variables: str) -> subprocess.Popen:
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '',
                              'PYTHONPATH': str(ROOT / 'src'),
                              'JAX_COMPILATION_CACHE_DIR': str(programs),
                              'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'} | variables
  return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def job(programs: pathlib.Path, *commands: list[str]) -> Iterator[list[subprocess.Popen]]:
  """The processes of one job, a command each. Whatever is left of them at the end is killed."""
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
  """The children of a process that runs: the one in which it does its work."""
  path = pathlib.Path(f'/proc/{process.pid}/task/{process.pid}/children')
  return [int(pid) for pid in path.read_text().split()] if process.poll() is None else []


def ended(processes: Sequence[subprocess.Popen], seconds: float) -> list[int]:
  """The exit codes, once all have ended, their workers included; `output` is what each has said. Raises TimeoutExpired."""
  until = time.monotonic() + seconds
  for process in processes:
    _hear(process, max(0.01, until - time.monotonic()))
  return [process.returncode for process in processes]


def undisturbed_job(folder: pathlib.Path) -> dict[int, str]:
  """Runs JOB in folder / 'whole', unless that has been done; the losses."""
  if not (folder / 'whole').exists():
    with job(folder / 'programs',
             *[train(folder / 'whole', folder / 'cache', JOB)] * 2) as processes:
      codes = ended(processes, PATIENCE_SECONDS)
    assert codes == [0, 0], [process.output for process in processes]
  return losses(folder / 'whole')


def contents(folder: pathlib.Path) -> dict[str, str]:
  return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
          for path in sorted(folder.rglob('*')) if path.is_file()}


def losses(workdir: pathlib.Path) -> dict[int, str]:
  log = workdir / 'metrics.jsonl'
  records = [json.loads(line) for line in log.read_text().splitlines()
             if line.endswith('}')] if log.exists() else []
  return {record['step']: repr(record['loss']) for record in records if record['kind'] == 'train'}


def kill_prepare(folder: pathlib.Path, kills: int, rng: random.Random, say=print) -> bool:
  """Whether the set is the same whenever, and as often as, it was killed."""
  corpus(folder / 'in')
  prepare = lambda output, workers: command('prepare', f'--input={folder / "in"}',
                                            f'--output={output}', '--shard_bytes=400000',
                                            f'--workers={workers}')
  start = time.perf_counter()
  whole = run(prepare(folder / 'whole', 1))
  seconds = time.perf_counter() - start
  assert whole.returncode == 0, whole.output
  wanted, same, done, n = contents(folder / 'whole'), True, 0, 0
  while done < kills:
    output, n = folder / f'killed-{n}', n + 1
    while done < kills and not (output / 'index.json').exists():
      workers = rng.choice([0, 2, 3])
      killed = run(prepare(output, workers), rng.uniform(0.3, 1) * seconds)
      if killed.returncode == -signal.SIGKILL:
        done += 1
        say(f'prepare killed {done} times; {len(list(output.glob("parts/*")))} parts are done')
    ended = run(prepare(output, 2))
    found = contents(output)
    same &= ended.returncode == 0 and found == wanted
    say(f'finished: {"the same bytes" if found == wanted else "OTHER BYTES: " + str([k for k in wanted | found if wanted.get(k) != found.get(k)])} {ended.output if ended.returncode else ""}')
    shutil.rmtree(output)
  return same


def kill_train(folder: pathlib.Path, kills: int, rng: random.Random, say=print) -> bool:
  """Whether every step's loss is the same whenever, and as often as, a run was killed."""
  train_in = lambda name: train(folder / name, folder / 'cache', FIELDS)
  programs = folder / 'programs'
  run(train_in('first'), None, programs)
  start = time.perf_counter()
  whole = run(train_in('whole'), None, programs)
  seconds = time.perf_counter() - start
  assert whole.returncode == 0, whole.output
  wanted, same, done, n = losses(folder / 'whole'), losses(folder / 'first') == losses(folder / 'whole'), 0, 0
  while done < kills:
    workdir, n = folder / f'killed-{n}', n + 1
    while done < kills:
      killed = run(train_in(workdir.name), rng.uniform(0.3, 1.1) * seconds, programs)
      if killed.returncode != -signal.SIGKILL:
        break
      done += 1
      say(f'train killed {done} times; checkpoints {sorted(int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit())}')
    ended = run(train_in(workdir.name), None, programs)
    found = losses(workdir)
    same &= ended.returncode == 0 and found == wanted
    say(f'finished: {"the same losses" if found == wanted else "OTHER LOSSES"} {ended.output if ended.returncode else ""}')
    shutil.rmtree(workdir)
  return same


def kill_job(folder: pathlib.Path, kills: int, rng: random.Random, say=print) -> bool:
  """Whether every step's loss is the same, on both processes, whenever, and as often as, one of the two was killed, or the worker of one; and whether the
  other one ended by itself, with a line at the end that says so.

  It is killed once both run, some steps later: before, the other one would wait five minutes for it to come.
  """
  wanted = undisturbed_job(folder)
  same, done, n = wanted == losses(folder / 'whole' / 'process-1') and len(wanted) == JOB['train.steps'], 0, 0
  start = lambda workdir: job(folder / 'programs', *[train(workdir, folder / 'cache', JOB)] * 2)
  checkpoints = lambda workdir: sorted(int(path.name) for path in workdir.glob('checkpoints/*')
                                       if path.name.isdigit())

  has_ended = lambda processes: any(process.poll() is not None for process in processes)

  def starts(workdir: pathlib.Path) -> int:
    logs = [own / 'events.jsonl' for own in (workdir, workdir / 'process-1')]
    return min(log.read_text().count('"start"') if log.exists() else 0 for log in logs)

  while done < kills:
    workdir, n = folder / f'killed-{n}', n + 1
    while done < kills:
      before, until = starts(workdir), time.monotonic() + PATIENCE_SECONDS
      step = max([0, *checkpoints(workdir)]) + rng.randint(0, 6)
      with start(workdir) as processes:
        while not has_ended(processes) and time.monotonic() < until and not (starts(workdir) > before and (step == 0 or step in losses(workdir))):
          time.sleep(0.02)
        time.sleep(rng.uniform(0, 1))
        if has_ended(processes):
          same &= ended(processes, PATIENCE_SECONDS) == [0, 0]
          break
        began, victim, whom = time.perf_counter(), rng.choice([0, 1]), rng.choice([
            'process', 'worker'])
        for pid in workers(processes[victim]) if whom == 'worker' else ():
          os.kill(pid, signal.SIGKILL)
        if whom == 'process':
          processes[victim].kill()
        codes, done = ended(processes, PATIENCE_SECONDS), done + 1
        survivor = processes[1 - victim]
        last = (survivor.output.splitlines() or [''])[-1]
        # Orbax may print tracebacks of its threads, which do not lead through this project
        ours = f'File "{ROOT}/src/'
        noticed = re.fullmatch(ANOTHER_ENDED, last) and ours not in survivor.output
        # 0: it had done all
        fine = survivor.returncode == 0 or survivor.returncode == 1 and bool(noticed)
        same &= fine
        say(f'job: {whom} {victim} killed, {done} times; exit codes {codes} after {time.perf_counter() - began:.1f} s; '
            f'checkpoints {checkpoints(workdir)}; {last if fine else "NO CLEAR END: " + survivor.output}')
    with start(workdir) as processes:
      codes = ended(processes, PATIENCE_SECONDS)
    found = [losses(workdir), losses(workdir / 'process-1')]
    same &= codes == [0, 0] and found == [wanted, wanted]
    say(f'finished: {"the same losses" if found == [wanted, wanted] else "OTHER LOSSES"} {[process.output for process in processes] if any(codes) else ""}')
    shutil.rmtree(workdir)
  return same


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
