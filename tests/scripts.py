"""What the tests of scripts share: where they stand, programs that stand in for others, waiting."""
import pathlib
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / 'launch'


def wait_for(true, seconds: float, what: str):
  """The first value of true() that counts as one; fails after so many seconds."""
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if value := true():
      return value
    time.sleep(0.1)
  pytest.fail(f'{what}: not within {seconds} seconds')


def program(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(exist_ok=True, parents=True)
  new = path.with_suffix('.new')
  new.write_text(f'#!/bin/bash\n{text}\n')
  new.chmod(0o755)
  new.replace(path)  # bash may still be reading the old one
