"""Targets and the loss of every future: sums and counts, divided once.

Future m at position t predicts token t+1+m, and counts iff that token stands in the same document as t:

    loss = sum_m weight_m * nats_M[m] / count_M[m]            (Gloeckle et al. 2024, arXiv:2404.19737, section 2)

A batch is a dict of int32[B, T], T = L + M: 'tokens', 'segments' (0 is padding) and 'positions'. Targets are read off the
tokens at hand, m+1 places on, so there is no roll and the farthest future has a target at the last position.
"""
import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.layers import document_mask
from mtp_jax.model import Model
from mtp_jax.sharding import einsum, out, place


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
  """What future m predicts and where it counts: int32[B, L] tokens, bool[B, L]. m may be traced."""
  L = batch['tokens'].shape[1] - futures
  ahead = lambda x_BT: place(jax.lax.dynamic_slice_in_dim(x_BT, m + 1, L, 1), 'BL')
  segments_BL = place(batch['segments'][:, :L], 'BL')
  return ahead(batch['tokens']), (ahead(batch['segments']) == segments_BL) & (segments_BL > 0)


def counts(batch, futures: int):
  """How many positions count for each future: int32[M]."""
  return jnp.stack([jnp.sum(targets(batch, m, futures)[1], dtype=jnp.int32) for m in range(futures)])


def loss(model: Model, batch, coefficient_M, chunk: int):
  """sum_m coefficient_M[m] * nats_M[m], and the sums it is made of.

  Args:
    batch: rows of L + M tokens.
    coefficient_M: weight_m / count_m, the counts being those of the whole step, so that microbatches add up exactly.
    chunk: positions whose logits are alive at once.

  Returns:
    (float32 scalar, Sums).
  """
  c = model.config
  L = batch['tokens'].shape[1] - c.futures
  positions_BL, segments_BL = (place(batch[name][:, :L], 'BL') for name in ('positions', 'segments'))
  mask_BLS = document_mask(segments_BL)
  z_BLD, _ = model.run_trunk(model.embed(place(batch['tokens'][:, :L], 'BL')), positions_BL, mask_BLS)
  unembed_VD = model.unembedding()

  def future(m, h_BLD):
    return cross_entropy(h_BLD, unembed_VD, *targets(batch, m, c.futures), chunk)

  sums = model.map_futures(future, z_BLD, batch['tokens'], positions_BL, mask_BLS)
  return jnp.dot(coefficient_M, sums.nats_M), sums


def cross_entropy(h_BLD, unembed_VD, y_BL, counted_BL, chunk: int) -> Sums:
  """Sums of -log softmax(h unembed^T)[y] where counted, one chunk of logits alive at a time, forward and backward.

  The backward pass recomputes each chunk's logits: one matmul more than the three it needs.
  """
  def step(total, inputs):
    h_BLD, y_BL, counted_BL = inputs
    logits_BLV = einsum('BLD,VD->BLV', h_BLD, unembed_VD.astype(h_BLD.dtype), jnp.float32)
    hit_BLV = jnp.arange(logits_BLV.shape[-1]) == y_BL[..., None]
    nats_BL = jax.nn.logsumexp(logits_BLV, -1) - jnp.sum(logits_BLV, -1, where=hit_BLV)
    correct_BL = jnp.argmax(logits_BLV, -1) == y_BL
    return total + Sums(jnp.sum(nats_BL, where=counted_BL), jnp.sum(correct_BL, where=counted_BL, dtype=jnp.int32),
                        jnp.sum(counted_BL, dtype=jnp.int32)), None

  with jax.named_scope('loss'):
    zero = Sums(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    inputs = tuple(_chunks(x, chunk) for x in (h_BLD, y_BL, counted_BL))
    return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), zero, inputs)[0]


def _chunks(x_BL, chunk: int):
  """[B, L, ...] -> [L/chunk, B, chunk, ...]; under context parallelism each chunk is spread over the axis like L was."""
  B, L, *rest = x_BL.shape
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else mesh.shape['context']
  n, tail = L // (parts * chunk), 'r' * len(rest)
  x_BLnc = jnp.reshape(x_BL, (B, parts, n, chunk, *rest), **out('BLnc' + tail))
  return jnp.reshape(jnp.moveaxis(x_BLnc, 2, 0), (n, B, parts * chunk, *rest), **out('nBL' + tail))
