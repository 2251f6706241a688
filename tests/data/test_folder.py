"""Files of a folder appear complete or not at all."""
import os
import pathlib

import pytest

from mtp_jax.config import BadInput
from mtp_jax.data import folder as folders
from mtp_jax.data.folder import Folder


def test_a_file_that_is_not_finished_does_not_appear(tmp_path):
  folder = Folder(tmp_path / 'set', '')
  with pytest.raises(RuntimeError), folder.new_file('file') as path:
    pathlib.Path(path).write_text('half')
    raise RuntimeError
  assert os.listdir(folder.url) == [] and folder.sizes() == {}
  folder.write('file', b'whole')
  assert folder.sizes() == {'file': 5} and folder.read('file') == b'whole'
  assert os.stat(folder.path('file')).st_mode & 0o777 == 0o666 & ~folders._umask()


def test_links_that_lead_nowhere_or_in_a_circle_are_no_files_of_a_folder(tmp_path):
  (tmp_path / 'circle').symlink_to('back')
  (tmp_path / 'back').symlink_to('circle')
  (tmp_path / 'away').symlink_to('nowhere')
  (tmp_path / 'file').write_text('whole')
  assert Folder(tmp_path, '').sizes() == {'file': 5}


def test_an_unknown_protocol_is_one_line():
  with pytest.raises(BadInput, match=r"^--data: 'nowhere://x': Protocol not known: nowhere"):
    Folder('nowhere://x', '--data')
