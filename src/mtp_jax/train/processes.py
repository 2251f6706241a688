"""One training job of many processes, each with its own devices: how they find each other, stop together, and notice a dead one.

Where a job runs is read from the environment, in this order:

    variables   JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID, set by whoever launches
    Slurm       a step of several tasks, one a node or one a GPU: srun python -m mtp_jax train ...
    TPU         the hosts of a slice on Cloud TPU VMs or GKE, and of several slices; JAX asks the platform

The process that was launched only watches: the work is done in a child, because JAX ends a process by abort when a peer is gone.
The parent turns that into a line and exit code 1, and passes signals on. SIGTERM to any process reaches all: they agree on a step.
"""
import contextlib
import glob
import importlib.util
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping

from mtp_jax.config import BadInput
from mtp_jax.report.display import print_stderr
from mtp_jax.train.watch import Interrupts

VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
START_SECONDS = 300  # that processes wait for each other at the start, and at most at the end
SAVED = (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes after which nothing is lost


def environment(variables: Mapping[str, str], tpu: bool) -> str | None:
  """'variables', 'slurm', 'tpu', or None: this process is alone.

  Args:
    variables: such as os.environ.
    tpu: whether this machine has TPU chips.

  Raises:
    BadInput: some of VARIABLES are missing, or are no such numbers.
  """
  given = [name for name in VARIABLES if name in variables]
  if given:
    missing = [name for name in VARIABLES if name not in variables]
    if missing:
      raise BadInput(f'{given[0]}={variables[given[0]]}: {" and ".join(missing)} must be set as well')
    count, index = (variables[name] for name in VARIABLES[1:])
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
      raise BadInput(f'JAX_PROCESS_ID={index}, JAX_NUM_PROCESSES={count}: must be numbers from 0, the first below the second')
    host, _, port = variables[VARIABLES[0]].rpartition(':')
    if not (host and port.isdigit()):
      raise BadInput(f'JAX_COORDINATOR_ADDRESS={variables[VARIABLES[0]]}: must be host:port of process 0')
    return 'variables' if int(count) > 1 else None
  if 'SLURM_STEP_NODELIST' in variables and int(variables.get('SLURM_NTASKS', 1)) > 1:  # inside srun; the batch script has no step
    return 'slurm'
  return 'tpu' if tpu and variables.get('JAX_PLATFORMS', 'tpu').find('tpu') >= 0 else None


def has_tpu() -> bool:
  return importlib.util.find_spec('libtpu') is not None and bool(glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*'))


def run(work: Callable[[], int], heartbeat_seconds: int) -> int:
  """Does the work, as one of the processes of a job where there are several; the exit code.

  Args:
    work: returns an exit code. With several processes it runs in a child of this one, after `jax.distributed` has started.
    heartbeat_seconds: without a sign of life for so long a process is taken for dead, and all end.
  """
  where = environment(os.environ, has_tpu())
  if not where:
    return work()
  sys.stdout.flush()
  sys.stderr.flush()
  alive, parent_holds = os.pipe()
  child = os.fork()
  if child:
    os.close(alive)
    return _watch(child)
  os.close(parent_holds)
  os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on once
  threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
  os._exit(_work(work, where, heartbeat_seconds))


def _watch(child: int) -> int:
  def pass_on(number, _):
    with contextlib.suppress(ProcessLookupError):  # it has just ended
      os.kill(child, number)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, pass_on)
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  if code == -signal.SIGTERM:  # before JAX listened to it: nothing was done yet that could be lost
    return 128 + signal.SIGTERM
  if code == -signal.SIGABRT:
    print_stderr('mtp_jax: another process of this job has ended or hangs, so this one ended too; run the same command on all of them to resume')
  elif code == 1:  # what a dead process makes fail in this one is told in many words, by JAX, Gloo and Orbax
    print_stderr('mtp_jax: failed as told above; another process of this job may have ended and be the reason: run the same command on all of them to resume')
  elif code < 0:
    print_stderr(f'mtp_jax: ended by signal {-code}' + ('; the kernel sends it when memory runs out' if code == -signal.SIGKILL else ''))
  return 1 if code < 0 else code


def _end_with(alive: int) -> None:
  """Ends this process when the parent has: the pipe is closed then."""
  os.read(alive, 1)
  os._exit(1)


def _work(work: Callable[[], int], where: str, heartbeat_seconds: int) -> int:
  """In the child. After a failure there is no waiting for the others, which would wait for this one."""
  import jax
  code = 1
  try:
    given = {} if where != 'variables' else {'coordinator_address': os.environ[VARIABLES[0]], 'num_processes': int(os.environ[VARIABLES[1]]),
                                            'process_id': int(os.environ[VARIABLES[2]])}
    jax.distributed.initialize(**given, initialization_timeout=START_SECONDS, shutdown_timeout_seconds=START_SECONDS,
                               heartbeat_timeout_seconds=heartbeat_seconds)
    code = work()
    if code in SAVED:
      jax.distributed.shutdown()
  except jax.errors.JaxRuntimeError as error:
    print_stderr(f'mtp_jax: {str(error).splitlines()[0][:300]}')
  except BaseException:
    traceback.print_exc()
  with contextlib.suppress(OSError):
    sys.stdout.flush()
    sys.stderr.flush()
  return code


def interrupts() -> Interrupts:
  """SIGTERM and Ctrl-C of this process; among several JAX itself listens to SIGTERM."""
  import jax
  return Interrupts((signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,))


def stops(heard: Interrupts, step: int) -> int:
  """The signal after which a run is to stop at this step, 0 if none: the same step on all processes, whichever was told.

  To be called after every step, by all.
  """
  import jax
  from jax.experimental import multihost_utils
  if jax.process_count() == 1:
    return heard.received
  if heard.received and not heard.passed_on:
    heard.passed_on = True
    signal.raise_signal(signal.SIGTERM)
  return (heard.received or signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(step) else 0


def total(number: int) -> int:
  """The sum over all processes. To be called by all."""
  import jax
  import numpy as np
  from jax.experimental import multihost_utils
  return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(number)).sum())


def check_same(**texts: str) -> None:
  """Raises BadInput, on all processes, unless each text is the same everywhere. To be called by all."""
  import hashlib

  import jax
  import numpy as np
  from jax.experimental import multihost_utils
  if jax.process_count() == 1:
    return
  digests = np.array([np.frombuffer(hashlib.sha256(text.encode()).digest()[:4], np.int32)[0] for text in texts.values()])
  differs = multihost_utils.process_allgather(digests) != digests  # compared with this one's own
  for name, (column, text) in zip(texts, zip(differs.T, texts.values())):
    if column.any():
      raise BadInput(f'{name}: process {jax.process_index()} and process {int(column.argmax())} of this job differ in it (here {text[:100]}); '
                     'start all with the same command, on the same files')
