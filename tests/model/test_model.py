"""Who may see whom, token by token; scans against loops; one future against the plain language
model.
"""
import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import ObjectiveConfig
from mtp_jax.model.attention import Documents, documents
from mtp_jax.model.norm import rms_norm
from mtp_jax.objective import Read, future_states, loss
from mtp_jax.train import balance

LENGTH = 12


def nats_MBL(model, batch):
  """-log p of each future's target at each position, 0 where it does not count."""
  read = Read.of(batch, model.config.futures)
  logp_MBLV = jax.nn.log_softmax(future_states(model, read) @ model.readout().table().T)
  nats = -jnp.take_along_axis(logp_MBLV, read.targets_MBL[..., None], -1)[..., 0]
  return jnp.where(read.counted_MBL, nats, 0.0)


def test_a_token_influences_exactly_the_predictions_it_should(tiny, random_model, variant):
  c = tiny(layers=5, futures=4, **variant)
  M, T = 4, LENGTH + 4
  segments = np.array([1] * 7 + [2] + [3] * 6 + [0] * 2)
  positions = np.array([*range(7), 0, *range(6), 0, 1])
  rng = np.random.default_rng(0)
  tokens = np.tile(rng.integers(0, c.vocab, T), (T + 1, 1))
  # row j differs in token j, the last in none
  tokens[np.arange(T), np.arange(T)] = (tokens[-1] + rng.integers(1, c.vocab, T)) % c.vocab
  batch = {'tokens': tokens, 'segments': np.tile(segments, (T + 1, 1)), 'positions': np.tile(positions, (T + 1, 1))}
  nats = np.asarray(jax.jit(nats_MBL)(random_model(c), jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), batch)))

  wanted = np.zeros((T, M, LENGTH), bool)
  for j, m, t in np.ndindex(*wanted.shape):
    counted = segments[t] == segments[t + 1 + m] != 0
    read = [*range(t + 1), t + 1 + m]
    if c.kind == 'sequential':  # modules 1 to m, or module m alone, are given tokens at positions of this document
      modules = [m] if c.module_input == 'trunk' else range(1, m + 1)
      read += [s + k for k in modules for s in range(t + 1) if segments[s] == segments[t]]
    wanted[j, m, t] = counted and segments[j] == segments[t] and j in read
  changed = np.moveaxis(np.abs(nats[:, :-1] - nats[:, -1:]), 1, 0)
  # rows of a batch may be rounded apart, by some 1e-6; the least influence here is 2e-4
  np.testing.assert_array_equal(changed > 3e-5, wanted)
  assert wanted.sum() > 100


def gradients(model, batch, chunk=4):
  """(loss, sums, gradients), each future weighted differently."""
  coefficient_M = 1.0 / (1 + jnp.arange(model.config.futures))
  read = Read.of(batch, model.config.futures)
  (value, sums), grads = jax.value_and_grad(loss, has_aux=True)(model, read, coefficient_M,
                                                                ObjectiveConfig(chunk=chunk, balance_loss=0.0))
  return value, sums, grads


def unrolled(model, batch):
  """The equations in a Python loop over blocks and futures: no scan, no remat, one array of logits
  a future.
  """
  c = model.config
  L = batch['tokens'].shape[1] - c.futures
  take = lambda stack, i: jax.tree.map(lambda x: x[i], stack)
  positions_BL, segments_BL = batch['positions'][:, :L], batch['segments'][:, :L]
  keys = Documents((segments_BL[:, :, None] == segments_BL[:, None, :]) & jnp.tril(jnp.ones((1, L, L), bool)),
                   segments_BL)
  norm = lambda x_BLD, scale: rms_norm(x_BLD, scale[...], c.norm_epsilon)
  x_BLD = model.embed_VD[...][batch['tokens'][:, :L]]
  for blocks in model.stacks:
    for i in range(len(blocks.attention_norm_D)):
      x_BLD, _ = take(blocks, i)(x_BLD, positions_BL, keys)
  states = [norm(x_BLD, model.final_norm_D)]
  if c.kind == 'linear':
    states = [norm(x_BLD @ model.futures.map_Dd[m], model.final_norm_D) for m in range(c.futures)]
  elif c.kind in ('parallel', 'causal', 'anticausal'):
    states = [None] * c.futures
    for m in range(c.futures)[::-1 if c.kind == 'anticausal' else 1]:
      y_BLD, _ = take(model.futures, m)(x_BLD, positions_BL, keys)
      states[m] = norm(y_BLD, model.final_norm_D)
      x_BLD = x_BLD if c.kind == 'parallel' else y_BLD
  else:
    read = states[0] if c.hidden_input == 'post_norm' else x_BLD
    for k in range(1, c.futures):
      module = take(model.futures, 0 if c.share_modules else k - 1)
      e_BLD = model.embed_VD[...][batch['tokens'][:, k:k + L]]
      e_BLD, h_BLD = norm(e_BLD, module.embedding_norm_D), norm(read, module.hidden_norm_D)
      joined_BLD = e_BLD @ module.join_CD[:16] + h_BLD @ module.join_CD[16:]
      x_BLD, _ = module.block(joined_BLD, positions_BL, keys)
      states.append(norm(x_BLD, module.out_norm_D))
      if c.module_input == 'chain':
        read = states[-1] if c.hidden_input == 'post_norm' else x_BLD
  nats = []
  for m, h_BLD in enumerate(states):
    logp_BLV = jax.nn.log_softmax(h_BLD @ model.unembed_VD[...].T)
    counted_BL = (batch['segments'][:, m + 1:m + 1 + L] == segments_BL) & (segments_BL > 0)
    y_BL = batch['tokens'][:, m + 1:m + 1 + L]
    nats.append(-jnp.sum(jnp.take_along_axis(logp_BLV, y_BL[..., None], -1)[..., 0] * counted_BL))
  return sum(nat / (1 + m) for m, nat in enumerate(nats))


