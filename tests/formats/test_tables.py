"""Tables of tensors: both directions are inverse, cover every array, and say what the formats' readers expect."""
import dataclasses

import exports
import numpy as np
import pytest

from mtp_jax.config import BadInput
from mtp_jax.formats.export import arrays_of, by_arrays
from mtp_jax.formats.fitting import FORMATS, check, fitting, problems
from mtp_jax.formats.tensors import Row, tensors


def tables(case: str):
  """(format, config, arrays, tensors, those of the folder mtp/) of a case."""
  name, changes = exports.CASES[case]
  c = exports.model_config(changes)
  return FORMATS[name], c, arrays_of(c), FORMATS[name].tensors(c), FORMATS[name].sidecar(c)


@pytest.mark.parametrize('case', exports.CASES)
def test_what_comes_back_from_the_tensors_is_every_array_in_every_bit(case):
  _, c, arrays, main, sidecar = tables(case)
  ours = exports.random_arrays(c)
  target = {name: np.full(array.shape, np.nan, np.float32) for name, array in ours.items()}
  for tensor in main + sidecar:
    theirs = arrays.to_theirs(tensor, ours.__getitem__)
    assert theirs.flags.c_contiguous and theirs.shape == arrays.tensor_shape(tensor)
    if not (tensor.zeros or tensor.copy):
      arrays.to_ours(tensor, theirs, target)
  for name, array in ours.items():
    assert np.array_equal(target[name], array), name


@pytest.mark.parametrize('case', exports.CASES)
def test_a_number_is_in_one_tensor_only_but_for_copies(case):
  _, c, arrays, main, sidecar = tables(case)
  names = [tensor.name for tensor in main + sidecar]
  assert len(set(names)) == len(names)
  held = sum(np.prod(arrays.tensor_shape(tensor)) for tensor in main + sidecar if not (tensor.zeros or tensor.copy))
  assert held == sum(np.prod(shape) for shape in arrays.shapes.values())


def test_an_array_is_in_one_group_and_copies_follow_what_they_copy():
  _, c, arrays, main, _ = tables('deepseek_v3')
  groups = list(by_arrays(main))
  names = [name for names, _ in groups for name in names]
  assert sorted(names) == sorted(arrays.shapes)
  assert sum(len(group) for _, group in groups) == len(main)
  group = next(group for names, group in groups if 'embed_VD' in names)
  assert [tensor.copy for tensor in group] == [False, True, True]


def test_axes_marks_and_joins_move_numbers_as_they_say():
  arrays = dataclasses.replace(arrays_of(exports.model_config({})), rotary=4, shapes={
      'x_DHK': (2, 3, 4), 'y_UHJ': (1, 1, 6), 'a_AHK': (1, 2, 2), 'b_AHK': (1, 2, 2), 'c_CD': (4, 2),
      'e_EDW': (2, 1, 3)})
  read = {name: np.arange(np.prod(shape)).reshape(shape) for name, shape in arrays.shapes.items()}
  read['b_AHK'] = read['b_AHK'] + 10

  def theirs(*rows, experts=0):
    return [arrays.to_theirs(tensor, read.__getitem__).tolist() for tensor in tensors(rows, experts=experts)]

  x = read['x_DHK']
  assert theirs(Row('w', {'x_DHK': 'HK D'}))[0] == x.reshape(2, 12).T.tolist()
  assert theirs(Row('w', {'x_DHK': 'D H~K'}))[0] == x[:, :, [0, 2, 1, 3]].reshape(2, 12).tolist()
  assert theirs(Row('w', {'y_UHJ': 'H~J U'}))[0] == [[0], [1], [2], [4], [3], [5]]
  assert theirs(Row('w', {'a_AHK': 'HK A', 'b_AHK': 'HK A'}, join=1))[0] == [[n] for n in (0, 1, 10, 11, 2, 3, 12, 13)]
  assert theirs(Row('w', {'c_CD': 'D /C'}))[0] == [[4, 6, 0, 2], [5, 7, 1, 3]]
  assert theirs(Row('w{e}', {'e_EDW': 'W D'}), experts=2) == [[[0], [1], [2]], [[3], [4], [5]]]


