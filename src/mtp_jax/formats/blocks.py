"""Tables of a block in the names of Hugging Face, and the entries of config.json that formats
share.

torch's Linear holds the transpose of a matrix here: [outputs, inputs]. Rotary pairs are the two
halves of a head, as here, but for latent attention, whose pairs are neighbours.
"""
from collections.abc import Mapping

from mtp_jax.config import BadInput, ModelConfig
from mtp_jax.formats.tensors import Row, Tensor, tensors

GROUPED = (
    Row('self_attn.q_proj.weight', {'attention.wq_DHK': 'HK D'}),
    Row('self_attn.k_proj.weight', {'attention.wk_DGK': 'GK D'}),
    Row('self_attn.v_proj.weight', {'attention.wv_DGK': 'GK D'}),
    Row('self_attn.o_proj.weight', {'attention.wo_HKD': 'D HK'}))
QK_NORM = (
    Row('self_attn.q_norm.weight', {'attention.q_norm_K': 'K'}),
    Row('self_attn.k_norm.weight', {'attention.k_norm_K': 'K'}))
BIAS = (
    Row('self_attn.q_proj.bias', {'attention.q_bias_HK': 'HK'}),
    Row('self_attn.k_proj.bias', {'attention.k_bias_GK': 'GK'}),
    Row('self_attn.v_proj.bias', {'attention.v_bias_GK': 'GK'}))
NO_BIAS = (
    Row('self_attn.q_proj.bias', {'attention.wq_DHK': 'HK'}, zeros=True),
    Row('self_attn.k_proj.bias', {'attention.wk_DGK': 'GK'}, zeros=True),
    Row('self_attn.v_proj.bias', {'attention.wv_DGK': 'GK'}, zeros=True))
QUERIES = (Row('self_attn.q_proj.weight', {'attention.wq_DHJ': 'H~J D'}),)
COMPRESSED_QUERIES = (
    Row('self_attn.q_a_proj.weight', {'attention.q_down_DU': 'U D'}),
    Row('self_attn.q_a_layernorm.weight', {'attention.q_norm_U': 'U'}),
    Row('self_attn.q_b_proj.weight', {'attention.q_up_UHJ': 'H~J U'}))
LATENT = (
    Row('self_attn.kv_a_proj_with_mqa.weight', {'attention.kv_down_DA': 'A D',
                                                'attention.k_rotary_Do': '~o D'}),
    Row('self_attn.kv_a_layernorm.weight', {'attention.kv_norm_A': 'A'}),
    Row('self_attn.kv_b_proj.weight', {'attention.k_up_AHK': 'HK A', 'attention.v_up_AHK': 'HK A'},
        join=1),
    Row('self_attn.o_proj.weight', {'attention.wo_HKD': 'D HK'}))
NORMS = (
    Row('input_layernorm.weight', {'attention_norm_D': 'D'}),
    Row('post_attention_layernorm.weight', {'feed_forward_norm_D': 'D'}))
DENSE = (
    Row('mlp.gate_proj.weight', {'feed_forward.gate_DF': 'F D'}),
    Row('mlp.up_proj.weight', {'feed_forward.up_DF': 'F D'}),
    Row('mlp.down_proj.weight', {'feed_forward.down_FD': 'D F'}))
EXPERTS = (
    Row('mlp.gate.weight', {'feed_forward.router_DE': 'E D'}),
    Row('mlp.gate.e_score_correction_bias', {'feed_forward.bias_E': 'E'}, float32=True),
    Row('mlp.experts.{e}.gate_proj.weight', {'feed_forward.gate_EDW': 'W D'}),
    Row('mlp.experts.{e}.up_proj.weight', {'feed_forward.up_EDW': 'W D'}),
    Row('mlp.experts.{e}.down_proj.weight', {'feed_forward.down_EWD': 'D W'}),
    Row('mlp.shared_experts.gate_proj.weight', {'feed_forward.shared.gate_DF': 'F D'}),
    Row('mlp.shared_experts.up_proj.weight', {'feed_forward.shared.up_DF': 'F D'}),
    Row('mlp.shared_experts.down_proj.weight', {'feed_forward.shared.down_FD': 'D F'}))

ENDS = (
    Row('model.embed_tokens.weight', {'embed_VD': 'V D'}),
    Row('model.norm.weight', {'final_norm_D': 'D'}))
UNEMBEDDING = (Row('lm_head.weight', {'unembed_VD': 'V D'}),)


def block(c: ModelConfig, experts: bool, zero_bias: bool = False) -> tuple[Row, ...]:
  """The table of a block.

  Args:
    zero_bias: queries, keys and values have biases, of zeros where the model has none.
  """
  if c.attention == 'latent':
    attention = (COMPRESSED_QUERIES if c.query_rank else QUERIES) + LATENT
  else:
    attention = GROUPED + (QK_NORM if c.qk_norm else ()) + (BIAS if c.qkv_bias else NO_BIAS if zero_bias else ())
  return NORMS + attention + (EXPERTS if experts else DENSE)


