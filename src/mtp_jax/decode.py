"""Decoding with a cache: the futures draft, the next forward verifies, and drafts again.

Each pass of the loop runs the trunk on the last known token and K drafts after it (Stern et al. 2018, arXiv:1811.03115,
section 4; K = 0 is plain autoregression). Future 0 says which token follows each of them. Drafts are accepted while they
equal what future 0 says; then comes one token of its own. So every token is future 0's, and the output is that of plain
autoregression, token for token, in float32. (In bfloat16 a pass over several tokens may round a near-tie the other way.)

With a temperature, a token is argmax(logits / temperature + Gumbel noise), a sample of the model's law, and the noise
depends only on the row's seed and the position. Drafts use the same noise, so they often agree, and the output is again that
of autoregression at the same seed.

Rows have prompts of unequal length, kept left-aligned: a row's slot s in a cache is its position s. What a rejected draft left
in a cache lies past the last known token, where no query looks until it has been written anew: nothing is rolled back.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp

from mtp_jax.config import ModelConfig
from mtp_jax.layers import Cache, write
from mtp_jax.model import Model, capped
from mtp_jax.sharding import einsum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
  """What decoding keeps of the tokens so far.

  trunk: a Cache with a leading axis N. first: that of the parallel future 0. drafters: those of the futures, or modules, 1..K; of a
  chain, or of linear heads, those of all heads that run. state_BSD: h^0 of every position, which the sequential modules start from.
  What a kind does not need is None.
  """
  trunk: Cache
  first: Cache | None
  drafters: tuple[Cache | None, ...]
  state_BSD: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
  """The loop's state. tokens_BS: int32; depth_BS: 0 where future 0 spoke, m where a draft of future m was accepted."""
  memory: Memory
  tokens_BS: jax.Array
  depth_BS: jax.Array
  length_B: jax.Array    # tokens known
  done_B: jax.Array
  drafts_BK: jax.Array   # of the tokens after those known; -1, which nothing equals, before the first pass
  forwards_B: jax.Array  # passes in which the row took part
  accepted_BK: jax.Array  # passes in which its draft k+1 was accepted


@functools.partial(jax.jit, static_argnames=('slots', 'draft', 'sample'))
def generate(model: Model, prompts_BP, length_B, limit_B, seed_B, temperature, allowed_V, eos, *, slots: int, draft: int, sample: bool) -> Progress:
  """Continues every row up to `limit_B` tokens or its first eos.

  Args:
    prompts_BP: int32, prompts left-aligned.
    length_B: int32 >= 1, tokens of each prompt.
    limit_B: int32, tokens of each row in all; a row whose limit is its length does nothing.
    seed_B: uint32, one a row. temperature: float; both matter only when `sample`.
    allowed_V: bool, ids that may be emitted.
    eos: int32, the id that ends a row.
    slots: S, positions a cache holds: at least the longest limit.
    draft: K, how many futures draft, 0..M-1.

  Returns:
    The Progress at the end. The pass over the prompt is not among `forwards_B`.
  """
  B, P = prompts_BP.shape
  unembed_DV = model.readout().table().T  # laid out once for all passes
  choose = functools.partial(_choose, model.config, unembed_DV=unembed_DV, seed_B=seed_B, temperature=temperature, allowed_V=allowed_V, sample=sample)
  tokens_BS = jnp.pad(prompts_BP, ((0, 0), (0, slots - P)))
  drafters = _drafters(model, draft)
  first = _take(model.futures, 0) if model.config.kind == 'parallel' and model.config.futures > 1 else None
  memory = _prefill(model, first, drafters, prompts_BP, slots)
  start = Progress(memory, tokens_BS, jnp.zeros((B, slots), jnp.int32), length_B, length_B >= limit_B, jnp.full((B, draft), -1),
                   jnp.zeros(B, jnp.int32), jnp.zeros((B, draft), jnp.int32))
  return jax.lax.while_loop(lambda p: ~jnp.all(p.done_B), functools.partial(_advance, model, first, drafters, choose, limit_B, eos), start)


