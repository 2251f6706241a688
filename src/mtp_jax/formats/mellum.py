"""mellum: a trunk as qwen3 has it, with one sequential module that transformers runs itself.

Mellum's blocks may be dense and attend to everything; then its trunk is that of Qwen3. transformers
5.20 or newer drafts with the module.
"""
from collections.abc import Mapping

from mtp_jax.config import BadInput, ModelConfig
from mtp_jax.formats.blocks import block, ends, entries, fields, no_parts, one_module, trunk
from mtp_jax.formats.format import Format
from mtp_jax.formats.llama import NEVER
from mtp_jax.formats.tensors import Row, Tensor, tensors

MODULE = (
    Row('mtp.pre_fc_norm_embedding.weight', {'embedding_norm_D': 'D'}),
    Row('mtp.pre_fc_norm_hidden.weight', {'hidden_norm_D': 'D'}),
    Row('mtp.fc.weight', {'join_CD': 'D C'}),
    Row('mtp.norm.weight', {'out_norm_D': 'D'}))

SERVING = """\
    transformers   model = transformers.AutoModelForCausalLM.from_pretrained('{folder}')
                   model.generate(ids, use_mtp=True)      drafts with the module; transformers 5.20 or newer
    vLLM           vllm serve {folder} --model-impl transformers \\
                     --speculative-config '{{"method": "mtp", "num_speculative_tokens": 1}}'
    SGLang         python -m sglang.launch_server --model-path {folder}      the trunk alone
"""
LAYERS = {'layer_types': 'full_attention', 'mlp_layer_types': 'dense',
          'mtp_layer_types': 'full_attention',
          'mtp_mlp_layer_types': 'dense'}


def problems(c: ModelConfig) -> list[str]:
  found = no_parts(c, *NEVER, 'qkv_bias') + one_module(c)
  if not c.qk_norm:
    found.append('queries and keys are not normed (qk_norm)')
  return found if c.futures > 1 else [*found, 'it has no module; qwen3 holds it']


def all_tensors(c: ModelConfig) -> list[Tensor]:
  return (ends(c) + trunk(c) + tensors(MODULE, '', 'futures.', (0,))
          + tensors(block(c, False), 'mtp.layers.0.', 'futures.block.', (0,)))


def all_entries(c: ModelConfig) -> dict:
  rope, shared = {'rope_type': 'default', 'rope_theta': c.rope_base}, entries(c)
  del shared['rope_scaling'], shared['rope_theta']  # would replace rope_parameters in transformers 5
  return {'architectures': ['MellumForCausalLM'], 'model_type': 'mellum', **shared,
          'head_dim': c.head_width,
          'attention_bias': False, 'sliding_window': None,
          'layer_types': ['full_attention'] * c.trunk_layers,
          'mlp_layer_types': ['dense'] * c.trunk_layers, 'num_nextn_predict_layers': 1,
          'mtp_layer_types': ['full_attention'], 'mtp_mlp_layer_types': ['dense'],
          'rope_parameters': {'full_attention': rope, 'sliding_attention': rope}}


def all_fields(config: Mapping) -> dict:
  for key, only in LAYERS.items():
    if set(config.get(key) or ()) != {only}:
      raise BadInput(f'{key}={config.get(key)!r}: all must be {only!r}')
  if config.get('attention_bias'):
    raise BadInput('attention_bias=True: this format has no biases here')
  rope = (config.get('rope_parameters') or {}).get('full_attention')
  return fields({**config, 'rope_parameters': rope}) | {'qk_norm': True, 'futures': 2}


MELLUM = Format('a dense trunk with norms of queries and keys, and one sequential module', problems,
                all_tensors,
                all_entries, all_fields, SERVING, norm_read='post_norm')
