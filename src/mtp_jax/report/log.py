"""The metrics log: workdir/metrics.jsonl, and the same numbers for TensorBoard."""
import json
import math
import pathlib


class Log:
  """Writes one JSON line per record to workdir/metrics.jsonl, and TensorBoard scalars beside it.

  On resume, records after the checkpoint are dropped, and so is the validation at its step, which
  the run repeats: the file then holds what a run without interruption would have written.

  Args:
    step: of the checkpoint; 0 for a new run.
  """

  def __init__(self, workdir: pathlib.Path, step: int, tensorboard: bool):
    self.path = workdir / 'metrics.jsonl'
    if self.path.exists():
      lines = self.path.read_text(errors='replace').splitlines()
      kept = [line for line in lines if _position(line) <= (step, False)]
      temporary = self.path.with_suffix('.tmp')
      temporary.write_text(''.join(line + '\n' for line in kept))
      temporary.replace(self.path)
    self.file = self.path.open('a', buffering=1)
    self.board = None
    if tensorboard:
      from tensorboardX import SummaryWriter
      self.board = SummaryWriter(str(workdir / 'tensorboard'), purge_step=step + 1 if step
                                 else None)

  def write(self, step: int, kind: str, values: dict) -> None:
    """Writes numbers, or lists of one number per future; null where one is not finite."""
    self.file.write(json.dumps(finite({'step': step, 'kind': kind, **values})) + '\n')
    if self.board:
      for key, value in values.items():
        if isinstance(value, list):
          for m, number in enumerate(value):
            self.board.add_scalar(f'{kind}/{key}/{m}', number, step)
        else:
          self.board.add_scalar(f'{kind}/{key}', value, step)

  def close(self) -> None:
    self.file.close()
    if self.board:
      self.board.close()


def finite(value):
  """The value with None, JSON's null, in place of every number that is not finite."""
  if isinstance(value, dict):
    return {key: finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _position(line: str) -> tuple[float, bool]:
  """(step, is a validation) of a record; a line that a crash cut off comes after all others."""
  try:
    record = json.loads(line)
    return record['step'], record['kind'] == 'validation'
  except (ValueError, TypeError, KeyError):
    return math.inf, True
