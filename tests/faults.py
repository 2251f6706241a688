"""The fault matrix of training: injects faults, and counts those that a run survives and those that nothing tells of.

    python tests/faults.py [--only=NAME,...] [--share=0.1] [--json]

    survived        the run or the restore goes on; bad input is refused in one line with exit code 2
    silent errors   what was loaded or logged differs from the run without the fault, and no line tells it
    steps lost      at most, by one fault: steps done before it that must be run again

Progress goes to stderr. Exit code 1 if a fault was not survived, or an error was silent.
"""
import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
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
import traceback

from xla_flags import FAST

ROOT = pathlib.Path(__file__).parents[1]
os.environ |= {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': os.environ.get('XLA_FLAGS', FAST)}
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.pytest_cache' / 'programs'))
sys.path += [str(ROOT / 'tests' / room) for room in ('checkpoint', 'cli', 'train')]

import buckets
import kills
import pytest
import test_damage
import test_record
import test_tokenizer
import test_typos
import test_workdir
from costs_of_safety import costs
from experiments import experiment, log_of, random_state, same_bits, write, write_config_file

from mtp_jax.checkpoint import store
from mtp_jax.checkpoint.record import FOLDER
from mtp_jax.cli.command import table
from mtp_jax.cli.main import main as mtp_jax
from mtp_jax.config import folder_path
from mtp_jax.data.progress import quiet
from mtp_jax.mesh import make_mesh
from mtp_jax.train.fit import fit

PROGRAMS = os.environ['JAX_COMPILATION_CACHE_DIR']
STOP_SECONDS = 10


@dataclasses.dataclass
class Row:
  """One line of the table."""
  fault: str
  injected: int = 0
  survived: int = 0
  silent: int = 0
  lost: int = 0

  def is_good(self) -> bool:
    return self.injected == self.survived and not self.silent


@dataclasses.dataclass
class Place:
  """Where a row works, how many of its repetitions are asked for, its random numbers, and who gets its progress."""
  folder: pathlib.Path
  share: float
  rng: random.Random

  def times(self, full: int) -> int:
    return max(1, round(full * self.share))

  def note(self, line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def saved(folder: pathlib.Path):
  """A config, its states of the steps 3 and 6, and the workdir where both were saved."""
  config, workdir = experiment(folder), folder / 'run'
  states = {step: random_state(config, seed=step) for step in (3, 6)}
  with contextlib.closing(store.Writer(workdir, 3)) as writer:
    for step, state in states.items():
      write(workdir, config, state, step, writer=writer)
  return config, states, workdir


def restore_damaged(row: Row, place: Place, checkpoints, damage, must_fall_back: bool) -> None:
  """Damages a copy of the newest checkpoint, step 6, and restores: what was saved, or with a line step 3."""
  config, states, workdir = checkpoints
  with tempfile.TemporaryDirectory(dir=place.folder) as copy:
    copy = shutil.copytree(workdir, pathlib.Path(copy) / 'run')
    what = damage(copy / FOLDER / '6')
    row.injected += 1
    try:
      (step, state), lines = test_damage.restore(config, copy, make_mesh(config.mesh))
    except Exception as error:
      return place.note(f'{row.fault}: {what}: NOT RESTORED: {error!r}')
  is_told = step == 6 and not must_fall_back or len(lines) == 1
  is_silent = not (same_bits(state, states[step]) and is_told)
  row.survived, row.silent, row.lost = row.survived + 1, row.silent + is_silent, max(row.lost, 6 - step)
  if is_silent:
    place.note(f'{row.fault}: {what}: A SILENT ERROR, step {step}')


def bit_flips(place: Place) -> list[Row]:
  """One bit of one file; without a manifest, as after a kill before it was written, the fingerprint alone tells."""
  checkpoints, rows = saved(place.folder), []
  for has_manifest, part in itertools.product((True, False), ('parameters', 'training')):
    name = 'moments' if part == 'training' else part
    row = Row(f'bit flipped in {name}' + ('' if has_manifest else ', no manifest'))

    def flip(newest, has_manifest=has_manifest, part=part):
      if not has_manifest:
        for path in newest.glob('manifest*'):
          path.unlink()
      path = place.rng.choice(sorted(path for path in (newest / part).rglob('*') if path.is_file()))
      content, bit = bytearray(path.read_bytes()), place.rng.randrange(8 * path.stat().st_size)
      content[bit // 8] ^= 1 << bit % 8
      path.write_bytes(content)
      return f'bit {bit} of {path.relative_to(newest)}'

    for _ in range(place.times(60 if has_manifest else 20)):
      restore_damaged(row, place, checkpoints, flip, must_fall_back=has_manifest)
    rows.append(row)
  return rows


def damaged_files(place: Place) -> list[Row]:
  """Every file cut off, emptied and removed, every folder removed."""
  checkpoints, row = saved(place.folder), Row('file or folder of a checkpoint damaged')
  newest = checkpoints[2] / FOLDER / '6'
  cases = [(path.relative_to(newest), damage) for path in sorted(newest.rglob('*'))
           for damage in ('cut off', 'empty', 'removed') if path.is_file() or damage == 'removed']
  for path, name in place.rng.sample(cases, place.times(len(cases))):
    def damage(newest, path=path, name=name):
      test_damage.DAMAGES[name](newest / path)
      return f'{path} {name}'
    is_needed = not path.name.startswith('manifest') and ((newest / path).is_file() or any((newest / path).rglob('*')))
    restore_damaged(row, place, checkpoints, damage, must_fall_back=is_needed)
  return [row]


def training_in(place: Place, workdir: pathlib.Path) -> list[str]:
  return kills.train(workdir, place.folder / 'cache', kills.FIELDS | {'train.checkpoint_every': 10})


def start(place: Place, workdir: pathlib.Path) -> subprocess.Popen:
  """Training, which nobody waits for yet."""
  return kills._start(training_in(place, workdir), PROGRAMS)


def undisturbed(place: Place) -> tuple[list[dict], float]:
  """The log of a run without faults, and its seconds."""
  began = time.perf_counter()
  whole = start(place, place.folder / 'whole')
  if kills.ended([whole], kills.PATIENCE_SECONDS) != [0]:
    raise RuntimeError(whole.output)
  return log_of(place.folder / 'whole'), time.perf_counter() - began


def steps_not_saved(workdir: pathlib.Path) -> int:
  """How many steps the log has beyond the newest checkpoint."""
  return max(0, max(kills.losses(workdir), default=0) - max(kills.checkpoints(workdir), default=0))


def sigterm(place: Place) -> list[Row]:
  """At random moments after the start of training: a checkpoint is saved and the exit code is 143."""
  row, longest, done = Row('SIGTERM'), 0.0, 'step {0} of {0}'.format(kills.FIELDS['train.steps'])
  expected, seconds = undisturbed(place)
  for n in itertools.count():
    workdir, before = place.folder / f'stopped-{n}', row.injected
    while row.injected < place.times(20):
      events, starts = workdir / 'events.jsonl', row.injected - before
      process, began = start(place, workdir), time.monotonic()
      while (process.poll() is None and time.monotonic() - began < kills.PATIENCE_SECONDS
             and not (events.exists() and events.read_text().count('"start"') > starts)):
        time.sleep(0.02)
      time.sleep(place.rng.uniform(0, seconds / 3))
      sent = time.perf_counter()
      process.send_signal(signal.SIGTERM)
      [code] = kills.ended([process], kills.PATIENCE_SECONDS)
      if code == 0 or done in process.output:  # it had ended before
        break
      longest = max(longest, time.perf_counter() - sent)
      row.injected, row.survived = row.injected + 1, row.survived + (code == 143)
      row.lost = max(row.lost, steps_not_saved(workdir))
      place.note(f'SIGTERM {row.injected}: exit code {code} after {time.perf_counter() - sent:.1f} s, at step '
                 f'{max(kills.checkpoints(workdir), default=0)}' + ('' if code == 143 else f': {process.output}'))
    last = kills.run(training_in(place, workdir), programs=PROGRAMS)
    row.survived -= last.returncode != 0
    row.silent += last.returncode == 0 and log_of(workdir) != expected
    if row.injected >= place.times(20):
      slow = ': MORE, which a busy machine explains' if longest > STOP_SECONDS else ''
      place.note(f'SIGTERM: ended after {longest:.1f} s at most; {STOP_SECONDS} s are the bound{slow}')
      return [row]


def killed(row: Row, place: Place, kill, full: int, home=None) -> list[Row]:
  """Counts what a function of kills.py notes; home: where the workdirs are, if not in the folder of the place."""
  unclear = 0

  def note(line):
    nonlocal unclear
    place.note(line)
    row.silent += 'OTHER LOSSES' in line
    unclear += 'NO CLEAR END' in line
    if ' times; ' in line:
      row.injected += 1
      row.lost = max([row.lost, *map(steps_not_saved, (home or place.folder).glob('killed-*'))])

  same = kill(place.folder, place.times(full), place.rng, note)
  row.survived = row.injected - max(unclear, not same and not row.silent)
  return [row]


def kill(place: Place) -> list[Row]:
  return killed(Row('kill -9 of training'), place, kills.kill_train, 50)


def kill_in_bucket(place: Place) -> list[Row]:
  """A server on localhost stands for the bucket."""
  with buckets.served() as environment, pytest.MonkeyPatch.context() as patch:
    for name, value in environment.items():
      patch.setenv(name, value)
    home = folder_path(f'gs://{buckets.BUCKET}/runs')
    kill = functools.partial(kills.kill_train, home=home)
    return killed(Row('kill -9 of training in a bucket'), place, kill, 10, home)


def kill_job(place: Place) -> list[Row]:
  return killed(Row('kill -9 of one of two processes'), place, kills.kill_job, 12)


def bad_steps(place: Place) -> list[Row]:
  """15 of 40 steps are bad; pytest compares parameters and moments with those of the other 25 alone, to the bit."""
  test = 'tests/train/test_guards.py::test_40_steps_of_which_15_are_bad_are_bitwise_the_other_25[parallel-host]'
  done = subprocess.run([sys.executable, '-m', 'pytest', '-n', '0', test], cwd=ROOT, text=True, capture_output=True,
                        env=os.environ | {'PYTHONPATH': str(ROOT / 'src')})
  is_same = done.returncode == 0
  place.note('15 bad steps of 40: ' + ('the same bits' if is_same else done.stdout[-3000:]))
  return [Row('bad steps among 40', 15, 15 * is_same, int(not is_same))]


def full_disk(place: Place) -> list[Row]:
  """No file can grow, three times in one run: the run goes on, and every line of its log is there at the end."""
  fields = {'steps': 30, 'checkpoint_every': 2, 'evaluate_every': 0, 'log_every': 1}
  config, row, lines = experiment(place.folder, train=fields), Row('disk full for some steps', 3), []
  whole, workdir = place.folder / 'whole', place.folder / 'run'
  fit(config, whole, note=quiet)
  full = [step + 9 * n for n in range(3) for step in range(4, 8)]
  with pytest.MonkeyPatch.context() as patch:
    outcome = test_workdir.with_a_full_disk(patch, full, lambda: fit(config, workdir, note=lines.append))
  refused = [line for line in lines if 'could not be written' in line]
  for line in refused:
    place.note(line)
  noticed = {(int(line.split()[1].rstrip(':')) - full[0]) // 9 for line in refused}  # 'step 6: a checkpoint could not'
  row.survived = len(noticed) * (outcome.step == 30)
  row.silent = int(log_of(workdir) != log_of(whole))
  row.lost = steps_not_saved(workdir)
  return [row]


def two_starts(place: Place) -> list[Row]:
  """Two processes of their own in one workdir, at nearly the same time: one trains, the other is refused."""
  row, (expected, _) = Row('second start in one workdir'), undisturbed(place)
  for n in range(place.times(10)):
    workdir = place.folder / f'twice-{n}'
    first = start(place, workdir)
    time.sleep(place.rng.uniform(0, 0.5))
    processes = [first, start(place, workdir)]
    codes = kills.ended(processes, kills.PATIENCE_SECONDS)
    refusal = max(processes, key=lambda process: process.returncode).output.splitlines()[-1]
    told = sum(line.startswith('mtp_jax: ') for process in processes for line in process.output.splitlines())
    is_refused = sorted(codes) == [0, 2] and told == 1 and refusal.startswith(f'mtp_jax: --workdir={workdir}: ')
    row.injected, row.survived = row.injected + 1, row.survived + is_refused
    row.silent += log_of(workdir) != expected
    row.lost = max(row.lost, steps_not_saved(workdir))
    place.note(f'two starts {n + 1}: exit codes {codes}; {refusal}')
  return [row]


def is_refused(arguments: list[str], ending: str = '') -> bool:
  """Whether a command ends with exit code 2 and one line."""
  with contextlib.redirect_stderr(io.StringIO()) as stderr:
    code = mtp_jax(arguments)
  line = stderr.getvalue()
  return code == 2 and line.startswith('mtp_jax: ') and line.count('\n') == 1 and line.endswith(f'{ending}\n')


def attempt(row: Row, place: Place, count: int, holds) -> None:
  """Counts so many faults; an exception is one that was not survived."""
  row.injected += count
  try:
    row.survived += count * bool(holds())
  except Exception:
    place.note(f'{row.fault}: {traceback.format_exc()}')


def typos(place: Place) -> list[Row]:
  """Mistyped names of fields: one line that names the field that was meant."""
  row, path = Row('mistyped field'), place.folder / 'tiny.py'
  write_config_file(path, experiment(place.folder))
  for typed, meant in place.rng.sample(sorted(test_typos.MEANT.items()), place.times(30)):
    arguments = ['train', f'--config={path}', f'--workdir={place.folder / "new"}', f'--config.{typed}=1']
    attempt(row, place, 1, lambda: is_refused(arguments, f"; did you mean '{meant}'?"))  # noqa: B023
  return [row]


def hostile_files(place: Place) -> list[Row]:
  """Records of a checkpoint and models of a tokenizer that hold anything: one line, or read right."""
  commands, records, models = Row('hostile file, by a command'), Row('hostile record'), Row('damaged tokenizer model')
  path, new = place.folder / 'tiny.py', place.folder / 'new'
  write_config_file(path, experiment(place.folder))
  for text in place.rng.sample(sorted(test_record.TEXTS.values()), place.times(len(test_record.TEXTS))):
    workdir = test_record.put(place.folder / 'hostile', text)
    attempt(commands, place, 1, lambda: is_refused(['inspect', f'--workdir={workdir}']))  # noqa: B023
    model = place.folder / 'model'
    model.write_bytes(text)
    arguments = ['train', f'--config={path}', f'--workdir={new}', f'--config.data.tokenizer={model}']
    attempt(commands, place, 1, lambda: is_refused(arguments))  # noqa: B023

  read = test_record.test_a_record_with_anything_in_one_place_is_read_or_refused_in_one_line
  for keys in place.rng.sample(test_record.PLACES, place.times(len(test_record.PLACES))):
    attempt(records, place, len(test_record.VALUES), lambda: read(place.folder, keys) is None)  # noqa: B023
  fitting = {'fitting': test_tokenizer.train(place.folder / 'fitting', **test_tokenizer.FITTING)}
  load = test_tokenizer.test_a_damaged_model_is_refused_in_one_line_or_still_gives_every_byte_back
  attempt(models, place, 600, lambda: load(fitting) is None)
  return [commands, records, models]


FAULTS = {faults.__name__: faults for faults in (
    bit_flips, damaged_files, sigterm, kill, kill_in_bucket, kill_job, bad_steps, full_disk, two_starts, typos,
    hostile_files)}


def rows_of(name: str, place: Place) -> list[Row]:
  """The rows of a kind of fault; if it ends with an exception, one that is not good."""
  place.folder.mkdir()
  began = time.perf_counter()
  try:
    rows = FAULTS[name](place)
  except Exception:
    place.note(traceback.format_exc())
    rows = [Row(f'{name} (ended by an exception)', 1)]
  place.note(f'{name}: {time.perf_counter() - began:.0f} s')
  return rows


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default=','.join([*FAULTS, 'costs']), help='names, with commas; all: %(default)s')
  parser.add_argument('--share', type=float, default=1.0, help='of the repetitions')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--json', action='store_true', help='prints one JSON object in place of the table')
  given = parser.parse_args()
  names = given.only.split(',')
  if unknown := set(names) - {*FAULTS, 'costs'}:
    parser.error(f'--only: no fault is called {", ".join(sorted(unknown))}; there are {", ".join([*FAULTS, "costs"])}')
  if not 0 < given.share <= 1:
    parser.error(f'--share={given.share}: must be above 0 and at most 1')
  with tempfile.TemporaryDirectory() as folder:
    rows = [row for name in FAULTS if name in names
            for row in rows_of(name, Place(pathlib.Path(folder, name), given.share, random.Random(given.seed)))]
    seconds = costs(pathlib.Path(folder, 'costs')) if 'costs' in names else {}
  if given.json:
    print(json.dumps({'share': given.share, 'rows': [dataclasses.asdict(row) for row in rows], 'costs': seconds}))
  else:
    head = ['fault', 'injected', 'survived', 'silent errors', 'steps lost']
    lines = table(head, [dataclasses.astuple(row) for row in rows])
    lines += [f'{name}: {value:.3g}' for name, value in seconds.items()]
    print('\n'.join(lines))
  sys.exit(not all(row.is_good() for row in rows))
