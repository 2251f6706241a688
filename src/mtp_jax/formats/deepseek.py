"""deepseek_v3 and glm4_moe: experts and sequential modules, in the tensors of DeepSeek-V3
(arXiv:2412.19437).

Module k is layer N + k after the N of the trunk. deepseek_v3 has latent attention, with rotary
pairs side by side: vLLM knows no other. glm4_moe has grouped attention.
"""
from collections.abc import Mapping

from mtp_jax.config import BadInput, ModelConfig
from mtp_jax.formats.blocks import block, ends, entries, fields, no_parts, trunk
from mtp_jax.formats.format import Format
from mtp_jax.formats.tensors import Row, Tensor, tensors

MODULE = (
    Row('enorm.weight', {'embedding_norm_D': 'D'}),
    Row('hnorm.weight', {'hidden_norm_D': 'D'}),
    Row('eh_proj.weight', {'join_CD': 'D C'}),
    Row('shared_head.norm.weight', {'out_norm_D': 'D'}))
EPSILON = 1e-6  # that of transformers in the norms of what latent attention compresses, whatever rms_norm_eps

SERVING = """\
    transformers   model = transformers.AutoModelForCausalLM.from_pretrained('{folder}')
    vLLM           vllm serve {folder} --speculative-config '{{"method": "mtp", "num_speculative_tokens": 1}}'
    SGLang         python -m sglang.launch_server --model-path {folder} --speculative-algorithm NEXTN \\
                     --speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2

transformers drafts with the modules by `model.generate(ids, use_mtp=True)`, after a line that names their layers, since
it only knows those of the released model:

    transformers.{architecture}._keys_to_ignore_on_load_unexpected = [r'model\\.layers\\.({layers})\\..*']
    model = transformers.AutoModelForCausalLM.from_pretrained('{folder}')

SGLang drafts with one module.
"""


def shared_problems(c: ModelConfig) -> list[str]:
  found = no_parts(c, 'logit_cap')
  if not c.experts:
    found.append('it has no experts')
  elif c.router != 'sigmoid':
    found.append(f'affinities are not of a sigmoid (router {c.router})')
  elif not c.shared_experts:
    found.append('it has no shared experts')
  elif c.expert_groups > 1 and c.experts < 2 * c.expert_groups:
    found.append(f'its groups of experts have {c.experts // c.expert_groups}, fewer than two')
  if c.futures > 1 and c.kind != 'sequential':
    found.append(f'its futures are no sequential modules (kind {c.kind})')
  elif c.own_heads > 1 and c.independent:
    found.append("every module reads the trunk's state (module_input trunk), and readers chain them")
  if c.experts and c.futures > 1 and c.kind == 'sequential' and not c.future_experts:
    found.append('its modules have no experts (future_experts)')
  return found


def all_tensors(c: ModelConfig) -> list[Tensor]:
  table = 'embed_VD' if c.tie_embeddings else 'unembed_VD'
  copies = (Row('embed_tokens.weight', {'embed_VD': 'V D'}, copy=True),
            Row('shared_head.head.weight', {table: 'V D'}, copy=True))
  found = ends(c) + trunk(c)
  for k in range(c.own_heads):
    name = f'model.layers.{c.trunk_layers + k}.'
    found += tensors(MODULE, name, 'futures.', (k,)) + tensors(copies, name)
    found += tensors(block(c, True), name, 'futures.block.', (k,), c.experts)
  return found


def shared_entries(c: ModelConfig) -> dict:
  return {**entries(c), 'moe_intermediate_size': c.expert_width, 'n_routed_experts': c.experts,
          'num_experts_per_tok': c.experts_per_token, 'n_shared_experts': c.shared_experts,
          'n_group': c.expert_groups, 'topk_group': c.groups_per_token, 'norm_topk_prob': True,
          'routed_scaling_factor': c.expert_scale, 'scoring_func': 'sigmoid',
          'topk_method': 'noaux_tc',
          'first_k_dense_replace': c.dense_trunk_layers, 'moe_layer_freq': 1,
          'num_nextn_predict_layers': c.own_heads}


KEPT = {'scoring_func': 'sigmoid', 'topk_method': 'noaux_tc', 'norm_topk_prob': True,
        'moe_layer_freq': 1}
