"""mimo: a dense trunk with one sequential module, in the tensors of MiMo-7B (arXiv:2505.07608).

Its config.json is of type qwen2, so transformers loads the trunk; vLLM and SGLang take MiMo from
`architectures`. The module's matrix has the state first and the embedding second. Biases of
queries, keys and values are always there: vLLM would leave missing ones uninitialised. vLLM gives
the module the trunk's state before the final norm, as MiMo was trained, SGLang the one after it.
"""
from collections.abc import Mapping

from mtp_jax.config import ModelConfig
from mtp_jax.formats.blocks import block, ends, entries, no_parts, one_module, trunk, widths_agree
from mtp_jax.formats.format import Format
from mtp_jax.formats.llama import NEVER, qwen2_fields
from mtp_jax.formats.tensors import Row, Tensor, tensors

MODULE = (
    Row('token_layernorm.weight', {'embedding_norm_D': 'D'}),
    Row('hidden_layernorm.weight', {'hidden_norm_D': 'D'}),
    Row('input_proj.weight', {'join_CD': 'D /C'}),
    Row('final_layernorm.weight', {'out_norm_D': 'D'}))

SERVING = """\
    transformers   transformers.AutoModelForCausalLM.from_pretrained('{folder}')
    vLLM           vllm serve {folder} --speculative-config '{{"method": "mtp", "num_speculative_tokens": 1}}'
    SGLang         python -m sglang.launch_server --model-path {folder} --speculative-algorithm NEXTN \\
                     --speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2 \\
                     --speculative-draft-model-path {folder}

transformers loads the trunk as Qwen2, and tells that the tensors of the module are not used. vLLM and SGLang draft one
token with the module.
"""


def problems(c: ModelConfig) -> list[str]:
  found = no_parts(c, *NEVER, 'qk_norm') + widths_agree(c) + one_module(c)
  return found if c.futures > 1 else [*found, 'it has no module; qwen2 holds it']


def all_tensors(c: ModelConfig) -> list[Tensor]:
  name = 'model.mtp_layers.0.'
  return (ends(c) + trunk(c, zero_bias=True) + tensors(MODULE, name, 'futures.', (0,))
          + tensors(block(c, False, zero_bias=True), name, 'futures.block.', (0,)))


def all_entries(c: ModelConfig) -> dict:
  return {'architectures': ['MiMoForCausalLM'], 'model_type': 'qwen2', **entries(c),
          'attention_bias': True,
          'use_sliding_window': False, 'sliding_window': None, 'num_nextn_predict_layers': 1}


def fields(config: Mapping) -> dict:
  return qwen2_fields(config) | {'futures': 2, 'hidden_input': 'pre_norm'}


MIMO = Format('a dense trunk and one sequential module', problems, all_tensors, all_entries, fields,
              SERVING,
              norm_read='either')
