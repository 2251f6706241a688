"""A run's own files: logs, config, tokenizer, evidence of bad steps, traces; all that is no checkpoint.

They stand in the workdir. Where that is in a bucket, whose objects cannot be appended to, they stand in
config.data.cache/workdirs/BUCKET/FOLDER on this machine, and those that have changed are copied to the bucket at the
start, before each save and at the end. A start first fetches the logs, if another machine was the last to write them.

One run at a time writes in a workdir. On this machine a lock sees to that, which ends with the process, even if that is
killed. A bucket has none: there the newest start is the owner, and the run before it ends at its next save.
"""
import contextlib
import fcntl
import os
import pathlib
import shutil
import socket
import threading
import time
from collections.abc import Callable

from mtp_jax.config import BadInput, local_path
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
    self.taken_by = ''  # who has started in the bucket since this run did
    self._owner = ''  # this process, as OWNER has it
    self._copied = {}  # (bytes, time) of each file when it was copied
    self._copying, self._failure, self._was_failing = None, '', False

  def take(self):
    """Takes the lock, and the bucket, whose logs it fetches.

    Returns:
      (the open OWNER file, which holds the lock until it is closed; why it is refused, or '').

    Raises:
      OSError: OWNER cannot be written.
    """
    file = (self.folder / OWNER).open('a+')  # flock on NFS asks for one that is open for writing
    file.seek(0)
    last_here = file.read()
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return file, f'{one_line(last_here) or "another process"} trains there; wait for it, or choose another'
    except OSError:  # a file system without locks
      pass
    owner = f'process {os.getpid()} on {socket.gethostname()}, since {time.strftime("%Y-%m-%d %H:%M:%S")},\n'
    refusal = '' if self.bucket is None else self._take_bucket(last_here, owner)
    if not refusal:
      self._owner = owner
      with contextlib.suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(owner)
        file.flush()
    return file, refusal

  def _take_bucket(self, last_here: str, owner: str) -> str:
    """Fetches the logs unless this folder wrote them last, and becomes the owner; why not, or ''."""
    try:
      last = (self.bucket / OWNER).read_text() if (self.bucket / OWNER).exists() else ''
      if self._owner and last != self._owner:
        return f'{one_line(last)} trains there now, so this run ends'
      if not last or last != last_here:
        self._fetch()
      (self.bucket / OWNER).write_text(owner)
    except Exception as error:  # whatever the bucket's client may raise
      return f'the bucket cannot be read or written ({in_words(error)}); create it, or see to its permissions'
    return ''

  def _fetch(self) -> None:
    for path in list(self.folder.iterdir()):  # of another run, or of this one before it went on elsewhere
      if path.is_dir() and not path.name.startswith('process-'):
        shutil.rmtree(path)
      elif path.is_file() and path.name != OWNER:
        path.unlink()
    for name in FETCHED:
      if (self.bucket / name).exists():
        content = (self.bucket / name).read_bytes()
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_bytes(content)

  def publish(self, note: Callable[[str], None], seconds: float = 10) -> None:
    """Copies to the bucket what has changed, unless it has another owner: then `taken_by` tells whom.

    Args:
      note: gets a line when the bucket cannot be written, and when it can again.
      seconds: the run goes on after so many, and so does the copying.
    """
    if self.bucket is None or self.taken_by:
      return
    if not (self._copying and self._copying.is_alive()):
      self._copying = threading.Thread(target=self._copy, daemon=True)
      self._copying.start()
    self._copying.join(seconds)
    failure = f'not done after {seconds} seconds' if self._copying.is_alive() else self._failure
    if failure and not self._was_failing:
      note(f'{self.bucket}: the logs cannot be copied there ({failure}); the run goes on, they are in {self.folder}')
    if self._was_failing and not failure:
      note(f'{self.bucket}: the logs are copied there again; no lines are lost')
    self._was_failing = bool(failure)

  def _copy(self) -> None:
    self._failure = ''
    try:
      owner = (self.bucket / OWNER).read_text()
      if owner != self._owner:
        self.taken_by = one_line(owner)
        return
      for path in sorted(self.folder.rglob('*')):
        name = path.relative_to(self.folder)
        if not path.is_file() or name.parts[0].startswith('process-') or name == pathlib.Path(OWNER):
          continue
        state = path.stat().st_size, path.stat().st_mtime_ns
        if self._copied.get(name) != state:
          (self.bucket / name).write_bytes(path.read_bytes())
          self._copied[name] = state
    except Exception as error:  # whatever the bucket's client may raise
      self._failure = in_words(error)


def check_owner(files: OwnFiles, is_taken: bool) -> None:
  """Raises BadInput, which launchers do not try again, where another run has started in the bucket.

  Args:
    is_taken: whether any process of the job has seen that.
  """
  if is_taken:
    files.taken_by = files.taken_by or 'another run'
    raise BadInput(f'--workdir={files.workdir}: {files.taken_by} trains there now, so this run ends')
