"""Config files, and the command-line arguments that choose one and change its fields.

    --config=FILE[:ARGUMENT]         a Python file; get_config(ARGUMENT) returns a ConfigDict
    --config.section.field=value     changes a field; --noconfig.section.field sets one to False

With schema.py the door to ml_collections.
"""
import importlib.machinery
import importlib.util
import inspect
import json
import os
import stat
import sys
import traceback
import typing
from collections.abc import Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from mtp_jax.config.errors import BadInput, cannot, nearest, one_line
from mtp_jax.config.paths import check_local, expanded
from mtp_jax.config.schema import SECTIONS, Config, check_name


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
  """The arguments that choose or change a config, checked before any program runs; and all others.

  Raises:
    BadInput: there is no such file or field, a field is given twice, or a flag is not written
    --name=value.
  """
  arguments = _with_values(arguments)
  ours = [argument for argument in arguments if _is_about_config(argument)]
  names = [_name(argument) for argument in ours]
  check_given_once(names)
  for argument, name in zip(ours, names):
    if name == 'config':
      if '=' not in argument:
        raise BadInput(f'{argument}: flags are written --name=value, such as '
                       '--config=configs/tiny.py')
      _check_exists('config', argument.partition('=')[2])
      continue
    check_name(name.removeprefix('no').removeprefix('config.'))
  return ours, [argument for argument in arguments if not _is_about_config(argument)]


def check_given_once(names: Sequence[str]) -> None:
  """Raises BadInput for a flag that is given twice."""
  for name in names:
    if names.count(name) > 1:
      raise BadInput(f'--{name}: given {names.count(name)} times; give it once')


def _with_values(arguments: Sequence[str]) -> list[str]:
  """The arguments, --config.section.field VALUE written as --config.section.field=VALUE."""
  joined = []
  for argument in arguments:
    last = joined[-1] if joined else ''
    if last.startswith('--config.') and '=' not in last and not _is_boolean(last) and argument[:1] != '-':
      joined[-1] = f'{last}={argument}'
    else:
      joined.append(argument)
  return joined


def _is_boolean(argument: str) -> bool:
  section, _, field = argument.removeprefix('--config.').partition('.')
  return section in SECTIONS and typing.get_type_hints(SECTIONS[section]).get(field) is bool


def load(arguments: Sequence[str], flag: str = 'config') -> Config:
  """The config that --config=FILE and overrides describe.

    load(['--config=configs/tiny.py', '--config.train.steps=200'])

  Args:
    flag: the name of --config in messages.

  Raises:
    BadInput: there is no such file, it fails or returns something else, or a value does not fit its
    field.
  """
  config = _run_file(flag, path(arguments))
  overrides = [argument for argument in arguments if _name(argument) != 'config']
  values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict('config', config, flag_values=values, lock_config=True,
                                    sys_argv=['', *overrides])
  except Exception as error:
    raise BadInput(f'--{flag}={path(arguments)}: lacks a field that is set ({one_line(error)}); get_config() must '
                   'return Config(...).to_config_dict()') from None
  try:
    values(['', *overrides])
    chosen = values.config.to_dict()
  except Exception as error:  # names the flag itself
    raise BadInput(one_line(error)) from None
  return Config.from_dict(chosen)


def _run_file(flag: str, value: str) -> ml_collections.ConfigDict:
  """What get_config of FILE[:ARGUMENT] returns.

  Raises:
    BadInput: the file, which is a program, fails, has no get_config, or one that does not take the
      argument; or it returns something else.
  """
  where, file = f'--{flag}={value}', _check_exists(flag, value)
  _check_is_no_json(where, file)
  loader = importlib.machinery.SourceFileLoader('mtp_jax_config_file', file)
  spec = importlib.util.spec_from_file_location(loader.name, file, loader=loader)
  module = importlib.util.module_from_spec(spec)
  sys.modules[loader.name] = module
  try:
    loader.exec_module(module)
    if not callable(getattr(module, 'get_config', None)):
      raise BadInput('has no function get_config')
    config = module.get_config(*_argument(value, module.get_config))
  except BadInput as error:
    raise BadInput(f'{where}: {error}') from None
  except KeyboardInterrupt:
    raise
  except BaseException as error:  # a config may exit, or raise what is no Exception
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    line = f' (line {lines[-1]})' if lines else ''
    raise BadInput(one_line(f'{where}: {type(error).__name__}: {error}{line}')) from None
  if not isinstance(config, ml_collections.ConfigDict):
    returned = type(config).__name__
    raise BadInput(f'{where}: get_config() returned {returned}, but must return '
                   'Config(...).to_config_dict()')
  return config


def _check_is_no_json(where: str, file: str) -> None:
  """Raises BadInput for a file that cannot be read or holds JSON, which fails as a program."""
  with cannot('read', where, 'make it readable, or give another file'), open(file, 'rb') as stream:
    content = stream.read()
  try:
    is_json = isinstance(json.loads(content), dict | list)
  except (ValueError, RecursionError):
    is_json = False
  if is_json:
    raise BadInput(f'{where}: is JSON; a config is a Python file with a function get_config, such as configs/tiny.py')


def _argument(value: str, get_config) -> list[str]:
  """ARGUMENT of FILE:ARGUMENT, [] without one. Raises BadInput if get_config does not take it."""
  file, colon, argument = value.partition(':')
  arguments = [argument] if colon else []
  try:
    inspect.signature(get_config).bind(*arguments)
  except TypeError:
    signature = f'get_config{inspect.signature(get_config)}'
    fix = f'takes no argument; write {file}' if colon else f'needs an argument; write {file}:ARGUMENT'
    raise BadInput(f'{signature} {fix}') from None
  return arguments


def path(arguments: Sequence[str]) -> str:
  """FILE[:ARGUMENT] of --config=FILE[:ARGUMENT].

  Raises:
    BadInput: it is missing.
  """
  for argument in arguments:
    if _name(argument) == 'config':
      return argument.partition('=')[2]
  raise BadInput('--config: missing; see --help')


def _name(argument: str) -> str:
  return argument.lstrip('-').partition('=')[0]


def _is_about_config(argument: str) -> bool:
  name = _name(argument)
  return argument.startswith('-') and (name == 'config'
                                       or name.removeprefix('no').startswith('config.'))


def _check_exists(flag: str, value: str) -> str:
  """The path of the file of FILE[:ARGUMENT]. Raises BadInput if there is none."""
  file = expanded(value.partition(':')[0], f'--{flag}')
  check_local(file, f'--{flag}')
  if not file:
    raise BadInput(f'--{flag}: empty; give a Python file, such as configs/tiny.py')
  with cannot('read', f'--{flag}={file}', 'make it readable, or give another file'):
    try:
      mode = os.stat(file).st_mode
    except (FileNotFoundError, NotADirectoryError):
      mode = None
    folder = file if mode and stat.S_ISDIR(mode) else os.path.dirname(file) or '.'
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) and not (mode and stat.S_ISREG(mode)) else []
  if mode and stat.S_ISREG(mode):
    return file
  configs = [os.path.join(folder, name) for name in names if name.endswith('.py')]
  if mode:
    what = 'is a folder' if stat.S_ISDIR(mode) else 'is no regular file'
    raise BadInput(f'--{flag}={file}: {what}; give a Python file' + (f', such as {configs[0]}' if configs else ''))
  raise BadInput(f'--{flag}={file}: no such file'
                 + (f'; {nearest(file, configs)}' if configs else ''))
