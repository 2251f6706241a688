"""What every command needs: its flags, the config, the model, printing results, the exit code."""
import time

STARTED = time.perf_counter()

import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence

from mtp_jax.config import BadInput, Config, files
from mtp_jax.config.errors import explain, in_words

CONFIG = ('config', None,
          'the experiment, such as configs/tiny.py; --config.section.field=value changes a field')
WORKDIR = ('workdir', None, 'folder of the run; may be in a bucket, gs://BUCKET/FOLDER')
TOKENIZER = ('tokenizer', '', "a SentencePiece model file; '': the one that --workdir keeps")
DATA = ('data', '', "prepared sets, or text files and folders of them, separated by commas; '': those of the "
                    'training run')
PATHS = {'workdir', 'tokenizer', 'data', 'output', 'plot', 'drafter', 'prompt_file', 'text_file'}  # where ~ is the home
FOLDERS = {'workdir', 'drafter'}  # that may be in a bucket
LOCAL = {'plot', 'prompt_file'}  # that may not be addresses
STEP = ('step', -1, 'step of the checkpoint; -1 is the newest')
MESH = ('mesh', '', "devices along each axis, such as tensor=4,fsdp=2; '': the config's mesh if there are "
                    'enough devices, else one device')
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
  """The exit code that `run` returns; an error that a user or the machine has caused is printed as
  one line, and raised under `python -X dev`.

  Raises:
    KeyboardInterrupt: the user did not wait for the end.
  """
  try:
    return run()
  except BrokenPipeError:  # nobody reads what is printed
    return 128 + signal.SIGPIPE
  except Exception as error:
    explained = explain(error)
    if explained is None or sys.flags.dev_mode:
      raise
    line, code = explained
    from mtp_jax.report.display import print_stderr
    print_stderr(f'mtp_jax: {line}')
    return code


def open_standard_streams() -> None:
  """Makes stdout print any character, and opens what the process was started without: the next file
  would take its place, and be written to.
  """
  for descriptor, name in enumerate(('stdin', 'stdout', 'stderr')):
    try:
      os.fstat(descriptor)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, this one
      setattr(sys, name, open(descriptor, 'r' if name == 'stdin' else 'w', closefd=False))
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')


def _drop_stdout() -> None:
  """What is printed from now on, and what waits in the buffer, goes nowhere."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, sys.stdout.fileno())
  os.close(nowhere)


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
  mesh = mesh_sizes(flags.mesh) if 'mesh' in flags and flags.mesh else None
  workdir, step = flags.workdir, None if flags.step < 0 else flags.step
  from mtp_jax.formats.detect import is_folder
  if not is_folder(workdir):  # else of another framework
    from mtp_jax.checkpoint.record import locate, read_record
    workdir, step = locate(workdir, step)
    read_record(workdir, step, note=lambda line: None)  # refuses a wrong folder before JAX starts
  from mtp_jax.lm import load
  data = tuple(flags.data.split(',')) if 'data' in flags and flags.data else None
  return load(workdir, step, tokenizer=flags.tokenizer or None, data=data, mesh=mesh)


def mesh_sizes(text: str) -> dict[str, int]:
  """{'tensor': 4, 'fsdp': 2} of 'tensor=4,fsdp=2'."""
  parts = text.split(',')
  sizes = dict(part.partition('=')[::2] for part in parts)
  if len(sizes) < len(parts) or not all(size.isdecimal() for size in sizes.values()):
    raise BadInput(f'--mesh={text}: must be the devices along each axis, such as tensor=4,fsdp=2')
  return {axis: int(size) for axis, size in sizes.items()}


def use_cpu_devices(count: int) -> None:
  """Splits the CPU into `count` devices, unless XLA_FLAGS already does; before JAX starts."""
  flag = 'xla_force_host_platform_device_count'
  if flag not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'--{flag}={count} {os.environ.get("XLA_FLAGS", "")}'


def print_result(flags, values: dict, lines: Iterable[str]) -> None:
  """Prints `values` as one JSON object with --json, else the lines; if anybody reads them."""
  from mtp_jax.report.log import finite
  with contextlib.suppress(BrokenPipeError):  # the work is done, whoever reads of it
    say(json.dumps(finite(values)) if flags.json else '\n'.join(lines))


def say(text: str, end: str = '\n') -> None:
  """Prints on stdout at once.

  Raises:
    BrokenPipeError: nobody reads it.
    OSError: it cannot be written.
  """
  try:
    print(text, end=end, flush=True)
  except OSError as error:
    _drop_stdout()
    if isinstance(error, BrokenPipeError):
      raise
    raise OSError(f'stdout: cannot be written ({in_words(error)}); print to another place') from error


def table(head: Sequence, rows: Iterable[Sequence]) -> list[str]:
  """Lines of a table in columns as wide as their widest cell."""
  cells = [[str(cell) for cell in row] for row in [head, *rows]]
  widths = [max(map(len, column)) for column in zip(*cells)]
  return ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
          for row in cells]
