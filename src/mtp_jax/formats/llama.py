"""llama, qwen2, qwen3: the trunk and future 0 as a plain language model, the other futures in a
folder mtp/.

The block of future 0 is the last layer; for anticausal heads, which all stand between the trunk and
future 0, the last layers are those of all futures. Servers refuse tensors that they do not know, so
the futures' are in a folder of their own:

    mtp/model.safetensors    modules.{k}.* of sequential modules, heads.{m}.* of the block of future m

The three differ in what stands beside queries and keys: nothing, biases, or norms.
"""
from collections.abc import Mapping

from mtp_jax.config import BadInput, ModelConfig
from mtp_jax.formats.blocks import block, ends, entries, fields, no_parts, trunk, widths_agree
from mtp_jax.formats.format import Format
from mtp_jax.formats.tensors import Row, Tensor, tensors

MODULE = (
    Row('enorm.weight', {'embedding_norm_D': 'D'}),
    Row('hnorm.weight', {'hidden_norm_D': 'D'}),
    Row('eh_proj.weight', {'join_CD': 'D C'}),
    Row('norm.weight', {'out_norm_D': 'D'}))
NEVER = 'logit_cap', 'experts', 'latent', 'linear'

SERVING = """\
    transformers   transformers.AutoModelForCausalLM.from_pretrained('{folder}')
    vLLM           vllm serve {folder}
    SGLang         python -m sglang.launch_server --model-path {folder}

They decode with future 0 alone. `mtp/` holds the other futures for mtp_jax; no server reads it.
"""


def heads_in_trunk(c: ModelConfig) -> list[int]:
  """Futures whose blocks stand between the trunk and future 0, in order."""
  if c.first_own_head:
    return []
  return list(range(c.futures - 1, -1, -1)) if c.kind == 'anticausal' else [0]


def plain(c: ModelConfig, zero_bias: bool = False) -> list[Tensor]:
  """The trunk and what stands between it and future 0."""
  found = ends(c) + trunk(c, zero_bias)
  for i, m in enumerate(heads_in_trunk(c), c.trunk_layers):
    found += tensors(block(c, False, zero_bias), f'model.layers.{i}.', 'futures.', (m,))
  return found


def sidecar(c: ModelConfig) -> list[Tensor]:
  """All other futures."""
  if c.kind != 'sequential' or c.futures == 1:
    left = sorted(set(range(c.first_own_head, c.futures)) - set(heads_in_trunk(c)))
    return [tensor for m in left
            for tensor in tensors(block(c, False), f'heads.{m}.', 'futures.', (m,))]
  found = []
  for k in range(c.own_heads):
    found += tensors(MODULE, f'modules.{k}.', 'futures.', (k,))
    found += tensors(block(c, False), f'modules.{k}.', 'futures.block.', (k,))
  return found


def _entries(c: ModelConfig, architecture: str, model_type: str, **others) -> dict:
  layers = c.trunk_layers + len(heads_in_trunk(c))
  return {'architectures': [architecture], 'model_type': model_type, **entries(c),
          'num_hidden_layers': layers,
          **others}


def llama_problems(c: ModelConfig) -> list[str]:
  found = no_parts(c, *NEVER, 'qk_norm', 'qkv_bias')
  if c.width % c.heads:
    found.append(f'transformers wants width={c.width} to be a multiple of heads={c.heads}')
  return found


def llama_fields(config: Mapping) -> dict:
  if config.get('attention_bias'):
    raise BadInput('attention_bias=True: a bias after attention is no part of models here')
  return fields(config)


LLAMA = Format(
    'the trunk and future 0',
    llama_problems,
    plain,
    lambda c: _entries(c, 'LlamaForCausalLM', 'llama', head_dim=c.head_width, attention_bias=False,
                       mlp_bias=False),
    llama_fields, SERVING, sidecar)


def qwen2_problems(c: ModelConfig) -> list[str]:
  return no_parts(c, *NEVER, 'qk_norm') + widths_agree(c)


def qwen2_fields(config: Mapping) -> dict:
  return fields(config) | {'qkv_bias': True}


QWEN2 = Format(
    'the trunk and future 0, with biases of queries, keys and values, 0 where the model has none',
    qwen2_problems,
    lambda c: plain(c, zero_bias=True),
    lambda c: _entries(c, 'Qwen2ForCausalLM', 'qwen2', use_sliding_window=False,
                       sliding_window=None),
    qwen2_fields, SERVING, sidecar)


def qwen3_problems(c: ModelConfig) -> list[str]:
  found = no_parts(c, *NEVER, 'qkv_bias')
  return found if c.qk_norm else [*found, 'queries and keys are not normed (qk_norm)']


def qwen3_fields(config: Mapping) -> dict:
  return llama_fields(config) | {'qk_norm': True}


QWEN3 = Format(
    'the trunk and future 0, with norms of queries and keys',
    qwen3_problems,
    plain,
    lambda c: _entries(c, 'Qwen3ForCausalLM', 'qwen3', head_dim=c.head_width, attention_bias=False,
                       use_sliding_window=False, sliding_window=None),
    qwen3_fields, SERVING, sidecar)
