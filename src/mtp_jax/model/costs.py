"""What a model holds and what it costs: parameters and FLOPs by part, and where the figures are written.

Counts come from the tree of shapes, so they follow the model as it is. A multiply-add is two FLOPs; the backward pass costs
twice the forward pass, and rematerialisation is not counted; attention counts all L keys of a row (PaLM, arXiv:2204.02311,
appendix B), so that model-FLOP utilisation compares across systems.
"""
import hashlib
import math

import jax
import numpy as np

from mtp_jax.sharding import letters, name

PARTS = ('embedding', 'trunk', 'futures', 'unembedding')


def _part(path) -> str:
  root = path[0].name
  return {'embed_VD': 'embedding', 'unembed_VD': 'unembedding', 'trunk': 'trunk', 'futures': 'futures', 'final_norm_D': 'trunk'}[root]


def _leaves(model):
  return jax.tree_util.tree_flatten_with_path(model)[0]


def parameters(model) -> dict[str, int]:
  """Parameters by part and in all; `model` may be a tree of shapes."""
  counts = dict.fromkeys(PARTS, 0)
  for path, leaf in _leaves(model):
    counts[_part(path)] += math.prod(leaf.shape)
  return counts | {'total': sum(counts.values())}


def flops_per_token(model, length: int, active: tuple[bool, ...] | None = None, causal: bool = False) -> dict[str, int]:
  """Forward and backward FLOPs of one input token, by part: trunk, futures, unembedding (M of them), total.

  A matrix of P parameters costs 2P forward; a block's attention 4 H K L (scores and their sum over L keys). A shared
  sequential module is applied, and counted, M-1 times. Embedding a token costs nothing, nor does a future that is not `active`.
  With `causal` attention counts L/2 keys, as many as a query may look at on average.
  """
  c = model.config
  length = length // 2 if causal else length
  active = active or (True,) * c.futures
  counts = {part: 3 * _forward_flops(model, length, part, times) for part, times in (('trunk', c.trunk_layers), ('futures', len(c.heads_to_run(active))))}
  counts['unembedding'] = 3 * 2 * c.vocab * c.width * sum(active)
  return counts | {'total': sum(counts.values())}


def recomputed_flops_per_token(model, length: int) -> int:
  """What a train step multiplies besides, with remat='none': attention makes its scores once more in the backward pass, and the inner
  heads of a chain run once to find the states that the walk back starts from. Model-FLOP utilisation does not count it."""
  c = model.config
  heads = len(c.heads_to_run((True,) * c.futures))
  blocks = c.trunk_layers + (0 if c.kind == 'linear' else heads)
  chained = 0 if c.independent else max(0, heads - 1)
  return blocks * 2 * c.heads * c.head_width * length + _forward_flops(model, length, 'futures', chained)


def _forward_flops(model, length: int, part: str, times: int) -> int:
  """Of `times` applications of one of the blocks, heads or modules stacked in a part."""
  c, total = model.config, 0
  for path, leaf in _leaves(model):
    if _part(path) == part and len(letters(path)) > 1:
      total += 2 * math.prod(leaf.shape[1:])
    if _part(path) == part and name(path) == 'wq_DHK':
      total += 4 * c.heads * c.head_width * length
  return total * times


def matmul_flops(jaxpr) -> int:
  """2 x the multiply-adds of every matrix product in a jaxpr, those in a loop times its length, those of a device times the devices of its mesh.
  Sees into every inner jaxpr, and into the TPU's kernels of attention."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      ((contracted, _), _), left = equation.params['dimension_numbers'], equation.invars[0].aval
      total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left.shape[i] for i in contracted)
    times = TIMES.get(equation.primitive.name, lambda parameters: 1)(equation.params)
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')):
      inner = getattr(value, 'jaxpr', value)
      total += times * matmul_flops(inner) if hasattr(inner, 'eqns') else 0
  return total


def _tiles(kernel: dict) -> int:
  """How many tiles a kernel of causal attention multiplies: its grid goes over rows, heads, tiles of queries and tiles of keys, of which half are hidden."""
  grid = kernel['grid_mapping'].grid
  keys = grid[1] if '_dkv_' in kernel['name'] else grid[-1]
  return math.prod(grid) * (keys + 1) // (2 * keys)


TIMES = {'scan': lambda loop: loop['length'], 'shard_map': lambda local: local['mesh'].size, 'pallas_call': _tiles}


def parameters_sha256(model) -> str:
  """SHA-256 over name, type, shape and bytes of every parameter, in the order of their names; the same on any mesh."""
  digest = hashlib.sha256()
  for path, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in _leaves(model)):
    digest.update(f'{path} {leaf.dtype} {leaf.shape}\n'.encode())
    digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
  return digest.hexdigest()
