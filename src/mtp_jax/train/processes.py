"""One training job of several processes: how they find each other, stop at the same step, and end
when one of them has.

The environment tells where a job runs; the first that applies is used:

    variables   JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID, set by the user or a launcher
    Slurm       a step with several tasks, one per node or per GPU: srun python -m mtp_jax train ...
    TPU         the hosts of one or several slices, on Cloud TPU VMs or GKE; JAX asks the platform

Where the variables tell the address, the processes meet there before JAX starts (meeting.py).

JAX aborts a process when another one of its job is gone. So each process does its work in a child
process; the parent turns an abort into a message and exit code 1, and forwards signals. SIGTERM,
SIGHUP or Ctrl-C to any process stops all at the same step; Ctrl-C twice ends that process alone,
without saving, and the others end since it is gone.
"""
import contextlib
import glob
import hashlib
import importlib.util
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping

from mtp_jax.config import BadInput
from mtp_jax.config.errors import in_words
from mtp_jax.report.display import flush, print_stderr
from mtp_jax.train import meeting
from mtp_jax.train.watch import Interrupts, heard, watched

VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
WAIT_SECONDS = 300  # that processes wait for each other at most at the end
ENDS_SECONDS = 5  # after Ctrl-C twice: a process that waits for another one, within JAX, hears nothing
STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # signals that save a checkpoint
SAVED = (0, *(128 + number for number in STOPS))  # exit codes after which nothing is lost


def environment(variables: Mapping[str, str], tpu: bool) -> str | None:
  """Where the job runs: 'variables', 'slurm', 'tpu', or None for a single process.

  Args:
    variables: such as os.environ.
    tpu: whether this machine has TPU chips.

  Raises:
    BadInput: some of VARIABLES are missing or invalid.
  """
  given = [name for name in VARIABLES if name in variables]
  if given:
    missing = [name for name in VARIABLES if name not in variables]
    if missing:
      raise BadInput(f'{given[0]}={variables[given[0]]}: {" and ".join(missing)} must be set as well')
    address, count, index = (variables[name] for name in VARIABLES)
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
      raise BadInput(f'JAX_PROCESS_ID={index}, JAX_NUM_PROCESSES={count}: '
                     'must be numbers from 0, the first below the second')
    host, _, port = address.rpartition(':')
    if not (host and port.isdigit()):
      raise BadInput(f'JAX_COORDINATOR_ADDRESS={address}: must be host:port of process 0')
    return 'variables' if int(count) > 1 else None
  # not set in the batch script itself, which is no task
  in_slurm_step = 'SLURM_STEP_NODELIST' in variables
  if in_slurm_step and _slurm_tasks(variables) > 1:
    return 'slurm'
  return 'tpu' if tpu and 'tpu' in variables.get('JAX_PLATFORMS', 'tpu') else None


def _slurm_tasks(variables: Mapping[str, str]) -> int:
  """Tasks of this step: one in the shell that `salloc` opens, whatever the size of its allocation."""
  count = variables.get('SLURM_STEP_NUM_TASKS') or variables.get('SLURM_NTASKS') or '1'
  return int(count) if count.isdecimal() else 1


def awaited(where: str, variables: Mapping[str, str]) -> str:
  """For whom this process of a job waits while JAX starts, in words."""
  if where == 'variables':
    address, count, index = (variables[name] for name in VARIABLES)
    return f'process {index} of {count} waits for JAX to start on all of them, at {address}'
  if where == 'slurm':
    return (f'task {variables.get("SLURM_PROCID", "?")} of {_slurm_tasks(variables)} waits for the others, on '
            f'{variables["SLURM_STEP_NODELIST"]}')
  return 'waits for the other hosts of this TPU slice'


def has_tpu() -> bool:
  """Whether this machine has TPU chips and JAX can use them."""
  devices = glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*')
  return importlib.util.find_spec('libtpu') is not None and bool(devices)


