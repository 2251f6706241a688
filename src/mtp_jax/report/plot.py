"""Pictures: PNG files drawn by matplotlib, which is needed only for them."""
import contextlib

from mtp_jax.config import BadInput
from mtp_jax.config.errors import in_words


@contextlib.contextmanager
def picture(path: str, width: float, height: float, columns: int = 1):
  """Yields axes to draw on (an array of them for several columns) and saves the figure to `path`
  when the block ends.

  Args:
    width, height: of the figure, in inches.

  Raises:
    BadInput: matplotlib is missing, or the file cannot be written.
  """
  try:
    import matplotlib
  except ImportError as error:
    raise BadInput(f"--plot={path}: {error}; pip install -e '.[report]'") from None
  matplotlib.use('Agg')
  from matplotlib import pyplot
  figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout='constrained')
  try:
    yield axes
    figure.savefig(path, dpi=150)
  except OSError as error:
    raise BadInput(f'--plot={path}: cannot be written ({in_words(error)}); give another path') from None
  except ValueError as error:
    raise BadInput(f'--plot={path}: {error}') from None
  finally:
    pyplot.close(figure)
