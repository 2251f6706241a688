"""The model's forward written anew, in NumPy's float64, for one document without packing: a reference for scores."""
import jax
import numpy as np


def logprobs(model, ids) -> np.ndarray:
  """float64[M, n - 1, V]: the log softmax of `logits`."""
  found = logits(model, ids)
  top = found.max(-1, keepdims=True)
  return found - top - np.log(np.exp(found - top).sum(-1, keepdims=True))


def logits(model, ids) -> np.ndarray:
  """float64[M, n - 1, V]: logits of every future after every prefix of n ids, the first of which is bos.

  Future m at position t is for ids[t + 1 + m]; a sequential one is given ids up to t + m, and 0 beyond the end.
  """
  c = model.config
  w = jax.tree_util.tree_map_with_path(lambda _, x: np.asarray(jax.device_get(x), np.float64), model)
  n, M = len(ids) - 1, c.futures
  z = w.embed_VD[...][ids[:n]]
  for blocks in w.stacks:
    for i in range(len(blocks.attention_norm_D[...])):
      z = _block(c, _layer(blocks, i), z)
  final = lambda x: _norm(x, w.final_norm_D[...], c)
  head = lambda m: _layer(w.futures, 0 if c.share_modules else m - c.first_own_head)
  if M == 1:
    states = [final(z)]
  elif c.kind == 'parallel':
    states = [final(_block(c, head(m), z)) for m in range(M)]
  elif c.kind == 'linear':
    states = [final(z @ head(m).map_Dd[...]) for m in range(M)]
  elif c.kind in ('causal', 'anticausal'):
    x, states = z, [None] * M
    for m in range(M) if c.kind == 'causal' else reversed(range(M)):
      x = _block(c, head(m), x)
      states[m] = final(x)
  else:
    states, given = [final(z)], np.concatenate([ids, np.zeros(M, int)])
    state = states[0] if c.hidden_input == 'post_norm' else z
    for m in range(1, M):
      module = head(m)
      e = _norm(w.embed_VD[...][given[m:m + n]], module.embedding_norm_D[...], c)
      x = np.concatenate([e, _norm(state, module.hidden_norm_D[...], c)], -1) @ module.join_CD[...]
      x = _block(c, module.block, x)
      states.append(_norm(x, module.out_norm_D[...], c))
      if c.module_input == 'chain':
        state = states[-1] if c.hidden_input == 'post_norm' else x
  table = w.embed_VD[...] if c.tie_embeddings else w.unembed_VD[...]
  found = np.stack(states) @ table.T
  return c.logit_cap * np.tanh(found / c.logit_cap) if c.logit_cap else found


def _layer(stacked, i: int):
  return jax.tree.map(lambda x: x[i], stacked)


def _norm(x, scale, c):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_epsilon) * scale


def _block(c, w, x):
  x = x + _attention(c, w.attention, _norm(x, w.attention_norm_D[...], c))
  h, f = _norm(x, w.feed_forward_norm_D[...], c), w.feed_forward
  if not hasattr(f, 'router_DE'):
    return x + _swiglu(h, f.gate_DF[...], f.up_DF[...], f.down_FD[...])
  y = _swiglu(h, f.shared.gate_DF[...], f.shared.up_DF[...], f.shared.down_FD[...])
  for t, h_D in enumerate(h):  # one token and one expert at a time
    affinity = 1 / (1 + np.exp(-h_D @ f.router_DE[...]))
    score = (affinity + f.bias_E[...]).reshape(c.expert_groups, -1)
    if c.groups_per_token < c.expert_groups:
      best_two = np.sort(score, -1)[:, -2:].sum(-1)
      score[np.argsort(best_two)[:-c.groups_per_token]] = -np.inf
    chosen = np.argsort(score.ravel())[-c.experts_per_token:]
    for e in chosen:
      out = _swiglu(h_D, f.gate_EDW[...][e], f.up_EDW[...][e], f.down_EWD[...][e])
      y[t] += c.expert_scale * affinity[e] / affinity[chosen].sum() * out
  return x + y


def _swiglu(h, gate_DF, up_DF, down_FD):
  gate = h @ gate_DF
  return (gate / (1 + np.exp(-gate)) * (h @ up_DF)) @ down_FD


def _attention(c, w, h):
  """One head at a time."""
  if c.attention == 'latent':
    return _latent_attention(c, w, h)
  y = 0
  for i in range(c.heads):
    g = i // (c.heads // c.kv_heads)
    q, k, v = h @ w.wq_DHK[...][:, i], h @ w.wk_DGK[...][:, g], h @ w.wv_DGK[...][:, g]
    if c.qkv_bias:
      q, k, v = q + w.q_bias_HK[...][i], k + w.k_bias_GK[...][g], v + w.v_bias_GK[...][g]
    if c.qk_norm:
      q, k = _norm(q, w.q_norm_K[...], c), _norm(k, w.k_norm_K[...], c)
    y = y + _read(_rotated(c, q), _rotated(c, k), v) @ w.wo_HKD[...][i]
  return y


def _latent_attention(c, w, h):
  """One head at a time, its keys and values expanded from the latents."""
  K, y = c.head_width, 0
  latent, k_rotary = _norm(h @ w.kv_down_DA[...], w.kv_norm_A[...], c), _rotated(c, h @ w.k_rotary_Do[...])
  for i in range(c.heads):
    if c.query_rank:
      q = _norm(h @ w.q_down_DU[...], w.q_norm_U[...], c) @ w.q_up_UHJ[...][:, i]
    else:
      q = h @ w.wq_DHJ[...][:, i]
    q = np.concatenate([q[:, :K], _rotated(c, q[:, K:])], -1)
    k = np.concatenate([latent @ w.k_up_AHK[...][:, i], k_rotary], -1)
    y = y + _read(q, k, latent @ w.v_up_AHK[...][:, i]) @ w.wo_HKD[...][i]
  return y


def _read(q, k, v):
  """Causal softmax attention of one head."""
  scores = np.where(np.tril(np.ones((len(q), len(k)), bool)), q @ k.T / np.sqrt(q.shape[1]), -np.inf)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True) @ v


def _rotated(c, x):
  """Each pair (j, j + o/2) of o numbers as a complex number, turned by position * base^(-2j/o)."""
  half = x.shape[1] // 2
  angle = np.arange(len(x))[:, None] * c.rope_base ** (-np.arange(half) / half)
  turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
  return np.concatenate([turned.real, turned.imag], -1)
