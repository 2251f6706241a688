"""What a caller may hand in to follow the work on a set; by default nothing is shown.

    note(line)                   a line of text, such as 'another process prepares data/web; waiting for it'
    progress(total, ready)       makes a meter, a context manager, for `total` bytes of input,
                                 `ready` of which earlier work has done
    meter.show(size, documents, tokens)    what this work has read and written so far; called often
    waiting(what)                a context manager, in which a document of config.data.dataset is waited for

`mtp_jax.report.display` has `print_stderr` and `Meter` for a terminal.
"""


def quiet(line: str) -> None:
  """A note that nobody reads."""


class NoMeter:
  """A meter that shows nothing."""

  def __init__(self, total: int, ready: int):
    pass

  def __enter__(self) -> 'NoMeter':
    return self

  def __exit__(self, *error) -> None:
    pass

  def show(self, size: int, documents: int, tokens: int) -> None:
    """Bytes of input, documents and tokens since the beginning of this work."""
