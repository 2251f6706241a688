"""The log-probability of every token of a text, under every future.

    bos x_0 x_1 ... x_{n-1}        future m gives log p_m(x_j | bos x_0 ... x_{j-1-m})

is read at position j - m, so future m says nothing about the first m tokens. (A sequential future is
also given the tokens in between.) The sum over future 0 is the log-probability of the text, by the
chain rule; its end is not part of it.

A text longer than a row is read in windows of a row's L inputs, which begin L - overlap apart. A
position is read in the first window that holds it, so that all but the first `overlap` tokens are
predicted from at least `overlap` tokens.
"""
import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import objective
from mtp_jax.config import Config
from mtp_jax.mesh import process_share, put, to_text_order
from mtp_jax.model.model import Model, capped
from mtp_jax.objective import Read, chunked, whole
from mtp_jax.report.display import Count
from mtp_jax.sharding import einsum, place

SHORTEST = 32  # inputs of a row at least; shorter texts are padded, so that they share a program


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Score:
  """What `LanguageModel.score` returns of one text.

  Attributes:
    ids: int32[n], its tokens.
    logprobs: float32[futures, n], the log-probability of each token in nats; nan for the first m tokens of future m.
    likeliest: bool[futures, n], whether no other id that can be generated is likelier.
    top_ids: int32[futures, n, top], the likeliest of these ids, and top_logprobs their log-probabilities;
      -1 and nan for the first m tokens of future m.
    bytes: of the text.
  """
  ids: np.ndarray
  logprobs: np.ndarray
  likeliest: np.ndarray
  top_ids: np.ndarray
  top_logprobs: np.ndarray
  bytes: int

  @property
  def logprob(self) -> float:
    """Of the whole text, under future 0."""
    return float(np.sum(self.logprobs[0], dtype=np.float64))

  @property
  def nats(self) -> list[float]:
    """Per token, of each future; nan where it predicts none."""
    return [-float(np.mean(row[m:], dtype=np.float64)) if len(row) > m else math.nan
            for m, row in enumerate(self.logprobs)]

  @property
  def bits_per_byte(self) -> float:
    """Of future 0; nan for a text of no bytes."""
    return -self.logprob / math.log(2) / self.bytes if self.bytes else math.nan

  def __repr__(self) -> str:
    return (f'Score: tokens {len(self.ids):,}, futures {len(self.logprobs)}, logprob {self.logprob:.3f}\n'
            f'nats a token {self.nats[0]:.4f}, bits per byte {self.bits_per_byte:.4f}')


@dataclasses.dataclass(frozen=True)
class Window:
  """Positions [start, stop) of bos and a text; the first so many were read in the window before."""
  text: int
  start: int
  stop: int
  repeated: int


def windows(text: int, tokens: int, length: int, overlap: int) -> list[Window]:
  """The windows of a text of so many tokens.

  Args:
    text: its number.
    length: L, inputs of a row.
    overlap: 0 to L-1.
  """
  found, start = [], 0
  while not found or found[-1].stop < tokens:
    found.append(Window(text, start, min(start + length, tokens), overlap if start else 0))
    start += length - overlap
  return found if tokens else []


