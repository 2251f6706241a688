"""The pages: short where they should be, their links lead to files, their commands exist."""
import pathlib
import re
import runpy

import pytest

from mtp_jax.cli.main import COMMANDS

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [path for folder in ('', 'configs', 'launch', 'notebooks', 'src', 'tests')
         for path in sorted((ROOT / folder).glob('*.md') if folder in ('', 'tests') else (ROOT / folder).rglob('*.md'))]
PATHS = [str(path.relative_to(ROOT)) for path in PAGES]


def test_the_first_page_has_at_most_1000_words():
  assert len((ROOT / 'README.md').read_text().split()) <= 1000


@pytest.mark.parametrize('path', PATHS)
def test_links_lead_to_files(path):
  links = re.findall(r'\]\((?!https?:)([^)#]+)', (ROOT / path).read_text())
  assert not [link for link in links if not ((ROOT / path).parent / link).exists()]


@pytest.mark.parametrize('path', PATHS)
def test_commands_exist(path):
  commands = re.findall(r'python -m mtp_jax ((?:benchmark )?[a-z-]+)', (ROOT / path).read_text())
  assert set(commands) <= {*COMMANDS, 'benchmark'}  # which alone lists its own


def test_every_command_of_the_table_of_tasks_exists():
  tasks = (ROOT / 'README.md').read_text().partition('## Tasks')[2].partition('##')[0]
  commands = re.findall(r'\| `([a-z-]+) ', tasks)
  assert len(commands) >= 8 and set(commands) <= set(COMMANDS)


def test_the_script_draws_the_futures(tmp_path):
  path = tmp_path / 'futures.svg'
  runpy.run_path(str(ROOT / 'docs' / 'draw.py'))['draw_futures'](str(path))
  assert path.read_text().count('</g>') > 20
