"""A server on localhost that speaks as Google Cloud Storage does, with one bucket."""
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

BUCKET = 'bucket'


@contextlib.contextmanager
def served() -> Iterator[dict[str, str]]:
  """The variables of the environment that send gcsfs and TensorStore there, as long as the block lasts."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  command = [sys.executable, '-m', 'gcp_storage_emulator', 'start', '--host=127.0.0.1', f'--port={port}',
             '--in-memory', f'--default-bucket={BUCKET}']
  server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  address = f'http://127.0.0.1:{port}'
  try:
    while server.poll() is None and not _answers(port):
      time.sleep(0.1)
    if server.poll() is not None:
      raise RuntimeError(f'{" ".join(command)}: ended with exit code {server.returncode}')
    # without the last one gcsfs asks Google what kind of bucket it is
    yield {'STORAGE_EMULATOR_HOST': address, 'TENSORSTORE_GCS_HTTP_URL': address,
           'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false'}
  finally:
    server.kill()
    server.wait()


def _answers(port: int) -> bool:
  try:
    socket.create_connection(('127.0.0.1', port), timeout=1).close()
    return True
  except OSError:
    return False
