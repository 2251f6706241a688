"""Expected acceptance against brute force, against the decoder's own counts, and against speculative sampling done by hand."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import experiment, random_state, write

import mtp_jax
from mtp_jax import acceptance, objective, train
from mtp_jax.config import MeshConfig
from mtp_jax.sharding import make_mesh, shardings

KINDS = {'parallel': {}, 'linear': {'kind': 'linear'}, 'sequential': {'kind': 'sequential'}}


def laws_MBLV(model, batch, allowed_V):
  """Every future's law after every position."""
  readout = model.readout()
  logits = lambda m, h_BLD: jnp.where(allowed_V, h_BLD @ readout.table().T, -jnp.inf)
  return np.float64(jax.nn.softmax(readout.map(logits, *objective.states(model, batch))))


def brute_force(laws_MBLV, batch, way):
  """tokens, forwards by draft length, offered and accepted by depth: the chain of forwards of every document, walked one by one."""
  M, B, L, _ = laws_MBLV.shape
  tokens, forwards, offered, accepted = 0, np.zeros(M), np.zeros(M - 1), np.zeros(M - 1)
  for b in range(B):
    segments, ids = batch['segments'][b], batch['tokens'][b]
    for segment in set(segments[:L].tolist()) - {0}:
      inside = np.flatnonzero(segments == segment)
      start, end = inside[0], min(inside[-1], L)  # the last target
      tokens += end - start
      for K in range(M):
        due = {start: 1.0}
        for t in range(start, end):
          u, reach = due.pop(t, 0.0), 1.0
          forwards[K] += u
          for m in range(1, K + 1):
            if t + 1 + m > end:
              break
            p, q, x = laws_MBLV[0, b, t + m], laws_MBLV[m, b, t], ids[t + 1 + m]
            agree = float(p.argmax() == q.argmax())
            passed, shared = (agree, agree) if way == 'greedy' else (min(1, q[x] / p[x]), np.minimum(p, q).sum())
            if K == M - 1:
              offered[m - 1] += u * reach
              accepted[m - 1] += u * reach * shared
            due[t + m] = due.get(t + m, 0) + u * reach * (1 - passed)
            reach *= passed
          else:
            m = K + 1
          due[t + m] = due.get(t + m, 0) + u * reach
  return tokens, forwards, offered, accepted


def expected(model, batch, allowed_V, chunk=7):
  c, readout = model.config, model.readout()
  h_MBLD = readout.map(lambda m, h_BLD: h_BLD, *objective.states(model, batch))
  return acceptance.drafts(c, h_MBLD, readout.table(), batch, allowed_V, chunk)


@pytest.mark.parametrize('kind', KINDS)
def test_expected_counts_are_those_of_a_walk_over_every_document(tiny, random_model, packed, kind, assert_close):
  model = random_model(tiny(futures=4, layers=6, vocab=6, **KINDS[kind]))
  batch, allowed_V = packed(model.config, 6, 20), np.arange(6) != 5
  batch['tokens'] %= 5
  found = jax.jit(functools.partial(expected, allowed_V=allowed_V))(model, batch)
  laws = laws_MBLV(model, batch, allowed_V)
  for i, way in enumerate(acceptance.WAYS):
    tokens, forwards, offered, accepted = brute_force(laws, batch, way)
    assert int(found.tokens) == tokens
    assert_close((found.forwards_WM[i], found.offered_WK[i], found.accepted_WK[i]), (forwards, offered, accepted))
    assert forwards[0] == tokens > forwards[1] and 0 < accepted[0] < offered[0]


def test_expected_counts_on_a_mesh_are_those_on_one_device(tiny, random_model, packed, assert_close):
  model = random_model(tiny(futures=3))
  batch, allowed_V = packed(model.config, 8, 16), np.ones(24, bool)
  run = jax.jit(functools.partial(expected, allowed_V=allowed_V))
  wanted = jax.device_get(run(model, batch))
  for sizes in (MeshConfig(fsdp=4, tensor=2), MeshConfig(fsdp=2, context=2)):
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
      assert_close(jax.device_get(run(jax.device_put(model, shardings(model, mesh)), train.put(batch, mesh))), wanted)


def test_one_future_drafts_nothing(tiny, random_model, packed):
  model = random_model(tiny(futures=1))
  batch = packed(model.config, 3, 16)
  found = expected(model, batch, np.ones(24, bool))
  assert found.forwards_WM.tolist() == [[int(found.tokens)]] * 2 and found.accepted_WK.shape == (2, 0)


