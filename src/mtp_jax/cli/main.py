"""python -m mtp_jax COMMAND: train, evaluate, score, generate, inspect and measure.

Exit codes: 0 done; 1 the run failed, or another process of its job did; 2 bad input, one line says
what to fix; 129, 130 and 143 interrupted by SIGHUP, Ctrl-C or SIGTERM, after saving a checkpoint to
resume from; 141 nobody reads what is printed. `python -X dev -m mtp_jax` shows a traceback as well.
"""
import dataclasses
import signal
import typing

from absl import flags as absl_flags

from mtp_jax.cli import convert, data, evaluate, measure, plan, report, run
from mtp_jax.cli.command import FOLDERS, LOCAL, PATHS, Command, exit_code_of, open_standard_streams, say, table
from mtp_jax.config import BadInput, Config, check_local, expanded, files, nearest
from mtp_jax.config.paths import check_folder

COMMANDS = {'train': run.COMMANDS['train'], **evaluate.COMMANDS, **run.COMMANDS, **report.COMMANDS, **data.COMMANDS,
            **convert.COMMANDS, **measure.COMMANDS, **plan.COMMANDS}

DEFINE = {bool: absl_flags.DEFINE_boolean, int: absl_flags.DEFINE_integer,
          float: absl_flags.DEFINE_float}


def main(arguments: list[str]) -> int:
  """Runs a command and returns its exit code; `arguments` are those after `python -m mtp_jax`."""
  open_standard_streams()
  try:
    return exit_code_of(lambda: _run(arguments))
  except KeyboardInterrupt:
    from mtp_jax.report.display import print_stderr
    print_stderr('mtp_jax: interrupted')
    return 128 + signal.SIGINT


def _run(arguments: list[str]) -> int:
  of_two_words = arguments[:1] == ['benchmark'] and len(arguments) > 1 and arguments[1][:1] != '-'
  words = 2 if of_two_words else 1
  name, rest = ' '.join(arguments[:words]), arguments[words:]
  if name in ('', '--help', '-h', 'help', 'benchmark'):
    say(_overview())
    return 0
  if name not in COMMANDS:
    raise BadInput(f'{name}: no such command; {nearest(name, COMMANDS)}')
  command = COMMANDS[name]
  if '--help' in rest or '-h' in rest:
    say(_help(name, command))
    return 0
  return command.run(_parse(name, command, rest))


def _parse(name: str, command: Command, arguments: list[str]) -> absl_flags.FlagValues:
  """The values of a command's flags; that of `config` is the list of --config... arguments."""
  defaults = {flag: default for flag, default, _ in command.flags}
  for argument in arguments:
    flag = argument.lstrip('-').partition('=')[0].partition('.')[0]
    known = flag in defaults or flag.removeprefix('no') in defaults
    if argument.startswith('-') and not known:
      raise BadInput(f'{argument}: {name} has no such flag; {nearest(flag, defaults)}')
  config_arguments, others = files.split(arguments)
  names = [argument.lstrip('-').partition('=')[0] for argument in others if argument.startswith('-')]
  files.check_given_once([name if name in defaults else name.removeprefix('no') for name in names])
  values = absl_flags.FlagValues()
  for flag, default, meaning in command.flags:
    define = DEFINE.get(type(default), absl_flags.DEFINE_string)
    define(flag, default, meaning, flag_values=values)
  try:
    words = values([name, *others])[1:]
  except absl_flags.Error as error:
    raise BadInput(' '.join(str(error).split())) from None
  if words:
    raise BadInput(f'{words[0]}: not expected here; flags are written --name=value')
  if config_arguments:
    values.config = config_arguments
  for flag in PATHS & defaults.keys():
    if values[flag].value == '' and defaults[flag] != '':
      raise BadInput(f'--{flag}=: empty; give a path')
    if values[flag].value:
      values[flag].value = expanded(values[flag].value, f'--{flag}')
      if flag in LOCAL:
        check_local(values[flag].value, f'--{flag}')
      if flag in FOLDERS:
        check_folder(values[flag].value, f'--{flag}')
  return values


def _overview() -> str:
  rows = table(('command', ''), [(name, command.summary) for name, command in COMMANDS.items()])[1:]
  return '\n'.join(['python -m mtp_jax COMMAND [--flag=value ...]', '', *_indent(rows), '',
                    'python -m mtp_jax COMMAND --help lists its flags.'])


def _help(name: str, command: Command) -> str:
  rows = [(f'--{flag}', _default(default), meaning) for flag, default, meaning in command.flags]
  lines = [f'python -m mtp_jax {name}: {command.summary}', '', command.run.__doc__, '',
           *_indent(table(('', '', ''), rows)[1:]), '', f'python -m mtp_jax {command.example}']
  if name == 'train':
    lines += ['', 'fields of a config, with their defaults, which a config file may change:', '',
              *_indent(table(('', '', ''), _config_fields())[1:])]
  return '\n'.join(lines)


def _default(value) -> str:
  return '' if value in (None, '') else f'[{value}]'


def _config_fields() -> list[tuple[str, str, str]]:
  return [(f'--config.{section}.{field.name}', f'[{field.default}]', field.metadata['meaning'])
          for section, kind in typing.get_type_hints(Config).items()
          for field in dataclasses.fields(kind)]


def _indent(lines: list[str]) -> list[str]:
  return ['  ' + line for line in lines]
