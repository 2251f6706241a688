"""The scripts of launch/ are well formed, and can be run by their names."""
import shutil
import stat
import subprocess

import pytest
from scripts import LAUNCH

SHELL = ['slurm.sbatch', 'tpu_vm.sh']


@pytest.mark.parametrize('name', SHELL)
def test_shell_files_are_well_formed(name):
  subprocess.run(['bash', '-n', LAUNCH / name], check=True, timeout=30)
  if not shutil.which('shellcheck'):
    pytest.skip('needs shellcheck')
  found = subprocess.run(['shellcheck', '--shell=bash', LAUNCH / name], capture_output=True, text=True, timeout=60)
  assert found.returncode == 0, found.stdout


def test_whoever_runs_a_script_by_its_name_can():
  assert (LAUNCH / 'tpu_vm.sh').stat().st_mode & stat.S_IXUSR
