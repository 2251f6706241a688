"""Exports in Hugging Face transformers, on the CPU: the logits of every future it runs, and its greedy text."""
import os

import exports
import numpy as np
import numpy_forward
import pytest

from mtp_jax.formats import against
from mtp_jax.formats.export import export

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
os.environ['HF_HUB_DISABLE_PROGRESS_BARS'] = '1'
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings('ignore')  # those of other packages

CLOSE = 2e-5  # float32 against float64, of logits below 10
L = 16


def exported(folder, case: str, **options):
  """(the source, the model in transformers)"""
  name, changes = exports.CASES[case]
  source = exports.source(changes)
  export(source, name, folder / 'out', **options)
  config = transformers.AutoConfig.from_pretrained(folder / 'out')
  kind = getattr(transformers, config.architectures[0], transformers.Qwen2ForCausalLM)
  c = source.model
  if name in ('deepseek_v3', 'glm4_moe'):  # the line of the model card
    layers = '|'.join(str(c.trunk_layers + k) for k in range(c.own_heads))
    assert rf"{kind.__name__}._keys_to_ignore_on_load_unexpected = [r'model\.layers\.({layers})\..*']" in (
        folder / 'out' / 'README.md').read_text()
    kind._keys_to_ignore_on_load_unexpected = [rf'model\.layers\.({layers})\..*']
  return source, kind.from_pretrained(folder / 'out').eval()


def prompt(n: int = L) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, n)


@pytest.mark.parametrize('case', [case for case in exports.CASES if case != 'meta'])
def test_logits_in_transformers_are_those_of_the_model(tmp_path, case):
  source, model = exported(tmp_path, case)
  ids = prompt(L + 1)
  ours = numpy_forward.logits(exports.model_of(source), ids)
  with torch.inference_mode():
    output = model(torch.tensor(ids[None, :L]), output_hidden_states=True)
    assert np.abs(output.logits[0].numpy() - ours[0]).max() < CLOSE
    if source.model.futures == 1 or exports.CASES[case][0] not in ('mellum', 'deepseek_v3', 'glm4_moe'):
      return
    modules, state = transformers.modeling_layers.MtpModel.from_pretrained(model).eval(), output.hidden_states[-1]
    for k in range(1, source.model.futures):
      n = L + 1 - k
      given, positions = torch.tensor(ids[None, k:k + n]), torch.arange(k, k + n)[None]
      state = modules.forward_layer(k - 1, state[:, :n], positions, None, input_ids=given)
      assert np.abs(modules._project_to_logits(state)[0].numpy() - ours[k][:n]).max() < CLOSE


@pytest.mark.parametrize('case', ['mellum', 'deepseek_v3', 'glm4_moe with biases'])
def test_drafting_in_transformers_changes_no_token_of_greedy_text(tmp_path, case):
  _, model = exported(tmp_path, case)
  ids = torch.tensor([[256, *prompt()]])
  plain, drafted = (model.generate(ids, max_new_tokens=24, use_mtp=use_mtp) for use_mtp in (False, True))
  assert plain.tolist() == drafted.tolist() and plain.shape[1] > L + 4


@pytest.mark.parametrize('case', ['llama', 'mellum'])
def test_greedy_text_of_transformers_is_that_of_the_folder_opened_here(tmp_path, case):
  import mtp_jax
  _, model = exported(tmp_path, case)
  ids = prompt()
  theirs = model.generate(torch.tensor([[256, *ids]]), max_new_tokens=24)[0, L + 1:].tolist()
  lm = mtp_jax.load(tmp_path / 'out')
  ours = lm.generate([ids.tolist()], max_tokens=24)
  assert list(ours.ids[0]) == theirs
  if case == 'llama':
    assert against.transformers_decoder(lm)([ids.tolist()], 24).ids[0] == theirs


def test_a_folder_that_transformers_wrote_is_read_back(tmp_path):
  """A plain checkpoint, without the entry of ours; biases are the model's own."""
  from mtp_jax.formats.importing import open_folder
  for case in ('llama of one future', 'qwen2', 'qwen3, tied'):
    source, model = exported(tmp_path / case, case)
    model.config.mtp_jax = {}
    model.save_pretrained(tmp_path / case / 'theirs')
    opened = open_folder(tmp_path / case / 'theirs', '--input', tokenizer='bytes')
    assert opened.config.model.futures == 1 and opened.config.model.qkv_bias == (case == 'qwen2')
    for tensor in opened.tensors:
      assert np.array_equal(opened.found[tensor.name], model.state_dict()[tensor.name].numpy())


@pytest.mark.parametrize('case', ['mimo', 'mellum', 'glm4_moe'])
def test_a_folded_final_norm_changes_no_logit_of_the_trunk(tmp_path, case):
  name, changes = exports.CASES[case]
  source = exports.source(changes | {'hidden_input': 'pre_norm', 'futures': 2, 'share_modules': False})
  assert export(source, name, tmp_path / 'out')['folded']
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
  ids = prompt(L + 1)
  with torch.inference_mode():
    theirs = model(torch.tensor(ids[None, :L])).logits[0].numpy()
  assert np.abs(theirs - numpy_forward.logits(exports.model_of(source), ids)[0]).max() < CLOSE
