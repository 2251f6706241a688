"""Hugging Face's Llama, Qwen2 and Qwen3, and MiMo's module, written in NumPy's float64 from their tensors."""
import numpy as np


class Llama:
  """A plain model of one text at a time.

  Args:
    config: the content of config.json. tensors: by their names.
  """

  def __init__(self, config: dict, tensors: dict):
    self.c, self.w = config, {name: np.float64(array) for name, array in tensors.items()}
    self.width = config.get('head_dim') or config['hidden_size'] // config['num_attention_heads']

  def norm(self, x, name: str):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.c['rms_norm_eps']) * self.w[f'{name}.weight']

  def linear(self, x, name: str):
    return x @ self.w[f'{name}.weight'].T + self.w.get(f'{name}.bias', 0)

  def rotated(self, x):
    """x[L, heads, width]: the two halves of each head are turned against each other."""
    frequencies = self.c['rope_parameters']['rope_theta'] ** (-np.arange(0, self.width, 2) / self.width)
    angles = np.arange(len(x))[:, None, None] * frequencies
    a, b = np.split(x, 2, -1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  def block(self, x, name: str):
    """x[L, D] after the block of this name."""
    L, group = len(x), self.c['num_attention_heads'] // self.c['num_key_value_heads']
    y = self.norm(x, f'{name}.input_layernorm')
    q, k, v = (self.linear(y, f'{name}.self_attn.{part}_proj').reshape(L, -1, self.width) for part in 'qkv')
    if f'{name}.self_attn.q_norm.weight' in self.w:
      q, k = self.norm(q, f'{name}.self_attn.q_norm'), self.norm(k, f'{name}.self_attn.k_norm')
    q, k, v = self.rotated(q), self.rotated(k).repeat(group, 1), v.repeat(group, 1)
    scores = np.einsum('lhk,shk->hls', q, k) / np.sqrt(self.width)
    scores = np.exp(np.where(np.tri(L, dtype=bool), scores, -np.inf))
    read = np.einsum('hls,shk->lhk', scores / scores.sum(-1, keepdims=True), v).reshape(L, -1)
    x = x + self.linear(read, f'{name}.self_attn.o_proj')
    y = self.norm(x, f'{name}.post_attention_layernorm')
    gate = self.linear(y, f'{name}.mlp.gate_proj')
    return x + self.linear(gate / (1 + np.exp(-gate)) * self.linear(y, f'{name}.mlp.up_proj'), f'{name}.mlp.down_proj')

  def state(self, ids):
    """float64[L, D], before the final norm."""
    x = self.w['model.embed_tokens.weight'][ids]
    for i in range(self.c['num_hidden_layers']):
      x = self.block(x, f'model.layers.{i}')
    return x

  def logits(self, state):
    """float64[L, V] of states before the final norm."""
    return self.norm(state, 'model.norm') @ self.w['lm_head.weight'].T

  def mimo_logits(self, hidden, given):
    """float64[L, V] of MiMo's module: what follows the given ids, each one after the token of its hidden state."""
    name = 'model.mtp_layers.0'
    e = self.norm(self.w['model.embed_tokens.weight'][given], f'{name}.token_layernorm')
    x = np.concatenate([self.norm(hidden, f'{name}.hidden_layernorm'), e], -1)
    x = self.block(self.linear(x, f'{name}.input_proj'), name)
    return self.norm(x, f'{name}.final_layernorm') @ self.w['lm_head.weight'].T