RUNS = {'parallel': [{}, {'remat': 'none'}, {'remat': 'dots', 'head_batch': 2},
                     {'remat': 'attention,qkv,mlp', 'head_batch': 4}],
        'linear': [{}, {'head_batch': 2}], 'causal': [{}, {'remat': 'none'}], 'anticausal': [{}],
        'post_norm': [{}, {'remat': 'none'}, {'remat': 'dots'}], 'pre_norm': [{}], 'shared': [{}], 'trunk': [{}],
        'experts': [{}, {'remat': 'none'}, {'remat': 'dots'}]}


def test_scans_equal_a_loop_however_much_is_recomputed_or_run_at_once(tiny, random_model, packed, variant, request,
                                                                      assert_close):
  c = tiny(layers=6, futures=4, **variant)
  batch = packed(c, 2, 8)
  wanted, wanted_grads = jax.jit(jax.value_and_grad(unrolled))(random_model(c), batch)
  for run in RUNS[request.node.callspec.params['variant']]:
    model = random_model(dataclasses.replace(c, **run))
    value, _, grads = jax.jit(gradients)(model, batch)
    assert_close(value, wanted)
    assert_close(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads))


def test_remat_saves_the_matmuls_or_only_a_blocks_input_or_what_is_named_besides(tiny, random_model):
  def saved(remat, whole=False):
    model = random_model(tiny(feed_forward=20, remat=remat))
    x_BLD, positions_BL, keys = jnp.zeros((2, LENGTH, 16)), jnp.zeros((2, LENGTH),
                                                                      int), documents(jnp.ones((2, LENGTH), int))
    back = jax.eval_shape(lambda model,
                          x_BLD: jax.vjp(lambda model, x_BLD: model.run_trunk(x_BLD, positions_BL, keys), model,
                                         x_BLD)[1], model, x_BLD)
    return [x.shape for x in jax.tree.leaves(back) if whole or x.shape[1:3] == (2, LENGTH)]

  none, dots, full = saved('none'), saved('dots'), saved('full')
  assert full == [(2, 2, LENGTH, 16)]
  assert (2, 2, LENGTH, 20) in dots and (2, 2, LENGTH, 20) not in full
  assert len(none) > len(dots) > len(full)
  added = lambda remat: sorted((Counter(saved(remat, True)) - Counter(saved('full', True))).elements())
  B, G, r, K = 2, 2, 2, 8  # two blocks of the trunk; attention stands by key head
  assert added('attention') == sorted([(2, B, G, LENGTH * r, K), (2, B, G, LENGTH * r, 1)])  # with the log of each sum
  assert added('qkv') == sorted([(2, B, LENGTH, G * r, K), (2, B, LENGTH, G, K), (2, B, LENGTH, G, K)])
  assert added('attention,mlp') == sorted([*added('attention'), (2, B, LENGTH, 20), (2, B, LENGTH, 20)])  # gate and up