COUNTS = {'experts': 'n_routed_experts', 'experts_per_token': 'num_experts_per_tok',
          'shared_experts': 'n_shared_experts', 'expert_width': 'moe_intermediate_size',
          'dense_layers': 'first_k_dense_replace'}


def shared_fields(config: Mapping) -> dict:
  for key, value in KEPT.items():
    if config.get(key, value) != value:
      raise BadInput(f'{key}={config[key]!r}: models here have {value!r}')
  counts = COUNTS if 'n_routed_experts' in config else COUNTS | {'experts': 'num_local_experts'}
  for key in counts.values():
    if type(config.get(key)) is not int:
      raise BadInput(f'{key}={config.get(key)!r}: must be a whole number')
  return fields(config) | {name: config[key] for name, key in counts.items()} | {
      'router': 'sigmoid', 'expert_groups': config.get('n_group') or 1,
      'groups_per_token': config.get('topk_group') or 1,
      'expert_scale': float(config['routed_scaling_factor']),
      'futures': 1 + (config.get('num_nextn_predict_layers') or 0)}


def deepseek_problems(c: ModelConfig) -> list[str]:
  found = shared_problems(c)
  if c.attention != 'latent':
    found.append('its attention is not latent')
  if c.norm_epsilon != EPSILON:
    found.append(f'norm_epsilon={c.norm_epsilon:g} is not {EPSILON:g}, which transformers has in latent attention')
  return found


def deepseek_entries(c: ModelConfig) -> dict:
  return {'architectures': ['DeepseekV3ForCausalLM'], 'model_type': 'deepseek_v3',
          **shared_entries(c),
          'q_lora_rank': c.query_rank or None, 'kv_lora_rank': c.kv_rank,
          'qk_nope_head_dim': c.head_width,
          'qk_rope_head_dim': c.rope_width, 'v_head_dim': c.head_width, 'rope_interleave': True,
          'attention_bias': False}


def deepseek_fields(config: Mapping) -> dict:
  for key in ('kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim'):
    if type(config.get(key)) is not int:
      raise BadInput(f'{key}={config.get(key)!r}: must be a whole number')
  if config['v_head_dim'] != config['qk_nope_head_dim']:
    raise BadInput(f'v_head_dim={config["v_head_dim"]}: must be qk_nope_head_dim={config["qk_nope_head_dim"]} here')
  if config.get('rope_interleave', True) is not True or config.get('attention_bias'):
    raise BadInput('rope_interleave, attention_bias: must be true and false')
  return shared_fields(config) | {
      'attention': 'latent', 'query_rank': config.get('q_lora_rank') or 0,
      'kv_rank': config['kv_lora_rank'],
      'head_width': config['qk_nope_head_dim'], 'rope_width': config['qk_rope_head_dim'],
      'kv_heads': config['num_attention_heads']}


DEEPSEEK_V3 = Format('latent attention, experts and sequential modules', deepseek_problems,
                     all_tensors,
                     deepseek_entries, deepseek_fields, SERVING, norm_read='post_norm')


def glm_problems(c: ModelConfig) -> list[str]:
  return shared_problems(c) + no_parts(c, 'latent')


def glm_entries(c: ModelConfig) -> dict:
  found = {'architectures': ['Glm4MoeForCausalLM'], 'model_type': 'glm4_moe', **shared_entries(c),
           'head_dim': c.head_width, 'use_qk_norm': c.qk_norm, 'attention_bias': c.qkv_bias,
           'partial_rotary_factor': 1.0}
  return found | {'rope_parameters': {**found['rope_parameters'], 'partial_rotary_factor': 1.0}}


def glm_fields(config: Mapping) -> dict:
  rope = config.get('rope_parameters') or {}
  share = rope.get('partial_rotary_factor', config.get('partial_rotary_factor', 0.5))
  if share != 1:
    raise BadInput(f'partial_rotary_factor={share}: here whole heads rotate')
  return shared_fields(config) | {'qk_norm': bool(config.get('use_qk_norm', False)),
                                  'qkv_bias': bool(config.get('attention_bias', False))}


GLM4_MOE = Format('grouped attention, experts and sequential modules', glm_problems, all_tensors,
                  glm_entries,
                  glm_fields, SERVING, norm_read='post_norm')
