"""A page as a person sees it: opened in headless Chromium."""
import re
import shutil
import subprocess

import pytest

PROGRAM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason='needs Chromium: apt-get install chromium')


def look(page, picture, width: int, height: int, dark: bool = False) -> list[str]:
  """Writes a picture of a page, in light or in dark; the lines of the browser's console."""
  command = [PROGRAM, '--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', '--enable-logging=stderr',
             f'--user-data-dir={picture}.profile', f'--window-size={width},{height}', f'--screenshot={picture}',
             f'--blink-settings=preferredColorScheme={0 if dark else 1}', f'file://{page}']
  ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert ended.returncode == 0, ended.stderr
  return re.findall(r':CONSOLE[:(]\d+\)?\] (.*)', ended.stderr)
