"""Errors that the user can fix, each reported in one line."""
import difflib
from collections.abc import Iterable


class BadInput(ValueError):
  """What a user can fix: one line with the field or file, its value and the fix. The command line
  exits with code 2.
  """


def nearest(name: str, names: Iterable[str]) -> str:
  """"did you mean 'layers'?", or all names when none is similar."""
  names = list(names)
  close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
  return f"did you mean '{close[0]}'?" if close else f'valid names: {", ".join(names)}'
