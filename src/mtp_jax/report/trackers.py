"""Where a run's numbers can be looked at besides metrics.jsonl: one small class for each program.

A tracker gets every record of the log as {'train/loss': 1.5, 'train/nats/0': 1.4, ...}. A run that
resumes writes the records after its checkpoint again; both programs then show them once.
"""
import importlib.util
import os
import pathlib
import secrets
import time
import typing

from mtp_jax.config import BadInput


class Tracker(typing.Protocol):
  """What a run asks of one."""

  def write(self, step: int, values: dict[str, float]) -> None:
    """Adds the numbers of one record."""

  def close(self) -> None:
    """Writes what still waits."""


class TensorBoard:
  """Event files in workdir/tensorboard; `tensorboard --logdir=WORKDIR` shows them."""
  package, extra = 'tensorboardX', ''

  def __init__(self, workdir: pathlib.Path, step: int, config: dict):
    # not SummaryWriter: where its thread cannot write, it ends, and the run waits for ever to hand it a number
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import SessionLog
    folder = workdir / 'tensorboard'
    folder.mkdir(exist_ok=True)
    self._file = EventsWriter(str(folder / 'events'))
    if step:  # hides what an earlier run wrote after the checkpoint
      self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))

  def _add(self, **fields) -> None:
    from tensorboardX.proto.event_pb2 import Event
    self._file.write_event(Event(wall_time=time.time(), **fields))

  def write(self, step: int, values: dict[str, float]) -> None:
    from tensorboardX.summary import scalar
    for name, value in values.items():
      self._add(step=step, summary=scalar(name, value))
    self._file.flush()

  def close(self) -> None:
    self._file.close()


class WeightsAndBiases:
  """A run of Weights & Biases, its files in workdir/wandb; WANDB_PROJECT, WANDB_MODE and its other
  variables hold. A resumed run goes on as the same one, which ignores steps that it has.

  Raises:
    BadInput: wandb cannot start, such as without a login.
  """
  package, extra = 'wandb', 'wandb'

  def __init__(self, workdir: pathlib.Path, step: int, config: dict):
    import wandb
    folder = workdir / 'wandb'
    folder.mkdir(exist_ok=True)
    run_id = folder / 'run_id'
    if not (step and run_id.exists()):
      run_id.write_text(secrets.token_hex(8))
    try:
      self._run = wandb.init(
          dir=str(workdir), id=run_id.read_text(), name=workdir.name, config=config,
          project=os.environ.get('WANDB_PROJECT', 'mtp_jax'), resume='allow' if step else None,
          settings=wandb.Settings(console='off', silent=True))
    except (wandb.Error, OSError) as error:
      raise BadInput(f"config.train.trackers: wandb does not start: {error}; log in with 'wandb login', or keep "
                     'the records here with WANDB_MODE=offline') from None

  def write(self, step: int, values: dict[str, float]) -> None:
    self._run.log(values, step=step)

  def close(self) -> None:
    self._run.finish()


TRACKERS = {'tensorboard': TensorBoard, 'wandb': WeightsAndBiases}


def check_installed(names: tuple[str, ...]) -> None:
  """Raises BadInput for a tracker whose package is missing."""
  for name in names:
    kind = TRACKERS[name]
    if importlib.util.find_spec(kind.package) is None:
      raise BadInput(f"config.train.trackers={names!r}: {kind.package} is missing; pip install -e '.[{kind.extra}]'")


def open_trackers(names: tuple[str, ...], workdir: pathlib.Path, step: int, config: dict) -> list[Tracker]:
  """The trackers of a run, or of its resume from the checkpoint at `step`."""
  return [TRACKERS[name](workdir, step, config) for name in names]


def flat(kind: str, values: dict) -> dict[str, float]:
  """{'train/loss': 1.5, 'train/nats/0': 1.4}: a list has a name for each entry."""
  numbers = {}
  for key, value in values.items():
    if isinstance(value, list):
      numbers |= {f'{kind}/{key}/{m}': number for m, number in enumerate(value)}
    else:
      numbers[f'{kind}/{key}'] = value
  return numbers
