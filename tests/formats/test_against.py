"""The plain model that transformers is timed on, run by a Llama written in NumPy, has the logits of the model."""
import types

import exports
import numpy as np
import numpy_forward
import pytest
from experiments import FAMILIES

from mtp_jax.config import BadInput
from mtp_jax.formats import against


def language_model(changes):
  """What `plain` needs of a LanguageModel."""
  source = exports.source(changes)
  return types.SimpleNamespace(config=source.config, tokenizer=source.tokenizer, record=source.record,
                               model=exports.model_of(source))


def llama_logits(c: dict, tensors: dict, linear, ids: np.ndarray) -> np.ndarray:
  """float64[L, V] of Hugging Face's Llama or Qwen3 for one text."""
  w = {name.removesuffix('.weight'): np.float64(array) for name, array in tensors.items()}
  L, width = len(ids), c['head_dim']
  heads, groups = c['num_attention_heads'], c['num_key_value_heads']

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + c['rms_norm_eps']) * scale

  def rotate(x):  # x[L, heads, width]: the two halves of each head are turned against each other
    frequencies = c['rope_parameters']['rope_theta'] ** (-np.arange(0, width, 2) / width)
    angles = np.arange(L)[:, None, None] * frequencies
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)

  x = w['model.embed_tokens'][ids]
  for i in range(c['num_hidden_layers']):
    layer = lambda name, i=i: w[f'model.layers.{i}.{name}']
    y = norm(x, layer('input_layernorm'))
    q, k, v = ((y @ layer(f'self_attn.{name}_proj').T).reshape(L, -1, width) for name in 'qkv')
    if 'Qwen3' in c['architectures'][0]:
      q, k = norm(q, layer('self_attn.q_norm')), norm(k, layer('self_attn.k_norm'))
    q, k, v = rotate(q), rotate(k).repeat(heads // groups, 1), v.repeat(heads // groups, 1)
    scores = np.einsum('lhk,shk->hls', q, k) / np.sqrt(width)
    scores = np.exp(np.where(np.tri(L, dtype=bool), scores, -np.inf))
    attended = np.einsum('hls,shk->lhk', scores / scores.sum(-1, keepdims=True), v).reshape(L, -1)
    x = x + attended @ layer('self_attn.o_proj').T
    y = norm(x, layer('post_attention_layernorm'))
    gate = y @ layer('mlp.gate_proj').T
    x = x + (gate / (1 + np.exp(-gate)) * (y @ layer('mlp.up_proj').T)) @ layer('mlp.down_proj').T
  if linear is not None:
    x = x @ np.float64(linear).T
  return norm(x, w['model.norm']) @ w['lm_head'].T


@pytest.mark.parametrize('changes', [
    *({**family, 'layers': 5, 'futures': 3} for name, family in FAMILIES.items() if name != 'experts'),
    {'qk_norm': True, 'head_width': 10}], ids=str)
def test_the_plain_model_has_the_logits_of_future_0(changes):
  lm = language_model(changes)
  ids = np.random.default_rng(0).integers(0, lm.tokenizer.size, 13)
  expected = numpy_forward.logits(lm.model, ids)[0]
  config, tensors, generation, linear = against.plain(lm)
  np.testing.assert_allclose(llama_logits(config, tensors, linear, ids[:-1]), expected, rtol=0,
                             atol=1e-5 * np.abs(expected).max())
  assert generation['suppress_tokens'] == [256, 258, 259, 260, 261, 262, 263]  # bos, pad, and rows without a token


@pytest.mark.parametrize('changes', [{'logit_cap': 30.0}, {'dtype': 'bfloat16'}, {'experts': 4},
                                     {'attention': 'latent', 'kv_heads': 4}], ids=str)
def test_a_model_that_is_not_plain_is_refused(changes):
  with pytest.raises(BadInput, match='--against=transformers: runs plain models in float32; of this one '):
    against.plain(language_model(changes))