LLAMA = {'model.embed_tokens.weight': (264, 24), 'model.norm.weight': (24,), 'lm_head.weight': (264, 24)}
BLOCK = {'input_layernorm.weight': (24,), 'post_attention_layernorm.weight': (24,),
         'self_attn.q_proj.weight': (24, 24), 'self_attn.k_proj.weight': (12, 24), 'self_attn.v_proj.weight': (12, 24),
         'self_attn.o_proj.weight': (24, 24), 'mlp.gate_proj.weight': (20, 24), 'mlp.up_proj.weight': (20, 24),
         'mlp.down_proj.weight': (24, 20)}
BIASES = {'self_attn.q_proj.bias': (24,), 'self_attn.k_proj.bias': (12,), 'self_attn.v_proj.bias': (12,)}
WIDER = {'self_attn.q_proj.weight': (40, 24), 'self_attn.k_proj.weight': (20, 24),
         'self_attn.v_proj.weight': (20, 24), 'self_attn.o_proj.weight': (24, 40)}
NORMED = {'self_attn.q_norm.weight': (10,), 'self_attn.k_norm.weight': (10,)}
MLA = {'self_attn.q_a_proj.weight': (10, 24), 'self_attn.q_a_layernorm.weight': (10,),
       'self_attn.q_b_proj.weight': (40, 10), 'self_attn.kv_a_proj_with_mqa.weight': (18, 24),
       'self_attn.kv_a_layernorm.weight': (14,), 'self_attn.kv_b_proj.weight': (48, 14),
       'self_attn.o_proj.weight': (24, 24)}
EXPERTS = {'mlp.gate.weight': (8, 24), 'mlp.gate.e_score_correction_bias': (8,),
           **{f'mlp.experts.{e}.{name}_proj.weight': shape for e in range(8)
              for name, shape in (('gate', (12, 24)), ('up', (12, 24)), ('down', (24, 12)))},
           'mlp.shared_experts.gate_proj.weight': (24, 24), 'mlp.shared_experts.up_proj.weight': (24, 24),
           'mlp.shared_experts.down_proj.weight': (24, 24)}
NORMS = {name: BLOCK[name] for name in ('input_layernorm.weight', 'post_attention_layernorm.weight')}
DENSE = {name: shape for name, shape in BLOCK.items() if name.startswith('mlp')}
NEXTN = {'enorm.weight': (24,), 'hnorm.weight': (24,), 'eh_proj.weight': (24, 48), 'shared_head.norm.weight': (24,),
         'embed_tokens.weight': (264, 24), 'shared_head.head.weight': (264, 24)}
META = {'attention_norm.weight': (24,), 'ffn_norm.weight': (24,), 'attention.wq.weight': (24, 24),
        'attention.wk.weight': (12, 24), 'attention.wv.weight': (12, 24), 'attention.wo.weight': (24, 24),
        'feed_forward.w1.weight': (20, 24), 'feed_forward.w2.weight': (24, 20), 'feed_forward.w3.weight': (20, 24)}


def layers(names, *blocks, prefix: str = 'model.layers.') -> dict:
  return {f'{prefix}{i}.{name}': shape for i in names for block in blocks for name, shape in block.items()}