def score(config: Config, model: Model, texts: Sequence[np.ndarray], bos: int, byte_length_V, allowed_V, mesh, batch,
          futures: int = 1, top: int = 0, overlap: int = 0, what: str = '') -> list[Score]:
  """The scores of texts, given as ids, in their order.

  Args:
    byte_length_V: int32, bytes that each id stands for.
    allowed_V: bool, ids that a decoder may generate.
    batch: called with a number of rows, how many of them a batch should have.
    futures: how many are computed, from future 0 on.
    top: alternatives to each token.
    what: the name that progress is shown by; '': it is not.
  """
  c, L = config.model, config.data.length
  every = [window for i, ids in enumerate(texts) for window in windows(i, len(ids), L, overlap)]
  every.sort(key=lambda window: window.start - window.stop)  # of similar length side by side
  sequences = [np.concatenate([[bos], ids]).astype(np.int32) for ids in texts]
  found = [_empty(ids, futures, top, int(np.sum(byte_length_V[ids]))) for ids in texts]
  size = batch(len(every))
  with Count(what, len(every), 'windows') as count_shown:
    for first in range(0, len(every), size):
      some = every[first:first + size]
      length = _row_length(some[0].stop - some[0].start, L, mesh.shape['context'])
      rows = _rows(some, sequences, size, length, c.futures)
      index, count = process_share(mesh)
      share = {name: x_BT[index * size // count:(index + 1) * size // count] for name, x_BT in rows.items()}
      results = jax.device_get(_score_batch(config, model, put(share, mesh), allowed_V, futures, top))
      for row, window in enumerate(some):
        _fill(found[window.text], window, [x[:, row] for x in results])
      count_shown.show(first + len(some))
  return found


def _empty(ids: np.ndarray, futures: int, top: int, size: int) -> Score:
  shape = futures, len(ids)
  return Score(np.asarray(ids, np.int32), np.full(shape, np.nan, np.float32), np.zeros(shape, bool),
               np.full((*shape, top), -1, np.int32), np.full((*shape, top), np.nan, np.float32), size)


def _row_length(longest: int, most: int, context: int) -> int:
  """Inputs of the rows of a batch: as many as in training, or SHORTEST, twice as many, and so on."""
  power = SHORTEST << max(0, (longest - 1).bit_length() - SHORTEST.bit_length() + 1)
  return power if power < most and power % (2 * context) == 0 else most


def _rows(some: Sequence[Window], sequences: Sequence[np.ndarray], size: int, length: int, futures: int) -> dict:
  """int32[size, length + M] each, as in training; the rows after those of the windows are padding."""
  shape = size, length + futures
  tokens_BT, segments_BT = np.zeros((2, *shape), np.int32)
  for row, window in enumerate(some):
    ids = sequences[window.text][window.start:window.start + length + futures]
    tokens_BT[row, :len(ids)], segments_BT[row, :len(ids)] = ids, 1
  positions_BT = np.arange(shape[1], dtype=np.int32) * segments_BT
  return {'tokens': tokens_BT, 'segments': segments_BT, 'positions': positions_BT}


def _fill(found: Score, window: Window, results) -> None:
  """Writes what a window's positions say of their targets, arrays [futures, L, ...], into the score of its text."""
  n = len(found.ids)
  for x_new, x in zip(results, (found.logprobs, found.likeliest, found.top_ids, found.top_logprobs)):
    for m in range(len(x)):
      first, stop = window.start + window.repeated, min(window.stop, n - m)
      if first < stop:
        x[m, first + m:stop + m] = x_new[m, window.repeated:stop - window.start]


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _score_batch(config: Config, model: Model, batch, allowed_V, futures: int, top: int):
  """`of_targets` of the first futures, whole on every device."""
  c, chunk = config.model, config.objective.positions(config.model.vocab)
  read, w_VD = Read.of(batch, c.futures), model.readout().table()
  h_gBLD = objective.future_states(model, read, futures)
  results = of_targets(c, h_gBLD, w_VD, read.targets_MBL[:futures], allowed_V, chunk, top)
  return [place(x, 'x' * x.ndim) for x in results]


def of_targets(c, h_gBLD, w_VD, target_gBL, allowed_V, chunk: int, top: int = 0):
  """In text order: the log-probability of each target, float32[g, B, L]; whether it is the likeliest id that is
  allowed; the `top` likeliest of these, and their log-probabilities, [g, B, L, top].

  Args:
    h_gBLD: normed states.
    w_VD: the unembedding.
    chunk: positions whose logits are alive at once, on each device.
  """
  def step(_, inputs):
    h_PtD, target_Pt = inputs
    logits_PtV = capped(einsum('PtD,VD->PtV', h_PtD, w_VD, jnp.float32), c)
    logp_PtV = jax.nn.log_softmax(logits_PtV)
    ids_V = place(jnp.arange(logp_PtV.shape[-1]), 'V')
    logp_Pt = jnp.sum(logp_PtV, -1, where=ids_V == target_Pt[..., None])
    likely_PtV = jnp.where(allowed_V, logp_PtV, -jnp.inf)
    likeliest_Pt = jnp.argmax(likely_PtV, -1) == target_Pt
    if not top:
      return None, (logp_Pt, likeliest_Pt)
    top_logp_Ptx, top_ids_Ptx = jax.lax.top_k(place(likely_PtV, 'Ptx'), top)
    return None, (logp_Pt, likeliest_Pt, top_ids_Ptx, top_logp_Ptx)

  _, results = jax.lax.scan(step, None, (chunked(h_gBLD, chunk), chunked(target_gBL, chunk)))
  in_text_order = lambda x_gBL: jnp.stack([to_text_order(x_BL) for x_BL in x_gBL])
  results = [in_text_order(whole(x_nPt, target_gBL.shape)) for x_nPt in results]
  nothing = jnp.zeros((*target_gBL.shape, 0))
  return results if top else [*results, nothing, nothing]