def _advance(model: Model, first, drafters: tuple, choose, limit_B, eos, p: Progress) -> Progress:
  """One forward: verify the drafts, emit what is accepted and one token more, draft again."""
  B, K = p.drafts_BK.shape
  ahead_T = jnp.arange(K + 1)
  last_B1 = (p.length_B - 1)[:, None]
  block_BT = jnp.concatenate([jnp.take_along_axis(p.tokens_BS, last_B1, 1), p.drafts_BK], 1)
  positions_BT = last_B1 + ahead_T
  z_BTD, h_BTD, memory = _verify(model, first, drafters, K, block_BT, positions_BT, p.memory)
  own_BT = choose(h_BTD, positions_BT + 1)

  agree_BK = jnp.cumprod(p.drafts_BK == own_BT[:, :-1], 1)
  accepted_B = jnp.sum(agree_BK, 1)
  offered_BT = (ahead_T <= accepted_B[:, None]) & (positions_BT + 1 < limit_B[:, None]) & ~p.done_B[:, None]
  ends_BT = offered_BT & (own_BT == eos)
  emitted_BT = offered_BT & (jnp.cumsum(ends_BT, 1) - ends_BT == 0)
  slots_BT = jnp.where(emitted_BT, positions_BT + 1, p.tokens_BS.shape[1])
  tokens_BS = write(p.tokens_BS, own_BT, slots_BT)
  depth_BS = write(p.depth_BS, jnp.where(ahead_T < accepted_B[:, None], ahead_T + 1, 0), slots_BT)
  length_B = p.length_B + jnp.sum(emitted_BT, 1)

  if K == 0:
    drafts_BK = p.drafts_BK
  elif model.config.kind not in ('parallel', 'sequential'):
    h_BKD = jnp.concatenate([jnp.take_along_axis(h_BTD, accepted_B[:, None, None], 1) for h_BTD in z_BTD], 1)
    drafts_BK = choose(h_BKD, positions_BT[:, :1] + accepted_B[:, None] + 2 + jnp.arange(K))
  elif model.config.kind == 'parallel':
    drafts_BK, memory = _draft_parallel(model, drafters, choose, z_BTD, positions_BT, accepted_B[:, None], memory)
  else:
    drafts_BK, memory = _draft_sequential(model, drafters, choose, tokens_BS, length_B[:, None] - 2, memory)
  live_B = ~p.done_B
  return Progress(memory, tokens_BS, depth_BS, length_B, p.done_B | jnp.any(ends_BT & emitted_BT, 1) | (length_B >= limit_B), drafts_BK,
                  p.forwards_B + live_B, p.accepted_BK + agree_BK * emitted_BT[:, :K])


def _choose(c, h_BTD, positions_BT, *, unembed_DV, seed_B, temperature, allowed_V, sample: bool):
  """The token at each position: the argmax, or a sample by Gumbel noise keyed by row and position. int32[B, T]."""
  logits_BTV = jnp.where(allowed_V, capped(einsum('BLD,DV->BLV', h_BTD, unembed_DV, jnp.float32), c), -jnp.inf)
  if sample:
    noise = lambda seed, position: jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), allowed_V.shape)
    logits_BTV = logits_BTV / temperature + jax.vmap(jax.vmap(noise, (None, 0)))(seed_B, positions_BT)
  return jnp.argmax(logits_BTV, -1).astype(jnp.int32)


def _drafters(model: Model, K: int) -> tuple:
  """The heads or modules that draft, cut out of their stack once, before the loop."""
  c = model.config
  if c.first_future:
    return tuple(_take(model.futures, 0 if c.share_modules else k - 1) for k in range(1, K + 1))
  return tuple(_take(model.futures, k) for k in _heads(c, K))


def _heads(c: ModelConfig, K: int) -> range:
  """The futures whose heads `_drafters` holds, in the order in which they run."""
  return range(1, K + 1) if c.kind == 'parallel' else range(c.futures - 1, -1, -1) if c.kind == 'anticausal' else range(K + 1)


def _read_all(model: Model, heads: tuple, K: int, z_BTD, positions_BT, mask_BTS, caches: tuple):
  """Linear heads, and heads in a chain, on new tokens: (what the unembedding reads for futures 0..K, caches)."""
  c, state_BTD, read, written = model.config, z_BTD, {}, []
  for m, head, cache in zip(_heads(c, K), heads, caches):
    x_BTD, cache = head(state_BTD, positions_BT, mask_BTS, cache)
    written.append(cache)
    read[m] = model.readout().norm(x_BTD)
    state_BTD = state_BTD if c.independent else x_BTD
  return [read[m] for m in range(K + 1)], tuple(written)


def _take(stacked, index: int):
  return jax.tree.map(lambda x: x[index], stacked)


def _write(block, x_BTD, positions_BT, cache: Cache) -> Cache:
  return cache.write(*block.keys_values(x_BTD, positions_BT), positions_BT)


def _prefill(model: Model, first, drafters: tuple, tokens_BP, S: int) -> Memory:
  """Runs the prompts, and what fills them up, through every cache."""
  c = model.config
  B, P = tokens_BP.shape
  empty = Cache.empty(c, B, S)
  positions_BP = jnp.broadcast_to(jnp.arange(P), (B, P))
  trunk = jax.tree.map(lambda x: jnp.broadcast_to(x, (c.trunk_layers, *x.shape)), empty)
  z_BPD, trunk = model.run_trunk(model.embed(tokens_BP), positions_BP, empty.mask(positions_BP), trunk)
  if c.first_future:
    h_BPD = model.readout().start(z_BPD)[0]
    caches, _ = _chain(model, drafters, h_BPD, tokens_BP, positions_BP, (empty,) * len(drafters), lambda k, h_B1D, tokens_BP: tokens_BP)
    return Memory(trunk, None, caches, jnp.pad(h_BPD, ((0, 0), (0, S - P), (0, 0))))
  if c.kind == 'parallel':
    return Memory(trunk, _write(first, z_BPD, positions_BP, empty), tuple(_write(block, z_BPD, positions_BP, empty) for block in drafters), None)
  caches = (None if c.kind == 'linear' else empty,) * len(drafters)
  return Memory(trunk, None, _read_all(model, drafters, len(drafters) - 1, z_BPD, positions_BP, empty.mask(positions_BP), caches)[1], None)