def plain(model, batch):
  """A next-token model and its loss: embedding, blocks, norm, unembedding, cross-entropy."""
  x_BLD = model['embed_VD'][batch['tokens'][:, :-1]]
  positions_BL, keys = batch['positions'][:, :-1], documents(batch['segments'][:, :-1])
  x_BLD, _ = jax.lax.scan(lambda x_BLD, block: (block(x_BLD, positions_BL, keys)[0], None), x_BLD, model['blocks'])
  h_TD = rms_norm(x_BLD, model['norm_D'], 1e-6).reshape(-1, x_BLD.shape[-1])
  same_BL = (batch['segments'][:, 1:] == batch['segments'][:, :-1]) & (batch['segments'][:, :-1] > 0)
  return nats_of(h_TD @ model['unembed_VD'].T, batch['tokens'][:, 1:].ravel(), same_BL.ravel())


@jax.custom_vjp
def nats_of(logits_TV, target_T, same_T):
  return nats_and_slopes(logits_TV, target_T, same_T)[0]


def nats_and_slopes(logits_TV, target_T, same_T):
  """The gradient is that of a textbook, softmax - one-hot, its one division made before the
  product: in that order of roundings.
  """
  top_T1 = jnp.max(logits_TV, -1, keepdims=True)
  e_TV = jnp.exp(logits_TV - top_T1)
  sum_T1 = jnp.sum(e_TV, -1, keepdims=True)
  hit_TV = jnp.arange(logits_TV.shape[-1]) == target_T[..., None]
  nats_T = (top_T1 + jnp.log(sum_T1))[..., 0] - jnp.take_along_axis(logits_TV, target_T[..., None], -1)[..., 0]
  return jnp.sum(nats_T, where=same_T), jnp.where(same_T[..., None], 1 / sum_T1 * e_TV - hit_TV, 0.0)


nats_of.defvjp(nats_and_slopes, lambda slope_TV, gradient: (gradient * slope_TV, None, None))


def as_plain(tree):
  """The leaves of a model of one future, or of its gradients, in the plain model's layout."""
  return {'embed_VD': tree.embed_VD[...], 'blocks': tree.trunk, 'norm_D': tree.final_norm_D[...],
          'unembed_VD': tree.unembed_VD[...]}


def test_one_future_is_the_plain_language_model(tiny, random_model, packed, family, assert_close):
  """Two programs, which XLA fuses as it likes on each processor: equal but for the order of float32
  sums.
  """
  model = random_model(tiny(futures=1, **family))
  batch = packed(model.config, 3, LENGTH)
  value, sums, grads = jax.jit(functools.partial(gradients, chunk=3 * LENGTH))(model, batch)
  wanted, wanted_grads = jax.jit(jax.value_and_grad(plain))(as_plain(model), batch)
  assert_close((value, sums.nats_M[0]), (wanted, wanted))
  assert_close(as_plain(grads), wanted_grads)


def test_with_one_future_all_kinds_are_one(tiny, random_model, packed, assert_close):
  batch = packed(tiny(futures=1), 3, LENGTH)
  run = jax.jit(gradients)
  value, sums, grads = run(random_model(tiny(futures=1)), batch)
  for kind in ('linear', 'causal', 'anticausal', 'sequential'):
    other_value, other_sums, other_grads = run(random_model(tiny(futures=1, kind=kind)), batch)
    one, other = (value, sums, as_plain(grads)), (other_value, other_sums, as_plain(other_grads))
    assert_close(jax.tree.leaves(one), jax.tree.leaves(other))


def test_packed_documents_equal_documents_in_rows_of_their_own(tiny, random_model, variant, assert_close):
  c = tiny(futures=4, **variant)
  rng = np.random.default_rng(0)
  sizes, T = [5, 1, 2, 3, 5], LENGTH + c.futures  # the last document crosses the end of the inputs
  empty = lambda: {name: np.zeros((len(sizes), T), np.int32) for name in ('tokens', 'segments', 'positions')}
  together, apart = empty(), empty()
  start = 0
  for i, size in enumerate(sizes):
    end = start + size
    own = start if end > LENGTH else 0
    document = {'tokens': rng.integers(0, c.vocab, size), 'segments': i + 1, 'positions': np.arange(size)}
    for name, values in document.items():
      together[name][0, start:end] = values
      apart[name][i, own:own + size] = 1 if name == 'segments' else values
    start = end
  run = jax.jit(gradients)
  (value, sums, grads), (other_value, other_sums, other_grads) = (run(random_model(c), batch)
                                                                  for batch in (together, apart))
  np.testing.assert_array_equal(sums.count_M, other_sums.count_M)
  # exact, since no target's logit is within 0.01 of the best other one
  np.testing.assert_array_equal(sums.correct_M, other_sums.correct_M)
  # loads differ: near the end of a document a module is given what follows in the row, and nothing counts there
  grads, other_grads = balance.without_loads(grads), balance.without_loads(other_grads)
  assert_close((value, grads), (other_value, other_grads))
