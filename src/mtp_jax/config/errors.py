"""Errors, each reported in one line."""
import contextlib
import difflib
import os
import types
from collections.abc import Iterable, Iterator, Mapping


class BadInput(ValueError):
  """What a user can fix: one line with the field or file, its value and the fix. The command line
  exits with code 2.
  """

  def __init__(self, text: str):
    super().__init__(text if len(str(text).splitlines()) == 1 else one_line(text))


def explain(error: Exception) -> tuple[str, int] | None:
  """(one line, the exit code) of an error that a user or the machine has caused; None of any other
  one, whose traceback tells more.

  What JAX, Orbax and other packages raise when the machine is at fault becomes a line here and
  nowhere else.
  """
  if isinstance(error, BadInput):
    return one_line(error), 2
  text = in_words(error)
  if isinstance(error, RuntimeError) and 'initialize backend' in text:
    return f'JAX_PLATFORMS: {text}', 2
  if isinstance(error, OSError):
    return one_line(text), 1
  if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in text:
    return f'out of memory: {text}', 1
  by_the_machine = isinstance(error, (ImportError, RuntimeError))
  if not by_the_machine or isinstance(error, (NotImplementedError, RecursionError)):
    return None
  return f'{type(error).__name__}: {text}', 1


@contextlib.contextmanager
def cannot(verb: str, where: str, fix: str) -> Iterator[None]:
  """Turns an OSError of the block into BadInput: "--workdir=a: cannot write (a/b: Permission denied); FIX".

  One without a number is in words already, and passes.

  Args:
    where: the flag or field that named the path, with its value.
  """
  try:
    yield
  except OSError as error:
    if not error.errno:
      raise
    raise BadInput(f'{where}: cannot {verb} ({in_words(error)}); {fix}') from error


def in_words(error: BaseException) -> str:
  """What an error says, in one line: of an OSError 'a/b: Permission denied', without its number."""
  if not getattr(error, 'strerror', None):
    return one_line(error) or type(error).__name__
  paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, str | bytes)]
  return ': '.join([*paths[:1], error.strerror])


def one_line(text) -> str:
  """The text, or that of an error, with its whitespace merged, and without its middle if it is very
  long.
  """
  line = ' '.join(str(text).split())
  return line if len(line) <= 1000 else f'{line[:600]} ... {line[-390:]}'


def nearest(name: str, names: Iterable[str], elsewhere: Mapping[str, str] = types.MappingProxyType({})) -> str:
  """"did you mean 'layers'?", or all names when none is similar.

  Args:
    elsewhere: 'train.steps' by 'steps', of names that other places have: meant where none of `names`
      is similar, or none is very similar and this is the very name.
  """
  names = list(names)
  close = difflib.get_close_matches(name, names, n=1, cutoff=0.9 if name in elsewhere else 0.6)
  if not close:
    close = [elsewhere[other] for other in difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.75)] or close
  return f"did you mean '{close[0]}'?" if close else f'valid names: {", ".join(names)}'