@pytest.fixture(scope='module')
def lm(tmp_path_factory):
  folder = tmp_path_factory.mktemp('acceptance')
  config = experiment(folder, model={'layers': 5, 'futures': 4}, data={'length': 64})
  write(folder / 'run', config, random_state(config, seed=5))
  return mtp_jax.load(folder / 'run')


def as_row(lm, ids) -> dict:
  """A document as a batch of one row."""
  M, L = lm.config.model.futures, len(ids) - 1
  tokens = np.zeros((1, L + M), np.int32)
  tokens[0, :L + 1] = ids
  segments = np.where(np.arange(L + M) <= L, 1, 0)[None].astype(np.int32)
  return {'tokens': tokens, 'segments': segments, 'positions': np.arange(L + M, dtype=np.int32)[None]}


def test_greedy_forwards_are_those_that_the_decoder_makes(lm):
  """On the text that the decoder wrote itself, position by position: not in expectation, but one by one."""
  allowed_V = train.emitted(lm.config, lm.tokenizer)
  for prompt in ('the 1', 'a', '2 é the', 'import'):
    for draft in (1, 3):
      said = lm.generate(prompt, max_tokens=60, draft=draft)
      ids = np.concatenate([[lm.tokenizer.bos], lm.tokenizer.encode(prompt), said.ids[0]])
      t, forwards, accepted = len(ids) - len(said.ids[0]) - 1, 0, np.zeros(draft, int)
      agrees = laws_MBLV(lm._on_one_device, as_row(lm, ids), allowed_V).argmax(-1)[:, 0]
      while t < len(ids) - 1:
        n = 0
        while n < draft and t + 2 + n < len(ids) and agrees[n + 1, t] == agrees[0, t + n + 1]:
          accepted[n] += 1
          n += 1
        t, forwards = t + n + 1, forwards + 1
      forwards += n > 0  # the forward that verified the last drafts had nothing more to say
      assert (forwards, accepted.tolist()) == (said.forwards, said.accepted)


@pytest.mark.slow
def test_sampled_forwards_agree_with_speculative_sampling_within_its_confidence_interval(tiny, random_model):
  """Leviathan's algorithm 1 by hand on full laws, 600 documents; then the expectation over the very documents that it wrote."""
  model = random_model(tiny(futures=3, vocab=8))
  T, documents, V = 24, 600, 8
  ones = np.ones((documents, T + 3), np.int32)
  as_batch = lambda ids: {'tokens': ids, 'segments': ones * (np.arange(T + 3) <= T), 'positions': ones * np.arange(T + 3, dtype=np.int32)}
  run = jax.jit(lambda ids: jax.nn.softmax(model.readout().map(lambda m, h: h @ model.readout().table().T, *objective.states(model, as_batch(ids)))))
  rng = np.random.default_rng(0)
  draw = lambda law: (rng.random((len(law), 1)) > law.cumsum(-1)).sum(-1).clip(0, V - 1)
  ids = np.zeros((documents, T + 3), np.int32)
  ids[:, 0] = rng.integers(0, V, documents)
  last, forwards, rows = np.zeros(documents, int), np.zeros(documents), np.arange(documents)  # position of the last known token
  own = np.float64(run(ids))[0, rows, last]  # the law of the token that a forward says itself
  while (last < T).any():
    going = last < T
    forwards += going
    q = np.float64(run(ids))[1:, rows, last.clip(0, T - 1)]
    token = draw(own)
    for n in range(3):
      ids[rows[going], last[going] + 1] = token[going]
      last = last + going
      going = going & (last < T)
      p = np.float64(run(ids))[0, rows, last.clip(0, T - 1)]
      own = np.where(going[:, None], p, own)
      if n < 2:
        token = draw(q[n])
        accept = rng.random(documents) < p[rows, token] / q[n][rows, token]
        rest = np.maximum(p - q[n], 0) + 1e-300
        own = np.where((going & ~accept)[:, None], rest / rest.sum(-1, keepdims=True), own)
        going = going & accept
  found = expected(model, as_batch(ids), np.ones(V, bool))
  assert int(found.tokens) == documents * T
  half = 3.3 * forwards.std() / math.sqrt(documents)  # exceeded once in a thousand seeds
  assert abs(float(found.forwards_WM[1, 2]) / documents - forwards.mean()) < half
  assert half / forwards.mean() < 0.02
