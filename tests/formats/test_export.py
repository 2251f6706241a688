"""Exported folders: what is in them, and that reading them gives the model back."""
import gc
import json
import weakref

import exports
import ml_dtypes
import numpy as np
import numpy_forward
import pytest
from plain_llama import Llama

import mtp_jax
from mtp_jax.config import BadInput
from mtp_jax.formats import export as exporting
from mtp_jax.formats import safetensors
from mtp_jax.formats.export import export, with_final_norm_folded
from mtp_jax.formats.importing import open_folder


def settings(folder, name: str = 'config.json') -> dict:
  return json.loads((folder / name).read_text())


def change_settings(folder, **changes) -> None:
  (folder / 'config.json').write_text(json.dumps(settings(folder) | changes))


def exported(folder, case: str, **options):
  """(the source, the folder of a case)"""
  name, changes = exports.CASES[case]
  source = exports.source(changes)
  export(source, name, folder, **options)
  return source, folder


@pytest.mark.parametrize('case', exports.CASES)
def test_a_folder_opens_as_the_model_that_was_exported(tmp_path, case):
  source, folder = exported(tmp_path / 'out', case, shard_bytes=20_000)
  lm = mtp_jax.load(folder)
  assert lm.config.model == source.model and lm.config.data.length == 64 and lm.step == 7
  for name, array in exports.arrays_of(lm).items():
    assert np.array_equal(array, source.read(name)), name
  files = [path.name for path in folder.glob('*.safetensors')]
  assert len(files) > 1 and all('-of-' in name for name in files)


def test_files_hold_what_their_index_says_and_at_most_the_bytes_allowed(tmp_path):
  _, folder = exported(tmp_path / 'out', 'llama', shard_bytes=20_000)
  index = settings(folder, 'model.safetensors.index.json')
  sizes = {path.name: path.stat().st_size for path in folder.glob('*.safetensors')}
  assert set(index['weight_map'].values()) == set(sizes)
  assert sorted(sizes)[0] == f'model-00001-of-{len(sizes):05}.safetensors'
  assert max(sizes.values()) < 264 * 24 * 4 + 4000  # the embedding alone is larger than allowed
  arrays = safetensors.read(folder, '')
  assert set(arrays) == set(index['weight_map'])
  assert index['metadata']['total_size'] == sum(array.nbytes for array in arrays.values())


def test_bfloat16_is_rounded_to_nearest_but_biases_of_experts_are_not(tmp_path):
  source, folder = exported(tmp_path / 'out', 'glm4_moe', dtype='bfloat16')
  arrays = safetensors.read(folder, '')
  assert arrays['model.norm.weight'].dtype == ml_dtypes.bfloat16
  exact = source.read('final_norm_D')
  assert np.abs(np.float32(arrays['model.norm.weight']) - exact).max() <= 2**-8 * np.abs(exact).max()
  bias = arrays['model.layers.1.mlp.gate.e_score_correction_bias']
  assert bias.dtype == np.float32 and np.array_equal(bias, source.read('expert_trunk.feed_forward.bias_E')[0])
  assert settings(folder)['torch_dtype'] == settings(folder)['dtype'] == 'bfloat16'


def test_an_export_that_fails_leaves_nothing_of_its_name_and_the_next_one_succeeds(tmp_path, monkeypatch):
  source, wanted = exports.source({}), tmp_path / 'out'
  reads = []

  def read(name):
    reads.append(name)
    if len(reads) > 3:
      raise OSError(28, 'No space left on device')
    return source.read(name)

  with pytest.raises(BadInput, match='--output=.*: cannot write'):
    export(exporting.dataclasses.replace(source, read=read), 'llama', wanted)
  assert not wanted.exists()
  export(source, 'llama', wanted)
  assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_an_array_is_let_go_before_the_next_is_read(tmp_path):
  """So a model larger than the memory can be written."""
  source, alive = exports.source({}), []

  def read(name):
    gc.collect()
    assert not [other for other, array in alive if array() is not None], name
    array = source.read(name).copy()
    alive.append((name, weakref.ref(array)))
    return array

  export(exporting.dataclasses.replace(source, read=read), 'llama', tmp_path / 'out')
  assert {name for name, _ in alive} == set(exporting.arrays_of(source.model).shapes)


