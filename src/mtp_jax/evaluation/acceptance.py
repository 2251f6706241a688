"""How many drafts the model accepts from its own futures, without decoding: laws compared on documents at hand.

The draft of depth m at position t is for token t+1+m, drawn from the law q of future m at t. What verifies it is the law p of
future 0 at t+m, where all tokens before it are known. It is accepted

    greedy            iff p and q have the same argmax
    at temperature 1  with probability beta = sum_x min(p(x), q(x))      (Leviathan et al. 2022, arXiv:2211.17192, corollary 3.6)
                      and, given that x is the token that stands there, with probability min(1, q(x) / p(x))

A forward that starts at t emits the drafts accepted in a row and one token more, and the next forward starts behind them. So
the probability u(t) that a forward starts at t follows from those before it,

    u(t + 1 + n) += u(t) * P(exactly n drafts are accepted at t)

and a document of T tokens takes sum_t u(t) forwards. Given the document the law is exact: greedily for a text that the model wrote
greedily, at temperature 1 for one that speculative sampling wrote. Over other documents it says how the model would fare if they were
its own. (Drafts and tokens coupled by shared noise, the decoder's `same_seed`, agree less often: at least beta / (2 - beta).)

What acceptance is worth (Leviathan et al., section 3): `expected_tokens`, `walltime_factor`, `operations_factor`, `best_draft`.
"""
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mtp_jax import objective
from mtp_jax.config import ModelConfig
from mtp_jax.mesh import to_mesh_order, to_text_order
from mtp_jax.model.model import capped
from mtp_jax.sharding import einsum, out, place

WAYS = ('greedy', 'sampled')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafts:
  """Expected counts; K = M-1, the first axis tells greedy from sampled.

  tokens: emitted, the same whatever drafts. forwards_WM: passes that emit them, for draft lengths 0..K. offered_WK: by depth, the
  passes in which all drafts before it were accepted. accepted_WK: those in which it was as well.
  """
  tokens: jax.Array
  forwards_WM: jax.Array
  offered_WK: jax.Array
  accepted_WK: jax.Array


def expected_tokens(acceptance_K: Sequence[float]) -> float:
  """Of a pass with K drafts: 1 + a_1 + a_1 a_2 + ..., a_k being accepted given that those before it were. With one a for all it is
  (1 - a^(K+1)) / (1 - a) (Leviathan et al., equation 1)."""
  total = reached = 1.0
  for a in acceptance_K:
    reached *= a
    total += reached
  return total


def walltime_factor(acceptance_K: Sequence[float], cost: float) -> float:
  """Speed over plain decoding, if a draft takes `cost` of the time of a pass of the model and verifying is free (theorem 3.8)."""
  return expected_tokens(acceptance_K) / (len(acceptance_K) * cost + 1)


def operations_factor(acceptance_K: Sequence[float], cost: float = 0.0) -> float:
  """Arithmetic operations a token over those of plain decoding; `cost` is that of a draft in operations (theorem 3.11)."""
  return (len(acceptance_K) * (cost + 1) + 1) / expected_tokens(acceptance_K)


def best_draft(acceptance_K: Sequence[float], cost_M: Sequence[float]) -> int:
  """The draft length 0..K with most tokens for its cost; cost_M: of a pass with so many drafts, 1 + k c in Leviathan's model."""
  return max(range(len(cost_M)), key=lambda k: expected_tokens(acceptance_K[:k]) / cost_M[k])


