"""What every command needs: its flags, the config, the model, printing results, the exit code."""
import time

STARTED = time.perf_counter()

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence

from mtp_jax.config import BadInput, Config, files

CONFIG = ('config', None,
          'the experiment, such as configs/tiny.py; --config.section.field=value changes a field')
WORKDIR = ('workdir', None, 'folder of the run')
STEP = ('step', -1, 'step of the checkpoint; -1 is the newest')
JSON = ('json', False, 'print one JSON object on the last line')


@dataclasses.dataclass(frozen=True)
class Command:
  """A command: what it calls, one line for the overview, its flags (name, default, meaning), and a
  line to copy.

  run: takes absl's FlagValues, returns the exit code. Its docstring is shown by --help.
  """
  run: Callable
  summary: str
  flags: tuple
  example: str


def exit_code_of(run: Callable[[], int]) -> int:
  """The exit code that `run` returns; an error that a user can fix is printed as one line."""
  try:
    return run()
  except BadInput as error:
    print(f'mtp_jax: {error}', file=sys.stderr)
    return 2
  except OSError as error:
    print(f'mtp_jax: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('mtp_jax: interrupted', file=sys.stderr)
    return 130


def need(flags, name: str) -> None:
  """Raises BadInput if a flag that has no default was not given."""
  if flags[name].value is None:
    raise BadInput(f'--{name}: missing; see --help')


def need_at_least(flags, **minima) -> None:
  """Raises BadInput if a flag is below its minimum."""
  for name, minimum in minima.items():
    if flags[name].value < minimum:
      raise BadInput(f'--{name}={flags[name].value}: must be at least {minimum}')


def config_of(flags) -> Config:
  """The config of --config=FILE and its overrides."""
  need(flags, 'config')
  return files.load(flags.config)


def model_of(flags):
  """The `LanguageModel` of --workdir and --step."""
  need(flags, 'workdir')
  need_at_least(flags, step=-1)
  step = None if flags.step < 0 else flags.step
  from mtp_jax.checkpoint.record import read_record
  read_record(flags.workdir, step)  # refuses a wrong folder before JAX starts
  from mtp_jax.lm import load
  return load(flags.workdir, step)


def use_cpu_devices(count: int) -> None:
  """Splits the CPU into `count` devices, unless XLA_FLAGS already does; before JAX starts."""
  flag = 'xla_force_host_platform_device_count'
  if flag not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'--{flag}={count} {os.environ.get("XLA_FLAGS", "")}'


def print_result(flags, values: dict, lines: Iterable[str]) -> None:
  """Prints `values` as one JSON object with --json, else the lines."""
  from mtp_jax.report.log import finite
  print(json.dumps(finite(values)) if flags.json else '\n'.join(lines))


def table(head: Sequence, rows: Iterable[Sequence]) -> list[str]:
  """Lines of a table in columns as wide as their widest cell."""
  cells = [[str(cell) for cell in row] for row in [head, *rows]]
  widths = [max(map(len, column)) for column in zip(*cells)]
  return ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
          for row in cells]