def run(work: Callable[[], int], heartbeat_seconds: int, start_seconds: int) -> int:
  """Does the work, as one process of a job if there are several; returns its exit code.

  Args:
    work: returns an exit code. With several processes it runs in a child process, after
      `jax.distributed` has started.
    heartbeat_seconds: a process that shows no sign of life for so long counts as dead, and all
      others end.
    start_seconds: that processes wait for each other at the start. Every ten seconds each says for whom.

  Raises:
    OSError: another program listens at the address of process 0, which is this one.
  """
  where = environment(os.environ, has_tpu())
  if not where:
    return work()
  if where == 'variables' and int(os.environ['JAX_PROCESS_ID']) == 0:
    _check_free(os.environ['JAX_COORDINATOR_ADDRESS'])
  flush()
  parent_is_alive, held_by_parent = os.pipe()
  child = os.fork()
  if child:
    os.close(parent_is_alive)
    return _supervise(child)
  os.close(held_by_parent)
  os.setpgid(0, 0)  # Ctrl-C then reaches the parent alone, which forwards it once
  threading.Thread(target=_exit_with_parent, args=(parent_is_alive,), daemon=True).start()
  os._exit(_work(work, where, heartbeat_seconds, start_seconds))


def _check_free(address: str) -> None:
  """Raises OSError where another program listens at host:port: JAX would end with a segmentation fault."""
  port = int(address.rpartition(':')[2])
  try:
    meeting.listening(port).close()
  except (OSError, OverflowError) as error:
    raise OSError(f'JAX_COORDINATOR_ADDRESS={address}: process 0 cannot listen at port {port} ({in_words(error)}); '
                  'end what listens there, such as an earlier job, or set another port on all processes') from None


def _supervise(child: int) -> int:
  """In the parent: forwards signals, waits for the child, explains how it ended; the exit code."""
  interrupts = []

  def kill(number, _):
    with contextlib.suppress(ProcessLookupError):  # it has just ended
      os.kill(child, signal.SIGKILL if number == signal.SIGALRM else number)
    if number == signal.SIGINT:
      interrupts.append(number)
      if len(interrupts) == 2:
        signal.alarm(ENDS_SECONDS)

  for number in (*heard(STOPS), signal.SIGALRM):
    signal.signal(number, kill)
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  if code in (-signal.SIGTERM, -signal.SIGHUP):  # before JAX handled it, so there is nothing to lose yet
    return 128 - code
  if code == -signal.SIGKILL and len(interrupts) > 1:
    print_stderr('mtp_jax: interrupted')
    return 128 + signal.SIGINT
  if code == -signal.SIGABRT:
    print_stderr('mtp_jax: another process of this job has ended or hangs, so this one ended too; '
                 'run the same command on all of them to resume')
  elif code == 1:  # the end of another process shows in this one as errors of JAX, Gloo and Orbax
    print_stderr('mtp_jax: failed, see above; another process of this job may have ended and be the reason: '
                 'run the same command on all of them to resume')
  elif code < 0:
    reason = '; the kernel sends it when memory runs out' if code == -signal.SIGKILL else ''
    print_stderr(f'mtp_jax: ended by signal {-code}{reason}')
  return 1 if code < 0 else code


def _exit_with_parent(parent_is_alive: int) -> None:
  """In the child: exits when the parent has, which closes the pipe."""
  os.read(parent_is_alive, 1)
  os._exit(1)


def _work(work: Callable[[], int], where: str, heartbeat_seconds: int, start_seconds: int) -> int:
  """In the child: joins the job and does the work; the exit code.

  After a failure it does not wait for the other processes, because they wait for this one.
  """
  import jax
  code = 1
  try:
    address = _met(start_seconds) if where == 'variables' else {}
    with _said_again(f'mtp_jax: {awaited(where, os.environ)}; gives up after {start_seconds} seconds'):
      jax.distributed.initialize(**address, initialization_timeout=start_seconds,
                                 shutdown_timeout_seconds=WAIT_SECONDS,
                                 heartbeat_timeout_seconds=heartbeat_seconds)
    code = work()
    if code in SAVED:
      jax.distributed.shutdown()
  except _NotAllHaveCome as error:
    print_stderr(f'mtp_jax: {error}')
  except jax.errors.JaxRuntimeError as error:
    print_stderr(f'mtp_jax: {str(error).splitlines()[0][:300]}')
  except KeyboardInterrupt:
    print_stderr('mtp_jax: interrupted')
    code = 128 + signal.SIGINT
  except BaseException:
    print_stderr(traceback.format_exc())
  flush()
  return code