def test_a_folder_that_is_there_is_not_written_over(tmp_path):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'mine').touch()
  with pytest.raises(BadInput, match='is there already; give a new folder'):
    export(exports.source({}), 'llama', tmp_path / 'out')


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('name', ['mimo', 'glm4_moe'])
def test_with_the_final_norm_folded_a_module_reads_the_same_before_and_after_it(name, tied):
  case = {**exports.CASES[name][1], 'hidden_input': 'pre_norm', 'tie_embeddings': tied, 'futures': 2}
  source = exports.source(case)
  ids = np.random.default_rng(1).integers(0, 256, 12)
  wanted = numpy_forward.logits(exports.model_of(source), ids)
  assert np.abs(numpy_forward.logits(exports.model_of(exports.source(case | {'hidden_input': 'post_norm'})), ids)
                - wanted).max() > 0.1
  folded = with_final_norm_folded(source)
  for hidden_input in ('pre_norm', 'post_norm'):
    model = exporting.dataclasses.replace(folded.model, hidden_input=hidden_input)
    config = exporting.dataclasses.replace(folded.config, model=model)
    found = numpy_forward.logits(exports.model_of(exporting.dataclasses.replace(folded, config=config)), ids)
    assert np.abs(found - wanted).max() < 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize('hidden_input, fold, gives', [
    ('pre_norm', False, 'before'), ('post_norm', True, 'after'), ('pre_norm', True, 'before'),
    ('pre_norm', True, 'after')])
def test_the_module_of_mimo_makes_of_the_tensors_what_the_model_makes(tmp_path, hidden_input, fold, gives):
  """vLLM gives the module the state before the final norm, SGLang the one after it."""
  source = exports.source({**exports.CASES['mimo'][1], 'hidden_input': hidden_input})
  export(source, 'mimo', tmp_path / 'out', fold=fold)
  ids = np.random.default_rng(2).integers(0, 256, 13)
  wanted = numpy_forward.logits(exports.model_of(source), ids)
  llama = Llama(settings(tmp_path / 'out'), safetensors.read(tmp_path / 'out', ''))
  state = llama.state(ids[:-1])
  given = state if gives == 'before' else llama.norm(state, 'model.norm')
  assert np.abs(llama.logits(state) - wanted[0]).max() < 2e-5
  assert np.abs(llama.mimo_logits(given, ids[1:]) - wanted[1]).max() < 2e-5


def test_a_scale_of_nearly_0_is_not_folded():
  source = exports.source({**exports.CASES['mimo'][1], 'hidden_input': 'pre_norm'})
  read = lambda name: source.read(name) * (0 if name == 'final_norm_D' else 1)
  with pytest.raises(BadInput, match='too small to fold; give --nofold'):
    with_final_norm_folded(exporting.dataclasses.replace(source, read=read))


def test_rotary_embeddings_stand_in_the_config_for_transformers_4_and_5(tmp_path):
  _, folder = exported(tmp_path / 'out', 'llama')
  found = settings(folder)
  assert found['rope_theta'] == found['rope_parameters']['rope_theta'] == 5000.0 and found['rope_scaling'] is None
  assert found['vocab_size'] == 264 and found['hidden_act'] == 'silu' and found['max_position_embeddings'] == 64
  assert (found['bos_token_id'], found['eos_token_id'], found['pad_token_id']) == (256, 257, 258)
  generation = settings(folder, 'generation_config.json')
  assert (generation['bos_token_id'], generation['eos_token_id'], generation['pad_token_id']) == (256, 257, 258)
  assert (folder / 'mtp' / 'model.safetensors').exists() and len(list(folder.glob('*.safetensors'))) == 1


