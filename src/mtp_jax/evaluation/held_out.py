"""evaluation/held_out."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import objective
from mtp_jax.config import Config
from mtp_jax.evaluation import acceptance
from mtp_jax.mesh import put
from mtp_jax.model.model import Model
from mtp_jax.objective.targets import target_bytes


@functools.partial(jax.jit, static_argnums=0)
def _evaluate_step(config: Config, model: Model, batch, byte_length_V, allowed_V):
  c, o = config.model, config.objective
  readout = model.readout()
  h_MBLD = readout.map(lambda m, h_BLD: h_BLD, *objective.states(model, batch))
  y_MBL, counted_MBL = objective.all_targets(batch, c.futures)
  sums = objective.cross_entropy(c, o, h_MBLD, readout.table(), y_MBL, counted_MBL.astype(jnp.float32), counted_MBL)[1]
  return sums, target_bytes(batch, byte_length_V, c.futures), acceptance.drafts(c, h_MBLD, readout.table(), batch, allowed_V, o.chunk)


def evaluate(config: Config, model: Model, batches, byte_length_V, allowed_V, mesh) -> dict:
  """Over held-out batches, one entry a future: nats and accuracy, and the sums they are made of; bits per byte of future 0; and, greedily
  and at temperature 1, one entry a draft depth: acceptance; one entry a draft length from 0 on: tokens per forward (see `acceptance`).

  Args:
    allowed_V: bool, ids that a decoder may emit.

  Sums, divided once, in float64; nan for a future that no held-out document is long enough for.
  """
  total = None
  for batch in batches:
    found = jax.tree.map(np.float64, jax.device_get(_evaluate_step(config, model, put(batch, mesh), byte_length_V, allowed_V)))
    total = found if total is None else jax.tree.map(np.add, total, found)
  sums, size, drafts = total
  with np.errstate(divide='ignore', invalid='ignore'):
    by_way = {}
    for way, forwards_M, offered_K, accepted_K in zip(acceptance.WAYS, drafts.forwards_WM, drafts.offered_WK, drafts.accepted_WK):
      by_way |= {f'acceptance_{way}': (accepted_K / offered_K).tolist(), f'tokens_per_forward_{way}': (drafts.tokens / forwards_M).tolist()}
    return {'nats': (sums.nats_M / sums.count_M).tolist(), 'accuracy': (sums.correct_M / sums.count_M).tolist(), 'nats_sum': sums.nats_M.tolist(),
            'correct': sums.correct_M.astype(int).tolist(), 'count': sums.count_M.astype(int).tolist(),
            'bits_per_byte': float(sums.nats_M[0] / math.log(2) / size), **by_way}
