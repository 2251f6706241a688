"""The feed-forwards of experts over the tokens that were sent to them. No token is dropped, and nothing is as large
as the busiest expert could make it.

    y_t = sum over the experts e of token t of  weight_te * down_e(silu(gate_e x_t) * up_e x_t)

What a device multiplies is in expert_rows.py. Between the devices of the expert axis tokens travel by all-to-all, in
rounds: in each, a device sends up to c rows to every other. Under an even load one round is enough; further rounds
follow until every row has arrived. Both passes are written by hand, since the number of rounds depends on the data:
the backward pass sends tokens and gradients the same way, and multiplies gate and up once more.
"""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from mtp_jax.model.expert_rows import entries, expected_times, inverse, ranks, rows_by_expert, tokens_of
from mtp_jax.sharding import RULES, axes, on_devices

ROOM = 1.25  # rows that a device can send to another in a round, over those it sends under an even load
UNIT = 512  # rounds of more rows are a multiple of this: for other sizes a TPU's compiler takes minutes
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
  forward = functools.partial(_forward, axes('P'))
  return on_devices(forward, inputs, outputs)(h_BLD, expert_BLj, weight_BLj, gate_EDW, up_EDW, down_EWD)


def _mixture_forward(*arguments):
  return mixture(*arguments), arguments


def _mixture_backward(arguments, cotangents):
  inputs = ('BLD', 'BLD', 'BLj', 'BLj', 'EDW', 'EDW', 'EWD')
  outputs = ('BLD', 'BLj', 'EDW', 'EDW', 'EWD')
  dy_BLD, _ = cotangents
  backward = functools.partial(_backward, axes('P'))
  dh_BLD, dweight_BLj, *dmatrices = on_devices(backward, inputs, outputs)(dy_BLD, *arguments)
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


def _shared_out(dx, letters: str, tokens: tuple[str, ...]):
  """The inverse for gradients: their sum over all devices, of which each keeps its part."""
  axes, dimension = _axes(letters, 'D'), letters.index('D')
  if axes:
    dx = jax.lax.psum_scatter(dx, axes, scatter_dimension=dimension, tiled=True)
  return _sum(dx, tuple(axis for axis in tokens if axis not in (*axes, *_axes(letters, 'E'))))


def _forward(tokens: tuple[str, ...], h_BLD, expert_BLj, weight_BLj, gate_EDW, up_EDW, down_EWD):
  """`mixture` on a device: its tokens, its experts, its part of their width W.

  Args:
    tokens: the mesh axes that divide tokens.
  """
  x_tD, expert_jt, weight_jt = _flat(h_BLD), _flat(expert_BLj).T, _flat(weight_BLj).T
  matrices = _matrices(gate_EDW, up_EDW, down_EWD, x_tD.dtype)
  experts = len(gate_EDW)
  if _size('expert') == 1:
    y_tD, rows_E = rows_by_expert(expert_jt, experts, expert_jt.size).forward(x_tD, weight_jt, *matrices)
  else:
    exchange = _Exchange.of(expert_jt, experts, tokens)

    def receive(i, carry):
      y_tD, rows_E = carry
      x_aD, expert_1a, weight_1a = exchange.send(i, x_tD, expert_jt, weight_jt)
      y_aD, added_E = rows_by_expert(expert_1a, experts, expert_jt.size).forward(x_aD, weight_1a, *matrices)
      return y_tD + jnp.sum(exchange.back(i, y_aD), 0, dtype=jnp.float32), rows_E + added_E

    zeros = jnp.zeros(x_tD.shape, jnp.float32), jnp.zeros(experts, jnp.float32)
    y_tD, rows_E = exchange.rounds(receive, zeros)
    rows_E = jax.lax.all_gather(rows_E, 'expert', tiled=True)
  y_tD = _sum(y_tD.astype(x_tD.dtype), RULES['W'])
  rows_E = _sum(rows_E, tuple(axis for axis in tokens if axis != 'expert'))
  return jnp.reshape(y_tD, h_BLD.shape), rows_E


