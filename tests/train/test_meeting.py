"""The processes of a job meet before JAX starts; each says which of the others have not come, and gives up in time."""
import concurrent.futures
import contextlib
import re
import socket
import threading
import time

import pytest

from mtp_jax.train import meeting, processes


@pytest.fixture
def address(monkeypatch):
  monkeypatch.setattr(meeting, 'SAY_SECONDS', 0.2)
  with socket.create_server(('127.0.0.1', 0)) as free:
    port = free.getsockname()[1]
  return f'127.0.0.1:{port}'


class Job:
  """Processes, each a thread, and what each said."""

  def __init__(self, address: str, count: int, seconds: float = 20.0):
    self.address, self.count, self.seconds = address, count, seconds
    self.said, self.threads = {}, concurrent.futures.ThreadPoolExecutor()

  def start(self, index: int) -> concurrent.futures.Future:
    lines = self.said.setdefault(index, [])
    return self.threads.submit(meeting.meet, self.address, index, self.count, self.seconds, lines.append)

  def heard(self, index: int, text: str) -> None:
    """Waits until a process has said that."""
    until = time.monotonic() + 20
    while not any(text in line for line in self.said[index]):
      assert time.monotonic() < until, (text, self.said)
      time.sleep(0.02)


def service(address: str):
  """JAX's, which takes the place of process 0: what listens there."""
  port = int(address.rpartition(':')[2])
  return meeting.listening(port, backlog=10)


def test_each_process_says_who_has_not_come_and_all_go_on_when_all_have(address):
  job = Job(address, 4)
  first = job.start(1)
  job.heard(1, f'mtp_jax: process 1 of 4 waits for process 0 at {address}; gives up after 20.0 seconds')
  last = job.start(0)
  for index in (0, 1):
    job.heard(index, f'process {index} of 4 waits for processes 2 and 3 to come to {address}; gives up')
  third = job.start(3)
  for index in (0, 1, 3):
    job.heard(index, f'process {index} of 4 waits for process 2 to come to {address}; gives up')
  second = job.start(2)
  last.result(20)
  with service(address):
    assert [future.result(20) for future in (first, second, third)] == [None] * 3


def test_a_process_that_has_left_is_missing_again(address):
  job = Job(address, 3)
  last = job.start(0)
  job.heard(0, 'waits for processes 1 and 2')
  host, _, port = address.rpartition(':')
  with socket.create_connection((host, int(port))) as leaving:
    leaving.sendall(b'mtp_jax 1\n')
    job.heard(0, 'waits for process 2 to come')
  job.said[0].clear()
  job.heard(0, 'waits for processes 1 and 2 to come')
  others = [job.start(1), job.start(2)]
  last.result(20)
  with service(address):
    assert [future.result(20) for future in others] == [None] * 2


@pytest.mark.parametrize('present, told', [
    ([0, 2], {0: 'process 1 to come to {}', 2: r'process (1 to come to {}|0 at {}, which has ended; it waited for '
                                               'process 1)'}),
    ([1, 2], {1: 'process 0 at {}', 2: 'process 0 at {}'})])
def test_processes_give_up_in_time_and_say_who_was_missing(address, present, told):
  job = Job(address, 3, 5)
  futures = {index: job.start(index) for index in present}
  for index, future in futures.items():
    message = f'^process {index} of 3: waited 5 seconds for {told[index]}; see what became'.replace('{}', address)
    with pytest.raises(OSError, match=message):
      future.result(20)


@pytest.mark.parametrize('answer', [b'', b'\x00\x00\x12\x04\xff\xff nonsense\n'])
def test_another_program_at_the_address_is_not_taken_for_process_0(address, answer):
  """It closes every connection, after an answer of its own."""
  port, job = int(address.rpartition(':')[2]), Job(address, 2, 1)
  with contextlib.suppress(OSError), meeting.listening(port, backlog=10) as server:
    def close_all():
      with contextlib.suppress(OSError):
        while True:
          with server.accept()[0] as connection:
            connection.sendall(answer)
    threading.Thread(target=close_all, daemon=True).start()
    with pytest.raises(OSError, match='process 0 at .*, which does not let it in: another program may listen there'):
      job.start(1).result(20)


def test_what_sends_nothing_or_nonsense_to_process_0_does_not_count(address):
  job = Job(address, 2)
  last = job.start(0)
  job.heard(0, 'waits for process 1')
  host, _, port = address.rpartition(':')
  for content in (b'GET / HTTP/1.0\r\n\r\n', b'\xff\xfe', b'mtp_jax 7\n', b'mtp_jax x\n'):
    with socket.create_connection((host, int(port))) as other:
      other.sendall(content)
      assert other.recv(10) in (b'', b'missing pr')
  other = job.start(1)
  last.result(20)
  with service(address):
    assert other.result(20) is None


@pytest.mark.parametrize('indices, named', [([3], 'process 3'), ([1, 2], 'processes 1 and 2'),
                                            ([1, 2, 5], 'processes 1, 2 and 5')])
def test_missing_processes_are_named(indices, named):
  assert meeting._named(indices) == named
  assert re.fullmatch('processes 0, 1, .*, 9 and 90 more', meeting._named(list(range(100))))


@pytest.mark.parametrize('index', [0, 1])
def test_only_process_0_looks_whether_its_port_is_taken(address, index, monkeypatch):
  def fork():
    raise RuntimeError('goes on')

  monkeypatch.setattr(processes.os, 'fork', fork)
  for name, value in zip(processes.VARIABLES, (address, '2', str(index))):
    monkeypatch.setenv(name, value)
  with service(address), pytest.raises(RuntimeError if index else OSError,
                                       match='goes on' if index else 'process 0 cannot listen at port'):
    processes.run(lambda: 0, 10, 300)
