"""What a model is worth on held-out rows: nats, accuracy, bits per byte, and how many of its own
drafts it accepts.
"""
import functools
import math

import jax
import numpy as np

from mtp_jax import objective
from mtp_jax.config import Config
from mtp_jax.evaluation import acceptance
from mtp_jax.mesh import put
from mtp_jax.model.model import Model
from mtp_jax.objective import Read, Table
from mtp_jax.report.display import Count


def evaluate(config: Config, model: Model, batches, byte_length_V, allowed_V, mesh, shown: Count | None = None) -> dict:
  """Sums over held-out batches, divided once, in float64.

  Args:
    batches: this process's rows of each batch, int32[B, L + M].
    byte_length_V: int32, bytes that each id stands for.
    allowed_V: bool, ids that a decoder may generate.
    shown: told how many batches are done.

  Returns:
    nats and accuracy, with the sums they are made of: one entry a future, nan where no held-out
    document is long enough. bits_per_byte of future 0. Greedily and at temperature 1 (see
    `acceptance`): acceptance, one entry a draft depth, and tokens_per_forward, one entry a draft
    length from 0 on.
  """
  total = None
  for i, batch in enumerate(batches, 1):
    counts = jax.device_get(evaluate_batch(config, model, put(batch, mesh), byte_length_V, allowed_V))
    counts = jax.tree.map(np.float64, counts)
    total = counts if total is None else jax.tree.map(np.add, total, counts)
    if shown:
      shown.show(i)
  sums, target_bytes, drafts = total
  with np.errstate(divide='ignore', invalid='ignore'):
    figures = {
        'nats': (sums.nats_M / sums.count_M).tolist(),
        'accuracy': (sums.correct_M / sums.count_M).tolist(),
        'nats_sum': sums.nats_M.tolist(),
        'correct': sums.correct_M.astype(int).tolist(),
        'count': sums.count_M.astype(int).tolist(),
        'bits_per_byte': float(sums.nats_M[0] / math.log(2) / target_bytes),
    }
    for name, verified in {'greedy': drafts.greedy, 'sampled': drafts.sampled}.items():
      figures[f'acceptance_{name}'] = (verified.accepted_k / verified.offered_k).tolist()
      figures[f'tokens_per_forward_{name}'] = (drafts.tokens / verified.forwards_M).tolist()
  return figures


@functools.partial(jax.jit, static_argnums=0)
def evaluate_batch(config: Config, model: Model, batch, byte_length_V, allowed_V):
  """(Sums, bytes of the targets, Drafts), future by future."""
  c, o = config.model, config.objective
  read = Read.of(batch, c.futures)
  table = Table.for_rows(model.readout(), read.inputs_BL)

  def score(h_BLD, labels):
    group = jax.tree.map(lambda x_BL: x_BL[None], (h_BLD, labels))
    return jax.tree.map(lambda x_g: x_g[0], objective.cross_entropy(c, o, group[0], table, group[1])[1])

  sums, compared = acceptance.compare(model, read, allowed_V, o.positions(c.vocab), score)
  return sums, read.target_bytes(byte_length_V), acceptance.drafts(compared)
