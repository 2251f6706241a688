"""Verification: which drafts the model accepts, and which token follows them.

p is the model's distribution of the next token, q the distribution a draft was drawn from; both
after temperature, top-k and top-p (`distribution`). Speculative sampling (Leviathan et al. 2022,
arXiv:2211.17192, algorithm 1):

    a draft x ~ q is accepted    with probability min(1, p(x) / q(x))                `accepts`
    the token after those        is drawn from norm(max(0, p - q)) if a draft was    `correction`
                                 rejected, from p if all were accepted

The generated tokens then follow p exactly, whatever q is. At temperature 0 a distribution is
one-hot, and the same rules are greedy blockwise parallel decoding (Stern et al. 2018,
arXiv:1811.03115).

Random numbers depend on a row's seed and number and on the position of the token, not on the other
rows or the number of passes. With `same_seed`, drafts and tokens share one Gumbel noise instead: a token is
argmax(log p + noise), a draft argmax(log q + noise), and the draft is accepted if they are equal.
The text is then that of plain sampling with the same seed, whatever the drafts. Fewer drafts are
accepted: with probability at least overlap / (2 - overlap), where overlap = sum_x min(p(x), q(x)).

The criteria named lossy accept more drafts; the text then no longer follows p.
"""
import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.decode.requests import EXACT, Criterion

TOKEN, DRAFT, ACCEPT = range(3)  # streams of random numbers


def distribution(logits_V, temperature, top_k=None, top_p=None):
  """Probabilities that tokens are drawn with: float[..., V].

  softmax(logits / temperature), restricted to the `top_k` likeliest tokens, then to the fewest of
  those that hold `top_p` of their mass, and normalized. One-hot at the likeliest token where
  temperature is 0. Of equal tokens the lower id comes first.

  Args:
    logits_V: float[..., V]; -inf for a token that must not be generated.
    temperature, top_k, top_p: of the leading shape, or broadcast to it. top_k 0 and top_p 1
      restrict nothing.
  """
  temperature = jnp.asarray(temperature)[..., None]
  centred_V = logits_V - jnp.max(logits_V, -1, keepdims=True)
  p_V = jax.nn.softmax(centred_V / jnp.where(temperature > 0, temperature, 1))
  if top_k is not None:
    p_V = _truncated(p_V, jnp.asarray(top_k)[..., None], jnp.asarray(top_p)[..., None])
  one_hot_V = jax.nn.one_hot(jnp.argmax(logits_V, -1), logits_V.shape[-1], dtype=p_V.dtype)
  return jnp.where(temperature > 0, p_V, one_hot_V)


def _truncated(p_V, top_k, top_p):
  """p_V restricted by top_k, then by top_p, and normalized."""
  rank_V = jnp.arange(p_V.shape[-1])
  order_V = jnp.argsort(-p_V, stable=True)
  sorted_V = jnp.take_along_axis(p_V, order_V, -1)
  sorted_V = jnp.where((rank_V < top_k) | (top_k == 0), sorted_V, 0)
  mass_before_V = jnp.cumsum(sorted_V, -1) - sorted_V
  within_V = mass_before_V < top_p * jnp.sum(sorted_V, -1, keepdims=True)
  sorted_V = jnp.where(within_V | (top_p >= 1) | (rank_V == 0), sorted_V, 0)
  p_V = jnp.take_along_axis(sorted_V, jnp.argsort(order_V), -1)
  return p_V / jnp.sum(p_V, -1, keepdims=True)


def accepts(p_kV, q_kV, drafts_k, uniform_k):
  """Whether each draft, judged by itself, is accepted: bool[..., k].

  uniform_k: random numbers in [0, 1).
  """
  p_k, q_k = (jnp.take_along_axis(x_kV, drafts_k[..., None], -1)[..., 0] for x_kV in (p_kV, q_kV))
  return uniform_k * q_k < p_k


def correction(p_iV, q_kV, accepted):
  """The distribution of the token after the first `accepted` drafts: float[..., V].

  Args:
    p_iV: the model's, at every draft and after the last; i = k + 1.
    q_kV: the drafts'.
    accepted: int[...], from 0 to k.
  """
  at_accepted = lambda x_iV: jnp.take_along_axis(x_iV, accepted[..., None, None], -2)[..., 0, :]
  p_V = at_accepted(p_iV)
  q_V = at_accepted(jnp.concatenate([q_kV, jnp.zeros_like(p_iV[..., :1, :])], -2))
  excess_V = jnp.maximum(p_V - q_V, 0)
  mass = jnp.sum(excess_V, -1, keepdims=True)
  return jnp.where(mass > 0, excess_V / jnp.where(mass > 0, mass, 1), p_V)


def lossy_accepts(criterion: Criterion, p_kV, drafts_k):
  """Whether each draft, judged by itself, meets a criterion that is not exact: bool[..., k]."""
  p_k = jnp.take_along_axis(p_kV, drafts_k[..., None], -1)[..., 0]
  if criterion.name == 'lossy_top_k':
    return jnp.sum(p_kV > p_k[..., None], -1) < criterion.threshold
  if criterion.name == 'lossy_distance':
    return jnp.abs(drafts_k - jnp.argmax(p_kV, -1)) <= criterion.threshold
  entropy_k = -jnp.sum(jax.scipy.special.xlogy(p_kV, p_kV), -1)
  return p_k > jnp.minimum(criterion.threshold, criterion.threshold**0.5 * jnp.exp(-entropy_k))


