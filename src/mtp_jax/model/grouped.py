"""The feed-forwards of experts over the tokens that were sent to them: sorted by expert, in tiles. No token is
dropped, and nothing is as large as the busiest expert could make it.

    y_t = sum over the experts e of token t of  weight_te * down_e(silu(gate_e x_t) * up_e x_t)

On a device, tokens that go to one expert are put into tiles of at most b rows, each of a single expert. A loop
over the tiles that are in use multiplies them: as many as the load needs, of one size whatever the load. (The
same products as `jax.lax.ragged_dot`, which XLA carries out on a CPU for every expert over every token.)

Between the devices of the expert axis tokens travel by all-to-all, in rounds: in each, a device sends up to c
rows to every other. Under an even load one round is enough; further rounds follow until every row has arrived.
Both passes are written by hand, since the number of tiles and of rounds depends on the data: the backward pass
sends tokens and gradients the same way, and multiplies gate and up once more.
"""
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp

from mtp_jax.sharding import RULES, on_devices

ROOM = 1.25  # rows that a device can send to another in a round, over those it sends under an even load
TILE = 512  # the largest tile
MATRICES = 'EDW', 'EWD'  # letters of the parameters of experts


@jax.custom_vjp
def mixture(h_BLD, expert_BLj, weight_BLj, gate_EDW, up_EDW, down_EWD):
  """(what the chosen experts make of every token, [B, L, D] in its type; how many rows each expert multiplied,
  float32[E]).

  Args:
    expert_BLj: int32, the experts of each token; E where it goes to none, as padding does.
    weight_BLj: float32, of each expert in the sum.
    gate_EDW, up_EDW, down_EWD: float32; cast where they are used. Their gradients are float32 sums over all
      tokens.
  """
  inputs, outputs = ('BLD', 'BLj', 'BLj', 'EDW', 'EDW', 'EWD'), ('BLD', 'e')
  return on_devices(_forward, inputs, outputs)(h_BLD, expert_BLj, weight_BLj, gate_EDW, up_EDW, down_EWD)


def _mixture_forward(*arguments):
  return mixture(*arguments), arguments


def _mixture_backward(arguments, cotangents):
  inputs = ('BLD', 'BLD', 'BLj', 'BLj', 'EDW', 'EDW', 'EWD')
  outputs = ('BLD', 'BLj', 'EDW', 'EDW', 'EWD')
  dy_BLD, _ = cotangents
  dh_BLD, dweight_BLj, *dmatrices = on_devices(_backward, inputs, outputs)(dy_BLD, *arguments)
  return dh_BLD, None, dweight_BLj, *dmatrices


mixture.defvjp(_mixture_forward, _mixture_backward)


def _size(axis: str) -> int:
  """Devices along an axis of the mesh, as a function on a device sees it."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape[axis]


def _sum(x, axes: tuple[str, ...]):
  """Over the devices along these axes."""
  axes = tuple(axis for axis in axes if _size(axis) > 1)
  return jax.lax.psum(x, axes) if axes else x


def _axes(letters: str, letter: str) -> tuple[str, ...]:
  """The mesh axes of several devices along which a letter is sharded, among these letters."""
  taken = {axis for earlier in letters[:letters.index(letter)] for axis in RULES.get(earlier, ())}
  return tuple(axis for axis in RULES[letter] if axis not in taken and _size(axis) > 1)


def _whole(x, letters: str, dtype):
  """A device's part of a matrix in the compute type, its width gathered from all devices."""
  axes, x = _axes(letters, 'D'), x.astype(dtype)
  return jax.lax.all_gather(x, axes, axis=letters.index('D'), tiled=True) if axes else x


def _shared_out(dx, letters: str):
  """The inverse for gradients: their sum over all devices, of which each keeps its part."""
  axes, dimension = _axes(letters, 'D'), letters.index('D')
  if axes:
    dx = jax.lax.psum_scatter(dx, axes, scatter_dimension=dimension, tiled=True)
  return _sum(dx, tuple(axis for axis in RULES['P'] if axis not in (*axes, *_axes(letters, 'E'))))