def _verify(model: Model, first, drafters: tuple, K: int, tokens_BT, positions_BT, memory: Memory):
  """Future 0 on new tokens: (what the drafts are made of, what the unembedding reads, memory).

  Drafts are made of the trunk's state; of linear heads, or heads in a chain, of what the unembedding reads for futures 1..K.
  """
  mask_BTS = memory.trunk.mask(positions_BT)
  z_BTD, trunk = model.run_trunk(model.embed(tokens_BT), positions_BT, mask_BTS, memory.trunk)
  memory = dataclasses.replace(memory, trunk=trunk)
  if model.config.first_future:
    start_BTD, h_BTD = model.readout().start(z_BTD)
    return z_BTD, h_BTD, dataclasses.replace(memory, state_BSD=write(memory.state_BSD, start_BTD, positions_BT))
  if model.config.kind != 'parallel':
    (h_BTD, *drafting), caches = _read_all(model, drafters, K, z_BTD, positions_BT, mask_BTS, memory.drafters)
    return drafting, h_BTD, dataclasses.replace(memory, drafters=caches)
  x_BTD, cache = first(z_BTD, positions_BT, mask_BTS, memory.first)
  return z_BTD, model.readout().norm(x_BTD), dataclasses.replace(memory, first=cache)


def _draft_parallel(model: Model, drafters: tuple, choose, z_BTD, positions_BT, at_B1, memory: Memory):
  """Futures 1..K write all new positions and read at the last accepted one: (int32[B, K], memory)."""
  z_B1D, at_B1 = jnp.take_along_axis(z_BTD, at_B1[..., None], 1), jnp.take_along_axis(positions_BT, at_B1, 1)
  caches = tuple(_write(block, z_BTD, positions_BT, cache) for block, cache in zip(drafters, memory.drafters))
  h_BKD = jnp.concatenate([model.readout().norm(block.read(z_B1D, at_B1, cache.k_BSGK, cache.v_BSGK, cache.mask(at_B1)))
                           for block, cache in zip(drafters, caches)], 1)
  return choose(h_BKD, at_B1 + 2 + jnp.arange(len(drafters))), dataclasses.replace(memory, drafters=caches)


def _draft_sequential(model: Model, drafters: tuple, choose, tokens_BS, last_B1, memory: Memory):
  """Modules 1..K on a window that ends at `last_B1`, the last position whose next token is known: (int32[B, K], memory).

  Module k's state at position t is final once token t+k is known. An accepted draft is such a token, so what earlier passes
  left is final at all but the last K positions and the new one; these are run again.
  """
  K = len(drafters)
  window_BW = last_B1 + jnp.arange(-K, 1)
  h_BWD = jnp.take_along_axis(memory.state_BSD, jnp.maximum(window_BW, 0)[..., None], 1)

  def extend(k, h_B1D, tokens_BS):
    return write(tokens_BS, choose(h_B1D, last_B1 + k + 1), last_B1 + k + 1)

  caches, tokens_BS = _chain(model, drafters, h_BWD, tokens_BS, window_BW, memory.drafters, extend)
  drafts_BK = jnp.take_along_axis(tokens_BS, jnp.minimum(last_B1 + 2 + jnp.arange(K), tokens_BS.shape[1] - 1), 1)
  return drafts_BK, dataclasses.replace(memory, drafters=caches)


def _chain(model: Model, modules: tuple, h_BWD, tokens_BS, positions_BW, caches: tuple, extend):
  """Modules 1..K in turn: (caches, tokens_BS); extend(k, h_B1D, tokens_BS) may append what module k predicts last."""
  written = []
  for k, (module, cache) in enumerate(zip(modules, caches), 1):
    between_BW = jnp.take_along_axis(tokens_BS, jnp.clip(positions_BW + k, 0, tokens_BS.shape[1] - 1), 1)
    raw_BWD, normed_BWD, cache = module(model.embed(between_BW), h_BWD, positions_BW, cache.mask(positions_BW), cache)
    written.append(cache)
    tokens_BS = extend(k, normed_BWD[:, -1:], tokens_BS)
    h_BWD = normed_BWD if model.config.hidden_input == 'post_norm' else raw_BWD
  return tuple(written), tokens_BS
