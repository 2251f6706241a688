"""formats/llama."""
import os
import time
import typing
from collections.abc import Callable

import numpy as np

pass
from mtp_jax.config import BadInput
from mtp_jax.lm import LanguageModel


class _Theirs(typing.NamedTuple):
  ids: list[list[int]]
  seconds: float


def _transformers(lm: LanguageModel) -> Callable[[list, int], _Theirs]:
  """Greedy decoding of the same weights by Hugging Face transformers, on the CPU, of prompts of equal length.

  Raises:
    BadInput: it is not installed, or the model is none that its Llama can be.
  """
  try:
    import torch
    import transformers
  except ImportError as error:
    raise BadInput(f"--against=transformers: {error}; pip install -e '.[transformers]'") from None
  c, decoder = lm.config.model, lm.decoder
  if c.qk_norm or c.logit_cap or c.dtype != 'float32':
    raise BadInput('--against=transformers: its Llama has no qk_norm and no logit_cap, and is compared in float32')
  layers = [*decoder.layers, *(decoder.head(m) for m in decoder.running if c.kind != 'linear')]
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=lm.tokenizer.size, hidden_size=c.width, intermediate_size=c.feed_forward, num_hidden_layers=len(layers), num_attention_heads=c.heads,
      num_key_value_heads=c.kv_heads, head_dim=c.head_width, rms_norm_eps=c.norm_epsilon, max_position_embeddings=1 << 20, tie_word_embeddings=False,
      rope_parameters={'rope_type': 'default', 'rope_theta': c.rope_base}, bos_token_id=lm.tokenizer.bos, eos_token_id=lm.tokenizer.eos,
      pad_token_id=lm.tokenizer.pad)).eval()
  tensor = lambda x: torch.from_numpy(np.array(x))
  flat = lambda x, rows: tensor(np.asarray(x).reshape(rows, -1).T)
  weights = {'model.embed_tokens.weight': tensor(decoder.embed_VD[:lm.tokenizer.size]), 'model.norm.weight': tensor(decoder.final_norm_D),
             'lm_head.weight': tensor(decoder.unembed_DV.T)}
  for i, block in enumerate(layers):
    own = {'input_layernorm': tensor(block.attention_norm_D[...]), 'post_attention_layernorm': tensor(block.mlp_norm_D[...]),
           'self_attn.q_proj': flat(block.wq_DHK[...], c.width), 'self_attn.k_proj': flat(block.wk_DGK[...], c.width),
           'self_attn.v_proj': flat(block.wv_DGK[...], c.width), 'self_attn.o_proj': flat(block.wo_HKD[...], c.heads * c.head_width),
           'mlp.gate_proj': flat(block.gate_DF[...], c.width), 'mlp.up_proj': flat(block.up_DF[...], c.width),
           'mlp.down_proj': flat(block.down_FD[...], c.feed_forward)}
    weights |= {f'model.layers.{i}.{name}.weight': value for name, value in own.items()}
  llama.load_state_dict(weights)
  if c.kind == 'linear' and c.futures > 1:
    linear = torch.nn.Linear(c.width, c.width, bias=False)
    linear.load_state_dict({'weight': flat(decoder.head(0).map_Dd[...], c.width)})
    llama.model.norm = torch.nn.Sequential(linear, llama.model.norm)

  def run(prompts, max_tokens):
    ids = torch.tensor(np.stack([lm.row(prompt) for prompt in prompts])).long()
    start = time.perf_counter()
    with torch.inference_mode():
      out = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
                           suppress_tokens=[lm.tokenizer.bos, lm.tokenizer.pad])
    seconds = time.perf_counter() - start
    found = out[:, ids.shape[1]:].tolist()
    return _Theirs([row[:row.index(lm.tokenizer.eos) + 1] if lm.tokenizer.eos in row else row for row in found], seconds)

  return run
