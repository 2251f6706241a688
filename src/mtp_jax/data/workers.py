"""Parts tokenized in this process, or in several that end with it."""
import concurrent.futures
import concurrent.futures.process
import multiprocessing
import os
import signal
import threading

from mtp_jax.data.parts import Work


def tokenized(work: Work, todo: list[int], workers: int, meter):
  """Yields (records, skipped) of each part, and the bytes of input read until then."""
  if workers < 2:
    totals = [0, 0, 0]  # bytes, documents, tokens

    def add(*numbers):
      totals[:] = [total + number for total, number in zip(totals, numbers)]
      meter.show(*totals)
    for number in todo:
      yield *work.tokenize(number, add), totals[0]
    return
  spawn = multiprocessing.get_context('spawn')  # a fork of a process with threads, which JAX and Grain have, may hang
  counts = spawn.Array('q', 4)  # bytes, documents, tokens; the last one tells workers to stop
  with concurrent.futures.ProcessPoolExecutor(workers, spawn, _enter, (work, counts)) as pool:
    pending = {pool.submit(_part, number) for number in todo}
    try:
      while pending:
        done, pending = concurrent.futures.wait(pending, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED)
        totals = counts[:3]
        meter.show(*totals)
        yield from ((*future.result(), totals[0]) for future in done)
    except concurrent.futures.process.BrokenProcessPool as error:
      raise ChildProcessError('a worker process was killed, perhaps for want of memory; run the same command with fewer --workers') from error
    finally:
      counts[3] = 1
      pool.shutdown(wait=True, cancel_futures=True)


def _enter(work: Work, counts) -> None:
  """Makes this process a worker, which ends when its parent does, however that ends; Ctrl-C is the parent's business."""
  global _mine
  _mine = work, counts
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()

  def follow():
    parent.join()
    os._exit(1)
  threading.Thread(target=follow, daemon=True).start()


def _part(number: int) -> tuple[int, int]:
  work, counts = _mine

  def count(*numbers):
    with counts.get_lock():
      if counts[3]:
        raise RuntimeError('stopped')
      for i, n in enumerate(numbers):
        counts[i] += n
  return work.tokenize(number, count)