TRAPS = {
    'qwen3': {'use_sliding_window': False, 'attention_bias': False, 'head_dim': 10},
    'mimo': {'model_type': 'qwen2', 'architectures': ['MiMoForCausalLM'], 'num_nextn_predict_layers': 1},
    'mellum': {'model_type': 'mellum', 'architectures': ['MellumForCausalLM'], 'layer_types': ['full_attention'] * 3,
               'mlp_layer_types': ['dense'] * 3, 'num_nextn_predict_layers': 1, 'mtp_layer_types': ['full_attention'],
               'mtp_mlp_layer_types': ['dense'], 'sliding_window': None, 'rope_parameters': {
                   kind: {'rope_type': 'default', 'rope_theta': 5000.0} for kind in ('full_attention',
                                                                                     'sliding_attention')}},
    'deepseek_v3': {'scoring_func': 'sigmoid', 'topk_method': 'noaux_tc', 'moe_layer_freq': 1, 'norm_topk_prob': True,
                    'rope_interleave': True, 'rms_norm_eps': 1e-6, 'num_nextn_predict_layers': 2, 'n_group': 4,
                    'topk_group': 2, 'routed_scaling_factor': 2.5, 'first_k_dense_replace': 1, 'q_lora_rank': 10,
                    'kv_lora_rank': 14, 'qk_nope_head_dim': 6, 'qk_rope_head_dim': 4, 'v_head_dim': 6},
    'deepseek_v3, plain queries': {'q_lora_rank': None, 'n_group': 1, 'topk_group': 1},
    'glm4_moe': {'partial_rotary_factor': 1.0, 'use_qk_norm': True, 'attention_bias': False, 'rope_parameters': {
        'rope_type': 'default', 'rope_theta': 5000.0, 'partial_rotary_factor': 1.0}},
}


@pytest.mark.parametrize('case', TRAPS)
def test_the_config_says_what_its_readers_would_guess_wrong(tmp_path, case):
  name, changes = exports.CASES[case]
  found = exporting.settings(exports.source(changes), exporting.check(name, exports.model_config(changes)), 'float32')
  assert {key: found[key] for key in TRAPS[case]} == TRAPS[case]
  assert case != 'mellum' or not found.keys() & {'rope_theta', 'rope_scaling'}


def test_copies_of_the_embedding_can_be_left_out(tmp_path):
  _, folder = exported(tmp_path / 'out', 'glm4_moe', copies=False)
  assert not [name for name in safetensors.read(folder, '') if 'embed_tokens' in name and 'layers' in name]
  assert mtp_jax.load(folder).config.model.futures == 2


def damaged(folder, change) -> None:
  """Changes the arrays of a folder of one file."""
  arrays = {name: np.array(array) for name, array in safetensors.read(folder, '').items()}
  change(arrays)
  writer = safetensors.Writer(folder, {name: (array.dtype, array.shape) for name, array in arrays.items()}, 10**9)
  for name, array in arrays.items():
    writer.write(name, array)
  writer.close()


def test_a_missing_an_unknown_and_a_misshapen_tensor_are_named(tmp_path):
  _, folder = exported(tmp_path / 'out', 'qwen2 without biases')
  name = 'model.layers.1.mlp.up_proj.weight'
  damaged(folder, lambda arrays: arrays.update({name: arrays[name].T.copy()}))
  with pytest.raises(BadInput, match=rf'{name} has shape \[24, 20\], not \[20, 24\]'):
    open_folder(folder, '--input')
  damaged(folder, lambda arrays: arrays.pop(name))
  with pytest.raises(BadInput, match=f'lacks {name}; 1 tensors are missing, 0 are unknown'):
    open_folder(folder, '--input')
  _, folder = exported(tmp_path / 'other', 'qwen2 without biases')
  damaged(folder, lambda arrays: arrays.update({'model.layers.9.x': arrays[name]}))
  with pytest.raises(BadInput, match='model.layers.9.x is in no table of its format'):
    open_folder(folder, '--input')
  _, folder = exported(tmp_path / 'third', 'qwen2 without biases')
  damaged(folder, lambda arrays: arrays['model.layers.0.self_attn.q_proj.bias'].__setitem__(3, 1))
  with pytest.raises(BadInput, match='q_proj.bias is not 0, but models with qkv_bias=False have no biases'):
    mtp_jax.load(folder)


