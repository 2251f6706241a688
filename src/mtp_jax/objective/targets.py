"""objective/targets."""
import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax import objective
from mtp_jax.mesh import to_mesh_order
from mtp_jax.model.attention import documents
from mtp_jax.model.model import Model
from mtp_jax.sharding import out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
  """Of each future, over all positions that count: float32[M] nats, int32[M] hits of the argmax, int32[M] positions."""
  nats_M: jax.Array
  correct_M: jax.Array
  count_M: jax.Array

  def __add__(self, other: 'Sums') -> 'Sums':
    return jax.tree.map(jnp.add, self, other)


def targets(batch, m, futures: int):
  """What future m predicts and where it counts: int32[B, L] tokens, bool[B, L]. m may be traced. Each device cuts its own from the whole row."""
  L = batch['tokens'].shape[1] - futures
  ahead = lambda x_BT: to_mesh_order(jax.lax.dynamic_slice_in_dim(x_BT, m + 1, L, 1))
  segments_BL = to_mesh_order(batch['segments'][:, :L])
  return ahead(batch['tokens']), (ahead(batch['segments']) == segments_BL) & (segments_BL > 0)


def all_targets(batch, futures: int):
  """`targets` of every future: int32[M, B, L], bool[M, B, L]."""
  return jax.tree.map(lambda *x: jnp.stack(x), *(targets(batch, m, futures) for m in range(futures)))


def counts(batch, futures: int):
  """How many positions count for each future: int32[M]."""
  return jnp.stack([jnp.sum(targets(batch, m, futures)[1], dtype=jnp.int32) for m in range(futures)])


def states(model: Model, batch):
  """What the futures read: (z_BLD of the trunk, tokens_BT, positions_BL, documents)."""
  c = model.config
  L = batch['tokens'].shape[1] - c.futures
  positions_BL, seen = to_mesh_order(batch['positions'][:, :L]), documents(to_mesh_order(batch['segments'][:, :L]))
  x_BLD = model.embed(to_mesh_order(batch['tokens'][:, :L]))
  return model.run_trunk(x_BLD, positions_BL, seen), batch['tokens'], positions_BL, seen


def _weighted(batch, m_G, futures: int, coefficient_M):
  """Targets of some futures, the weight of each in the loss, and where they count: int32, float32, bool [G, B, L]."""
  found = [(*targets(batch, m, futures), coefficient_M[m]) for m in m_G]
  y, k, counted = zip(*((y_BL, jnp.where(counted_BL, k, 0.0), counted_BL) for y_BL, counted_BL, k in found))
  return jnp.stack(y), jnp.stack(k), jnp.stack(counted)


def target_bytes(batch, byte_length_V, futures: int):
  """Bytes that future 0's counted targets stand for: int32."""
  y_BL, counted_BL = objective.targets(batch, 0, futures)
  return jnp.sum(byte_length_V.at[y_BL].get(**out('BL')), where=counted_BL, dtype=jnp.int32)
