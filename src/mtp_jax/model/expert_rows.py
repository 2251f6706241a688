"""The experts of one device over rows: a row is one token at one of its experts, j x t of them.

    y_t = sum over the rows of token t of  weight * down_e(silu(gate_e x_t) * up_e x_t),  e the expert of the row

No row is dropped, and the same is computed in two ways. `SortedRows` have all rows in the order of their experts;
a kernel of the chip multiplies each by the matrix of its expert. `Tiles` need no kernel: rows of one expert lie in
tiles, and a loop multiplies the tiles that are in use. (XLA carries out `jax.lax.ragged_dot` on a CPU as every
expert over every row.)
"""
import dataclasses
import re

import jax
import jax.numpy as jnp

from mtp_jax.model import kernels

STRETCH = 128  # rows of which each is compared with each


def rows_by_expert(expert_jt, experts: int, expected: int):
  """`SortedRows` where the chip has a kernel, else `Tiles`.

  Args:
    expert_jt: int32, the experts of each token; from `experts` on where it goes to none.
    expected: rows that all these experts together have under an even load.
  """
  kernel = kernels.grouped_kernel()
  return (SortedRows.of(expert_jt, experts, expected, kernel) if kernel
          else Tiles.of(expert_jt, experts, expected))


def _forward(x_aD, weight_a, gate, up, down, product):
  """What experts make of rows; product(rows, matrix) multiplies each row by that of its expert."""
  product_aW = jax.nn.silu(product(x_aD, gate)) * product(x_aD, up)
  return product((product_aW * weight_a[:, None]).astype(x_aD.dtype), down)


def _backward(dy_aD, x_aD, weight_a, gate, up, down, product, transposed, outer):
  """Gradients of the rows, of their weights, and of the three matrices.

  Args:
    transposed: as `product`, with the matrices transposed.
    outer: (left, right) -> float32 sum over the rows of an expert.
  """
  dtype = x_aD.dtype
  multiply = lambda gate_aW, up_aW: jax.nn.silu(gate_aW) * up_aW
  product_aW, back = jax.vjp(multiply, product(x_aD, gate), product(x_aD, up))
  dweighted_aW = transposed(dy_aD, down)
  dgate_aW, dup_aW = back((dweighted_aW * weight_a[:, None]).astype(product_aW.dtype))
  weighted_aW = (product_aW * weight_a[:, None]).astype(dtype)
  dgate_aW, dup_aW = dgate_aW.astype(dtype), dup_aW.astype(dtype)
  dx_aD = transposed(dgate_aW, gate) + transposed(dup_aW, up)
  dweight_a = jnp.sum((product_aW * dweighted_aW).astype(jnp.float32), -1)
  return dx_aD, dweight_a, (outer(x_aD, dgate_aW), outer(x_aD, dup_aW), outer(weighted_aW, dy_aD))


def _by_token(x_aD, place_jt):
  """The sum of each token's rows; float32 where j is above 1. A CPU takes ten times as long to sum the first axis."""
  x_tjD = entries(x_aD, place_jt.T)
  return jnp.sum(x_tjD, 1, dtype=jnp.float32) if len(place_jt) > 1 else x_tjD[:, 0]


def tokens_of(row, x_jt):
  """The token of each row, of j x t rows; t, beyond them, where there is no row."""
  tokens = x_jt.shape[1]
  return jnp.where(row < x_jt.size, row % tokens, tokens)