KEYS = {
    'llama, modules': LLAMA | layers(range(3), BLOCK),
    'qwen2 without biases': LLAMA | layers(range(3), BLOCK, BIASES),
    'qwen3': LLAMA | layers(range(2), BLOCK, WIDER, NORMED),
    'mimo without biases': LLAMA | layers(range(3), BLOCK, BIASES) | layers([0], BLOCK, BIASES, {
        'token_layernorm.weight': (24,), 'hidden_layernorm.weight': (24,), 'input_proj.weight': (24, 48),
        'final_layernorm.weight': (24,)}, prefix='model.mtp_layers.'),
    'mellum': LLAMA | layers(range(3), BLOCK, WIDER, NORMED) | layers(
        [0], BLOCK, WIDER, NORMED, prefix='mtp.layers.') | {
        'mtp.fc.weight': (24, 48), 'mtp.pre_fc_norm_embedding.weight': (24,), 'mtp.pre_fc_norm_hidden.weight': (24,),
        'mtp.norm.weight': (24,)},
    'deepseek_v3': LLAMA | layers([0], NORMS, MLA, DENSE) | layers([1, 2], NORMS, MLA, EXPERTS) | layers(
        [3, 4], NORMS, MLA, EXPERTS, NEXTN),
    'glm4_moe': LLAMA | layers([0], BLOCK, WIDER, NORMED) | layers([1, 2], NORMS, WIDER, NORMED, EXPERTS) | layers(
        [3], NORMS, WIDER, NORMED, EXPERTS, NEXTN),
    'meta': {'tok_embeddings.weight': (264, 24), 'norm.weight': (24,), 'output.weight': (264, 24)} | layers(
        range(3), META, prefix='layers.') | layers(range(2), META, prefix='extra_heads.'),
}


@pytest.mark.parametrize('case', KEYS)
def test_the_tensors_of_a_format_are_those_that_its_readers_know(case):
  _, _, arrays, main, _ = tables(case)
  assert {tensor.name: arrays.tensor_shape(tensor) for tensor in main} == KEYS[case]


def test_futures_that_no_server_reads_are_never_among_the_tensors_of_the_folder():
  for case in ('llama', 'llama, causal', 'llama, modules', 'llama, a shared module', 'qwen2', 'qwen3, tied'):
    _, _, _, main, sidecar = tables(case)
    assert sidecar and all(tensor.name.startswith(('heads.', 'modules.')) for tensor in sidecar)
    assert not any(tensor.name.startswith(('heads.', 'modules.', 'mtp')) for tensor in main)
  assert not tables('llama, anticausal')[4] and not tables('llama of one future')[4]


def test_a_tied_unembedding_is_left_out_and_biases_are_zeros_where_a_model_has_none():
  names = {tensor.name: tensor for tensor in tables('qwen3, tied')[3]}
  assert 'lm_head.weight' not in names
  names = {tensor.name: tensor for tensor in tables('mimo without biases')[3]}
  zeros = [name for name, tensor in names.items() if tensor.zeros]
  assert len(zeros) == 3 * (3 + 1) and all(name.endswith('_proj.bias') for name in zeros)


def test_biases_of_experts_stay_float32():
  assert all(tensor.float32 == tensor.name.endswith('e_score_correction_bias') for tensor in tables('deepseek_v3')[3])


