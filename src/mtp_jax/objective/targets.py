"""A batch as a step reads it: inputs, positions and documents, and the target of every future.

Future m at position t predicts token t+1+m. Its prediction counts if that token is in the same document as token t.
A batch is a dict of int32[B, T], T = L + M: 'tokens', 'segments' (the number of a token's document in its row, 0 for
padding) and 'positions' (counted from the document's first token). A row has L inputs and M tokens more, so that the
farthest future has a target at the last input.
"""
import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.mesh import to_mesh_order
from mtp_jax.sharding import out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Read:
  """A batch as the model reads it, in mesh order (see mesh.py).

  Attributes:
    inputs_BL, positions_BL, segments_BL: int32.
    targets_MBL: int32, the token that each future predicts; sequential module k also reads the targets of
      future k-1.
    counted_MBL: bool, whether that prediction counts.
    rows: rows of the whole batch, also in a microbatch.
  """
  inputs_BL: jax.Array
  positions_BL: jax.Array
  segments_BL: jax.Array
  targets_MBL: jax.Array
  counted_MBL: jax.Array
  rows: int = dataclasses.field(metadata={'static': True})

  @classmethod
  def of(cls, batch, futures: int) -> 'Read':
    """From int32[B, L + M] arrays; a device that holds a row holds all of it."""
    L = batch['tokens'].shape[1] - futures
    cut = lambda x_BT, start: to_mesh_order(x_BT[:, start:start + L])
    segments_BL = cut(batch['segments'], 0)
    ahead = range(1, futures + 1)
    targets_MBL = jnp.stack([cut(batch['tokens'], start) for start in ahead])
    same_MBL = jnp.stack([cut(batch['segments'], start) == segments_BL for start in ahead])
    counted_MBL = same_MBL & (segments_BL > 0)
    return cls(cut(batch['tokens'], 0), cut(batch['positions'], 0), segments_BL, targets_MBL, counted_MBL,
               len(batch['tokens']))

  @property
  def count_M(self):
    """How many positions count for each future: int32[M]."""
    return jnp.sum(self.counted_MBL, (1, 2), dtype=jnp.int32)

  def microbatches(self, n: int) -> 'Read':
    """n microbatches, stacked on a leading axis. Each takes every n-th row, and so is spread over all devices."""
    def split(x):
      *stacked, B, L = x.shape
      letters = 'M' * len(stacked) + 'BnL'
      return jnp.moveaxis(jnp.reshape(x, (*stacked, B // n, n, L), **out(letters)), -2, 0)
    return jax.tree.map(split, self)

  def target_bytes(self, byte_length_V):
    """Bytes of text of the targets of future 0 that count: int32."""
    bytes_BL = byte_length_V.at[self.targets_MBL[0]].get(**out('BL'))
    return jnp.sum(bytes_BL, where=self.counted_MBL[0], dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Labels:
  """What a group of futures predicts: target tokens, their weights in the loss, and a mask of those that count."""
  target_gBL: jax.Array
  weight_gBL: jax.Array
  counted_gBL: jax.Array

  @classmethod
  def of(cls, read: Read, coefficient_M) -> 'Labels':
    """The labels of all futures; coefficient_M: weight_m / count_m."""
    weight_MBL = jnp.where(read.counted_MBL, coefficient_M[:, None, None], 0.0)
    return cls(read.targets_MBL, weight_MBL, read.counted_MBL)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
  """Sums over the positions that count, for each future: nats, float32[M]; predictions whose argmax is the target,
  int32[M]; positions, int32[M].
  """
  nats_M: jax.Array
  correct_M: jax.Array
  count_M: jax.Array

  @classmethod
  def zeros(cls, futures: int) -> 'Sums':
    zeros_M = jnp.zeros(futures, jnp.int32)
    return cls(jnp.zeros(futures), zeros_M, zeros_M)

  def __add__(self, other: 'Sums') -> 'Sums':
    return jax.tree.map(jnp.add, self, other)

  def set(self, futures, sums: 'Sums') -> 'Sums':
    """With the sums of these futures replaced."""
    return jax.tree.map(lambda x_M, new: x_M.at[futures].set(new), self, sums)
