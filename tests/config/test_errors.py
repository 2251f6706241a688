"""Every error that the machine causes is one line in words: what, where, and no number of an error."""
import pytest

from mtp_jax.config import BadInput
from mtp_jax.config.errors import cannot, explain

ERRORS = [
    (OSError(28, 'No space left on device'), 'No space left on device'),
    (PermissionError(13, 'Permission denied', 'a/b'), 'a/b: Permission denied'),
    (IsADirectoryError(21, 'Is a directory', b'a/b'), 'a/b: Is a directory'),
    (OSError(36, 'File name too long', 'x' * 5000), 'xxx'),
    (OSError(40, 'Too many levels of symbolic links', 'a', None, 'b'), 'a: Too many levels of symbolic links'),
    (OSError('in words already'), 'in words already'), (ConnectionResetError(), 'ConnectionResetError'),
    (OSError(5, 'RESOURCE_EXHAUSTED: no space'), 'RESOURCE_EXHAUSTED: no space')]


@pytest.mark.parametrize('error, text', ERRORS, ids=str)
def test_no_message_begins_with_the_number_of_an_error(error, text):
  line, code = explain(error)
  assert line.startswith(text) and '[Errno' not in line and len(line) <= 1000 and code == 1


@pytest.mark.parametrize('error, text', [row for row in ERRORS if row[0].errno], ids=str)
def test_an_error_of_a_path_of_the_users_names_the_flag_and_the_fix(error, text):
  with pytest.raises(BadInput) as raised:
    with cannot('read', '--workdir=a', 'make it readable'):
      raise error
  line, code = explain(raised.value)
  assert line.startswith(f'--workdir=a: cannot read ({text}') and line.endswith('; make it readable') and code == 2