def accepted_in_a_row(passes_Bk):
  """How many drafts are accepted before the first rejection: int32[B]."""
  return jnp.sum(jnp.cumprod(passes_Bk.astype(jnp.int32), -1), -1, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
  """How each row of a batch chooses its tokens.

  Attributes:
    seed_B2: uint32, the seed of each row and a number that tells rows of one seed apart.
    temperature_B, top_k_B, top_p_B: one number a row.
    allowed_V: bool, ids that may be generated.
    greedy: all temperatures are 0, so no probabilities are needed.
    truncated: some row has a top_k or a top_p.
    same_seed, criterion: see the head of this module.
  """
  seed_B2: jax.Array
  temperature_B: jax.Array
  top_k_B: jax.Array
  top_p_B: jax.Array
  allowed_V: jax.Array
  greedy: bool = dataclasses.field(default=True, metadata={'static': True})
  truncated: bool = dataclasses.field(default=False, metadata={'static': True})
  same_seed: bool = dataclasses.field(default=False, metadata={'static': True})
  criterion: Criterion = dataclasses.field(default=EXACT, metadata={'static': True})

  def draft(self, logits_BiV, positions_Bi):
    """(drafts for these positions, int32[B, i]; their distributions, float[B, i, V]).

    None instead of distributions where `verify` needs none.
    """
    logits_BiV = self._allowed(logits_BiV)
    if self.greedy:
      return _argmax(logits_BiV), None
    q_BiV = self._distribution(logits_BiV)
    return self._draw(q_BiV, positions_Bi, TOKEN if self.same_seed else DRAFT), q_BiV

  def one_hot(self, drafts_Bk):
    """The distributions of drafts that were not drawn at random, as `draft` returns them."""
    return None if self.greedy else jax.nn.one_hot(drafts_Bk, self.allowed_V.shape[0])

  def verify(self, logits_BiV, drafts_Bk, q_BkV, positions_Bi):
    """(number of accepted drafts, int32[B]; the model's token after them, int32[B]).

    Args:
      logits_BiV: the model's, for every draft and for one token more; i = k + 1.
      drafts_Bk, q_BkV: what `draft` returned.
      positions_Bi: the positions of these tokens.
    """
    logits_BiV = self._allowed(logits_BiV)
    k = drafts_Bk.shape[1]
    if self.criterion.name == 'exact' and (self.greedy or self.same_seed):
      tokens_Bi = self._tokens(logits_BiV, positions_Bi)
      accepted_B = self._at_least(accepted_in_a_row(drafts_Bk == tokens_Bi[:, :k]), k)
      return accepted_B, _at(tokens_Bi, accepted_B)
    p_BiV = None if self.greedy else self._distribution(logits_BiV)
    if self.criterion.name == 'exact':
      uniform_Bk = self._random(jax.random.uniform, positions_Bi[:, :k], ACCEPT)
      passes_Bk = accepts(p_BiV[:, :k], q_BkV, drafts_Bk, uniform_Bk)
    else:
      temperature_B = jnp.where(self.temperature_B > 0, self.temperature_B, 1)
      untruncated_BkV = jax.nn.softmax(logits_BiV[:, :k] / temperature_B[:, None, None])
      passes_Bk = lossy_accepts(self.criterion, untruncated_BkV, drafts_Bk)
    accepted_B = self._at_least(accepted_in_a_row(passes_Bk), k)
    if self.greedy:
      return accepted_B, _at(_argmax(logits_BiV), accepted_B)
    if not self.criterion.lossless:  # accepted whatever p / q is, so there is nothing to correct
      q_BkV = jnp.zeros_like(p_BiV[:, :k])
    p_B1V = correction(p_BiV, q_BkV, accepted_B)[:, None]
    return accepted_B, self._draw(p_B1V, _at(positions_Bi, accepted_B)[:, None], TOKEN)[:, 0]

  def _tokens(self, logits_BiV, positions_Bi):
    """The tokens of plain decoding at these positions: int32[B, i]."""
    if self.greedy:
      return _argmax(logits_BiV)
    return self._draw(self._distribution(logits_BiV), positions_Bi, TOKEN)

  def _at_least(self, accepted_B, k: int):
    return jnp.maximum(accepted_B, min(self.criterion.min_block - 1, k))

  def _allowed(self, logits_BiV):
    return jnp.where(self.allowed_V, logits_BiV, -jnp.inf)

  def _distribution(self, logits_BiV):
    truncation = (self.top_k_B[:, None], self.top_p_B[:, None]) if self.truncated else ()
    return distribution(logits_BiV, self.temperature_B[:, None], *truncation)

  def _draw(self, p_BiV, positions_Bi, stream: int):
    """A token from each distribution, by Gumbel noise: argmax(log p + noise)."""
    gumbel = lambda key: jax.random.gumbel(key, p_BiV.shape[2:])
    return _argmax(jnp.log(p_BiV) + self._random(gumbel, positions_Bi, stream))

  def _random(self, draw, positions_Bi, stream: int):
    """draw(key) for every position; its key is made of seed, row, position and stream."""
    def one(seed_2, position):
      key = jax.random.key(seed_2[0])
      for number in (seed_2[1], position, stream):
        key = jax.random.fold_in(key, number)
      return draw(key)

    return jax.vmap(jax.vmap(one, (None, 0)))(self.seed_B2, positions_Bi)


def _argmax(x_BiV):
  return jnp.argmax(x_BiV, -1).astype(jnp.int32)


def _at(x_Bi, index_B):
  """One entry of each row."""
  return jnp.take_along_axis(x_Bi, index_B[:, None], 1)[:, 0]