def drafts(c: ModelConfig, h_MBLD, w_VD, batch, allowed_V, chunk: int) -> Drafts:
  """Counts over a batch.

  Args:
    h_MBLD: the normed state of every future.
    w_VD: the unembedding.
    allowed_V: bool, ids that a decoder may emit; the laws are over these.
    chunk: positions whose logits are alive at once.
  """
  M, (B, L) = c.futures, h_MBLD.shape[1:3]
  own_BL = to_text_order(objective.targets(batch, 0, M)[1])
  segments_BL = place(batch['segments'][:, :L], 'Bl')
  start_BL = jnp.pad(segments_BL[:, 1:] != segments_BL[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  inside, agree, overlap, ratio = (jnp.zeros((M - 1, B, L), **out('kBl')) for _ in range(4)) if M == 1 else jax.lax.map(
      lambda m: _compare(c, h_MBLD, w_VD, batch, m, allowed_V, chunk), jnp.arange(1, M))
  along = lambda x: jnp.moveaxis(place(x, 'kBl' if x.ndim == 3 else 'Bl'), -1, 0)  # positions first, as they come
  own_LB, start_LB, *by_depth = map(along, (own_BL, start_BL, inside, agree, overlap, ratio))
  inside, agree, overlap, ratio = by_depth
  found = {way: [_renewal(own_LB, start_LB, inside[:, :K], passed[:, :K], shared[:, :K]) for K in range(M)]
           for way, passed, shared in (('greedy', agree, agree), ('sampled', ratio, overlap))}
  stack = lambda f: jnp.stack([f(found[way]) for way in WAYS])
  return Drafts(jnp.sum(own_BL), stack(lambda by_length: jnp.stack([forwards for forwards, _, _ in by_length])),
                stack(lambda by_length: by_length[-1][1]), stack(lambda by_length: by_length[-1][2]))


def _compare(c: ModelConfig, h_MBLD, w_VD, batch, m, allowed_V, chunk: int):
  """Of the drafts of future m: whether they lie within document and row, and, 0 where not, whether argmaxes agree, the overlap, and
  min(1, q/p) of the token."""
  B, L = h_MBLD.shape[1:3]
  y_BL, counted_BL = objective.targets(batch, m, c.futures)
  verifying_BLD = to_mesh_order(jax.lax.dynamic_slice_in_dim(jnp.pad(to_text_order(h_MBLD[0]), ((0, 0), (0, c.futures), (0, 0))), m, L, 1), 'BLD')

  def laws(h_PTD):
    return jax.nn.log_softmax(jnp.where(allowed_V, capped(einsum('PTD,VD->PTV', h_PTD, w_VD, jnp.float32), c), -jnp.inf))

  def step(_, inputs):
    q_PTD, p_PTD, y_PT = inputs
    q_PTV, p_PTV = laws(q_PTD), laws(p_PTD)
    hit_PTV = jnp.arange(p_PTV.shape[-1]) == y_PT[..., None]
    ratio_PT = jnp.sum(q_PTV - p_PTV, -1, where=hit_PTV & allowed_V)
    return _, (jnp.argmax(q_PTV, -1) == jnp.argmax(p_PTV, -1), jnp.sum(jnp.exp(jnp.minimum(p_PTV, q_PTV)), -1), jnp.exp(jnp.minimum(ratio_PT, 0)))

  inputs = (objective.chunked(x_BL[None], chunk) for x_BL in (h_MBLD[m], verifying_BLD, y_BL))
  found = jax.lax.scan(step, None, tuple(inputs))[1]
  inside_BL = to_text_order(counted_BL) & (jnp.arange(L) < L - m)
  return inside_BL.astype(jnp.float32), *(jnp.where(inside_BL, to_text_order(objective.whole(x_nPT, 1, B, L)[0]).astype(jnp.float32), 0.0) for x_nPT in found)


def _renewal(own_LB, start_LB, inside_LKB, passed_LKB, shared_LKB):
  """(forwards, offered_K, accepted_K) when K drafts are made: the recursion above, over positions, for all rows at once."""
  K = passed_LKB.shape[1]

  def step(due_MB, inputs):
    own_B, start_B, inside_KB, passed_KB, shared_KB = inputs
    u_B = jnp.where(own_B, due_MB[0] + start_B, 0.0)
    reach_MB = jnp.concatenate([jnp.ones_like(u_B)[None], jnp.cumprod(passed_KB, 0)])  # at least n drafts are accepted
    exactly_MB = reach_MB - jnp.pad(reach_MB[1:], ((0, 1), (0, 0)))
    due_MB = jnp.pad(due_MB[1:], ((0, 1), (0, 0))) + u_B * exactly_MB
    offered_KB = u_B * reach_MB[:-1] * inside_KB
    return due_MB, (jnp.sum(u_B), jnp.sum(offered_KB, 1), jnp.sum(offered_KB * shared_KB, 1))

  sums = jax.lax.scan(step, jnp.zeros((K + 1, own_LB.shape[1]), **out('kB')), (own_LB, start_LB, inside_LKB, passed_LKB, shared_LKB))[1]
  return jax.tree.map(lambda x_L: jnp.sum(x_L, 0), sums)