def _forward(h_BLD, expert_BLj, weight_BLj, gate_EDW, up_EDW, down_EWD):
  """`mixture` on a device: its tokens, its experts, its part of their width W."""
  x_tD, expert_tj, weight_tj = (jnp.reshape(x, (-1, x.shape[-1])) for x in (h_BLD, expert_BLj, weight_BLj))
  matrices = _matrices(gate_EDW, up_EDW, down_EWD, x_tD.dtype)
  experts = len(gate_EDW)
  if _size('expert') == 1:
    y_tD, rows_E = Tiles.of(expert_tj, experts).forward(x_tD, weight_tj, *matrices)
  else:
    exchange = _Exchange.of(expert_tj, experts)

    def receive(i, carry):
      y_tD, rows_E = carry
      x_aD, expert_a1, weight_a1 = exchange.send(i, x_tD, expert_tj, weight_tj)
      y_aD, added_E = Tiles.of(expert_a1, experts).forward(x_aD, weight_a1, *matrices)
      return y_tD + jnp.sum(exchange.back(i, y_aD), 1, dtype=jnp.float32), rows_E + added_E

    zeros = jnp.zeros(x_tD.shape, jnp.float32), jnp.zeros(experts, jnp.float32)
    y_tD, rows_E = exchange.rounds(receive, zeros)
    rows_E = jax.lax.all_gather(rows_E, 'expert', tiled=True)
  y_tD = _sum(y_tD.astype(x_tD.dtype), RULES['W'])
  rows_E = _sum(rows_E, tuple(axis for axis in RULES['P'] if axis != 'expert'))
  return jnp.reshape(y_tD, h_BLD.shape), rows_E


def _backward(dy_BLD, h_BLD, expert_BLj, weight_BLj, gate_EDW, up_EDW, down_EWD):
  """(gradients of h_BLD, of the weights, and of the three matrices) on a device."""
  dy_tD, x_tD, expert_tj, weight_tj = (
      jnp.reshape(x, (-1, x.shape[-1])) for x in (dy_BLD, h_BLD, expert_BLj, weight_BLj))
  matrices = _matrices(gate_EDW, up_EDW, down_EWD, x_tD.dtype)
  experts = len(gate_EDW)
  dmatrices = tuple(jnp.zeros(matrix.shape, jnp.float32) for matrix in matrices)
  if _size('expert') == 1:
    dx_tD, dweight_tj, dmatrices = Tiles.of(expert_tj, experts).backward(
        dy_tD, x_tD, weight_tj, *matrices, dmatrices)
  else:
    exchange = _Exchange.of(expert_tj, experts)

    def receive(i, carry):
      dx_tD, dweight_tj, dmatrices = carry
      x_aD, expert_a1, weight_a1 = exchange.send(i, x_tD, expert_tj, weight_tj)
      dy_aD = exchange.send_rows(i, dy_tD)
      dx_aD, dweight_a1, dmatrices = Tiles.of(expert_a1, experts).backward(
          dy_aD, x_aD, weight_a1, *matrices, dmatrices)
      dx_tD += jnp.sum(exchange.back(i, dx_aD), 1, dtype=jnp.float32)
      return dx_tD, dweight_tj + exchange.back(i, dweight_a1)[..., 0], dmatrices

    zeros = jnp.zeros(x_tD.shape, jnp.float32), jnp.zeros(weight_tj.shape, jnp.float32)
    dx_tD, dweight_tj, dmatrices = exchange.rounds(receive, (*zeros, dmatrices))
  dx_tD, dweight_tj = _sum(dx_tD.astype(x_tD.dtype), RULES['W']), _sum(dweight_tj, RULES['W'])
  shared_out = map(_shared_out, dmatrices, ('EDW', 'EDW', 'EWD'))
  return jnp.reshape(dx_tD, h_BLD.shape), jnp.reshape(dweight_tj, weight_BLj.shape), *shared_out


