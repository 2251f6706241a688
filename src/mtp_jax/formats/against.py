"""Greedy decoding by Hugging Face transformers, to time it on the same weights."""
import dataclasses
import os
import time
from collections.abc import Callable

import numpy as np

from mtp_jax.config import BadInput
from mtp_jax.formats import fitting
from mtp_jax.formats.export import arrays_of, generation_settings, settings
from mtp_jax.formats.source import of_model

PLAIN = ('llama', 'qwen3', 'qwen2')


@dataclasses.dataclass(frozen=True)
class Decoded:
  """New ids of each prompt, up to and including eos, and the seconds they took."""
  ids: list[list[int]]
  seconds: float


def plain(lm) -> tuple[dict, dict[str, np.ndarray], dict, np.ndarray | None]:
  """(config.json, tensors, generation_config.json, map) of the trunk and future 0, in memory.

  map: the matrix [D, D] of a linear head, as torch's Linear holds it; it is applied before the
    final norm, where no format has a matrix. None for every other kind of model.

  Raises:
    BadInput: no plain format holds the model, or it computes in another type than float32.
  """
  source, linear = of_model(lm), None
  c = source.model
  if c.kind == 'linear' and c.futures > 1:
    linear = np.ascontiguousarray(source.read('futures.map_Dd')[0].T)
    source = source.with_model(one_future(c))
  names = [name for name in PLAIN if not fitting.problems(name, source.model)]
  if not names or c.dtype != 'float32':
    why = '; '.join(fitting.problems('llama', source.model)) or f'it computes in {c.dtype}'
    raise BadInput(f'--against=transformers: runs plain models in float32; of this one {why}')
  chosen, arrays = fitting.FORMATS[names[0]], arrays_of(source.model)
  tensors = {tensor.name: np.array(arrays.to_theirs(tensor, source.read))
             for tensor in chosen.tensors(source.model)}
  return settings(source, chosen, 'float32'), tensors, generation_settings(source), linear


def one_future(c):
  """The config of a model of linear heads without them."""
  return dataclasses.replace(c, futures=1, head_batch=1, kind='parallel', layers=c.trunk_layers)


def transformers_decoder(lm) -> Callable[[list, int], Decoded]:
  """Greedy decoding by Hugging Face transformers on the CPU, for prompts of equal length.

  Args:
    lm: a `LanguageModel`.

  Raises:
    BadInput: transformers is not installed, or has no such model.
  """
  try:
    import torch
    import transformers
  except ImportError as error:
    raise BadInput(f"--against=transformers: {error}; pip install -e '.[transformers]'") from None
  config, tensors, generation, linear = plain(lm)
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  kind = getattr(transformers, config['architectures'][0])
  model = kind(kind.config_class(**config)).eval()
  model.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()},
                        strict=not config['tie_word_embeddings'])
  if linear is not None:
    before = torch.nn.Linear(*linear.shape[::-1], bias=False)
    before.load_state_dict({'weight': torch.from_numpy(linear)})
    model.model.norm = torch.nn.Sequential(before, model.model.norm)
  eos, suppressed = lm.tokenizer.eos, generation['suppress_tokens']

  def run(prompts: list, max_tokens: int) -> Decoded:
    ids = torch.tensor(np.stack([lm.row(prompt) for prompt in prompts])).long()
    start = time.perf_counter()
    with torch.inference_mode():
      output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                              max_new_tokens=max_tokens, suppress_tokens=suppressed)
    seconds = time.perf_counter() - start
    new = output[:, ids.shape[1]:].tolist()
    return Decoded([row[:row.index(eos) + 1] if eos in row else row for row in new], seconds)

  return run
