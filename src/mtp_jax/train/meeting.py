"""How the processes of a job meet before JAX starts, so that each can say which of the others have not come.

    process 0    listens at its address; tells those that have come who is missing; 'go' to all when nobody is
    any other    connects and sends its index; listens to that

Then JAX's service takes the place of process 0 at the same address. JAX itself waits in silence.
"""
import contextlib
import selectors
import socket
import time
from collections.abc import Callable

from mtp_jax.config.errors import in_words

SAY_SECONDS = 10
ANSWER_SECONDS = 15  # in which process 0 answers, which tells who is missing every ten seconds
RETRY_SECONDS = 0.2
HELLO, MISSING, GO = 'mtp_jax', 'missing', 'go'


class _Wait:
  """How long this process waits for the others, and what it says of it.

  place: of the process in its job, in words.
  """

  def __init__(self, index: int, count: int, seconds: float, note: Callable[[str], None]):
    self.place, self.seconds, self._note = f'process {index} of {count}', seconds, note
    self.until, self._said = time.monotonic() + seconds, time.monotonic()
    self.for_whom = ''

  def goes_on(self, for_whom: str) -> bool:
    """Says for whom it waits, if it is time to. False when it has waited long enough."""
    self.for_whom, now = for_whom, time.monotonic()
    if now - self._said >= SAY_SECONDS:
      self._said = now
      self._note(f'mtp_jax: {self.place} waits for {for_whom}; gives up after {self.seconds} seconds')
    return now < self.until

  def failed(self) -> OSError:
    return OSError(f'{self.place}: waited {self.seconds} seconds for {self.for_whom}; see what became of it, and start '
                   'all processes again with the same command, or with a higher config.train.start_seconds')


def meet(address: str, index: int, count: int, seconds: float, note: Callable[[str], None]) -> None:
  """Returns when all processes of a job have come to host:port of process 0. Each must call it.

  Args:
    note: gets a line every SAY_SECONDS.

  Raises:
    OSError: not all have come within so many seconds; it says who has not.
  """
  wait = _Wait(index, count, seconds, note)
  host, _, port = address.rpartition(':')
  if index == 0:
    _receive(wait, address, int(port), count)
  else:
    _come(wait, address, (host.strip('[]'), int(port)), index)


def listening(port: int, backlog: int = 1) -> socket.socket:
  """A server at a port of this machine. Raises OSError or OverflowError where it is taken or is none."""
  family = {'family': socket.AF_INET6, 'dualstack_ipv6': True} if socket.has_dualstack_ipv6() else {}
  return socket.create_server(('', port), backlog=backlog, **family)


def _receive(wait: _Wait, address: str, port: int, count: int) -> None:
  """Process 0: waits until all others are connected, and tells them to go on."""
  with contextlib.ExitStack() as connections, selectors.DefaultSelector() as selector:
    come, told, told_at = {}, [], 0.0  # connections by index; who was missing when these were told, and when
    with listening(port, count) as server:
      selector.register(server, selectors.EVENT_READ)
      while missing := sorted(set(range(1, count)) - come.keys()):
        if not wait.goes_on(f'{_named(missing)} to come to {address}'):
          raise wait.failed()
        if missing != told or time.monotonic() - told_at >= SAY_SECONDS:
          told, told_at = missing, time.monotonic()
          for connection in come.values():
            _send(connection, f'{MISSING} {_named(missing)}')
        for key, _ in selector.select(RETRY_SECONDS):
          if key.fileobj is not server:  # nobody sends a second line, so this one has left
            selector.unregister(key.fileobj)
            come = {index: connection for index, connection in come.items() if connection is not key.fileobj}
            continue
          connection = connections.enter_context(server.accept()[0])
          index = _index_of(connection)
          if index in missing:
            come[index] = connection
            selector.register(connection, selectors.EVENT_READ)
          else:
            connection.close()
    for connection in come.values():
      _send(connection, GO)


def _index_of(connection: socket.socket) -> int | None:
  """The index that a process sends when it comes; None from any other program."""
  connection.settimeout(2)
  with contextlib.suppress(OSError, ValueError):
    hello, index = connection.recv(100).decode().split()
    return int(index) if hello == HELLO else None


def _send(connection: socket.socket, line: str) -> None:
  with contextlib.suppress(OSError):  # it has left, which the next look will tell
    connection.sendall(f'{line}\n'.encode())


def _come(wait: _Wait, address: str, place: tuple[str, int], index: int) -> None:
  """Any other process: connects to process 0, until that tells it to go on."""
  for_whom = f'process 0 at {address}'
  while wait.goes_on(for_whom):
    try:
      with socket.create_connection(place, timeout=ANSWER_SECONDS) as connection:
        _send(connection, f'{HELLO} {index}')
        for_whom = (f'process 0 at {address}, which does not let it in: another program may listen there, or another '
                    f'process have the index {index} too')
        for line in connection.makefile(errors='replace'):
          what, _, missing = line.strip().partition(' ')
          if what == GO:
            return _wait_for_service(wait, address, place)
          if what == MISSING:
            for_whom = f'process 0 at {address}, which has ended; it waited for {missing}'
            if not wait.goes_on(f'{missing} to come to {address}'):
              raise wait.failed()
    except TimeoutError:
      for_whom = f'process 0 at {address}, which does not answer'
    except ConnectionError:  # it does not listen yet, or no more
      pass
    except OSError as error:
      if time.monotonic() > wait.until:
        raise
      for_whom = f'process 0 at {address} ({in_words(error)})'
    time.sleep(RETRY_SECONDS)
  raise wait.failed()


def _wait_for_service(wait: _Wait, address: str, place: tuple[str, int]) -> None:
  """Until JAX's service of process 0 listens: JAX itself would look again after seconds only."""
  while wait.goes_on(f"JAX's service of process 0 at {address}"):
    with contextlib.suppress(OSError):
      return socket.create_connection(place, timeout=ANSWER_SECONDS).close()
    time.sleep(RETRY_SECONDS)
  raise wait.failed()


def _named(indices: list[int]) -> str:
  """'process 3', 'processes 1, 2 and 3', or of many the first ten."""
  names = [str(index) for index in indices]
  if len(names) > 12:
    names = [*names[:10], f'{len(names) - 10} more']
  head, last = names[:-1], names[-1]
  return f'processes {", ".join(head)} and {last}' if head else f'process {last}'
