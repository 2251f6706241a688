"""The plain model that transformers is timed on, run by a Llama written in NumPy, has the logits of the model."""
import types

import exports
import numpy as np
import numpy_forward
import pytest
from experiments import FAMILIES
from plain_llama import Llama

from mtp_jax.config import BadInput
from mtp_jax.formats import against


def language_model(changes):
  """What `plain` needs of a LanguageModel."""
  source = exports.source(changes)
  return types.SimpleNamespace(config=source.config, tokenizer=source.tokenizer, record=source.record,
                               model=exports.model_of(source))


@pytest.mark.parametrize('changes', [
    *({**family, 'layers': 5, 'futures': 3} for name, family in FAMILIES.items() if name != 'experts'),
    {'qk_norm': True, 'head_width': 10}], ids=str)
def test_the_plain_model_has_the_logits_of_future_0(changes):
  lm = language_model(changes)
  ids = np.random.default_rng(0).integers(0, lm.tokenizer.size, 13)
  expected = numpy_forward.logits(lm.model, ids)[0]
  config, tensors, generation, linear = against.plain(lm)
  llama = Llama(config, tensors)
  state = llama.state(ids[:-1])
  found = llama.logits(state if linear is None else state @ np.float64(linear).T)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  assert generation['suppress_tokens'] == [256, 258, 259, 260, 261, 262, 263]  # bos, pad, and rows without a token


@pytest.mark.parametrize('changes', [{'logit_cap': 30.0}, {'dtype': 'bfloat16'}, {'experts': 4},
                                     {'attention': 'latent', 'kv_heads': 4}], ids=str)
def test_a_model_that_is_not_plain_is_refused(changes):
  with pytest.raises(BadInput, match='--against=transformers: runs plain models in float32; of this one '):
    against.plain(language_model(changes))