def entries(x_t, index):
  """Entries of an array, 0 beyond its end."""
  return x_t.at[index].get(mode='fill', fill_value=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SortedRows:
  """Rows in the order of their experts.

  Attributes:
    row_a: the row at each place, a whole number of the kernel's tiles; j x t where there is none.
    place_jt: where each row lies; beyond all where it goes to no expert.
    rows_E: int32, rows of each expert.
    filled: the share of places that have a row under an even load.
    kernel: of `kernels.grouped_kernel`.
  """
  row_a: jax.Array
  place_jt: jax.Array
  rows_E: jax.Array
  filled: float = dataclasses.field(metadata={'static': True})
  kernel: object = dataclasses.field(metadata={'static': True})

  @classmethod
  def of(cls, expert_jt, experts: int, expected: int, kernel) -> 'SortedRows':
    rank_jt, rows_E = ranks(expert_jt, experts)
    places = -(-expert_jt.size // kernel.rows) * kernel.rows
    first_E = jnp.cumsum(rows_E) - rows_E
    place_jt = jnp.where(expert_jt < experts, _of_key(first_E, expert_jt) + rank_jt, places)
    return cls(inverse(place_jt, places), place_jt, rows_E, expected / places, kernel)

  def forward(self, x_tD, weight_jt, *matrices):
    """(y_tD, float32 sums where j is above 1; float32[E], rows of each expert)."""
    y_aD = _forward(*self._rows(x_tD, weight_jt), *matrices, self._product)
    return _by_token(y_aD, self.place_jt), self.rows_E.astype(jnp.float32)

  def backward(self, dy_tD, x_tD, weight_jt, *matrices_and_totals):
    """(gradient of x_tD, of the weights, float32 gradients of the matrices added to the last argument)."""
    *matrices, totals = matrices_and_totals
    x_aD, weight_a = self._rows(x_tD, weight_jt)
    dy_aD = entries(dy_tD, tokens_of(self.row_a, weight_jt))
    transposed = lambda rows, matrix: self._product(rows, matrix, transposed=True)
    dx_aD, dweight_a, dmatrices = _backward(dy_aD, x_aD, weight_a, *matrices, self._product, transposed, self._outer)
    return _by_token(dx_aD, self.place_jt), entries(dweight_a, self.place_jt), jax.tree.map(jnp.add, totals, dmatrices)

  def _rows(self, x_tD, weight_jt):
    """(states, weights) of the rows."""
    return entries(x_tD, tokens_of(self.row_a, weight_jt)), entries(jnp.ravel(weight_jt), self.row_a)

  def _product(self, x_aD, matrix, transposed=False):
    with jax.named_scope(expected_times(self.filled)):
      return self.kernel.product(x_aD, matrix, self.rows_E, transposed)

  def _outer(self, left_aD, right_aW):
    with jax.named_scope(expected_times(self.filled)):
      return self.kernel.outer(left_aD, right_aW, self.rows_E)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
  """How rows lie in tiles of at most b, each of a single expert.

  Attributes:
    expert_n: the expert of each tile.
    row_nb: the rows of each tile; j x t where it has fewer.
    place_jt: where each row lies in the tiles, n x b; beyond them where it goes to no expert.
    used: tiles in use, the first ones.
    even: tiles that an even load needs.
  """
  expert_n: jax.Array
  row_nb: jax.Array
  place_jt: jax.Array
  used: jax.Array
  even: int = dataclasses.field(metadata={'static': True})

  @classmethod
  def of(cls, expert_jt, experts: int, expected: int) -> 'Tiles':
    rows = expert_jt.size
    if rows <= experts:
      return cls._of_single_rows(expert_jt, experts)
    b = tile_rows(rows, experts)
    n = min(rows, (rows + experts * (b - 1)) // b)  # the most that any load needs
    rank_jt, rows_E = ranks(expert_jt, experts)
    tiles_E = -(-rows_E // b)
    tile_end_E = jnp.cumsum(tiles_E)
    expert_n = jnp.minimum(jnp.sum(tile_end_E <= jnp.arange(n)[:, None], 1, dtype=jnp.int32), experts - 1)
    place_jt = jnp.where(expert_jt < experts, _of_key((tile_end_E - tiles_E) * b, expert_jt) + rank_jt, n * b)
    even = experts * -(-expected // (experts * b))
    return cls(expert_n, jnp.reshape(inverse(place_jt, n * b), (n, b)), place_jt, tile_end_E[-1], min(n, even))

  @classmethod
  def _of_single_rows(cls, expert_jt, experts: int) -> 'Tiles':
    """Tiles of one row, as decoding has them: there is nothing to sort."""
    expert_a, rows = jnp.ravel(expert_jt), expert_jt.size
    inside_a = expert_a < experts
    place_a = jnp.where(inside_a, jnp.cumsum(inside_a) - 1, rows)
    row_n = inverse(place_a, rows)
    return cls(expert_a.at[row_n].get(mode='clip'), row_n[:, None], jnp.reshape(place_a, expert_jt.shape),
               jnp.sum(inside_a, dtype=jnp.int32), rows)

  def forward(self, x_tD, weight_jt, *matrices):
    """As of `SortedRows`."""
    def multiply(i, carry):
      y_nbD, rows_E = carry
      expert, _, x_bD, weight_b = self._tile(i, x_tD, weight_jt)
      y_bD = _forward(x_bD, weight_b, *(matrix[expert] for matrix in matrices), _dot)
      rows = jnp.sum(self.row_nb[i] < weight_jt.size, dtype=jnp.float32)
      return y_nbD.at[i].set(y_bD), rows_E.at[expert].add(rows)

    zeros = jnp.zeros((*self.row_nb.shape, x_tD.shape[-1]), x_tD.dtype), jnp.zeros(len(matrices[0]), jnp.float32)
    y_nbD, rows_E = self._loop(multiply, zeros)
    return _by_token(_rows_of(y_nbD), self.place_jt), rows_E

  def backward(self, dy_tD, x_tD, weight_jt, *matrices_and_totals):
    """As of `SortedRows`."""
    *matrices, totals = matrices_and_totals
    transposed = lambda rows, matrix: _dot(rows, matrix.T)
    outer = lambda left, right: jnp.dot(left.T, right, preferred_element_type=jnp.float32)

    def multiply(i, carry):
      dx_nbD, dweight_nb, *totals = carry
      expert, token_b, x_bD, weight_b = self._tile(i, x_tD, weight_jt)
      dx_bD, dweight_b, dmatrices = _backward(
          entries(dy_tD, token_b), x_bD, weight_b, *(matrix[expert] for matrix in matrices), _dot, transposed, outer)
      totals = [total.at[expert].add(dmatrix) for total, dmatrix in zip(totals, dmatrices)]
      return dx_nbD.at[i].set(dx_bD), dweight_nb.at[i].set(dweight_b), *totals

    dx_nbD = jnp.zeros((*self.row_nb.shape, x_tD.shape[-1]), x_tD.dtype)
    carry = dx_nbD, jnp.zeros(self.row_nb.shape, jnp.float32), *totals
    dx_nbD, dweight_nb, *totals = self._loop(multiply, carry)
    return _by_token(_rows_of(dx_nbD), self.place_jt), entries(jnp.ravel(dweight_nb), self.place_jt), tuple(totals)

  def _tile(self, i, x_tD, weight_jt):
    """(expert, tokens, their states, their weights) of tile i; zeros where it has fewer rows."""
    row_b = self.row_nb[i]
    token_b = tokens_of(row_b, weight_jt)
    return self.expert_n[i], token_b, entries(x_tD, token_b), entries(jnp.ravel(weight_jt), row_b)

  def _loop(self, body, carry):
    with jax.named_scope(expected_times(self.even)):
      return jax.lax.fori_loop(0, self.used, body, carry)


def _dot(rows, matrix):
  return jnp.dot(rows, matrix, preferred_element_type=rows.dtype)


def _rows_of(x_nbD):
  return jnp.reshape(x_nbD, (-1, x_nbD.shape[-1]))


def tile_rows(rows: int, experts: int) -> int:
  """b, a power of two: so many rows that under an even load an expert fills about eight tiles, from 8 to 512; on a
  GPU, where a turn of the loop costs more than a tile that is half empty, one, up to 1024.
  """
  least, most, tiles = (128, 1024, 1) if 'NVIDIA' in kernels.device_kind() else (8, 512, 8)
  return min(most, max(least, 1 << max(0, (rows // (tiles * experts)).bit_length() - 1)))


def ranks(key_jt, keys: int):
  """(how many earlier rows have the key of each row, int32[j, t]; how many rows have each key, int32[keys]).

  A sort would give the same, but a TPU's compiler takes many seconds for each. Rows of a stretch are compared with
  one another.
  """
  k = min(STRETCH, key_jt.size)
  key_nk = jnp.reshape(jnp.pad(jnp.ravel(key_jt), (0, -key_jt.size % k), constant_values=keys), (-1, k))
  earlier_kk = jnp.arange(k) < jnp.arange(k)[:, None]
  rank_nk = jnp.sum((key_nk[:, None] == key_nk[..., None]) & earlier_kk, 2, dtype=jnp.int32)
  rows_nE = jnp.sum(key_nk[..., None] == jnp.arange(keys), 1, dtype=jnp.int32)
  end_nE = jnp.cumsum(rows_nE, 0)
  rank_nk += jax.vmap(_of_key)(end_nE - rows_nE, key_nk)
  return jnp.reshape(jnp.ravel(rank_nk)[:key_jt.size], key_jt.shape), end_nE[-1]


def _of_key(table_E, key):
  """table_E[key], 0 for keys beyond; without a gather, which is slow on a TPU for single numbers."""
  return jnp.sum(jnp.where(key[..., None] == jnp.arange(len(table_E)), table_E, 0), -1)


def inverse(place_jt, places: int):
  """The row at each place, int32[places]; j x t where there is none."""
  rows = jnp.arange(place_jt.size, dtype=jnp.int32)
  return jnp.full(places, place_jt.size, jnp.int32).at[jnp.ravel(place_jt)].set(rows, mode='drop')


def expected_times(times: float) -> str:
  """The name of a loop whose number of turns depends on the data, or of a product whose number of rows does: how
  often it is, or which share is, to expect under an even load.
  """
  return f'about_{times:.12g}_times'


def times_in_name(name: str) -> float | None:
  """What `expected_times` wrote into a name, such as 'trunk/about_8_times'."""
  found = re.search(r'about_([\d.]+)_times\)*$', name)
  return float(found.group(1)) if found else None
