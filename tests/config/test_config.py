"""A wrong config is refused in one line: what is wrong, where, how to fix it; without importing JAX."""
import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import typing

import ml_collections
import pytest

from mtp_jax.config import (
    SECTIONS,
    BadInput,
    Config,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    forward_curriculum,
    reverse_curriculum,
    weight_at,
)

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / 'configs').glob('*.py'))

# values; in the message: the field with its value, and the nearest name or the fix
WRONG = {
    'section misspelt': ({'modle': {'layers': 4}}, 'config.modle: no such section',
                         "did you mean 'model'?"),
    'section unlike any': ({'zzz': {}}, 'config.zzz: no such section',
                           'valid names: model, objective, data, optimizer, train, mesh'),
    'field without its section': ({'layers': 4}, 'config.layers: no such section',
                                  "did you mean 'model.layers'?"),
    'section that is a number': ({'model': 3}, 'config.model=3', 'must be a section, ModelConfig'),
    'section that is a text': ({'train': 'fast'}, "config.train='fast'",
                               'must be a section, TrainConfig'),
    'field misspelt': ({'model': {'lyers': 4}}, 'config.model.lyers: no such field',
                       "did you mean 'layers'?"),
    'field in another spelling': ({'optimizer': {'learning_rte': 1e-3}},
                                  'config.optimizer.learning_rte', "did you mean 'learning_rate'?"),
    'field of another section': ({'train': {'qk_norm': True}},
                                 'config.train.qk_norm: no such field',
                                 "did you mean 'model.qk_norm'?"),
    'float where int': ({'train': {'steps': 1.5}}, 'config.train.steps=1.5',
                        'must be of type int, not float'),
    'text where int': ({'model': {'layers': '8'}}, "config.model.layers='8'",
                       'must be of type int, not str'),
    'bool where int': ({'model': {'layers': True}}, 'config.model.layers=True',
                       'must be of type int, not bool'),
    'int where bool': ({'model': {'share_modules': 1}}, 'config.model.share_modules=1',
                       'must be of type bool, not int'),
    'nothing where int': ({'mesh': {'fsdp': None}}, 'config.mesh.fsdp=None',
                          'must be of type int, not NoneType'),
    'text where tuple': ({'data': {'paths': 'corpus'}}, "config.data.paths='corpus'",
                         "must be a tuple, such as ('corpus',)"),
    'bool in a tuple of floats': ({'objective': {'weights': (1.0, True)}},
                                  'config.objective.weights=True',
                                  'must be of type float, not bool'),
    'choice misspelt': ({'model': {'kind': 'paralel'}}, "config.model.kind='paralel'",
                        "did you mean 'parallel'?"),
    'choice unlike any': ({'model': {'dtype': 'fp8'}}, "config.model.dtype='fp8'",
                          'valid names: float32, bfloat16'),
    'module input': ({'model': {'module_input': 'trunc'}}, "config.model.module_input='trunc'",
                     "did you mean 'trunk'?"),
    'attention': ({'model': {'attention': 'latnt'}}, "config.model.attention='latnt'", "did you mean 'latent'?"),
    'latent kv_heads': ({'model': {'attention': 'latent'}}, 'config.model.kv_heads=2',
                        'latent attention makes keys and values of every head; set 4'),
    'latent qk_norm': ({'model': {'attention': 'latent', 'kv_heads': 4, 'qk_norm': True}}, 'config.model.qk_norm=True',
                       'set False'),
    'negative query rank': ({'model': {'query_rank': -1}}, 'config.model.query_rank=-1', 'or 0 for queries'),
    'no kv rank': ({'model': {'kv_rank': 0}}, 'config.model.kv_rank=0', 'must be at least 1'),
    'odd rope width': ({'model': {'rope_width': 5}}, 'config.model.rope_width=5', 'must be even'),
    'kv rank and fsdp': ({'model': {'attention': 'latent', 'kv_heads': 4, 'kv_rank': 36}, 'mesh': {'fsdp': 8}},
                         'config.model.kv_rank=36', 'must be a multiple of fsdp x expert = 8'),
    'schedule': ({'optimizer': {'schedule': 'cosin'}}, "config.optimizer.schedule='cosin'",
                 "did you mean 'cosine'?"),
    'zero layers': ({'model': {'layers': 0}}, 'config.model.layers=0', 'must be at least 1'),
    'negative batch': ({'train': {'batch': -8}}, 'config.train.batch=-8', 'must be at least 1'),
    'nan': ({'optimizer': {'learning_rate': float('nan')}}, 'config.optimizer.learning_rate=nan',
            'must be finite'),
    'rate of zero': ({'optimizer': {'learning_rate': 0.0}}, 'config.optimizer.learning_rate=0.0',
                     'must be positive'),
    'b2 of one': ({'optimizer': {'b2': 1.0}}, 'config.optimizer.b2=1.0',
                  'must be at least 0 and below 1'),
    'odd head width': ({'model': {'head_width': 7}}, 'config.model.head_width=7', 'must be even'),
    'heads and kv_heads': ({'model': {'heads': 6, 'kv_heads': 4}}, 'config.model.heads=6',
                           'must be a multiple of config.model.kv_heads=4, such as 8'),
    'futures and head_batch': ({'model': {'head_batch': 3}}, 'config.model.futures=4',
                               'must be a multiple of config.model.head_batch=3, such as 6'),
    'no trunk left': ({'model': {'layers': 4}}, 'config.model.layers=4',
                      'leaves no trunk: 4 of them are futures; set at least 5'),
    'shared parallel futures': ({'model': {'share_modules': True}},
                                'config.model.share_modules=True',
                                "set config.model.kind='sequential'"),
    'too many weights': ({'objective': {'weights': (1, 1, 1, 1, 1)}},
                         'config.objective.weights=(1.0, 1.0, 1.0, 1.0, 1.0)',
                         'needs 1 to 4 numbers'),
    'no weights': ({'objective': {'weights': ()}}, 'config.objective.weights=()',
                   'needs 1 to 4 numbers'),
    'weights all zero': ({'objective': {'weights': (0, 0)}}, 'config.objective.weights=(0.0, 0.0)',
                         'must not all be 0 at once'),
    'chunk of less than nothing': ({'objective': {'chunk': -1}}, 'config.objective.chunk=-1',
                         'must be at least 1'),
    'negative z-loss': ({'objective': {'z_loss': -1e-4}}, 'config.objective.z_loss=-0.0001',
                        'must not be negative'),
    'negative cap': ({'model': {'logit_cap': -30.0}}, 'config.model.logit_cap=-30.0',
                     'must be positive, or 0 for none'),
    'linear futures and head_batch': ({'model': {'kind': 'linear', 'head_batch': 3}},
                                      'config.model.futures=4',
                                      'must be a multiple of config.model.head_batch=3'),
    'shared chain': ({'model': {'kind': 'causal', 'share_modules': True}},
                     'config.model.share_modules=True', "set config.model.kind='sequential'"),
    'all held out': ({'data': {'validation_share': 1.0}}, 'config.data.validation_share=1.0',
                     'must be between 0 and 1'),
    'warm-up too long': ({'train': {'steps': 50}}, 'config.optimizer.warmup_steps=100',
                         'below config.train.steps=50'),
    'wsd too long': ({'optimizer': {'schedule': 'wsd', 'decay_share': 0.95}},
                     'config.optimizer.decay_share=0.95', 'do not fit into the steps'),
    'batch and accumulate': ({'train': {'accumulate': 3}}, 'config.train.batch=32',
                             'must be a multiple of config.train.accumulate=3, such as 33'),
    'less than a microbatch': ({'train': {'batch': 30, 'accumulate': 3, 'batch_share': '0.3 step 0.5 1'}},
                               "config.train.batch_share='0.3 step 0.5 1'", 'one microbatch, 1/3 of the batch,'),
    'batch and mesh': ({'mesh': {'fsdp': 3}}, 'config.train.batch=32',
                       'a multiple of data x fsdp = 3 rows, such as 33 in all'),
    'rows and mesh': ({'mesh': {'data': 32}, 'train': {'evaluate_rows': 40}},
                      'config.train.evaluate_rows=40', 'must be a multiple of data x fsdp = 32'),
    'width and fsdp': ({'mesh': {'fsdp': 32}, 'model': {'width': 80}}, 'config.model.width=80',
                       'must be a multiple of config.mesh.fsdp=32, such as 96'),
    'kv_heads and tensor': ({'mesh': {'tensor': 4}}, 'config.model.kv_heads=2',
                            'must be a multiple of config.mesh.tensor=4, such as 4'),
    'vocab and tensor': ({'mesh': {'tensor': 2}, 'model': {'vocab': 265}}, 'config.model.vocab=265',
                         'must be a multiple of config.mesh.tensor=2, such as 266'),
    'remat of nothing known': ({'model': {'remat': 'attention,mpl'}},
                               "config.model.remat='attention,mpl'", "'mpl': did you mean 'mlp'?"),
    'moments nowhere': ({'optimizer': {'moments': 'disk'}}, "config.optimizer.moments='disk'",
                        'device, host'),
    'no heartbeat': ({'train': {'heartbeat_seconds': 0}}, 'config.train.heartbeat_seconds=0',
                     'must be at least 1'),
    'length and context': ({'mesh': {'context': 3}}, 'config.data.length=256',
                           'must be a multiple of config.mesh.context=3, such as 258'),
}


