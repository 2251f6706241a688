"""Nats and acceptance by group of tokens: what each group costs, and how well it is drafted.

A draft belongs to the group of the token that it is for. Counts of all groups add up to those of
the whole evaluation.
"""
import functools

import jax
import numpy as np

from mtp_jax.config import Config
from mtp_jax.data.rows import SourceRows, validation_ids
from mtp_jax.evaluation import acceptance
from mtp_jax.evaluation.groups import GROUPINGS
from mtp_jax.evaluation.scoring import of_targets
from mtp_jax.mesh import process_share, put, to_text_order
from mtp_jax.model.model import Model
from mtp_jax.objective import Read
from mtp_jax.report.display import Count
from mtp_jax.sharding import place
from mtp_jax.tokenizer import Tokenizer


def breakdown(config: Config, model: Model, rows: SourceRows, batch: int, limit: int, tokenizer: Tokenizer, allowed_V,
              mesh, by: list[str]) -> dict[str, dict]:
  """By grouping, then by group that has tokens: tokens, and the figures of `held_out.evaluate`
  nats (one entry a future), acceptance_greedy and acceptance_sampled (one entry a draft depth).

  Args:
    limit: rows to read, at even distances.
    allowed_V: bool, ids that a decoder may generate.
    by: names of groupings, of groups.BY.
  """
  groupings = {name: GROUPINGS[name](rows, tokenizer) for name in by}
  totals, ids = dict.fromkeys(by), validation_ids(rows, batch, limit)
  index, count = process_share(mesh)
  share = slice(index * batch // count, (index + 1) * batch // count)
  with Count('evaluate by ' + ' and '.join(by), len(ids), 'rows') as shown:
    for start in range(0, len(ids), batch):
      some = ids[start:start + batch]
      read = rows.batch(some)
      ours = put({name: x_BT[share] for name, x_BT in read.items()}, mesh)
      values = jax.device_get(_read_batch(config, model, ours, allowed_V))
      for name, grouping in groupings.items():
        sums = _sums(values, grouping.groups_BT(some, read), len(grouping.names))
        totals[name] = sums if totals[name] is None else jax.tree.map(np.add, totals[name], sums)
      shown.show(start + len(some))
  return {name: _figures(totals[name], groupings[name].names) for name in by}


@functools.partial(jax.jit, static_argnums=0)
def _read_batch(config: Config, model: Model, batch, allowed_V):
  """(log-probabilities of all targets, whether they count, `acceptance.by_position`), whole on every device."""
  c, chunk = config.model, config.objective.positions(config.model.vocab)
  read, w_VD = Read.of(batch, c.futures), model.readout().table()

  def logp(h_BLD, labels):
    return of_targets(c, h_BLD[None], w_VD, labels.target_gBL[None], allowed_V, chunk)[0][0]

  logp_MBL, compared = acceptance.compare(model, read, allowed_V, chunk, logp)
  counted_MBl = jax.numpy.stack([to_text_order(x_BL) for x_BL in read.counted_MBL])
  drafts = acceptance.by_position(compared)
  return jax.tree.map(lambda x: place(x, 'x' * x.ndim), (logp_MBL, counted_MBl, drafts))


def _sums(values, groups_BT: np.ndarray, groups: int) -> dict[str, np.ndarray]:
  """Sums of each group, float64[M or M-1, groups]."""
  logp_MBL, counted_MBL, drafts = values
  L = logp_MBL.shape[2]
  sums = {'count': [], 'nats': []}
  for m, (logp_BL, counted_BL) in enumerate(zip(logp_MBL, counted_MBL)):
    group = groups_BT[:, 1 + m:1 + m + L][counted_BL]
    sums['count'].append(_by_group(group, None, groups))
    sums['nats'].append(_by_group(group, -logp_BL[counted_BL], groups))
  for name, (offered_lkB, accepted_lkB) in drafts.items():
    for what, x_lkB in (('offered', offered_lkB), ('accepted', accepted_lkB)):
      sums[f'{what}_{name}'] = [_by_group(groups_BT[:, 1 + k:1 + k + L].T.ravel(), x_lkB[:, k - 1].ravel(), groups)
                                for k in range(1, x_lkB.shape[1] + 1)]
  return {name: np.array(rows).reshape(-1, groups) for name, rows in sums.items()}


def _by_group(group: np.ndarray, weights, groups: int) -> np.ndarray:
  """Sums of weights by group; those of group -1, which is padding, are left out."""
  return np.bincount(group + 1, weights, minlength=groups + 1)[1:].astype(np.float64)


def _figures(sums: dict[str, np.ndarray], names) -> dict[str, dict]:
  with np.errstate(divide='ignore', invalid='ignore'):
    nats = sums['nats'] / sums['count']
    acceptances = {f'acceptance_{way}': sums[f'accepted_{way}'] / sums[f'offered_{way}']
                   for way in ('greedy', 'sampled')}
  return {name: {'tokens': int(sums['count'][0, i]), 'nats': nats[:, i].tolist(),
                 **{key: values[:, i].tolist() for key, values in acceptances.items()}}
          for i, name in enumerate(names) if sums['count'][0, i]}
