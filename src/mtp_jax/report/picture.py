"""A PNG to look at; matplotlib is asked for only when one is drawn."""
import contextlib

from mtp_jax.config import BadInput


@contextlib.contextmanager
def picture(path: str, width: float, height: float, columns: int = 1):
  """Axes to draw on, or an array of them where there are several columns, in inches; saved to `path` when the block ends.

  Raises:
    BadInput: matplotlib is missing, or the file cannot be written.
  """
  try:
    import matplotlib
  except ImportError as error:
    raise BadInput(f"--plot={path}: {error}; pip install -e '.[notebook]'") from None
  matplotlib.use('Agg')
  from matplotlib import pyplot
  figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout='constrained')
  try:
    yield axes
    figure.savefig(path, dpi=150)
  except (OSError, ValueError) as error:
    raise BadInput(f'--plot={path}: {error}') from None
  finally:
    pyplot.close(figure)