def _matrices(gate_EDW, up_EDW, down_EWD, dtype) -> tuple:
  return tuple(map(functools.partial(_whole, dtype=dtype), (gate_EDW, up_EDW, down_EWD), ('EDW', 'EDW', 'EWD')))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
  """How the rows of a device lie in tiles. A row is one token at one of its experts, t x j of them.

  Attributes:
    expert_n: the expert of each tile.
    row_nb: the rows of each tile; t x j where it has fewer.
    place_tj: where each row lies in the tiles, n x b; beyond them where it goes to no expert.
    rows_E: float32, rows of each expert.
    used: tiles in use, the first ones.
  """
  expert_n: jax.Array
  row_nb: jax.Array
  place_tj: jax.Array
  rows_E: jax.Array
  used: jax.Array
  even: int = dataclasses.field(metadata={'static': True})

  @classmethod
  def of(cls, expert_tj, experts: int) -> 'Tiles':
    rows = expert_tj.size
    if rows <= experts:
      return cls._of_single_rows(expert_tj, experts)
    b = tile_rows(rows, experts)
    n = min(rows, (rows + experts * (b - 1)) // b)  # the most that any load needs
    expert_a = jnp.ravel(expert_tj)
    order_a = jnp.argsort(expert_a, stable=True)
    rows_E = jnp.sum(expert_a[:, None] == jnp.arange(experts), 0, dtype=jnp.int32)
    end_E, tiles_E = jnp.cumsum(rows_E), -(-rows_E // b)
    start_E, tile_end_E = end_E - rows_E, jnp.cumsum(tiles_E)
    first_tile_E = tile_end_E - tiles_E

    tile_n = jnp.arange(n)
    expert_n = jnp.minimum(jnp.searchsorted(tile_end_E, tile_n, side='right'), experts - 1)
    sorted_nb = ((tile_n - first_tile_E[expert_n]) * b + start_E[expert_n])[:, None] + jnp.arange(b)
    inside_nb = (sorted_nb < end_E[expert_n][:, None]) & (tile_n < tile_end_E[-1])[:, None]
    row_nb = jnp.where(inside_nb, order_a[jnp.minimum(sorted_nb, rows - 1)], rows)

    rank_a = jnp.zeros(rows, jnp.int32).at[order_a].set(jnp.arange(rows, dtype=jnp.int32))
    inside = jnp.minimum(expert_a, experts - 1)
    place_a = jnp.where(expert_a < experts, first_tile_E[inside] * b + rank_a - start_E[inside], n * b)
    even = experts * -(-rows // (experts * b))
    return cls(expert_n, row_nb, jnp.reshape(place_a, expert_tj.shape), rows_E.astype(jnp.float32),
               tile_end_E[-1], min(n, even))

  @classmethod
  def _of_single_rows(cls, expert_tj, experts: int) -> 'Tiles':
    """Tiles of one row, as decoding has them: there is nothing to sort."""
    expert_a, rows = jnp.ravel(expert_tj), expert_tj.size
    inside_a = expert_a < experts
    place_a = jnp.where(inside_a, jnp.cumsum(inside_a) - 1, rows)
    row_n = jnp.full(rows, rows, jnp.int32).at[place_a].set(jnp.arange(rows, dtype=jnp.int32), mode='drop')
    rows_E = jnp.sum(expert_a[:, None] == jnp.arange(experts), 0, dtype=jnp.float32)
    return cls(expert_a.at[row_n].get(mode='clip'), row_n[:, None], jnp.reshape(place_a, expert_tj.shape), rows_E,
               jnp.sum(inside_a, dtype=jnp.int32), rows)

  def forward(self, x_tD, weight_tj, gate_EDW, up_EDW, down_EWD):
    """(y_tD, float32 sums where j is above 1; rows of each expert)."""
    def multiply(i, y_nbD):
      expert, _, x_bD, weight_b = self._tile(i, x_tD, weight_tj)
      product_bW = jax.nn.silu(_dot(x_bD, gate_EDW[expert])) * _dot(x_bD, up_EDW[expert])
      weighted_bW = (product_bW * weight_b[:, None]).astype(x_bD.dtype)
      return y_nbD.at[i].set(_dot(weighted_bW, down_EWD[expert]))

    y_nbD = self._loop(multiply, jnp.zeros((*self.row_nb.shape, x_tD.shape[-1]), x_tD.dtype))
    return self._by_token(y_nbD), self.rows_E

  def backward(self, dy_tD, x_tD, weight_tj, gate_EDW, up_EDW, down_EWD, dmatrices):
    """(gradient of x_tD, of the weights, float32 gradients of the matrices added to dmatrices)."""
    dtype = x_tD.dtype

    def multiply(i, carry):
      dx_nbD, dweight_nb, dgate_EDW, dup_EDW, ddown_EWD = carry
      expert, token_b, x_bD, weight_b = self._tile(i, x_tD, weight_tj)
      dy_bD = dy_tD.at[token_b].get(mode='fill', fill_value=0)
      gate_DW, up_DW, down_WD = gate_EDW[expert], up_EDW[expert], down_EWD[expert]
      multiply = lambda gate_bW, up_bW: jax.nn.silu(gate_bW) * up_bW
      product_bW, back = jax.vjp(multiply, _dot(x_bD, gate_DW), _dot(x_bD, up_DW))
      dweighted_bW = _dot(dy_bD, down_WD.T)
      dgate_bW, dup_bW = back((dweighted_bW * weight_b[:, None]).astype(product_bW.dtype))
      weighted_bW = (product_bW * weight_b[:, None]).astype(dtype)
      dgate_bW, dup_bW = dgate_bW.astype(dtype), dup_bW.astype(dtype)
      add = lambda total, left, right: total.at[expert].add(_outer(left, right))
      return (dx_nbD.at[i].set(_dot(dgate_bW, gate_DW.T) + _dot(dup_bW, up_DW.T)),
              dweight_nb.at[i].set(jnp.sum((product_bW * dweighted_bW).astype(jnp.float32), -1)),
              add(dgate_EDW, x_bD, dgate_bW), add(dup_EDW, x_bD, dup_bW), add(ddown_EWD, weighted_bW, dy_bD))

    dx_nbD = jnp.zeros((*self.row_nb.shape, x_tD.shape[-1]), dtype)
    carry = dx_nbD, jnp.zeros(self.row_nb.shape, jnp.float32), *dmatrices
    dx_nbD, dweight_nb, *dmatrices = self._loop(multiply, carry)
    dweight_tj = jnp.ravel(dweight_nb).at[self.place_tj].get(mode='fill', fill_value=0)
    return self._by_token(dx_nbD), dweight_tj, tuple(dmatrices)

  def _tile(self, i, x_tD, weight_tj):
    """(expert, tokens, their states, their weights) of tile i; zeros where it has fewer rows."""
    row_b = self.row_nb[i]
    token_b = row_b // weight_tj.shape[1]  # beyond the tokens where there is no row
    weight_b = jnp.ravel(weight_tj).at[row_b].get(mode='fill', fill_value=0)
    return self.expert_n[i], token_b, x_tD.at[token_b].get(mode='fill', fill_value=0), weight_b

  def _by_token(self, x_nbD):
    """The sum over its experts of each token's rows."""
    x_aD = jnp.reshape(x_nbD, (-1, x_nbD.shape[-1]))
    x_tjD = x_aD.at[self.place_tj].get(mode='fill', fill_value=0)
    return jnp.sum(x_tjD, 1, dtype=jnp.float32) if x_tjD.shape[1] > 1 else x_tjD[:, 0]

  def _loop(self, body, carry):
    with jax.named_scope(expected_times(self.even)):
      return jax.lax.fori_loop(0, self.used, body, carry)


def tile_rows(rows: int, experts: int) -> int:
  """b: so many rows that under an even load an expert fills about eight tiles; a power of two from 8 to 512."""
  return min(TILE, max(8, 1 << max(0, (rows // (8 * experts)).bit_length() - 1)))


def expected_times(times: int) -> str:
  """The name of a loop whose number of turns depends on the data: what to expect under an even load."""
  return f'about_{times}_times'


def times_in_name(name: str) -> int | None:
  """What `expected_times` wrote into the name of a loop, such as 'trunk/about_8_times'."""
  found = re.search(r'about_(\d+)_times\)*$', name)
  return int(found.group(1)) if found else None


def _dot(rows, matrix):
  return jnp.dot(rows, matrix, preferred_element_type=rows.dtype)


def _outer(left, right):
  """The float32 sum over the rows of a tile."""
  return jnp.dot(left.T, right, preferred_element_type=jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Exchange:
  """Which rows travel between the devices of the expert axis in which round.

  Attributes:
    row_a: the rows of this device, t x j of them, in the order of the devices that they go to.
    start_e: where the rows of each device begin in that order; the last entry is their number.
    place_tj: each row's place among those that go to the same device.
    device_tj: the device that it goes to; e for none.
    needed: rounds, of the device that needs most.
  """
  row_a: jax.Array
  start_e: jax.Array
  place_tj: jax.Array
  device_tj: jax.Array
  needed: jax.Array
  experts: int = dataclasses.field(metadata={'static': True})
  room: int = dataclasses.field(metadata={'static': True})

  @classmethod
  def of(cls, expert_tj, experts: int) -> '_Exchange':
    """experts: of one device."""
    devices, rows = _size('expert'), expert_tj.size
    room = min(rows, int(ROOM * rows / devices) + 1)
    device_a = jnp.minimum(jnp.ravel(expert_tj) // experts, devices)
    row_a = jnp.argsort(device_a, stable=True)
    start_e = jnp.searchsorted(device_a[row_a], jnp.arange(devices + 1))
    rank_a = jnp.zeros(rows, jnp.int32).at[row_a].set(jnp.arange(rows, dtype=jnp.int32))
    most = jnp.max(jnp.diff(start_e))
    needed = jax.lax.pmax(-(-most // room), tuple(axis for axis in RULES['P'] if _size(axis) > 1))
    device_tj, rank_tj = (jnp.reshape(x_a, expert_tj.shape) for x_a in (device_a, rank_a))
    return cls(row_a, start_e, rank_tj - start_e[device_tj], device_tj, needed, experts, room)

  def rounds(self, body, carry):
    with jax.named_scope(expected_times(1)):
      return jax.lax.fori_loop(0, self.needed, body, carry)

  def _rows(self, i):
    """The rows that go to each device in round i; t x j where there are fewer."""
    place_ec = self.start_e[:-1, None] + i * self.room + jnp.arange(self.room)
    inside_ec = place_ec < self.start_e[1:, None]
    return jnp.where(inside_ec, self.row_a[jnp.minimum(place_ec, len(self.row_a) - 1)], len(self.row_a))

  def send_rows(self, i, x_tD):
    """The states of the tokens that arrive in round i."""
    token_ec = self._rows(i) // self.place_tj.shape[1]
    return self._to_devices(x_tD.at[token_ec].get(mode='fill', fill_value=0))

  def send(self, i, x_tD, expert_tj, weight_tj):
    """(states, experts of this device, weights) of the rows that arrive in round i."""
    row_ec = self._rows(i)
    expert_ec = jnp.ravel(expert_tj).at[row_ec].get(mode='fill', fill_value=-1)
    expert_ec = jnp.where(expert_ec < 0, self.experts, expert_ec % self.experts)
    weight_ec = jnp.ravel(weight_tj).at[row_ec].get(mode='fill', fill_value=0)
    return self.send_rows(i, x_tD), *map(self._to_devices, (expert_ec[..., None], weight_ec[..., None]))

  def back(self, i, x_aD):
    """What the devices made of the rows of round i, by token and expert; 0 where a row was not in the round."""
    back_aD = self._to_devices(jnp.reshape(x_aD, (-1, self.room, x_aD.shape[-1])))
    place_tj = self.place_tj - i * self.room
    inside_tj = (place_tj >= 0) & (place_tj < self.room) & (self.device_tj < len(self.start_e) - 1)
    place_tj = jnp.where(inside_tj, self.device_tj * self.room + place_tj, len(back_aD))
    return back_aD.at[place_tj].get(mode='fill', fill_value=0)

  def _to_devices(self, x_ecD):
    """The rows that every device has for this one: [e x c, D]."""
    received_ecD = jax.lax.all_to_all(x_ecD, 'expert', 0, 0, tiled=True)
    return jnp.reshape(received_ecD, (-1, x_ecD.shape[-1]))
