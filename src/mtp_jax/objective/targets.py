"""What a step takes from a batch, made once: inputs, positions, documents, and what each future
predicts and where it counts.

Future m at position t predicts token t+1+m, and counts iff that token is in the same document as t.
A batch is a dict of int32[B, T], T = L + M: 'tokens', 'segments' (the number of a token's document
in its row, 0 for padding) and 'positions' (from the document's first token). A row holds M tokens
more than inputs, so the farthest future has a target at the last position.
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
    targets_MBL: int32, the token that each future predicts; sequential module k is given those of
      future k-1.
    counted_MBL: bool, whether it counts.
    rows: of the whole batch, also where this is one of its microbatches.
  """
  inputs_BL: jax.Array
  positions_BL: jax.Array
  segments_BL: jax.Array
  targets_MBL: jax.Array
  counted_MBL: jax.Array
  rows: int = dataclasses.field(metadata={'static': True})

  @classmethod
  def of(cls, batch, futures: int) -> 'Read':
    """From int32[B, L + M] arrays, whose rows are whole on every device of the context axis."""
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
    """With a leading axis n: every n-th row each, so that each microbatch is spread over the
    devices like the batch.
    """
    def split(x):
      *stacked, B, L = x.shape
      letters = 'M' * len(stacked) + 'BnL'
      return jnp.moveaxis(jnp.reshape(x, (*stacked, B // n, n, L), **out(letters)), -2, 0)
    return jax.tree.map(split, self)

  def target_bytes(self, byte_length_V):
    """How many bytes future 0's counted targets stand for: int32."""
    bytes_BL = byte_length_V.at[self.targets_MBL[0]].get(**out('BL'))
    return jnp.sum(bytes_BL, where=self.counted_MBL[0], dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Labels:
  """Targets, weights in the loss and a mask, of a group of futures or of all of them: tokens, weight, and where
  they count.
  """
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
  """Of each future, over all positions that count: float32[M] nats, int32[M] hits of the argmax,
  int32[M] positions.
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