def trunk(c: ModelConfig, zero_bias: bool = False, name: str = 'model.layers.') -> list[Tensor]:
  """The tensors of the trunk's blocks; layer i is named NAMEi."""
  found = []
  for i in range(c.trunk_layers):
    experts = i >= c.dense_trunk_layers
    stack, index = ('expert_trunk', i - c.dense_trunk_layers) if experts else ('trunk', i)
    found += tensors(block(c, experts, zero_bias), f'{name}{i}.', f'{stack}.', (index,), c.experts)
  return found


def ends(c: ModelConfig) -> list[Tensor]:
  """The embedding, the final norm and, unless it is the embedding, the unembedding."""
  return tensors(ENDS if c.tie_embeddings else ENDS + UNEMBEDDING)


def no_parts(c: ModelConfig, *parts: str) -> list[str]:
  """What keeps a format from holding a model that has one of these parts, in words."""
  reasons = {
      'logit_cap': (c.logit_cap, 'logits are capped (logit_cap)'),
      'qk_norm': (c.qk_norm, 'queries and keys are normed (qk_norm)'),
      'qkv_bias': (c.qkv_bias, 'queries, keys and values have biases (qkv_bias)'),
      'experts': (c.experts, 'it has experts'),
      'latent': (c.attention == 'latent', 'its attention is latent'),
      'linear': (c.kind == 'linear' and c.futures > 1,
                 'future 0 is a matrix before the final norm (kind linear)'),
      'tie_embeddings': (c.tie_embeddings, 'embedding and unembedding are one (tie_embeddings)')}
  return [why for present, why in (reasons[part] for part in parts) if present]


def one_module(c: ModelConfig) -> list[str]:
  """What keeps a format of one sequential module from holding a model; none of one future."""
  if c.futures == 1:
    return []
  if c.kind != 'sequential':
    return [f'its futures are no sequential modules (kind {c.kind})']
  return [] if c.own_heads == 1 else [f'it has {c.own_heads} modules, not one; share_modules=True makes them one']


def widths_agree(c: ModelConfig) -> list[str]:
  """What keeps a format without a width of heads from holding a model."""
  if c.head_width * c.heads == c.width:
    return []
  return [f'head_width must be width / heads; {c.heads} heads of {c.head_width} are not {c.width}']


def entries(c: ModelConfig) -> dict:
  """What config.json holds in all formats. Rotary embeddings stand in it twice: in transformers 4
  rope_theta counts, in 5 rope_parameters.
  """
  rope = {'rope_type': 'default', 'rope_theta': c.rope_base}
  return {'vocab_size': c.vocab, 'hidden_size': c.width, 'num_hidden_layers': c.trunk_layers,
          'num_attention_heads': c.heads, 'num_key_value_heads': c.kv_heads,
          'intermediate_size': c.feed_forward,
          'hidden_act': 'silu', 'rms_norm_eps': c.norm_epsilon, 'rope_theta': c.rope_base,
          'rope_scaling': None,
          'rope_parameters': rope, 'tie_word_embeddings': c.tie_embeddings,
          'initializer_range': 0.02,
          'attention_dropout': 0.0, 'use_cache': True}


REQUIRED = {'vocab': 'vocab_size', 'width': 'hidden_size', 'layers': 'num_hidden_layers',
            'heads': 'num_attention_heads', 'feed_forward': 'intermediate_size'}
# other values are no model here
KEPT = {'hidden_act': ('silu', 'swish'), 'mlp_bias': (False,), 'use_sliding_window': (False,),
        'partial_rotary_factor': (1, 1.0), 'attention_dropout': (0, 0.0)}


def fields(config: Mapping) -> dict:
  """The fields of `ModelConfig` that every config.json holds.

  Raises:
    BadInput: an entry is missing, or there is no such model here.
  """
  for key in REQUIRED.values():
    if type(config.get(key)) is not int:
      raise BadInput(f'{key}={config.get(key)!r}: must be a whole number')
  for key, values in KEPT.items():
    if config.get(key, values[0]) not in (*values, None):
      raise BadInput(f'{key}={config[key]!r}: models here have {values[0]!r}')
  heads = config['num_attention_heads']
  return {name: config[key] for name, key in REQUIRED.items()} | {
      'kv_heads': config.get('num_key_value_heads') or heads,
      'head_width': config.get('head_dim') or config['hidden_size'] // heads,
      'norm_epsilon': float(config.get('rms_norm_eps', 1e-6)), 'rope_base': rope_base(config),
      'tie_embeddings': bool(config.get('tie_word_embeddings', False)),
      'kind': 'sequential', 'placement': 'appended', 'futures': 1}


def rope_base(config: Mapping) -> float:
  """The base of the rotary embedding, from the entries of transformers 4 or 5. Raises BadInput for
  scaled ones.
  """
  rope = dict(config.get('rope_parameters') or {})
  scaling = config.get('rope_scaling') or rope
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  if kind != 'default':
    raise BadInput(f'rope_scaling={kind}: rotary embeddings are not scaled here')
  if rope.get('partial_rotary_factor', 1) != 1:
    raise BadInput(f'partial_rotary_factor={rope["partial_rotary_factor"]}: here whole heads rotate')
  return float(rope.get('rope_theta') or config.get('rope_theta') or 10_000.0)
