"""A fingerprint of arrays: it changes when any of their values does, and is the same on any mesh.

    mix        two rounds of a product with an odd number and a shift, one to one on 32 bits
    element    h = mix(bits ^ w), w = mix(place ^ SEED); place is its number in the array
    array      sum of h, and sum of h w, modulo 2^32
    tree       SHA-256 of the names of its arrays and of their sums

A sum of integers is exact in any order, so each device adds up its own elements and nothing is
gathered. One changed element always changes a sum; any other change goes unseen with a probability of about 2^-60.
"""
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

SEED = 0x243F6A88
ODD = (0x9E3779B1, 0x85EBCA6B)
UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes of an element


def fingerprint(arrays: dict) -> str:
  """32 hexadecimal digits.

  Args:
    arrays: {'trunk.wq_DHK': array, ...} of elements of at most four bytes, on any mesh; those in the memory of the host
      pass through the device's one after the other.
  """
  return fingerprints(arrays)[0]


def fingerprints(arrays: dict) -> list[str]:
  """The fingerprint as each device of this process finds it. They are equal unless devices hold different copies of
  an array that is replicated.
  """
  on_device = [name for name, x in arrays.items() if _is_on_device(x)]
  groups = [on_device, *([name] for name in arrays if name not in on_device)]
  sums = {}  # of each array, by device
  for group in groups:
    by_device = [np.asarray(copy.data).tolist() for copy in _sums([arrays[name] for name in group]).addressable_shards]
    sums |= zip(group, zip(*by_device))
  return [_digest(arrays, dict(zip(sums, of_device))) for of_device in zip(*sums.values())]


def _digest(arrays: dict, sums: dict) -> str:
  lines = (f'{name} {x.dtype} {x.shape} {sums[name]}\n' for name, x in sorted(arrays.items()))
  return hashlib.sha256(''.join(lines).encode()).hexdigest()[:32]


def _is_on_device(x) -> bool:
  device, = list(x.sharding.device_set)[:1]
  return x.sharding.memory_kind in (None, device.default_memory().kind)


@jax.jit
def _sums(arrays: list):
  """uint32[arrays, 2]."""
  on_device = [jax.device_put(x, jax.memory.Space.Device) if x.ndim else x for x in arrays]
  return jnp.array([_sums_of(x) for x in on_device], jnp.uint32)


def _sums_of(x):
  """uint32[]: both sums of an array."""
  x = x.astype(jnp.uint8) if x.dtype == bool else x
  bits = jax.lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
  weight = _mixed(_place(bits) ^ np.uint32(SEED))
  hashed = _mixed(bits ^ weight)
  return jnp.sum(hashed, dtype=jnp.uint32), jnp.sum(hashed * weight, dtype=jnp.uint32)


def _place(bits):
  """uint32 like `bits`: the number of each element, modulo 2^32."""
  sharding = jax.typeof(bits).sharding
  iota = functools.partial(jax.lax.broadcasted_iota, jnp.uint32, bits.shape,
                           out_sharding=None if sharding.mesh.empty else sharding)
  place, stride = jnp.zeros_like(bits), 1
  for dimension in reversed(range(bits.ndim)):
    place += iota(dimension) * np.uint32(stride % 2**32)
    stride *= bits.shape[dimension]
  return place


def _mixed(x):
  for odd in ODD:
    x = x * np.uint32(odd)
    x = x ^ (x >> np.uint32(16))
  return x
