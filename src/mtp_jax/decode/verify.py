"""Verification on distributions: which drafts the model accepts, and what it says instead.

p is the model's law of the next token, q the law its draft was drawn from, both after temperature, top-k and top-p and of one type
(`law`). Speculative sampling (Leviathan et al. 2022, arXiv:2211.17192, algorithm 1):

    a draft x ~ q is accepted                  with probability min(1, p(x) / q(x))             `accepts`
    the token after the last one accepted is   drawn from norm(max(0, p - q)) where a draft     `correction`
                                               was rejected, from p after all of them

The tokens then follow the model's own law exactly, whatever q is. At temperature 0 a law is one token's, and the same rules are
greedy blockwise parallel decoding (Stern et al. 2018, arXiv:1811.03115).

Randomness is keyed by row and position, never by the batch or by the number of passes. With `same_seed`, drafts and tokens share one
Gumbel noise instead: a token is argmax(log p + noise), a draft argmax(log q + noise), accepted where they are equal. The text is then
that of plain sampling at the same seed, whatever drafts; fewer drafts are accepted, at least overlap / (2 - overlap) of them.

The criteria named lossy accept more and change the law of the text.
"""
import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.decode.requests import EXACT, Criterion

OWN, DRAFT, ACCEPT = range(3)  # streams of randomness


def law(logits_V, temperature, top_k=None, top_p=None):
  """The law that tokens are drawn from: softmax(logits / temperature), cut to the likeliest `top_k`, then to the fewest likeliest of
  those that hold `top_p` of their mass, and normed; all of it on the likeliest token where temperature is 0.

  Args:
    logits_V: float[..., V]; -inf where a token may not be said.
    temperature, top_k, top_p: of the leading shape, or broadcast to it. top_k 0 and top_p 1 cut nothing. Equal tokens: the lower id first.
  """
  V, temperature = logits_V.shape[-1], jnp.asarray(temperature)[..., None]
  p_V = jax.nn.softmax((logits_V - jnp.max(logits_V, -1, keepdims=True)) / jnp.where(temperature > 0, temperature, 1))
  if top_k is not None:
    top_k, top_p = (jnp.asarray(x)[..., None] for x in (top_k, top_p))
    order_V = jnp.argsort(-p_V, stable=True)
    ranked_V = jnp.where((jnp.arange(V) < top_k) | (top_k == 0), jnp.take_along_axis(p_V, order_V, -1), 0)
    before_V = jnp.cumsum(ranked_V, -1) - ranked_V
    within_V = before_V < top_p * jnp.sum(ranked_V, -1, keepdims=True)
    ranked_V = jnp.where(within_V | (top_p >= 1) | (jnp.arange(V) == 0), ranked_V, 0)
    p_V = jnp.take_along_axis(ranked_V, jnp.argsort(order_V), -1)
    p_V = p_V / jnp.sum(p_V, -1, keepdims=True)
  return jnp.where(temperature > 0, p_V, jax.nn.one_hot(jnp.argmax(logits_V, -1), V, dtype=p_V.dtype))


def accepts(p_kV, q_kV, drafts_k, uniform_k):
  """Whether each draft, for itself, passes: bool[..., k]. uniform_k: in [0, 1)."""
  at = lambda law_kV: jnp.take_along_axis(law_kV, drafts_k[..., None], -1)[..., 0]
  return uniform_k * at(q_kV) < at(p_kV)


def correction(p_iV, q_kV, accepted):
  """The law of the token after the first `accepted` drafts: float[..., V]; i = k + 1."""
  at = lambda law_iV: jnp.take_along_axis(law_iV, accepted[..., None, None], -2)[..., 0, :]
  p_V, q_V = at(p_iV), at(jnp.concatenate([q_kV, jnp.zeros_like(p_iV[..., :1, :])], -2))
  rest_V = jnp.maximum(p_V - q_V, 0)
  mass = jnp.sum(rest_V, -1, keepdims=True)
  return jnp.where(mass > 0, rest_V / jnp.where(mass > 0, mass, 1), p_V)


def lossy_accepts(criterion: Criterion, p_kV, drafts_k):
  """Whether each draft, for itself, passes a criterion that is not exact: bool[..., k]."""
  at_k = jnp.take_along_axis(p_kV, drafts_k[..., None], -1)[..., 0]
  if criterion.name == 'lossy_top_k':
    return jnp.sum(p_kV > at_k[..., None], -1) < criterion.threshold
  if criterion.name == 'lossy_distance':
    return jnp.abs(drafts_k - jnp.argmax(p_kV, -1)) <= criterion.threshold
  entropy_k = -jnp.sum(jax.scipy.special.xlogy(p_kV, p_kV), -1)
  return at_k > jnp.minimum(criterion.threshold, criterion.threshold**0.5 * jnp.exp(-entropy_k))


