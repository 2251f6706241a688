"""Parts tokenized in this process or in parallel ones, which end when this one does."""
import concurrent.futures
import concurrent.futures.process
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

from mtp_jax.data.parts import Preparation


def tokenize_parts(preparation: Preparation, numbers: list[int], workers: int,
                   meter) -> Iterator[tuple[int, int, int]]:
  """For each part, as it is done: its records, those of them skipped, and the bytes of input read
  so far, of all parts.

  Close the iterator to stop the workers.

  Args:
    workers: processes; below 2 this process does the work.
    meter: shown what has been done, as in data/progress.py.

  Raises:
    ChildProcessError: a worker was killed.
  """
  if workers < 2:
    return _in_this_process(preparation, numbers, meter)
  return _in_workers(preparation, numbers, workers, meter)


def _in_this_process(preparation: Preparation, numbers: list[int], meter):
  totals = [0, 0, 0]  # bytes, documents, tokens

  def count(*increments: int):
    for i, increment in enumerate(increments):
      totals[i] += increment
    meter.show(*totals)
  for number in numbers:
    yield *preparation.tokenize(number, count), totals[0]


def _in_workers(preparation: Preparation, numbers: list[int], workers: int, meter):
  spawn = multiprocessing.get_context('spawn')  # forking may hang, since JAX and Grain have threads
  totals = spawn.Array('q', 4)  # bytes, documents, tokens; the last one tells workers to stop
  with concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_worker, (preparation, totals)) as pool:
    pending = {pool.submit(_tokenize_in_worker, number) for number in numbers}
    try:
      while pending:
        done, pending = concurrent.futures.wait(pending, 0.2, concurrent.futures.FIRST_COMPLETED)
        size, documents, tokens = totals[:3]
        meter.show(size, documents, tokens)
        for future in done:
          yield *future.result(), size
    except concurrent.futures.process.BrokenProcessPool as error:
      raise ChildProcessError('a worker process was killed, perhaps because memory ran out; '
                              'run the same command with fewer --workers') from error
    finally:
      totals[3] = 1
      pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(preparation: Preparation, totals) -> None:
  """Makes this process a worker, which ends when its parent does. Ctrl-C is left to the parent."""
  global _worker
  _worker = preparation, totals
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)


def _tokenize_in_worker(number: int) -> tuple[int, int]:
  preparation, totals = _worker

  def count(*increments: int):
    with totals.get_lock():
      if totals[3]:
        raise RuntimeError('stopped')
      for i, increment in enumerate(increments):
        totals[i] += increment
  return preparation.tokenize(number, count)
