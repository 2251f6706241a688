"""Tiny random models for each format, as what `export` reads."""
import functools

import jax
import numpy as np

from mtp_jax import tokenizer
from mtp_jax.checkpoint import store
from mtp_jax.config import Config, DataConfig, ModelConfig
from mtp_jax.formats.export import Source
from mtp_jax.model.model import Model

SIZES = {'vocab': 264, 'width': 24, 'layers': 3, 'heads': 4, 'kv_heads': 2, 'head_width': 6, 'feed_forward': 20,
         'futures': 2, 'rope_base': 5000.0}
MODULES = {'kind': 'sequential', 'placement': 'appended'}
EXPERTS = {'experts': 8, 'experts_per_token': 3, 'expert_width': 12, 'shared_experts': 2, 'dense_layers': 1,
           'expert_scale': 2.5}
LATENT = {'attention': 'latent', 'kv_heads': 4, 'kv_rank': 14, 'query_rank': 10, 'rope_width': 4}
GROUPS = {'expert_groups': 4, 'groups_per_token': 2}

# name of a case: (format, changes of SIZES)
CASES = {
    'llama': ('llama', {'layers': 4, 'futures': 3, 'head_width': 8}),
    'llama of one future': ('llama', {'futures': 1, 'tie_embeddings': True}),
    'llama, causal': ('llama', {'kind': 'causal', 'layers': 5, 'futures': 3}),
    'llama, anticausal': ('llama', {'kind': 'anticausal', 'layers': 5, 'futures': 3}),
    'llama, modules': ('llama', {**MODULES, 'futures': 3}),
    'llama, a shared module': ('llama', {'kind': 'sequential', 'share_modules': True, 'futures': 4}),
    'qwen2': ('qwen2', {'layers': 4, 'qkv_bias': True, 'norm_epsilon': 1e-5}),
    'qwen2 without biases': ('qwen2', {'futures': 1}),
    'qwen3': ('qwen3', {'qk_norm': True, 'head_width': 10}),
    'qwen3, tied': ('qwen3', {'qk_norm': True, 'tie_embeddings': True, **MODULES}),
    'mimo': ('mimo', {**MODULES, 'hidden_input': 'post_norm', 'qkv_bias': True}),
    'mimo without biases': ('mimo', {**MODULES, 'share_modules': True, 'futures': 4}),
    'mellum': ('mellum', {**MODULES, 'qk_norm': True, 'head_width': 10}),
    'mellum, tied': ('mellum', {**MODULES, 'qk_norm': True, 'tie_embeddings': True}),
    'deepseek_v3': ('deepseek_v3', {**MODULES, **EXPERTS, **LATENT, **GROUPS, 'futures': 3}),
    'deepseek_v3, plain queries': ('deepseek_v3', {**MODULES, **EXPERTS, **LATENT, 'query_rank': 0, 'dense_layers': 2}),
    'deepseek_v3 of one future': ('deepseek_v3', {**MODULES, **EXPERTS, **LATENT, 'futures': 1}),
    'glm4_moe': ('glm4_moe', {**MODULES, **EXPERTS, 'qk_norm': True, 'head_width': 10}),
    'glm4_moe with biases': ('glm4_moe', {**MODULES, **EXPERTS, **GROUPS, 'qkv_bias': True, 'futures': 3}),
    'meta': ('meta', {'layers': 5, 'futures': 3}),
}


def model_config(changes) -> ModelConfig:
  return ModelConfig(**SIZES | dict(changes))


def random_arrays(c: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
  """All arrays by name, norms and biases included; matrices keep the size of what they multiply."""
  rng, shapes = np.random.default_rng(seed), jax.eval_shape(functools.partial(Model, c), jax.random.key(0))

  def fill(name: str, shape) -> np.ndarray:
    own = name.rpartition('_')[2]
    if 'norm' in name:
      return 1 + 0.3 * rng.standard_normal(shape)
    if own in ('VD', 'E', 'HK', 'GK') or 'bias' in name:
      return 0.3 * rng.standard_normal(shape)
    inputs = {'HKD': c.heads * c.head_width}.get(own) or shape[len(shape) - len(own) + (own[0] == 'E')]
    return rng.standard_normal(shape) * inputs**-0.5

  return {name: fill(name, x.shape).astype(np.float32) for name, x in store.by_path(shapes).items()}


def source(changes, seed: int = 0, length: int = 64) -> Source:
  """A random model with bytes for tokens."""
  c, tokens = model_config(changes), tokenizer.load('bytes')
  arrays = random_arrays(c, seed)
  record = {'step': 7, 'tokenizer': tokens.digest, 'identity': {}}
  return Source(Config(model=c, data=DataConfig(length=length)), tokens, record, arrays.__getitem__)


def model_of(source: Source) -> Model:
  """The model of these arrays, which stay NumPy's."""
  shapes = jax.eval_shape(functools.partial(Model, source.model), jax.random.key(0))
  paths = jax.tree_util.tree_flatten_with_path(shapes)[0]
  names = list(store.by_path(shapes))
  assert len(paths) == len(names)
  return jax.tree.unflatten(jax.tree.structure(shapes), [source.read(name) for name in names])


def arrays_of(lm) -> dict[str, np.ndarray]:
  """The arrays of a `LanguageModel`, by name."""
  return {name: np.asarray(x) for name, x in store.by_path(lm.model).items()}
