"""The unembedding in the loss: neighbours share one table, and score each other's tokens.

Where parameters are sharded over n devices, each device would gather the whole table, and sum up a
float32 gradient as large before the devices share it out. With a large vocabulary these two are the
largest arrays of a step. So r neighbours hold one table together, V / r rows each; a device scores
the tokens of all r against its rows (Megatron-LM's vocabulary-parallel loss, arXiv:1909.08053,
section 3), and what a softmax needs of all rows goes round in a few numbers a token. For each of D
columns, and a future of T tokens a device, it sends about

    2 T (r - 1) numbers      states to its neighbours, and their gradients back
    2 V / r numbers          its rows of the table, and the gradient of these

r is the number that sends fewest bytes: 1 with a small vocabulary, 4 with 102,400 rows and 16,384
tokens. FLOPs are the same with any r.
"""
import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.config import ModelConfig
from mtp_jax.model.model import Futures
from mtp_jax.sharding import axes, devices_along, neighbours, on_devices


def sharers(c: ModelConfig, tokens: int) -> int:
  """r: how many neighbours share a table.

  Args:
    tokens: of a future, on each device.
  """
  n, rows, size = devices_along('D'), c.vocab // devices_along('V'), jnp.dtype(c.dtype).itemsize
  sent_bytes = lambda r: 2 * size * tokens * (r - 1) + (size + 4) * rows / r
  return min((r for r in range(1, n + 1) if n % r == 0 and rows % r == 0), key=sent_bytes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
  """The unembedding, in the compute type, as the devices hold it in the loss.

  Methods are for use on each device, under `on_devices`, where an axis is as long as the
  device's part of it.

  Attributes:
    w_PVD: each device's rows, all columns.
    r: how many neighbours share the table.
    width, vocabulary, tokens: the mesh axes that divide columns, rows and tokens.
  """
  w_PVD: jax.Array
  r: int = dataclasses.field(metadata={'static': True})
  width: tuple[str, ...] = dataclasses.field(metadata={'static': True})
  vocabulary: tuple[str, ...] = dataclasses.field(metadata={'static': True})
  tokens: tuple[str, ...] = dataclasses.field(metadata={'static': True})

  @classmethod
  def of(cls, c: ModelConfig, unembed_VD, tokens: int) -> 'Table':
    """Brought together once for all futures, which have so many tokens each on a device."""
    w_VD = unembed_VD.astype(c.dtype)
    if jax.sharding.get_abstract_mesh().empty:
      return cls(w_VD[None], 1, (), (), ())
    table = cls(None, sharers(c, tokens), axes('D'), axes('V'), axes('P'))
    w_PVD = on_devices(table.gather_table, ('VD',), 'PVD')(w_VD)
    return dataclasses.replace(table, w_PVD=w_PVD)

  @classmethod
  def for_rows(cls, futures: Futures, inputs_BL) -> 'Table':
    """That of a model, for a batch of this shape."""
    B, L = inputs_BL.shape
    return cls.of(futures.config, futures.unembed_VD, B * L // devices_along('P'))

  def _near(self) -> dict:
    """The devices that share a table."""
    return {'axis_index_groups': neighbours(jax.lax.axis_size(self.width), self.r)[0]}

  def _far(self) -> dict:
    """The devices that hold the same rows of it."""
    return {'axis_index_groups': neighbours(jax.lax.axis_size(self.width), self.r)[1]}

  def gather_table(self, w_VD):
    """[V, D of this device] -> [1, V / r, all of D]."""
    if self.r > 1:
      w_VD = jax.lax.all_to_all(w_VD, self.width, 0, 1, tiled=True, **self._near())
    return jax.lax.all_gather(w_VD, self.width, axis=1, tiled=True, **self._far())[None]

  def scatter_gradient(self, dw_PDV):
    """[1, all of D, V / r] of each device's tokens -> the sum over all tokens, [D of this device, V].

    The first axis is the one that is scattered: of another, XLA would sum up the whole on every device.
    """
    if not self.tokens:
      return dw_PDV[0]
    dw_DV = jax.lax.psum_scatter(dw_PDV[0], self.width, tiled=True, **self._far())
    dw_DV = jax.lax.psum(dw_DV, tuple(axis for axis in self.tokens if axis not in self.width))
    if self.r == 1:
      return dw_DV
    return jax.lax.all_to_all(dw_DV, self.width, 0, 1, tiled=True, **self._near())

  def gather_tokens(self, x_Pt):
    """[1, t, ...] -> [1, r t, ...]: the tokens of all that share the table."""
    if self.r == 1:
      return x_Pt
    return jax.lax.all_gather(x_Pt, self.width, axis=1, tiled=True, **self._near())

  def own_tokens(self, x_Pt):
    """[1, r t] -> [1, t]: those of this device."""
    own = jnp.reshape(x_Pt, (1, self.r, -1))
    return own[:, jax.lax.axis_index(self.width) % self.r] if self.r > 1 else own[:, 0]

  def scatter_tokens(self, x_PtD):
    """[1, r t, D] -> [1, t, D]: the sum over all rows of the table, of the tokens of this device."""
    if self.r > 1:
      x_PtD = jax.lax.psum_scatter(x_PtD, self.width, scatter_dimension=1, tiled=True, **self._near())
    return jax.lax.psum(x_PtD, self.vocabulary) if self.vocabulary else x_PtD

  def over_rows(self, reduce, x_Pt):
    """`reduce`, such as jnp.max, over the parts of the table, whose results are x_Pt."""
    for axis in self.vocabulary:
      if jax.lax.axis_size(axis) > 1:
        x_Pt = reduce(jax.lax.all_gather(x_Pt, axis), 0)
    if self.r == 1:
      return x_Pt
    return reduce(jax.lax.all_gather(x_Pt, self.width, **self._near()), 0)

  def over_tokens(self, x):
    """The sum over all devices' tokens."""
    return jax.lax.psum(x, self.tokens) if self.tokens else x

  def ids_V(self, rows: int):
    """The ids of this device's rows."""
    if not self.tokens:
      return jnp.arange(rows)
    part = jax.lax.axis_index(self.vocabulary) * self.r + jax.lax.axis_index(self.width) % self.r
    return part * rows + jnp.arange(rows)