REFUSED = [
    ('llama', {'qk_norm': True}, 'queries and keys are normed'),
    ('llama', {'qkv_bias': True}, 'have biases'),
    ('llama', {'logit_cap': 30.0}, 'logits are capped'),
    ('llama', {'kind': 'linear'}, 'a matrix before the final norm'),
    ('llama', {'experts': 8}, 'it has experts'),
    ('llama', {'attention': 'latent', 'kv_heads': 4}, 'its attention is latent'),
    ('llama', {'width': 26, 'head_width': 8}, 'width=26 to be a multiple of heads=4'),
    ('qwen2', {'head_width': 8}, '4 heads of 8 are not 24'),
    ('qwen3', {}, 'queries and keys are not normed'),
    ('mimo', {'futures': 1}, 'it has no module; qwen2 holds it'),
    ('mimo', {}, 'no sequential modules (kind parallel)'),
    ('mimo', {'kind': 'sequential', 'futures': 3, 'layers': 4}, 'it has 2 modules, not one'),
    ('mimo', {'kind': 'sequential', 'qk_norm': True}, 'queries and keys are normed'),
    ('mellum', {'kind': 'sequential'}, 'queries and keys are not normed'),
    ('mellum', {'qk_norm': True, 'futures': 1}, 'qwen3 holds it'),
    ('mellum', {'qk_norm': True, 'kind': 'sequential', 'share_modules': True, 'futures': 3, 'layers': 4,
                'hidden_input': 'pre_norm'}, 'that norm can be folded for two futures, not for 3'),
    ('deepseek_v3', {**exports.MODULES, **exports.LATENT}, 'it has no experts'),
    ('deepseek_v3', {**exports.MODULES, **exports.EXPERTS}, 'its attention is not latent'),
    ('deepseek_v3', {**exports.MODULES, **exports.EXPERTS, **exports.LATENT, 'norm_epsilon': 1e-5}, 'is not 1e-06'),
    ('deepseek_v3', {**exports.MODULES, **exports.EXPERTS, **exports.LATENT, 'router': 'softmax'}, 'router softmax'),
    ('glm4_moe', {**exports.MODULES, **exports.EXPERTS, 'future_experts': False}, 'modules have no experts'),
    ('glm4_moe', {**exports.MODULES, **exports.EXPERTS, 'shared_experts': 0}, 'no shared experts'),
    ('glm4_moe', {**exports.MODULES, **exports.EXPERTS, 'expert_groups': 8, 'groups_per_token': 3},
     'groups of experts have 1, fewer than two'),
    ('glm4_moe', {**exports.MODULES, **exports.EXPERTS, 'futures': 3, 'module_input': 'trunk'}, 'readers chain them'),
    ('glm4_moe', {**exports.EXPERTS, 'layers': 5}, 'no sequential modules (kind parallel)'),
    ('meta', {'kind': 'sequential'}, 'no parallel heads (kind sequential)'),
    ('meta', {'tie_embeddings': True}, 'embedding and unembedding are one'),
    ('meta', {'head_width': 8}, '4 heads of 8 are not 24'),
]


@pytest.mark.parametrize('name, changes, why', REFUSED, ids=lambda x: x if isinstance(x, str) else '')
def test_a_model_that_a_format_cannot_hold_is_refused_with_the_formats_that_can(name, changes, why):
  c = exports.model_config(changes)
  with pytest.raises(BadInput) as error:
    check(name, c)
  assert why in str(error.value) and str(error.value).startswith(f'--format={name}: cannot hold this model: ')
  assert str(error.value).endswith(f'formats that can: {", ".join(fitting(c)) or "none"}')
  assert name not in fitting(c)


def test_every_case_fits_its_format_and_a_name_that_is_none_is_refused():
  for name, changes in exports.CASES.values():
    assert not problems(name, exports.model_config(changes))
  with pytest.raises(BadInput, match="--format=lama: no such format; did you mean 'llama'?"):
    check('lama', exports.model_config({}))


@pytest.mark.parametrize('case', exports.CASES)
def test_the_model_is_read_from_the_entries_alone_but_for_what_they_have_no_names_for(case):
  """Without the entry of ours: a plain checkpoint of that format."""
  chosen, c, *_ = tables(case)
  fields = chosen.fields(chosen.entries(c))
  untold = {'dtype', 'remat', 'head_batch', 'kind', 'placement', 'layers', 'futures', 'hidden_input', 'share_modules',
            'module_input', 'future_experts', 'qkv_bias'}
  for name, value in fields.items():
    assert name in untold or value == getattr(c, name), name
  read = dataclasses.replace(c, **fields)
  assert chosen.entries(dataclasses.replace(read, qkv_bias=c.qkv_bias)) == chosen.entries(c)


