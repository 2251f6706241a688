"""A run's own files: logs, config, tokenizer, evidence of bad steps, traces; all that is no checkpoint.

They stand in the workdir. Where that is in a bucket, whose objects cannot be appended to, they stand in
config.data.cache/workdirs/BUCKET/FOLDER on this machine, and those that have changed are copied to the bucket at the
start, before each save and at the end. A start first fetches the logs, whichever machine wrote them.

One run at a time writes in a workdir. On this machine a lock sees to that, which ends with the process, even if that is
killed. A bucket has none: a newer start notes itself in OWNER, and the run before it ends at its next save.
"""
import contextlib
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable

from mtp_jax.config import local_path
from mtp_jax.config.errors import cannot, in_words, one_line
from mtp_jax.config.paths import BUCKET, is_local
from mtp_jax.report import events, log

OWNER = 'owner.txt'  # who trains in a workdir, or did last
FETCHED = (log.FILE, events.FILE, 'wandb/run_id')


class OwnFiles:
  """The files of one process of a job, in `folder` on this machine.

  Args:
    workdir: as `folder_path` gives it.
    cache: config.data.cache.
    index: of the process; every one but the first has a folder process-INDEX of its own.

  Raises:
    BadInput: the folder cannot be made.
  """

  def __init__(self, workdir, cache: str, index: int):
    name = f'process-{index}' if index else ''
    self.workdir, self.is_first = workdir, not index
    self.bucket = None if is_local(workdir) else workdir / name
    home, where = workdir, f'--workdir={workdir}'
    if self.bucket is not None:
      home = local_path(cache, 'config.data.cache') / 'workdirs' / str(workdir).removeprefix(BUCKET)
      where = f'config.data.cache={cache}'
    with cannot('be a folder', where, 'choose another'):
      (home / name).mkdir(parents=True, exist_ok=True)
    self.folder = home / name
    self.owner, self.owner_before = '', ''  # this process, as OWNER has it; who was there before
    self._copied = {}  # (bytes, time) of each file when it was copied
    self._copying, self._failure, self._was_failing = None, '', False

  def lock(self):
    """(the open OWNER file, which holds the lock until it is closed; why the lock is refused, or '').

    Raises:
      OSError: OWNER cannot be written.
    """
    file = (self.folder / OWNER).open('a+')  # flock on NFS asks for one that is open for writing
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      return file, f'{one_line(file.read()) or "another process"} trains there; wait for it, or choose another'
    except OSError:  # a file system without locks
      pass
    self.owner = f'process {os.getpid()} on {socket.gethostname()}, since {time.strftime("%Y-%m-%d %H:%M:%S")},\n'
    with contextlib.suppress(OSError):  # a full disk
      file.truncate(0)
      file.write(self.owner)
      file.flush()
    return file, ''

  def fetch(self) -> None:
    """Copies the logs from the bucket, unless this process has written there already. Raises OSError."""
    if self.bucket is None or self._copied:
      return
    try:
      for name in FETCHED:
        (self.folder / name).unlink(missing_ok=True)
        if (self.bucket / name).exists():
          (self.folder / name).parent.mkdir(exist_ok=True)
          (self.folder / name).write_bytes((self.bucket / name).read_bytes())
      if (self.bucket / OWNER).exists():
        self.owner_before = (self.bucket / OWNER).read_text()
    except Exception as error:  # whatever the bucket's client may raise
      raise OSError(f'{self.bucket}: the logs cannot be fetched ({in_words(error)}); run the same command '
                    'again') from error

  def taken(self) -> str:
    """Who has started in the bucket since this run did; '' if nobody has, or that cannot be known now."""
    if self.bucket is None or not self.is_first:
      return ''
    with contextlib.suppress(Exception):
      owner = (self.bucket / OWNER).read_text()
      return '' if owner in (self.owner, self.owner_before) else one_line(owner)
    return ''

  def leave(self) -> None:
    """From now on nothing is copied: the workdir is another run's."""
    self.bucket = None

  def publish(self, note: Callable[[str], None], seconds: float | None = 10) -> None:
    """Copies to the bucket what has changed; the run goes on after so many seconds, and so does the copying.

    Args:
      note: gets a line when the bucket cannot be written, and when it can again.
    """
    if self.bucket is None:
      return
    if not (self._copying and self._copying.is_alive()):
      self._copying = threading.Thread(target=self._copy, daemon=True)
      self._copying.start()
    self._copying.join(seconds)
    if self._copying.is_alive():
      return
    if self._failure and not self._was_failing:
      note(f'{self.bucket}: the logs cannot be copied there ({self._failure}); the run goes on, they are in '
           f'{self.folder}')
    if self._was_failing and not self._failure:
      note(f'{self.bucket}: the logs can be copied there again; no lines are lost')
    self._was_failing = bool(self._failure)

  def _copy(self) -> None:
    self._failure = ''
    try:
      for path in sorted(self.folder.rglob('*')):
        name = path.relative_to(self.folder)
        if not path.is_file() or name.parts[0].startswith('process-'):
          continue
        state = path.stat().st_size, path.stat().st_mtime_ns
        if self._copied.get(name) != state:
          (self.bucket / name).write_bytes(path.read_bytes())
          self._copied[name] = state
    except Exception as error:  # whatever the bucket's client may raise
      self._failure = in_words(error)
