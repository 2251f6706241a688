"""Bad steps: why a step is skipped, and above which loss or gradient norm it counts as a spike.

    limit = median + factor * max(1.4826 * median |x - median|, FLOOR * median)

over the last `window` good steps. Of normal noise, 1.4826 times the median absolute deviation is
the standard deviation; unlike that, outliers hardly move it. The metrics of a step are known when
the next one has started, so the limits of a step depend on the steps up to the one before the last.
That holds after a resume as well: the window stands in the record of a checkpoint. Nothing here imports JAX.
"""
import collections
import math
import typing

import numpy as np

from mtp_jax.config import Config

CAUSES = ('loss not finite', 'gradient not finite', 'update not finite', 'loss spike', 'gradient spike')
FLOOR = 0.01  # of the median: what deviates less is noise, however flat the window


class Limits(typing.NamedTuple):
  """Above these, loss or gradient norm is a spike."""
  loss: float
  gradient_norm: float


NO_LIMITS = Limits(math.inf, math.inf)


class Guard:
  """What the recorded steps tell of the next ones. A step is given by its number, from 1.

  skipped: bad steps so far, by cause.

  Args:
    state: of the run that is resumed, as `state` gave it.
    comparable: whether the next steps have the same loss and data as those of that run.
  """

  def __init__(self, window: int, factor: float, state: dict | None = None, comparable: bool = True):
    self.window, self.factor = window, factor
    old = state or {'recent': [], 'skipped': {}}
    self._recent = collections.deque(old['recent'] if comparable else [], maxlen=window + 1)
    self.skipped = collections.Counter(old['skipped'])

  @classmethod
  def resumed(cls, config: Config, identity: dict, record: dict | None) -> 'Guard':
    """That of a run from the record of a checkpoint; with an empty window where objective, batch or data differ.

    Args:
      identity: of the data.
    """
    t, old = config.train, record and Config.from_dict(record['config'])
    comparable = old is not None and (old.objective, old.train.batch, record['identity']) == (
        config.objective, t.batch, identity)
    return cls(t.spike_window, t.spike_factor, record and record.get('guard'), comparable)

  def limits(self, step: int) -> Limits:
    """Those of a step: inf until the window is full, and if the factor is 0."""
    known = [values for number, *values in self._recent if number <= step - 2][-self.window:]
    if not self.factor or len(known) < self.window:
      return NO_LIMITS
    median = np.median(known, 0)
    deviation = 1.4826 * np.median(np.abs(known - median), 0)
    return Limits(*np.float32(median + self.factor * np.maximum(deviation, FLOOR * median)).tolist())

  def add(self, step: int, loss: float, gradient_norm: float, cause: int) -> None:
    """Notes a step. cause: 0 of a good one, else 1 + an index of CAUSES."""
    if cause:
      self.skipped[CAUSES[cause - 1]] += 1
    elif self.factor:
      self._recent.append((step, loss, gradient_norm))

  def forget(self) -> None:
    """Empties the window: what comes is not comparable."""
    self._recent.clear()

  def state(self) -> dict:
    """As JSON, for the record of a checkpoint."""
    return {'recent': list(self._recent), 'skipped': dict(self.skipped)}


def changes_loss(config: Config, step: int) -> bool:
  """Whether the futures' weights jump between the step before and this one, the first of which is
  step 0: by more than a fiftieth of their sum.
  """
  M, steps = config.model.futures, config.train.steps
  before, now = (np.array(config.objective.weights_M(M, max(0, n) / steps)) for n in (step - 1, step))
  return bool(np.abs(now - before).sum() > 0.02 * before.sum())