def theirs(case: str, name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """(a tensor of a case, all arrays of the model)"""
  _, c, arrays, main, _ = tables(case)
  ours = exports.random_arrays(c)
  return arrays.to_theirs(next(tensor for tensor in main if tensor.name == name), ours.__getitem__), ours


def test_mimo_joins_the_state_first_and_the_others_the_embedding():
  join, ours = theirs('mimo', 'model.mtp_layers.0.input_proj.weight')
  assert np.array_equal(join, np.concatenate([ours['futures.join_CD'][0][24:], ours['futures.join_CD'][0][:24]]).T)
  for case, name in (('mellum', 'mtp.fc.weight'), ('glm4_moe', 'model.layers.3.eh_proj.weight')):
    join, ours = theirs(case, name)
    assert np.array_equal(join, ours['futures.join_CD'][0].T)


def test_meta_turns_neighbours_against_each_other():
  found, ours = theirs('meta', 'extra_heads.1.attention.wk.weight')
  halves = ours['futures.attention.wk_DGK'][2].reshape(24, 2, 2, 3)  # [D, heads, half, pair]
  assert np.array_equal(found, halves.transpose(1, 3, 2, 0).reshape(12, 24))


def test_deepseek_turns_neighbours_of_the_rotary_part_only():
  found, ours = theirs('deepseek_v3, plain queries', 'model.layers.0.self_attn.q_proj.weight')
  wq = ours['trunk.attention.wq_DHJ'][0]
  assert np.array_equal(found, wq[:, :, [0, 1, 2, 3, 4, 5, 6, 8, 7, 9]].reshape(24, 40).T)
  found, ours = theirs('deepseek_v3', 'model.layers.0.self_attn.kv_a_proj_with_mqa.weight')
  assert np.array_equal(found[14:], ours['trunk.attention.k_rotary_Do'][0][:, [0, 2, 1, 3]].T)
  found, ours = theirs('deepseek_v3', 'model.layers.0.self_attn.kv_b_proj.weight')
  heads = [np.concatenate([ours[f'trunk.attention.{x}_up_AHK'][0][:, h] for x in 'kv'], 1).T for h in range(4)]
  assert np.array_equal(found, np.concatenate(heads))


FOREIGN = [
    ('llama', {'hidden_act': 'gelu'}, "hidden_act='gelu': models here have 'silu'"),
    ('llama', {'attention_bias': True}, 'attention_bias=True'),
    ('llama', {'mlp_bias': True}, 'mlp_bias=True'),
    ('llama', {'num_hidden_layers': None}, 'num_hidden_layers=None: must be a whole number'),
    ('qwen3', {'use_sliding_window': True}, 'use_sliding_window=True'),
    ('mellum', {'layer_types': ['sliding_attention'] * 3}, "all must be 'full_attention'"),
    ('mellum', {'mlp_layer_types': ['sparse'] * 3}, "all must be 'dense'"),
    ('deepseek_v3', {'scoring_func': 'softmax'}, "scoring_func='softmax'"),
    ('deepseek_v3', {'topk_method': 'greedy'}, "topk_method='greedy'"),
    ('deepseek_v3', {'v_head_dim': 8}, 'v_head_dim=8: must be qk_nope_head_dim=6'),
    ('deepseek_v3', {'rope_interleave': False}, 'rope_interleave'),
    ('glm4_moe', {'partial_rotary_factor': 0.5, 'rope_parameters': None}, 'partial_rotary_factor=0.5'),
    ('glm4_moe', {'moe_intermediate_size': 'x'}, 'moe_intermediate_size'),
    ('meta', {'hidden_dim': None}, 'hidden_dim=None'),
]


@pytest.mark.parametrize('case, changes, why', FOREIGN, ids=lambda x: x if isinstance(x, str) else '')
def test_a_config_of_another_model_is_refused_by_the_entry(case, changes, why):
  chosen, c, *_ = tables(case)
  with pytest.raises(BadInput) as error:
    chosen.fields(chosen.entries(c) | changes)
  assert why in str(error.value)