# weights, what is wrong with them
WRONG_WEIGHTS = {
    'a word': ((1.0, 'a'), "'a' is not a number"),
    'empty': (('',), "'nothing' is not a number"),
    'shape misspelt': (('1 stepp 0.5 0.1',), "'stepp' is not step, linear or cosine"),
    'two numbers': (('1 0.5',), "'0.5' is not step, linear or cosine"),
    'step over an interval': (('1 step 0.2:0.4 0.1',),
                              "'0.2:0.4' after step must be a fraction of training, such as 0.5"),
    'linear at a point': (('1 linear 0.5 0.1',),
                          "'0.5' after linear must be two fractions of training, such as 0:0.5"),
    'cosine at a point': (('1 cosine 0.5 0.1',),
                          "'0.5' after cosine must be two fractions of training, such as 0:0.5"),
    'no place': (('1 step',), "'' is not a number"),
    'no goal': (('1 step 0.5',), "'' is not a number"),
    'goal is a word': (('1 step 0.5 low',), "'low' is not a number"),
    'place is a word': (('1 step half 0.1',), "'half' is not a number"),
    'half an interval': (('1 linear 0.5: 0.1',), "'' is not a number"),
    'backwards': (('1 step 0.5 0.1 step 0.2 1',), 'fractions of training must rise from 0 to 1'),
    'overlapping': (('1 linear 0:0.5 2 linear 0.4:0.8 1',),
                    'fractions of training must rise from 0 to 1'),
    'interval backwards': (('1 linear 0.6:0.4 2',), 'fractions of training must rise from 0 to 1'),
    'empty interval': (('1 cosine 0.5:0.5 2',), 'fractions of training must rise from 0 to 1'),
    'past the end': (('1 step 1.5 2',), 'fractions of training must rise from 0 to 1'),
    'before the start': (('1 step -0.5 2',), 'fractions of training must rise from 0 to 1'),
    'nowhere': (('1 step nan 2',), 'fractions of training must rise from 0 to 1'),
    'negative': ((1.0, -0.5), 'must be finite and not negative'),
    'negative start': (('-1 step 0.5 1',), 'must be finite and not negative'),
    'negative goal': (('1 step 0.5 -1',), 'must be finite and not negative'),
    'infinite': ((float('inf'),), 'must be finite and not negative'),
    'infinite goal': (('1 step 0.5 inf',), 'must be finite and not negative'),
    'no number': (('nan',), 'must be finite and not negative'),
    'all 0 from a step on': (('1 step 0.5 0', 0), 'must not all be 0 at once'),
    'all 0 at the start': (('0 linear 0:0.5 1',), 'must not all be 0 at once'),
    'all 0 after a fall': (('1 cosine 0:0.5 0',), 'must not all be 0 at once'),
    'all 0 at one moment': (('1 linear 0:0.5 0', '0 linear 0.5:1 1'), 'must not all be 0 at once'),
    'all 0 for a while': (('1 step 0.3 0', '0 step 0.4 1'), 'must not all be 0 at once'),
}


