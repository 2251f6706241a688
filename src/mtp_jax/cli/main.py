"""python -m mtp_jax COMMAND: train, evaluate, generate, inspect and measure.

Exit codes: 0 done; 1 the run failed, or another process of its job did; 2 bad input, one line says what to mend; 130 and 143: interrupted by
Ctrl-C or SIGTERM, after saving a checkpoint to resume from.
"""
import dataclasses
import typing

from absl import flags
from ml_collections import config_flags

from mtp_jax import config as schema
from mtp_jax.cli import data, measure, run
from mtp_jax.cli.command import Command, _check_file, _exit_code, _table
from mtp_jax.config import BadInput, Config

COMMANDS = {**run.COMMANDS, **data.COMMANDS, **measure.COMMANDS}


def main(arguments: list[str]) -> int:
  return _exit_code(lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
  words = 2 if arguments[:1] == ['benchmark'] and arguments[1:2] and not arguments[1].startswith('-') else 1
  name, rest = ' '.join(arguments[:words]), arguments[words:]
  if name in ('', '--help', '-h', 'help') or (name == 'benchmark'):
    print(_overview())
    return 0
  if name not in COMMANDS:
    raise BadInput(f'{name}: no such command; {schema.nearest(name, COMMANDS)}')
  command = COMMANDS[name]
  if '--help' in rest or '-h' in rest:
    print(_help(name, command))
    return 0
  values = flags.FlagValues()
  for flag, default, meaning in command.flags:
    if flag == 'config':
      _check_overrides(rest)
      config_flags.DEFINE_config_file(flag, default, meaning, flag_values=values, lock_config=True, sys_argv=[name, *rest])
    else:
      define = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, float: flags.DEFINE_float}.get(type(default), flags.DEFINE_string)
      define(flag, default, meaning, flag_values=values)
  known = [flag for flag, *_ in command.flags]
  for argument in rest:
    flag = argument.lstrip('-').partition('=')[0].partition('.')[0]
    if argument.startswith('-') and flag not in known and flag.removeprefix('no') not in known:
      raise BadInput(f'{argument}: {name} has no such flag; {schema.nearest(flag, known)}')
  try:
    extra = values([name, *rest])[1:]
  except BadInput:
    raise
  except (flags.Error, OSError, ValueError, TypeError) as error:
    raise BadInput(' '.join(str(error).split())) from None
  except Exception as error:  # whatever a config file, which is a program, may raise
    raise BadInput(' '.join(f'--config: {type(error).__name__}: {error}'.split())) from None
  if extra:
    raise BadInput(f'{extra[0]}: not expected here; flags are written --name=value')
  return command.run(values)


def _check_overrides(arguments: list[str]) -> None:
  """Names of --config.section.field=value, and the config file, before anything is loaded."""
  names = [argument.lstrip('-').partition('=')[0] for argument in arguments]
  for name in names:
    if name.startswith('config.') and names.count(name) > 1:
      raise BadInput(f'--{name}: given {names.count(name)} times; say it once')
  for argument in arguments:
    flag, equals, value = argument.lstrip('-').partition('=')
    if flag.removeprefix('no').startswith('config.'):
      schema.check_name(flag.removeprefix('no').removeprefix('config.'))
    if flag == 'config':
      if not equals:
        raise BadInput(f'{argument}: flags are written --name=value, such as --config=configs/tiny.py')
      _check_file('config', value)


def _overview() -> str:
  rows = _table(('command', ''), [(name, command.summary) for name, command in COMMANDS.items()])[1:]
  return '\n'.join(['python -m mtp_jax COMMAND [--flag=value ...]', '', *('  ' + row for row in rows), '', 'python -m mtp_jax COMMAND --help tells its flags.'])


def _help(name: str, command: Command) -> str:
  shown = lambda default: '' if default in (None, '') else f'[{default}]'
  rows = _table(('', '', ''), [(f'--{flag}', shown(default), meaning) for flag, default, meaning in command.flags])[1:]
  lines = [f'python -m mtp_jax {name}: {command.summary}', '', command.run.__doc__, '', *('  ' + row for row in rows), '',
           f'python -m mtp_jax {command.example}']
  if name == 'train':
    fields = []
    for section, kind in typing.get_type_hints(Config).items():
      fields += [(f'--config.{section}.{field.name}', f'[{field.default}]', field.metadata['meaning']) for field in dataclasses.fields(kind)]
    lines += ['', 'fields of a config, with the defaults that a config file may change:', '', *('  ' + row for row in _table(('', '', ''), fields)[1:])]
  return '\n'.join(lines)

