"""report/log."""
import json
import math
import pathlib


class Log:
  """One JSON line a record in workdir/metrics.jsonl, and TensorBoard scalars beside it.

  On resume, records past the checkpoint are dropped, and so is the validation at it, which the run repeats: the file reads as if
  the run had never stopped.
  """

  def __init__(self, workdir: pathlib.Path, step: int, tensorboard: bool):
    self.path = workdir / 'metrics.jsonl'
    if self.path.exists():
      kept = [line for line in self.path.read_text(errors='replace').splitlines() if _place_of(line) <= (step, False)]
      temporary = self.path.with_suffix('.tmp')
      temporary.write_text(''.join(line + '\n' for line in kept))
      temporary.replace(self.path)
    self.file = self.path.open('a', buffering=1)
    self.board = None
    if tensorboard:
      from tensorboardX import SummaryWriter
      self.board = SummaryWriter(str(workdir / 'tensorboard'), purge_step=step + 1 if step else None)

  def write(self, step: int, kind: str, values: dict) -> None:
    """values: numbers, or lists of one number a future; one that is not finite is null in the file."""
    self.file.write(json.dumps(finite({'step': step, 'kind': kind, **values})) + '\n')
    if self.board:
      for key, value in values.items():
        for m, number in enumerate(value) if isinstance(value, list) else [(None, value)]:
          self.board.add_scalar(f'{kind}/{key}' if m is None else f'{kind}/{key}/{m}', number, step)

  def close(self) -> None:
    self.file.close()
    if self.board:
      self.board.close()


def finite(value):
  """The same, with None, JSON's null, for every number that is not finite."""
  if isinstance(value, dict):
    return {key: finite(v) for key, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [finite(v) for v in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _place_of(line: str) -> tuple[float, bool]:
  """The step of a record, and whether it is the validation there; a line cut off by a crash counts as past everything."""
  try:
    record = json.loads(line)
    return record['step'], record['kind'] == 'validation'
  except (ValueError, TypeError, KeyError):
    return math.inf, True