class _NotAllHaveCome(OSError):
  """A process of the job has not started."""


def _met(start_seconds: int) -> dict:
  """What VARIABLES tell JAX, once all processes of the job have come. Raises _NotAllHaveCome."""
  address, count, index = (os.environ[name] for name in VARIABLES)
  try:
    meeting.meet(address, int(index), int(count), start_seconds, print_stderr)
  except OSError as error:
    raise _NotAllHaveCome(in_words(error)) from error
  return {'coordinator_address': address, 'num_processes': int(count), 'process_id': int(index)}


@contextlib.contextmanager
def _said_again(line: str) -> Iterator[None]:
  """Prints a line every ten seconds while the block lasts."""
  ended = threading.Event()

  def say():
    while not ended.wait(meeting.SAY_SECONDS):
      print_stderr(line)

  threading.Thread(target=say, daemon=True).start()
  try:
    yield
  finally:
    ended.set()


def interrupts() -> Interrupts:
  """Records SIGTERM, SIGHUP and Ctrl-C of this process; among several processes JAX itself handles
  SIGTERM.
  """
  import jax
  return Interrupts(STOPS if jax.process_count() == 1 else (signal.SIGHUP, signal.SIGINT))


def stop_signal(interrupts: Interrupts) -> int:
  """The signal that stops the run now, 0 if none. All processes stop together, whichever got it;
  the others return SIGTERM.

  Every process must call it equally often: after every step, and after every batch of a validation.
  """
  import jax
  from jax.experimental import multihost_utils
  interrupts.asked += 1
  if jax.process_count() == 1:
    return interrupts.received
  if interrupts.received and not interrupts.forwarded:
    interrupts.forwarded = True
    signal.raise_signal(signal.SIGTERM)  # JAX tells the other processes
  if not multihost_utils.reached_preemption_sync_point(interrupts.asked):
    return 0
  return interrupts.received or signal.SIGTERM


def place() -> tuple[int, int]:
  """(index of this process, how many the job has)."""
  import jax
  return jax.process_index(), jax.process_count()


def total(number: int, hang_seconds: float) -> int:
  """The sum over all processes. Every process must call it.

  Args:
    hang_seconds: that it waits for the others; see `watched`.
  """
  return int(_gathered([number], hang_seconds, 'to add up a number').sum())


def largest(number: int, hang_seconds: float) -> int:
  """The largest number of all processes; otherwise as `total`."""
  return int(_gathered([number], hang_seconds, 'to compare a number').max())


def _gathered(numbers: list[int], hang_seconds: float, purpose: str):
  """int32[processes, numbers]"""
  import jax
  import numpy as np
  from jax.experimental import multihost_utils
  values = np.array(numbers, np.int32)
  if jax.process_count() == 1:
    return values[None]
  with watched(hang_seconds, f'the other processes of this job {purpose}'):
    return multihost_utils.process_allgather(values)


def check_same(hang_seconds: float, **texts: str) -> None:
  """Checks that each text is the same on all processes. Every process must call it.

  Args:
    hang_seconds: that it waits for the others; see `watched`.

  Raises:
    BadInput: on all processes, naming the first text that differs.
  """
  import jax
  digests = [_digest(text) for text in texts.values()]
  differs = _gathered(digests, hang_seconds, f'to compare {" and ".join(texts)}') != digests  # [processes, texts]
  for i, (name, text) in enumerate(texts.items()):
    if differs[:, i].any():
      mine, other = jax.process_index(), int(differs[:, i].argmax())
      raise BadInput(f'{name}: process {mine} and process {other} of this job differ in it (here {text[:100]}); '
                     'start all with the same command, on the same files')


def _digest(text: str) -> int:
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], 'little', signed=True)
