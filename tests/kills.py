"""Kills `prepare` and `train` at random moments, over and over, and compares what comes out with what an undisturbed run gives.

    python tests/kills.py --kills=50

Of `prepare` the folder must be the same, byte for byte. Of `train` every line of the log must tell the same loss to the last bit, hence the same batches:
nothing repeated, nothing lost. Prints a line a kill; exit code 1 on any difference.
"""
import argparse
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
TRAIN = ['--config=configs/tiny.py', *(f'--config.{field}' for field in (
    'model.width=16', 'model.heads=2', 'model.kv_heads=1', 'model.head_width=8', 'model.feed_forward=32', 'model.layers=3', 'model.futures=2', 'data.length=32',
    'train.batch=2', 'train.steps=100', 'train.log_every=1', 'train.checkpoint_every=5', 'train.evaluate_every=0', 'train.evaluate_rows=2',
    'train.tensorboard=False', 'optimizer.warmup_steps=0'))]


def corpus(folder: pathlib.Path, seed: int = 0) -> None:
  """JSON lines of some size, a compressed file, and a few text files."""
  import gzip
  rng = random.Random(seed)
  folder.mkdir()
  line = lambda: json.dumps({'text': ''.join(rng.choice('abcdefgh \n') for _ in range(rng.randint(1, 3000)))}) + '\n'
  (folder / 'a.jsonl').write_text(''.join(line() for _ in range(5000)) + '{"broken\n')
  with gzip.GzipFile(folder / 'b.jsonl.gz', 'wb', mtime=0) as file:
    file.write(''.join(line() for _ in range(500)).encode())
  for i in range(20):
    (folder / f'{i}.txt').write_text(line())


def command(name: str, *arguments) -> list[str]:
  return [sys.executable, '-m', 'mtp_jax', name, *map(str, arguments)]


def run(arguments: list[str], seconds: float | None = None, programs: pathlib.Path | str = '') -> subprocess.Popen:
  """Runs to the end, or for so long, and then kills it and waits until nothing of it is left. programs: where JAX keeps what it compiled."""
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'PYTHONPATH': str(ROOT / 'src'), 'JAX_COMPILATION_CACHE_DIR': str(programs),
                              'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  try:
    process.output, _ = process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    process.send_signal(signal.SIGKILL)
    process.output, _ = process.communicate()  # ends when the last worker has closed its end
  return process


def contents(folder: pathlib.Path) -> dict[str, str]:
  return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob('*')) if path.is_file()}


def losses(workdir: pathlib.Path) -> dict[int, str]:
  records = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines() if line.endswith('}')]
  return {record['step']: repr(record['loss']) for record in records if record['kind'] == 'train'}


def kill_prepare(folder: pathlib.Path, kills: int, rng: random.Random, say=print) -> bool:
  """Whether the set is the same whenever, and as often as, it was killed."""
  corpus(folder / 'in')
  prepare = lambda output, workers: command('prepare', f'--input={folder / "in"}', f'--output={output}', '--shard_bytes=400000', f'--workers={workers}')
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
  train = lambda name: command('train', f'--workdir={folder / name}', *TRAIN, f'--config.data.cache={folder / "cache"}')
  programs = folder / 'programs'
  run(train('first'), None, programs)
  start = time.perf_counter()
  whole = run(train('whole'), None, programs)
  seconds = time.perf_counter() - start
  assert whole.returncode == 0, whole.output
  wanted, same, done, n = losses(folder / 'whole'), losses(folder / 'first') == losses(folder / 'whole'), 0, 0
  while done < kills:
    workdir, n = folder / f'killed-{n}', n + 1
    while done < kills:
      killed = run(train(workdir.name), rng.uniform(0.3, 1.1) * seconds, programs)
      if killed.returncode != -signal.SIGKILL:
        break
      done += 1
      say(f'train killed {done} times; checkpoints {sorted(int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit())}')
    ended = run(train(workdir.name), None, programs)
    found = losses(workdir)
    same &= ended.returncode == 0 and found == wanted
    say(f'finished: {"the same losses" if found == wanted else "OTHER LOSSES"} {ended.output if ended.returncode else ""}')
    shutil.rmtree(workdir)
  return same


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--kills', type=int, default=50, help='of each command')
  parser.add_argument('--seed', type=int, default=0)
  given = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    folders = [pathlib.Path(folder, name) for name in ('prepare', 'train')]
    for each in folders:
      each.mkdir()
    same = [kill(each, given.kills, random.Random(given.seed)) for kill, each in zip((kill_prepare, kill_train), folders)]
  print(f'prepare: {"the same" if same[0] else "DIFFERENT"}; train: {"the same" if same[1] else "DIFFERENT"}')
  sys.exit(not all(same))