def in_a_row(passes_Bk):
  """How many drafts pass before the first that does not: int32[B]."""
  return jnp.sum(jnp.cumprod(passes_Bk.astype(jnp.int32), -1), -1, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
  """How the rows of a batch choose: each has a seed (uint32), a temperature, a top_k and a top_p of its own.

  allowed_V: bool, ids that may be said. Static: greedy, all temperatures are 0, so no law is needed; truncated, some row has a top_k
  or top_p; same_seed and criterion as above.
  """
  seed_B: jax.Array
  temperature_B: jax.Array
  top_k_B: jax.Array
  top_p_B: jax.Array
  allowed_V: jax.Array
  greedy: bool = dataclasses.field(default=True, metadata={'static': True})
  truncated: bool = dataclasses.field(default=False, metadata={'static': True})
  same_seed: bool = dataclasses.field(default=False, metadata={'static': True})
  criterion: Criterion = dataclasses.field(default=EXACT, metadata={'static': True})

  def draft(self, logits_BiV, positions_Bi):
    """(drafts for these positions, int32[B, i]; their laws, float[B, i, V], None where `verify` needs none)."""
    logits_BiV = self._allowed(logits_BiV)
    if self.greedy:
      return _argmax(logits_BiV), None
    q_BiV = self._law(logits_BiV)
    return self._draw(q_BiV, positions_Bi, OWN if self.same_seed else DRAFT), q_BiV

  def certain(self, drafts_Bk):
    """The laws of drafts that nothing was drawn for."""
    return None if self.greedy else jax.nn.one_hot(drafts_Bk, self.allowed_V.shape[0])

  def verify(self, logits_BiV, drafts_Bk, q_BkV, positions_Bi):
    """(how many drafts are accepted, int32[B]; the model's own token after them, int32[B]).

    Args:
      logits_BiV: the model's, for every draft and one token more; i = k + 1.
      drafts_Bk, q_BkV: what `draft` returned.
      positions_Bi: where these tokens will stand.
    """
    logits_BiV, k = self._allowed(logits_BiV), drafts_Bk.shape[1]
    at = lambda x_Bi: jnp.take_along_axis(x_Bi, accepted_B[:, None], 1)[:, 0]
    p_BiV = None if self.greedy else self._law(logits_BiV)
    if self.criterion.name == 'exact':
      if self.greedy or self.same_seed:
        own_Bi = _argmax(logits_BiV) if self.greedy else self._draw(p_BiV, positions_Bi, OWN)
        accepted_B = self._at_least(in_a_row(drafts_Bk == own_Bi[:, :k]), k)
        return accepted_B, at(own_Bi)
      passes_Bk = accepts(p_BiV[:, :k], q_BkV, drafts_Bk, self._uniform(positions_Bi[:, :k]))
    else:
      temperature_B11 = jnp.where(self.temperature_B > 0, self.temperature_B, 1)[:, None, None]
      passes_Bk = lossy_accepts(self.criterion, jax.nn.softmax(logits_BiV[:, :k] / temperature_B11), drafts_Bk)
    accepted_B = self._at_least(in_a_row(passes_Bk), k)
    if self.greedy:
      return accepted_B, at(_argmax(logits_BiV))
    if not self.criterion.lossless:  # what was let through was not drawn for its law, so nothing is left to correct
      q_BkV = jnp.zeros_like(p_BiV[:, :k])
    return accepted_B, self._draw(correction(p_BiV, q_BkV, accepted_B)[:, None], at(positions_Bi)[:, None], OWN)[:, 0]

  def _at_least(self, accepted_B, k: int):
    return jnp.maximum(accepted_B, min(self.criterion.min_block - 1, k))

  def _allowed(self, logits_BiV):
    return jnp.where(self.allowed_V, logits_BiV, -jnp.inf)

  def _law(self, logits_BiV):
    cut = (self.top_k_B[:, None], self.top_p_B[:, None]) if self.truncated else ()
    return law(logits_BiV, self.temperature_B[:, None], *cut)

  def _draw(self, law_BiV, positions_Bi, stream: int):
    """A token of each law, by Gumbel noise: argmax(log p + noise)."""
    noise_BiV = self._keyed(lambda key: jax.random.gumbel(key, law_BiV.shape[2:]), positions_Bi, stream)
    return _argmax(jnp.log(law_BiV) + noise_BiV)

  def _uniform(self, positions_Bk):
    return self._keyed(jax.random.uniform, positions_Bk, ACCEPT)

  def _keyed(self, random, positions_Bi, stream: int):
    one = lambda seed, position: random(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), stream))
    return jax.vmap(jax.vmap(one, (None, 0)))(self.seed_B, positions_Bi)


def _argmax(x_BiV):
  return jnp.argmax(x_BiV, -1).astype(jnp.int32)
