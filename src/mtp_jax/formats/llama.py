"""The weights of future 0, written as Hugging Face's Llama holds them.

    llama = export(lm)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama.config))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in llama.weights.items()})

Here a matrix has its input axes first: q_HK = x_D wq_DHK. torch's Linear holds the transpose, [H*K,
D]. Both sides rotate the two halves of a query or key against each other (rotary embedding,
arXiv:2104.09864).
"""
import dataclasses
import os
import time
from collections.abc import Callable

import numpy as np

from mtp_jax.config import BadInput
from mtp_jax.lm import LanguageModel


@dataclasses.dataclass(frozen=True)
class Llama:
  """A model in the format of Hugging Face's Llama.

  config: arguments of transformers.LlamaConfig. weights: float32 arrays by the names of its state
    dict.
  map: the matrix [D, D] of a linear head, as torch's Linear holds it; it is applied before the
  final norm, where Llama has no matrix. None for every other kind of model.
  """
  config: dict
  weights: dict[str, np.ndarray]
  map: np.ndarray | None


def export(lm: LanguageModel) -> Llama:
  """The trunk and future 0 of a model in the format of Hugging Face's Llama.

  Raises:
    BadInput: the model has parts that Llama has not.
  """
  c, decoder, tokenizer = lm.config.model, lm.decoder, lm.tokenizer
  if c.qk_norm or c.logit_cap or c.experts or c.attention != 'grouped' or c.dtype != 'float32':
    raise BadInput('--against=transformers: its Llama has no qk_norm, no logit_cap, no experts and no latent '
                   'attention, and is compared in float32')
  linear_head = c.kind == 'linear' and c.futures > 1
  blocks = [*decoder.layers, *(decoder.head(m) for m in decoder.heads_in_forward if c.kind != 'linear')]
  weights = {'model.embed_tokens.weight': np.array(decoder.embed_VD[:tokenizer.size]),
             'model.norm.weight': np.array(decoder.final_norm_D),
             'lm_head.weight': np.array(decoder.unembed_DV.T)}
  for i, block in enumerate(blocks):
    weights |= {f'model.layers.{i}.{name}.weight': array
                for name, array in _block(block, c).items()}
  config = {'vocab_size': tokenizer.size, 'hidden_size': c.width,
            'intermediate_size': c.feed_forward,
            'num_hidden_layers': len(blocks), 'num_attention_heads': c.heads,
            'num_key_value_heads': c.kv_heads,
            'head_dim': c.head_width, 'rms_norm_eps': c.norm_epsilon,
            'max_position_embeddings': 1 << 20,
            'tie_word_embeddings': False,
            'rope_parameters': {'rope_type': 'default', 'rope_theta': c.rope_base},
            'bos_token_id': tokenizer.bos, 'eos_token_id': tokenizer.eos,
            'pad_token_id': tokenizer.pad}
  return Llama(config, weights, _linear(decoder.head(0).map_Dd[...], c.width) if linear_head
               else None)


@dataclasses.dataclass(frozen=True)
class Decoded:
  """New ids of each prompt, up to and including eos, and the seconds they took."""
  ids: list[list[int]]
  seconds: float


def transformers_decoder(lm: LanguageModel) -> Callable[[list, int], Decoded]:
  """Greedy decoding by Hugging Face transformers on the CPU, for prompts of equal length.

  Raises:
    BadInput: transformers is not installed, or its Llama cannot hold the model.
  """
  try:
    import torch
    import transformers
  except ImportError as error:
    raise BadInput(f"--against=transformers: {error}; pip install -e '.[transformers]'") from None
  exported = export(lm)
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**exported.config)).eval()
  model.load_state_dict({name: torch.from_numpy(array) for name, array in exported.weights.items()})
  if exported.map is not None:
    linear = torch.nn.Linear(*exported.map.shape[::-1], bias=False)
    linear.load_state_dict({'weight': torch.from_numpy(exported.map)})
    model.model.norm = torch.nn.Sequential(linear, model.model.norm)
  bos, eos, pad = lm.tokenizer.bos, lm.tokenizer.eos, lm.tokenizer.pad

  def run(prompts: list, max_tokens: int) -> Decoded:
    ids = torch.tensor(np.stack([lm.row(prompt) for prompt in prompts])).long()
    start = time.perf_counter()
    with torch.inference_mode():
      output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                              max_new_tokens=max_tokens, suppress_tokens=[bos, pad])
    seconds = time.perf_counter() - start
    new = output[:, ids.shape[1]:].tolist()
    return Decoded([row[:row.index(eos) + 1] if eos in row else row for row in new], seconds)

  return run


def _block(block, c) -> dict[str, np.ndarray]:
  return {'input_layernorm': np.array(block.attention_norm_D[...]),
          'post_attention_layernorm': np.array(block.feed_forward_norm_D[...]),
          'self_attn.q_proj': _linear(block.attention.wq_DHK[...], c.width),
          'self_attn.k_proj': _linear(block.attention.wk_DGK[...], c.width),
          'self_attn.v_proj': _linear(block.attention.wv_DGK[...], c.width),
          'self_attn.o_proj': _linear(block.attention.wo_HKD[...], c.heads * c.head_width),
          'mlp.gate_proj': _linear(block.feed_forward.gate_DF[...], c.width),
          'mlp.up_proj': _linear(block.feed_forward.up_DF[...], c.width),
          'mlp.down_proj': _linear(block.feed_forward.down_FD[...], c.feed_forward)}


def _linear(w, inputs: int) -> np.ndarray:
  """A matrix as torch's Linear holds it: [outputs, inputs]."""
  return np.array(w).reshape(inputs, -1).T.copy()
