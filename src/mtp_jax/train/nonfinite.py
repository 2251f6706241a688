"""Bad steps (guards.py): their batch is kept as evidence, and too many in a row end the run, or send it back."""
import json
import pathlib

import numpy as np


class NotFinite(RuntimeError):
  """Too many steps in a row were bad; the last one was `step`."""

  def __init__(self, step: int, text: str):
    super().__init__(f'step {step}: {text}')
    self.step, self.text = step, text


def write_evidence(folder: pathlib.Path, step: int, batch, metrics: dict) -> pathlib.Path:
  """Writes the rows of the batch that this process holds, if any, and the metrics of the step; the
  path of the rows. Raises OSError.

      folder/nonfinite/step-STEP.npz    'tokens', 'segments', 'positions'
      folder/nonfinite/step-STEP.json   the metrics
  """
  path = folder / 'nonfinite' / f'step-{step}.npz'
  path.parent.mkdir(exist_ok=True)
  rows = {name: _local_rows(x) for name, x in batch.items()}
  np.savez(path, **{name: np.concatenate(parts) for name, parts in rows.items() if parts})
  path.with_suffix('.json').write_text(json.dumps(metrics) + '\n')
  return path


def _local_rows(x) -> list[np.ndarray]:
  return [np.asarray(shard.data) for shard in x.addressable_shards if shard.replica_id == 0]
