"""What a model holds and what it costs: parameters and FLOPs by part.

A multiply-add is two FLOPs, the backward pass costs twice the forward pass, and rematerialisation
is not counted. There are two conventions for attention: it counts all L keys of a row (PaLM,
arXiv:2204.02311, appendix B), so that model-FLOP utilisation compares across systems; or, `causal`,
the L/2 keys that a query may look at on average.
"""
import hashlib
import math

import jax
import numpy as np

from mtp_jax.config import ModelConfig
from mtp_jax.model.block import Block, attention_of
from mtp_jax.model.expert_rows import times_in_name
from mtp_jax.model.experts import Experts
from mtp_jax.model.grouped import MATRICES
from mtp_jax.model.model import HEADS
from mtp_jax.sharding import letters

PARTS = ('embedding', 'trunk', 'futures', 'unembedding')
PART_OF = {'embed_VD': 'embedding', 'trunk': 'trunk', 'expert_trunk': 'trunk', 'final_norm_D': 'trunk',
           'futures': 'futures', 'unembed_VD': 'unembedding'}


def parameters(model) -> dict[str, int]:
  """Parameters by part, in all ('total'), and those that one token uses ('active'): of the routed experts only
  its own, of an embedding that is not the unembedding too only a row. `model` may be a tree of shapes.
  """
  counts, idle, c = dict.fromkeys(PARTS, 0), 0, model.config
  for path, leaf in jax.tree_util.tree_leaves_with_path(model):
    size = math.prod(leaf.shape)
    counts[PART_OF[path[0].name]] += size
    if letters(path) in MATRICES:
      idle += size * (c.experts - c.experts_per_token) // c.experts
  if not c.tie_embeddings:
    idle += (c.vocab - 1) * c.width
  total = sum(counts.values())
  return counts | {'total': total, 'active': total - idle}


def flops_per_token(c: ModelConfig, length: int, active: tuple[bool, ...] | None = None,
                    causal: bool = False) -> dict[str, int]:
  """Forward and backward FLOPs of one input token: trunk, futures, unembedding (one for each active
  future), total.

  A shared sequential module is applied, and counted, M-1 times. Embedding a token costs nothing.

  Args:
    length: L, tokens of a row.
    active: futures that are computed, by default all.
    causal: count half the keys of a row in attention, not all.
  """
  active = active or (True,) * c.futures
  keys = length // 2 if causal else length
  heads = len(c.heads_to_run(active))
  counts = {
      'trunk': 3 * (c.dense_trunk_layers * Block.flops(c, keys)
                    + c.expert_trunk_layers * Block.flops(c, keys, True)),
      'futures': 3 * heads * HEADS[c.kind].flops(c, keys, c.experts_in_futures),
      'unembedding': 3 * 2 * c.vocab * c.width * sum(active),
  }
  return counts | {'total': sum(counts.values())}


def recomputed_flops_per_token(c: ModelConfig, length: int) -> int:
  """FLOPs that a train step multiplies besides, with remat='none', and that model-FLOP utilisation
  does not count.

  Attention computes its scores once more in the backward pass. The inner heads of a chain run once
  to find the states that the walk back starts from. Routed experts multiply gate and up once more.
  """
  heads = len(c.heads_to_run((True,) * c.futures))
  blocks = c.trunk_layers + (0 if c.kind == 'linear' else heads)
  chained = 0 if c.independent else max(0, heads - 1)
  with_experts = c.expert_trunk_layers + c.experts_in_futures * heads
  return (blocks * attention_of(c).score_flops(c, length)
          + chained * HEADS[c.kind].flops(c, length, c.experts_in_futures)
          + with_experts * Experts.recomputed_flops(c))


def matmul_flops(jaxpr) -> int:
  """2 x the multiply-adds of every matrix product in a jaxpr and all jaxprs inside it, the TPU's
  kernels included.

  Products in a loop count as often as it runs, or is expected to under an even load of experts, those of a device
  as often as there are devices in its mesh.
  """
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      left = equation.invars[0].aval
      total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left.shape[i] for i in contracted)
    if _grid_depends_on_data(equation):
      total += equation.params['cost_estimate'].flops
      continue
    times = _expected_times(equation) or TIMES.get(equation.primitive.name, lambda parameters: 1)(equation.params)
    is_jaxpr = lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
      inner = getattr(value, 'jaxpr', value)
      total += times * matmul_flops(inner) if hasattr(inner, 'eqns') else 0
  return total


def _expected_times(equation) -> float | None:
  """How often a loop is expected to run, or which share of a grouped product's rows to be there, where that depends
  on the data.
  """
  if equation.primitive.name != 'while' and equation.params.get('name') not in ('gmm', 'tgmm'):
    return None
  return times_in_name(str(equation.source_info.name_stack))


def _grid_depends_on_data(equation) -> bool:
  """Whether it is a kernel of grouped products, which says itself what its rows multiply."""
  kernel = equation.params
  return equation.primitive.name == 'pallas_call' and kernel['grid_mapping'].num_dynamic_grid_bounds > 0


def _tiles(kernel: dict) -> int:
  """How many tiles a kernel of causal attention multiplies: its grid is rows x heads x tiles of
  queries x tiles of keys.

  Causality hides half of them.
  """
  grid = kernel['grid_mapping'].grid
  keys = grid[1] if '_dkv_' in kernel['name'] else grid[-1]
  return math.prod(grid) * (keys + 1) // (2 * keys)


TIMES = {
    'scan': lambda loop: loop['length'],
    'shard_map': lambda local: math.prod(local['mesh'].shape[axis] for axis in local['newly_manual_axes']),
    'pallas_call': _tiles}


def parameters_sha256(model) -> str:
  """SHA-256 over name, type, shape and bytes of every parameter, in the order of their names; the
  same on any mesh.
  """
  digest = hashlib.sha256()
  leaves = sorted((jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(model))
  for path, leaf in leaves:
    digest.update(f'{path} {leaf.dtype} {leaf.shape}\n'.encode())
    digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
  return digest.hexdigest()
