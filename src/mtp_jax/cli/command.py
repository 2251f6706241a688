"""What every command needs: its flags, the config, the report, the exit code."""
import time

STARTED = time.perf_counter()

import dataclasses
import json
import os
import sys
from collections.abc import Callable

import ml_collections
from absl import flags
from ml_collections import config_flags

from mtp_jax import config as schema
from mtp_jax.config import BadInput, Config

CONFIG = ('config', None, 'the experiment, such as configs/tiny.py; --config.section.field=value changes a field')
WORKDIR = ('workdir', None, 'folder of the run')
STEP = ('step', -1, 'step of the checkpoint; -1 is the newest')
JSON = ('json', False, 'print one JSON object on the last line')


@dataclasses.dataclass(frozen=True)
class Command:
  run: Callable
  summary: str
  flags: tuple
  example: str


def _exit_code(work: Callable[[], int]) -> int:
  """That of the work, or of what it raised, which is told in a line."""
  try:
    return work()
  except BadInput as error:
    print(f'mtp_jax: {error}', file=sys.stderr)
    return 2
  except OSError as error:
    print(f'mtp_jax: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('mtp_jax: interrupted', file=sys.stderr)
    return 130


def _check_file(flag: str, value: str) -> None:
  path = value.partition(':')[0]
  if not os.path.isfile(path):
    folder = os.path.dirname(path) or '.'
    there = sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith('.py')) if os.path.isdir(folder) else []
    raise BadInput(f'--{flag}={path}: no such file' + (f'; {schema.nearest(path, there)}' if there else ''))


def _config(f) -> Config:
  _need(f, 'config')
  try:
    values = f.config
  except OSError as error:
    raise BadInput(f'--config: {" ".join(str(error).split())}') from None
  if not isinstance(values, ml_collections.ConfigDict):
    raise BadInput(f'--config: get_config() returned {type(values).__name__}, but must return Config(...).to_config_dict()')
  return Config.from_dict(values.to_dict())


def _load_config(path: str) -> Config:
  """A second config file, without overrides."""
  _check_file('against', path)
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', None, '', flag_values=values, lock_config=True, sys_argv=['', f'--config={path}'])
  try:
    values(['', f'--config={path}'])
  except Exception as error:  # whatever a config file, which is a program, may raise
    raise BadInput(' '.join(f'--against={path}: {type(error).__name__}: {error}'.split())) from None
  return _config(values)


def _path(f) -> str:
  return config_flags.get_config_filename(f['config'])


def _fake_devices(count: int) -> None:
  """Has JAX, which has not started yet, see so many CPU devices, unless the user has said how many."""
  if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={count} {os.environ.get("XLA_FLAGS", "")}'


def _need(f, flag: str) -> None:
  if f[flag].value is None:
    raise BadInput(f'--{flag}: missing; see --help')


def _need_at_least(f, **least) -> None:
  for flag, number in least.items():
    if f[flag].value < number:
      raise BadInput(f'--{flag}={f[flag].value}: must be at least {number}')


def _load(f):
  _need(f, 'workdir')
  _need_at_least(f, step=-1)
  from mtp_jax.checkpoint.record import metadata
  metadata(f.workdir, None if f.step < 0 else f.step)  # complains before JAX starts
  from mtp_jax.lm import load
  return load(f.workdir, None if f.step < 0 else f.step)


def _report(f, values: dict, lines: list[str]) -> None:
  from mtp_jax.report.log import finite
  print(json.dumps(finite(values)) if f.json else '\n'.join(lines))


def _table(head, rows) -> list[str]:
  cells = [[str(cell) for cell in row] for row in [head, *rows]]
  widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
  return ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
