"""Arguments of any type at every public function and every flag: BadInput or success, nothing else."""
import dataclasses
import inspect
import pathlib

import hypothesis
import numpy as np
import pytest
from experiments import experiment, random_state, write
from hypothesis import strategies as st

import mtp_jax
from mtp_jax.cli.command import CONFIG
from mtp_jax.cli.main import COMMANDS, main
from mtp_jax.config import SECTIONS, BadInput, Config
from mtp_jax.decode.engine import Engine
from mtp_jax.decode.requests import Criterion

NUMBERS = st.one_of(st.integers(), st.sampled_from([0, 1, -1, 2**31, 2**63, 10**400]), st.floats(),
                    st.complex_numbers())
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=6), st.binary(max_size=6))
LISTS = st.lists(SCALARS, max_size=3)
OBJECTS = [object(), print, {1}, int, range(3), np.float32('nan'), np.zeros((2, 2)), np.array(['a']), iter([]),
           np.array([1, None]), np.array([True]), Config(), '\0', '~', '~nobody/x', '\udcff', b'\xff', '']
ANY = st.one_of(SCALARS, LISTS, st.lists(LISTS, max_size=3), LISTS.map(tuple),
                st.dictionaries(st.text(max_size=3), SCALARS, max_size=2), st.sampled_from(OBJECTS))
WORDS = ['', ' ', '-1', '0.5', 'nan', 'inf', '-inf', '1e400', '9' * 20, '9' * 400, 'None', '()', "('a',)", '{}', '[[',
         '(' * 300, '~', '~nobody/x', '/dev/null', '/dev/null/x', 'a' * 300, ':', ',', ',,', '://', 'nowhere://x', '*',
         '[', '\udcff', '%s', '\n']
TYPED = st.one_of(st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs']), max_size=6),
                  st.sampled_from(WORDS))


def times(examples: int):
  return hypothesis.settings(deadline=None, max_examples=examples, database=None, derandomize=True,
                             suppress_health_check=list(hypothesis.HealthCheck))


def allowed(call) -> None:
  try:
    call()
  except BadInput as error:
    assert str(error) and len(str(error).splitlines()) == 1, error


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A folder with documents/, tiny.py and run/, a checkpoint."""
  folder = tmp_path_factory.mktemp('any')
  config = experiment(folder)
  write(folder / 'run', config, random_state(config))
  (folder / 'tiny.py').write_text('from mtp_jax.config import Config\n\ndef get_config():\n'
                                  f'  return Config.from_dict({config.to_dict()!r}).to_config_dict()\n')
  return folder


@pytest.fixture(scope='module')
def lm(place):
  """It does not decode: what passes the checks would, for minutes if asked to."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Engine, 'run', None)
    patch.setattr(mtp_jax.LanguageModel, '_run', lambda *arguments: None)
    patch.setattr(mtp_jax.LanguageModel, '_adaptive_engine', lambda *arguments: None)
    yield mtp_jax.load(place / 'run')


@pytest.mark.parametrize('name', [name for name in inspect.signature(mtp_jax.LanguageModel.generate).parameters
                                  if name != 'self'])
@times(150)
@hypothesis.given(value=ANY)
def test_any_argument_of_generate_is_taken_or_refused(lm, name, value):
  allowed(lambda: lm.generate(**{'prompts': ['a', 'b'], name: value}))


@pytest.mark.parametrize('text', ['a\0', '\0', 'a\ud800', '\udcff', b'\xff' * 2**20, 'a' * 2**20, '\n' * 9, '🙂' * 3],
                         ids=lambda text: repr(text[:2]))
def test_any_text_is_a_prompt_a_stop_string_and_a_text_to_score_or_refused(lm, text):
  """Longer than a row it is refused as a prompt, and scored in windows."""
  allowed(lambda: lm.generate(text))
  allowed(lambda: lm.generate('a', stop=text))
  allowed(lambda: lm.score(text[:100]))