@pytest.mark.parametrize('weights, what', WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_wrong_weights_are_refused_with_the_reason(weights, what):
  with pytest.raises(BadInput) as error:
    Config(objective=ObjectiveConfig(weights=weights))
  message = str(error.value)
  assert message.startswith('config.objective.weights=(') and what in message
  assert '\n' not in message
  assert ('write a number, or such as' in message) == (not what.startswith('must'))


PATHS = {
    0.7: {0: 0.7, 0.5: 0.7, 1: 0.7},
    '2': {0: 2, 0.5: 2, 1: 2},
    '0.3 step 0.676 0.1': {0: 0.3, 0.675: 0.3, 0.676: 0.1, 1: 0.1},
    '0 linear 0:0.5 1': {0: 0, 0.125: 0.25, 0.25: 0.5, 0.5: 1, 0.9: 1},
    '1 cosine 0:1 0': {0: 1, 0.25: (2 + 2**0.5) / 4, 0.5: 0.5, 0.75: (2 - 2**0.5) / 4, 1: 0},
    '1 cosine 0.25:0.75 0.5': {0: 1, 0.25: 1, 0.5: 0.75, 0.75: 0.5, 1: 0.5},
    '0 step 0.25 1 step 0.5 0': {0: 0, 0.24: 0, 0.25: 1, 0.49: 1, 0.5: 0, 1: 0},
    '1 linear 0:0.25 0 linear 0.5:1 2': {0: 1, 0.125: 0.5, 0.25: 0, 0.375: 0, 0.5: 0, 0.75: 1,
                                         1: 2},
    '1 linear 0:0.5 0 step 0.5 1': {0.25: 0.5, 0.49: 0.02, 0.5: 1, 1: 1},
    '1 step 0 2': {0: 2, 1: 2},
}


@pytest.mark.parametrize('weight, values', PATHS.items(), ids=map(str, PATHS))
def test_a_weight_follows_its_path(weight, values):
  assert {fraction: weight_at(weight, fraction) for fraction in values} == pytest.approx(
      values, abs=1e-12)


def test_weights_are_those_of_a_moment_and_the_last_one_repeats():
  o = ObjectiveConfig(weights=(1.0, '0.3 step 0.676 0.1'))
  assert [o.weights_M(4, fraction) for fraction in (0, 0.7)] == [
      (1.0, 0.3, 0.3, 0.3), (1.0, 0.1, 0.1, 0.1)]
  assert o.weights_M(1, 0.7) == (1.0,)
  assert Config(objective=o).objective == o


@pytest.mark.parametrize('futures', range(1, 9))
@pytest.mark.parametrize('steps', [7, 24, 100])
def test_curricula_are_those_of_their_paper(futures, steps):
  """k futures at epoch e of E, in whole numbers: floor(e / (E / k_max)) = e k_max // E."""
  forward, reverse = (Config(model=ModelConfig(futures=futures, layers=9),
                             objective=ObjectiveConfig(weights=curriculum(futures))).objective
                      for curriculum in (forward_curriculum, reverse_curriculum))
  for step in range(steps):
    passed = step * futures // steps
    for o, k in ((forward, min(futures, passed + 1)), (reverse, max(1, futures - passed))):
      assert o.weights_M(futures, step / steps) == (1.0,) * k + (0.0,) * (futures - k)


@pytest.mark.parametrize('kind, active, heads', [
    ('parallel', (0, 1, 0, 1), [1, 3]),
    ('parallel', (0, 0, 0, 0), []),
    ('linear', (1, 0, 0, 1), [0, 3]),
    ('causal', (0, 1, 0, 0), [0, 1]),
    ('causal', (1, 0, 0, 1), [0, 1, 2, 3]),
    ('anticausal', (0, 1, 0, 0), [1, 2, 3]),
    ('anticausal', (0, 0, 0, 1), [3]),
    ('sequential', (0, 0, 1, 0), [1, 2]),
    ('sequential', (1, 0, 0, 0), []),
    ('sequential', (1, 1, 1, 1), [1, 2, 3]),
    ('trunk', (0, 1, 0, 1), [1, 3]),
    ('trunk', (1, 0, 0, 0), []),
])
def test_a_future_needs_its_head_and_in_a_chain_those_it_depends_on(kind, active, heads):
  fields = {'kind': 'sequential', 'module_input': 'trunk'} if kind == 'trunk' else {'kind': kind}
  assert ModelConfig(**fields).heads_to_run(tuple(map(bool, active))) == heads


def test_the_defaults_are_valid():
  assert Config.from_dict({}) == Config()


def test_a_config_survives_json():
  config = Config(objective=ObjectiveConfig(weights=(1.0, '0 step 0.5 0.3')),
                  model=ModelConfig(kind='sequential'))
  assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_survives_ml_collections():
  config = Config(objective=ObjectiveConfig(weights=(1.0, '0 step 0.5 0.3')),
                  model=ModelConfig(kind='sequential'))
  values = config.to_config_dict()
  assert isinstance(values, ml_collections.ConfigDict) and values.is_locked
  assert Config.from_dict(values) == Config.from_dict(values.to_dict()) == config


@pytest.mark.parametrize('values, where, fix', WRONG.values(), ids=WRONG)
def test_bad_input_is_one_line_with_field_value_and_fix(values, where, fix):
  with pytest.raises(BadInput) as error:
    Config.from_dict(values)
  message = str(error.value)
  assert where in message and fix in message and '\n' not in message


@pytest.mark.parametrize('section, field, value',
                         [('model', 'layers', '8'), ('train', 'steps', 2.0),
                          ('data', 'paths', 'corpus')])
def test_a_config_built_in_python_is_checked_too(section, field, value):
  with pytest.raises(BadInput, match=f'config.{section}.{field}='):
    Config(**{section: SECTIONS[section](**{field: value})})


def test_an_int_becomes_a_float():
  config = Config(optimizer=OptimizerConfig(clip=2), objective=ObjectiveConfig(weights=(1, 2)))
  assert config == Config.from_dict({'optimizer': {'clip': 2}, 'objective': {'weights': [1, 2]}})
  assert type(config.optimizer.clip) is float
  assert [type(w) for w in config.objective.weights] == [float, float]
  # so that --config.optimizer.clip=0.5 fits the type
  assert type(config.to_config_dict().optimizer.clip) is float


def test_the_last_weight_repeats():
  assert ObjectiveConfig(weights=(1.0, 0.3)).weights_M(4) == (1.0, 0.3, 0.3, 0.3)
  assert ObjectiveConfig().weights_M(1) == (1.0,)


@pytest.mark.parametrize('fields, trunk_layers, modules', [
    ({}, 4, 4),
    ({'placement': 'appended'}, 7, 4),
    ({'futures': 1}, 8, 0),
    ({'kind': 'linear'}, 8, 4),
    ({'kind': 'linear', 'placement': 'appended', 'futures': 1}, 8, 0),
    ({'kind': 'causal'}, 4, 4),
    ({'kind': 'anticausal', 'placement': 'appended'}, 7, 4),
    ({'kind': 'sequential'}, 5, 3),
    ({'kind': 'sequential', 'placement': 'appended'}, 8, 3),
    ({'kind': 'sequential', 'share_modules': True}, 7, 1),
    ({'kind': 'sequential', 'share_modules': True, 'futures': 1}, 8, 0),
    ({'kind': 'sequential', 'futures': 1}, 8, 0),
])
def test_eight_layers_are_shared_between_trunk_and_futures(fields, trunk_layers, modules):
  config = Config(model=ModelConfig(**fields)).model
  assert (config.trunk_layers, config.own_heads) == (trunk_layers, modules)


def test_every_field_has_one_line_of_meaning():
  for section in typing.get_type_hints(Config).values():
    for field in dataclasses.fields(section):
      meaning = field.metadata['meaning']
      assert meaning and '\n' not in meaning, field.name


@pytest.mark.parametrize('path', CONFIGS, ids=[path.name for path in CONFIGS])
def test_every_config_file_builds(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert isinstance(Config.from_dict(module.get_config()), Config)


def test_checking_a_config_imports_no_jax():
  program = ('import sys; from mtp_jax.config import Config; '
             'Config.from_dict(Config().to_config_dict()); '
             'print([name for name in ("jax", "jaxlib", "flax") if name in sys.modules])')
  assert subprocess.run([sys.executable, '-c', program], capture_output=True, text=True,
                        check=True).stdout == '[]\n'


def test_a_chunk_of_0_is_the_largest_power_of_two_whose_logits_fit_within_bounds():
  fits = lambda chunk, vocab: 4 * chunk * vocab <= 2**28
  for vocab in (1, 264, 32_000, 65_536, 65_537, 102_400, 129_280, 262_144, 10**6):
    wanted = max([128, *(chunk for chunk in (256, 512, 1024) if fits(chunk, vocab))])
    assert ObjectiveConfig().positions(vocab) == wanted
    assert ObjectiveConfig(chunk=7).positions(vocab) == 7
