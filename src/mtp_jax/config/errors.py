"""What a user can fix, told in one line."""
import difflib


class BadInput(ValueError):
  """What a user can mend: one line naming the field or file, its value and the fix. The command line exits with code 2."""


def nearest(name: str, names) -> str:
  """'; did you mean 'layers'?', or the list of names when none is near."""
  close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
  return f"did you mean '{close[0]}'?" if close else f'valid names: {", ".join(names)}'