def test_a_copy_that_is_another_tensor_is_refused(tmp_path):
  _, folder = exported(tmp_path / 'out', 'glm4_moe')
  damaged(folder, lambda arrays: arrays['model.layers.3.embed_tokens.weight'].__setitem__((0, 0), 9))
  with pytest.raises(BadInput, match='embed_tokens.weight is not the tensor that it must be a copy of'):
    mtp_jax.load(folder)


@pytest.mark.parametrize('entry', [
    {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, {'rope_scaling': {'type': 'yarn', 'factor': 4.0}},
    {'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4}}], ids=['llama3', 'yarn', 'yarn of transformers 5'])
def test_a_scaled_rotary_embedding_is_refused_by_its_name(tmp_path, entry):
  _, folder = exported(tmp_path / 'out', 'llama of one future')
  change_settings(folder, mtp_jax={}, **entry)
  with pytest.raises(BadInput, match='config.json: rope_scaling=(llama3|yarn): rotary embeddings are not scaled here'):
    open_folder(folder, '--input', tokenizer='bytes')


@pytest.mark.parametrize('key, value, why', [
    ('rope_theta', 1e6, 'its entry mtp_jax.model says 5000.0'), ('hidden_size', 48, 'its entry mtp_jax.model says 24'),
    ('model_type', 'gpt2', 'is of model_type gpt2, which is not read here')])
def test_a_config_that_was_changed_is_refused(tmp_path, key, value, why):
  _, folder = exported(tmp_path / 'out', 'llama of one future')
  change_settings(folder, **{key: value})
  with pytest.raises(BadInput, match=why):
    open_folder(folder, '--input')


def test_a_plain_checkpoint_needs_a_tokenizer_and_keeps_what_it_says(tmp_path):
  source, folder = exported(tmp_path / 'out', 'llama of one future')
  change_settings(folder, mtp_jax={}, max_position_embeddings=131_072, dtype='bfloat16')
  with pytest.raises(BadInput, match='has no tokenizer.model; .* give --tokenizer'):
    open_folder(folder, '--input')
  opened = open_folder(folder, '--input', tokenizer='bytes')
  assert opened.config.data.length == 2048 and opened.config.model.dtype == 'bfloat16'
  assert opened.config.model.futures == 1 and opened.config.model.tie_embeddings


def test_weights_quantised_in_blocks_are_multiplied_by_their_scales(tmp_path):
  source = exports.source({**exports.CASES['deepseek_v3, plain queries'][1], 'width': 144, 'feed_forward': 260,
                           'futures': 1})
  export(source, 'deepseek_v3', tmp_path / 'out')
  name, rng = 'model.layers.0.mlp.gate_proj.weight', np.random.default_rng(0)
  scales = np.float32(rng.uniform(0.5, 2, (3, 2)))

  def quantise(arrays):
    arrays[name] = arrays[name].astype(ml_dtypes.float8_e4m3fn)
    arrays[name + '_scale_inv'] = scales

  damaged(tmp_path / 'out', quantise)
  stored = safetensors.read(tmp_path / 'out', '')[name]
  found = exports.arrays_of(mtp_jax.load(tmp_path / 'out'))['trunk.feed_forward.gate_DF'][0].T
  assert found.shape == (260, 144)
  for row, column in np.ndindex(260, 144):
    assert found[row, column] == np.float32(stored[row, column]) * scales[row // 128, column // 128]


def test_the_model_card_has_counts_data_conventions_and_how_to_serve(tmp_path):
  _, folder = exported(tmp_path / 'out', 'mimo')
  text = (folder / 'README.md').read_text()
  for part in ('SGLang', '--speculative-draft-model-path out', '"method": "mtp"', '| total |',
               '- join: embedding first', 'the state after the final norm, which SGLang gives it', '## Data', 'step 7'):
    assert part in text
