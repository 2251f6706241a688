"""The exported weights, run by a Llama written in NumPy, give the logits of the model."""
import types

import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import tokenizer
from mtp_jax.config import BadInput, Config, ModelConfig
from mtp_jax.decode.decoder import Decoder
from mtp_jax.formats import llama

SIZES = {'vocab': 264, 'width': 16, 'layers': 4, 'heads': 4, 'kv_heads': 2, 'head_width': 8,
         'feed_forward': 20,
         'futures': 3}


def model(random_model, **changes):
  """What `export` needs of a LanguageModel."""
  c, tokens = ModelConfig(**SIZES | changes), tokenizer.load('bytes')
  decoder = Decoder.of(random_model(c), tokens.size)
  return types.SimpleNamespace(config=Config(c), decoder=decoder, tokenizer=tokens)


def logits(exported: llama.Llama, ids: np.ndarray) -> np.ndarray:
  """float64[L, V] of Hugging Face's Llama for one text."""
  c, w = exported.config, {name.removesuffix('.weight'): np.float64(array)
                           for name, array in exported.weights.items()}
  L, width = len(ids), c['head_dim']
  heads, groups = c['num_attention_heads'], c['num_key_value_heads']

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + c['rms_norm_eps']) * scale

  def rotate(x):  # x[L, heads, width]: the two halves of each head are turned against each other
    frequencies = c['rope_parameters']['rope_theta'] ** (-np.arange(0, width, 2) / width)
    angles = np.arange(L)[:, None, None] * frequencies
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles)
                           + a * np.sin(angles)], -1)

  x = w['model.embed_tokens'][ids]
  for i in range(c['num_hidden_layers']):
    layer = lambda name, i=i: w[f'model.layers.{i}.{name}']
    y = norm(x, layer('input_layernorm'))
    q, k, v = ((y @ layer(f'self_attn.{name}_proj').T).reshape(L, -1, width) for name in 'qkv')
    q, k, v = rotate(q), rotate(k).repeat(heads // groups, 1), v.repeat(heads // groups, 1)
    scores = np.einsum('lhk,shk->hls', q, k) / np.sqrt(width)
    scores = np.exp(np.where(np.tri(L, dtype=bool), scores, -np.inf))
    attended = np.einsum('hls,shk->lhk', scores / scores.sum(-1, keepdims=True), v).reshape(L, -1)
    x = x + attended @ layer('self_attn.o_proj').T
    y = norm(x, layer('post_attention_layernorm'))
    gate = y @ layer('mlp.gate_proj').T
    x = x + (gate / (1 + np.exp(-gate)) * (y @ layer('mlp.up_proj').T)) @ layer('mlp.down_proj').T
  if exported.map is not None:
    x = x @ np.float64(exported.map).T
  return norm(x, w['model.norm']) @ w['lm_head'].T


def test_the_exported_llama_has_the_logits_of_the_model(random_model, variant):
  """For every kind of model: the trunk and future 0, in float64 against float32."""
  if 'experts' in variant:
    pytest.skip('a Llama has no experts; export refuses them')
  lm = model(random_model, **variant)
  ids = np.random.default_rng(0).integers(0, lm.tokenizer.size, 12)
  tokens_Bi = jnp.asarray(ids[None], jnp.int32)
  forward, _ = lm.decoder.forward(tokens_Bi, jnp.arange(12)[None], lm.decoder.caches(1, 12))
  expected = np.asarray(lm.decoder.logits(forward.next_BiD))[0]
  np.testing.assert_allclose(logits(llama.export(lm), ids), expected, rtol=0,
                             atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize('changes', [{'qk_norm': True}, {'logit_cap': 30.0}, {'dtype': 'bfloat16'},
                                     {'experts': 4}, {'attention': 'latent', 'kv_heads': 4}],
                         ids=str)
def test_a_model_that_llama_cannot_hold_is_refused(random_model, changes):
  with pytest.raises(BadInput,
                     match='its Llama has no qk_norm, no logit_cap, no experts and no latent attention, and is '
                           'compared in float32'):
    llama.export(model(random_model, **changes))


def test_every_array_is_float32_and_of_the_size_that_the_config_says(random_model):
  exported = llama.export(model(random_model))
  assert all(array.dtype == np.float32 and array.flags.c_contiguous
             for array in exported.weights.values())
  assert exported.weights['model.layers.0.self_attn.k_proj.weight'].shape == (2 * 8, 16)
  assert len(exported.weights) == 3 + 9 * exported.config['num_hidden_layers']