FUNCTIONS = {
    'row': lambda lm, x: lm.row(x),
    'drafter': lambda lm, x: lm.drafter(x, 1),
    'draft': lambda lm, x: lm.drafter('lookup', x),
    'prompts': lambda lm, x: lm.held_out_prompts(x, 3),
    'length of prompts': lambda lm, x: lm.held_out_prompts(1, x),
    'expected_speed_up': lambda lm, x: x is None or lm.expected_speed_up(x),
    'texts of evaluate': lambda lm, x: x is None or lm.evaluate(x),
    'rows of evaluate': lambda lm, x: x is None or type(x) in (int, float, bool) and x >= 1 or lm.evaluate(rows=x),
    'by of evaluate': lambda lm, x: lm.evaluate('a', by=x),
    'path of evaluate': lambda lm, x: isinstance(x, str) and lm.evaluate(pathlib.Path('nowhere', x)),
    'texts of score': lambda lm, x: lm.score(x),
    'futures of score': lambda lm, x: lm.score('a', futures=x),
    'top of score': lambda lm, x: lm.score('a', top=x),
    'overlap of score': lambda lm, x: lm.score('a', overlap=x),
    'load': lambda lm, x: mtp_jax.load(x),
    'criterion': lambda lm, x: Criterion(x),
    'threshold': lambda lm, x: Criterion('lossy_typical', x),
    'min_block': lambda lm, x: Criterion(min_block=x),
    'fit': lambda lm, x: isinstance(x, Config) or mtp_jax.fit(x, 'nowhere'),
    'from_dict': lambda lm, x: Config.from_dict(x),
    'section': lambda lm, x: Config.from_dict({'model': x}),
    'config': lambda lm, x: Config(train=x),
}


@pytest.mark.parametrize('call', FUNCTIONS.values(), ids=FUNCTIONS)
@times(150)
@hypothesis.given(value=ANY)
def test_any_argument_of_a_public_function_is_taken_or_refused(lm, call, value):
  allowed(lambda: call(lm, value))


@pytest.mark.parametrize('argument', ['step', 'tokenizer', 'data'])
@times(25)
@hypothesis.given(value=ANY)
def test_any_argument_of_load_is_taken_or_refused(lm, place, argument, value):
  allowed(lambda: mtp_jax.load(place / 'run', **{argument: value}))


@pytest.mark.parametrize('section, field', [(section, field.name) for section, kind in SECTIONS.items()
                                            for field in dataclasses.fields(kind)])
@times(40)
@hypothesis.given(value=ANY)
def test_any_value_of_a_field_is_taken_or_refused(section, field, value):
  allowed(lambda: Config.from_dict({section: {field: value}}))


BASE = {'config': 'tiny.py', 'workdir': 'run', 'prompt': 'a', 'text': 'a', 'input': 'nowhere', 'output': 'nowhere/x',
        'data': 'documents', 'topology': 'cpu'}
FLAGS = [(name, flag) for name, command in COMMANDS.items() for flag, *_ in command.flags
         if not (name == 'inspect' and flag == CONFIG[0])]


@pytest.mark.parametrize('command, flag', FLAGS, ids=str)
@times(12)
@hypothesis.given(value=TYPED)
def test_any_value_of_a_flag_is_taken_or_refused_in_one_line(place, command, flag, value):
  """What is taken is not run: the other flags name a folder or a topology that does not exist."""
  hypothesis.assume(not (flag in ('output', 'plot', 'workdir') and value.strip('./') == ''))
  base = {name: BASE[name] for name, default, _ in COMMANDS[command].flags if default is None and name in BASE}
  if command in ('inspect', 'goodput', 'evaluate', 'score', 'generate', 'benchmark decode'):
    base = {**base, 'workdir': 'nowhere'}
  if command == 'inspect':
    del base['config']
  if command in ('train', 'benchmark train', 'benchmark data', 'certify'):
    base['config'] = 'nowhere.py'
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(place)
    words = [*command.split(), *(f'--{name}={text}' for name, text in (base | {flag: value}).items())]
    assert main(words) in (0, 2)