def _backward(tokens: tuple[str, ...], dy_BLD, h_BLD, expert_BLj, weight_BLj, gate_EDW, up_EDW, down_EWD):
  """(gradients of h_BLD, of the weights, and of the three matrices) on a device."""
  dy_tD, x_tD, expert_jt, weight_jt = (
      _flat(dy_BLD), _flat(h_BLD), _flat(expert_BLj).T, _flat(weight_BLj).T)
  matrices = _matrices(gate_EDW, up_EDW, down_EWD, x_tD.dtype)
  experts = len(gate_EDW)
  dmatrices = tuple(jnp.zeros(matrix.shape, jnp.float32) for matrix in matrices)
  if _size('expert') == 1:
    dx_tD, dweight_jt, dmatrices = rows_by_expert(expert_jt, experts, expert_jt.size).backward(
        dy_tD, x_tD, weight_jt, *matrices, dmatrices)
  else:
    exchange = _Exchange.of(expert_jt, experts, tokens)

    def receive(i, carry):
      dx_tD, dweight_jt, dmatrices = carry
      x_aD, expert_1a, weight_1a = exchange.send(i, x_tD, expert_jt, weight_jt)
      dy_aD = exchange.send_rows(i, dy_tD)
      dx_aD, dweight_1a, dmatrices = rows_by_expert(expert_1a, experts, expert_jt.size).backward(
          dy_aD, x_aD, weight_1a, *matrices, dmatrices)
      dx_tD += jnp.sum(exchange.back(i, dx_aD), 0, dtype=jnp.float32)
      return dx_tD, dweight_jt + exchange.back(i, dweight_1a[0]), dmatrices

    zeros = jnp.zeros(x_tD.shape, jnp.float32), jnp.zeros(weight_jt.shape, jnp.float32)
    dx_tD, dweight_jt, dmatrices = exchange.rounds(receive, (*zeros, dmatrices))
  dx_tD, dweight_jt = _sum(dx_tD.astype(x_tD.dtype), RULES['W']), _sum(dweight_jt, RULES['W'])
  shared_out = map(functools.partial(_shared_out, tokens=tokens), dmatrices, ('EDW', 'EDW', 'EWD'))
  return jnp.reshape(dx_tD, h_BLD.shape), jnp.reshape(dweight_jt.T, weight_BLj.shape), *shared_out


def _flat(x_BLx):
  return jnp.reshape(x_BLx, (-1, x_BLx.shape[-1]))


def _matrices(gate_EDW, up_EDW, down_EWD, dtype) -> tuple:
  return tuple(map(functools.partial(_whole, dtype=dtype), (gate_EDW, up_EDW, down_EWD), ('EDW', 'EDW', 'EWD')))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Exchange:
  """Which rows travel between the devices of the expert axis in which round.

  Attributes:
    rank_jt: each row's place among those that go to the same device.
    device_jt: the device that it goes to; e for none.
    needed: rounds, of the device that needs most.
  """
  rank_jt: jax.Array
  device_jt: jax.Array
  needed: jax.Array
  experts: int = dataclasses.field(metadata={'static': True})
  room: int = dataclasses.field(metadata={'static': True})

  @classmethod
  def of(cls, expert_jt, experts: int, tokens: tuple[str, ...]) -> '_Exchange':
    """experts: of one device. tokens: the mesh axes that divide tokens."""
    devices, rows = _size('expert'), expert_jt.size
    room = int(ROOM * rows / devices) + 1
    if room > UNIT:
      room = -(-room // UNIT) * UNIT
    room = min(rows, room)
    device_jt = jnp.minimum(expert_jt // experts, devices)
    rank_jt, rows_e = ranks(device_jt, devices)
    needed = jax.lax.pmax(-(-jnp.max(rows_e) // room), tuple(axis for axis in tokens if _size(axis) > 1))
    return cls(rank_jt, device_jt, needed, experts, room)

  def rounds(self, body, carry):
    with jax.named_scope(expected_times(1)):
      return jax.lax.fori_loop(0, self.needed, body, carry)

  def _places(self, i):
    """Where each row is among those sent in round i, e x c; beyond them where it is sent in another or to none."""
    place_jt = self.rank_jt - i * self.room
    inside_jt = (place_jt >= 0) & (place_jt < self.room) & (self.device_jt < _size('expert'))
    return jnp.where(inside_jt, self.device_jt * self.room + place_jt, _size('expert') * self.room)

  def _rows(self, i):
    """The rows that go to each device in round i; j x t where there are fewer."""
    sent = _size('expert'), self.room
    return jnp.reshape(inverse(self._places(i), math.prod(sent)), sent)

  def send_rows(self, i, x_tD):
    """The states of the tokens that arrive in round i."""
    return self._to_devices(entries(x_tD, tokens_of(self._rows(i), self.rank_jt)))

  def send(self, i, x_tD, expert_jt, weight_jt):
    """(states, experts of this device, weights) of the rows that arrive in round i."""
    row_ec = self._rows(i)
    expert_ec = jnp.ravel(expert_jt).at[row_ec].get(mode='fill', fill_value=-1)
    expert_ec = jnp.where(expert_ec < 0, self.experts, expert_ec % self.experts)
    weight_ec = entries(jnp.ravel(weight_jt), row_ec)
    expert_a, weight_a = map(self._to_devices, (expert_ec, weight_ec))
    return self.send_rows(i, x_tD), expert_a[None], weight_a[None]

  def back(self, i, x_ax):
    """What the devices made of the rows of round i, by expert and token; 0 where a row was not in the round."""
    back_ax = self._to_devices(jnp.reshape(x_ax, (-1, self.room, *x_ax.shape[1:])))
    return entries(back_ax, self._places(i))

  def _to_devices(self, x_ecx):
    """The rows that every device has for this one: [e x c, ...]."""
    received_ecx = jax.lax.all_to_all(x_ecx, 'expert', 0, 0, tiled=True)
    return jnp.reshape(received_ecx, (-1, *x_ecx.shape[2:]))
