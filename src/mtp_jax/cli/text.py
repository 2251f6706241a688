"""Text that is typed as a flag, or the content of a file: bytes, which need not be UTF-8."""
import re
import sys

from mtp_jax.config import BadInput

_ESCAPE = re.compile(rb'\\(x[0-9a-fA-F]{2}|[0-7]{1,3}|.?)', re.DOTALL)
_ESCAPED = {b'n': b'\n', b't': b'\t', b'r': b'\r', b'a': b'\a', b'b': b'\b', b'f': b'\f', b'v': b'\v',
            **{mark: mark for mark in (b'\\', b"'", b'"')}}


def typed_or_read(flags, name: str) -> bytes:
  """--NAME, or the content of --NAME_file, of which one is given; '-' is stdin.

  Raises:
    BadInput: both are given, or the file cannot be read.
  """
  if flags[name].value is not None and flags[f'{name}_file'].value is not None:
    raise BadInput(f'--{name}_file: not together with --{name}')
  path = flags[f'{name}_file'].value
  if path is None:
    return typed(flags, name)
  if path == '-':
    return sys.stdin.buffer.read()
  try:
    with open(path, 'rb') as file:
      return file.read()
  except OSError as error:
    raise BadInput(f'--{name}_file={path}: {error.strerror}') from None


def typed(flags, name: str) -> bytes:
  """The bytes that were typed as a flag, which need not be UTF-8; C escapes count with --escapes."""
  text = flags[name].value.encode('utf-8', errors='surrogateescape')

  def replace(match) -> bytes:
    escape = match[1]
    if escape[:1] == b'x' and len(escape) == 3:
      return bytes.fromhex(escape[1:].decode())
    if re.fullmatch(b'[0-7]+', escape) and int(escape, 8) < 256:
      return bytes([int(escape, 8)])
    if escape not in _ESCAPED:
      raise BadInput(f'--{name}={flags[name].value}: no such escape: {match[0].decode(errors="replace")}; write '
                     r'\n, \t, \xHH, \OOO or \\, or leave out --escapes')
    return _ESCAPED[escape]

  return _ESCAPE.sub(replace, text) if flags.escapes else text
