"""The image of launch/ holds what it needs, and nothing else."""
import os
import re
import subprocess
import tomllib

import pytest
from scripts import LAUNCH, ROOT, program


def instructions(text: str) -> list[tuple[str, str]]:
  lines = re.sub(r'\\\n', ' ', re.sub(r'(?m)^#.*\n', '', text)).splitlines()
  return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


@pytest.fixture(scope='module')
def dockerfile() -> list[tuple[str, str]]:
  return instructions((LAUNCH / 'Dockerfile').read_text())


def test_the_image_holds_all_that_the_package_is_built_from_and_the_configs(dockerfile):
  before, after = set(), set()
  for what, rest in dockerfile:
    if what == 'RUN' and 'pip install' in rest:
      before, after = after, set()
    if what == 'COPY':
      after |= set(rest.split()[:-1])
  assert all((ROOT / source).exists() for source in before | after), before | after
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  named = {'pyproject.toml', project['project']['readme'], *project['project']['license-files'],
           *project['tool']['setuptools']['packages']['find']['where']}
  assert before == named and after == {'configs'}
  offered = re.search(r'tpu \| cuda\)', next(rest for what, rest in dockerfile if what == 'RUN'))
  assert offered and {'tpu', 'cuda', 'data', 'gcs'} <= set(project['project']['optional-dependencies'])


def test_the_image_is_small_runs_the_command_line_and_not_as_root(dockerfile):
  kinds = [what for what, _ in dockerfile]
  assert dockerfile[0] == ('FROM', 'python:3.12-slim')
  assert dockerfile[-1] == ('ENTRYPOINT', '["python", "-m", "mtp_jax"]') and 'CMD' not in kinds
  user = [rest for what, rest in dockerfile if what == 'USER'][-1]
  assert user not in ('root', '0') and any(what == 'RUN' and rest.startswith('useradd') and user in rest.split()
                                           for what, rest in dockerfile)
  assert kinds.index('USER') > max(place for place, what in enumerate(kinds) if what in ('RUN', 'COPY'))


@pytest.mark.parametrize('accelerator, wanted', [
    ('tpu', '.[data,gcs,tpu]'), ('cuda', '.[data,gcs,cuda]'), ('none', '.[data,gcs]'), ('gpu', None)])
def test_the_accelerator_chooses_what_is_installed(dockerfile, tmp_path, accelerator, wanted):
  program(tmp_path / 'pip', 'echo "${@: -1}"')
  script = next(rest for what, rest in dockerfile if what == 'RUN')
  found = subprocess.run(['sh', '-c', script],
                         env={'PATH': f'{tmp_path}:{os.environ["PATH"]}',
                              'ACCELERATOR': accelerator}, capture_output=True, text=True, timeout=30)
  assert (found.returncode, found.stdout.strip()) == ((0, wanted) if wanted else (2, ''))
  assert wanted or found.stderr == 'ACCELERATOR=gpu: must be tpu, cuda or none\n'
