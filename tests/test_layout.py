"""The house: rooms import only rooms below them, each third-party door is in one room, files and
lines are short.
"""
import ast
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from experiments import LATENT, experiment, random_state, write

import mtp_jax
from mtp_jax.config import Config, DataConfig, ObjectiveConfig, TrainConfig
from mtp_jax.evaluation import held_out
from mtp_jax.train import step as training

SOURCE = pathlib.Path(mtp_jax.__file__).parent
ROOT = SOURCE.parents[1]
FILES = sorted(SOURCE.rglob('*.py'))
TEXTS = [path for folder in ('src', 'tests', 'configs', 'docs', 'notebooks', 'launch')
         for path in sorted((ROOT / folder).rglob('*.py'))]

# From the top floor down: a room may import only rooms below its own floor.
FLOORS = ['__init__ __main__', 'cli', 'measure', 'harness', 'lm', 'formats', 'train', 'evaluation', 'decode',
          'objective', 'model', 'data', 'checkpoint', 'report', 'mesh', 'sharding', 'tokenizer', 'chips', 'programs',
          'config']
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
DOORS = {'orbax': 'checkpoint', 'grain': 'data', 'fsspec': 'data', 'array_record': 'data', 'ml_collections': 'config',
         'etils': 'config', 'tensorboardX': 'report', 'wandb': 'report', 'rich': 'report', 'matplotlib': 'report',
         'transformers': 'formats', 'lm_eval': 'harness'}


def room(path: pathlib.Path) -> str:
  return path.relative_to(SOURCE).parts[0].removesuffix('.py')


def imports(path: pathlib.Path) -> set[str]:
  """The modules that a file imports, wherever in it: 'mtp_jax.model.block', 'jax', 'jax.numpy'."""
  modules = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      modules |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: imports are absolute'
      modules |= {f'{node.module}.{alias.name}' for alias in node.names}
  return modules


def test_every_file_is_in_a_room_of_the_table():
  assert {room(path) for path in FILES} == set(FLOOR)


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path):
  own = FLOOR[room(path)]
  rooms = {module.split('.')[1] for module in imports(path) if module.startswith('mtp_jax.')} & set(FLOOR)
  above = {target for target in rooms - {room(path)} if FLOOR[target] <= own}
  assert not above or room(path) in ('__init__', '__main__')


@pytest.mark.parametrize('package, home', DOORS.items())
def test_a_package_enters_by_one_door(package, home):
  assert {room(path) for path in FILES if any(module.split('.')[0] == package for module in imports(path))} == {home}


@pytest.mark.parametrize('home', ['config', 'checkpoint/record.py', 'data', 'decode/requests.py', 'report'])
def test_what_refuses_bad_input_does_so_without_jax(home):
  paths = [SOURCE / home] if home.endswith('.py') else (SOURCE / home).rglob('*.py')
  assert not [path for path in paths
              if any(module.split('.')[0] in ('jax', 'flax', 'optax') for module in imports(path))]


def test_no_file_is_longer_than_400_lines():
  lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in TEXTS if path.suffix == '.py'}
  assert not {name: length for name, length in lengths.items() if length > 400}


def test_no_line_is_longer_than_120_characters_and_few_are_longer_than_100():
  lines = [(path, number, line) for path in TEXTS for number, line in enumerate(path.read_text().splitlines(), 1)]
  long = [f'{path.relative_to(ROOT)}:{number}' for path, number, line in lines if len(line) > 120]
  assert not long
  source = [line for path, _, line in lines if SOURCE in path.parents]
  assert sum(len(line) > 100 for line in source) < 0.05 * len(source)


# One letter, one meaning: the table in the header of sharding.py.
NAME = re.compile(r'[a-z]\w*_[A-Za-z0-9]*[A-Z][A-Za-z0-9]*')

def alphabet() -> dict[str, int]:
  """Every letter of the table, and how often it is explained."""
  header = ast.get_docstring(ast.parse((SOURCE / 'sharding.py').read_text())).partition('`x_BLD`')[0]
  tables = [line for line in header.splitlines() if line.startswith('    ')]
  found = re.findall(r'(?:(?<=  )|(?<=^    ))([A-Za-z](?: [a-z](?=  ))?) (?=\S| )', '\n'.join(tables), re.M)
  letters = [letter for entry in found for letter in entry.split()]
  return {letter: letters.count(letter) for letter in letters}


def test_every_letter_is_explained_once():
  counts = alphabet()
  assert set('BLSDCHGKJAUFVENMTPR') <= set(counts) and set('dlgntrhxpikwo') <= set(counts)
  assert set(counts.values()) == {1}


def names(path: pathlib.Path) -> set[str]:
  """Names and attributes that end in axes: a noun, '_', and letters of which one at least is upper
  case, or digits.
  """
  tree = ast.parse(path.read_text())
  found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
  found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
  found |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
  return {name for name in found if NAME.fullmatch(name)}


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_tensors_letters_are_those_of_the_alphabet(path):
  unknown = {name for name in names(path) if set(re.sub(r'\d', '', name.rpartition('_')[2])) - set(alphabet())}
  assert not unknown


def sizes_in(run) -> tuple[dict[str, set[int]], list[str]]:
  """Of all arrays that are locals of our functions when they return: the sizes of each letter over
  the run, and the functions within which a letter has two."""
  sizes, twice = {}, []

  def look(frame, event, _):
    if event != 'return' or not frame.f_code.co_filename.startswith(str(SOURCE)):
      return
    here = {}
    for name, value in list(frame.f_locals.items()):
      letters, shape = name.rpartition('_')[2], getattr(value, 'shape', None)
      if NAME.fullmatch(name) and isinstance(shape, tuple) and len(shape) == len(letters):
        for letter, size in zip(letters, shape):
          if letter.isdigit():
            assert size == int(letter), f'{name} in {frame.f_code.co_name} has shape {shape}'
          else:
            here.setdefault(letter, set()).add(size)
    for letter, found in here.items():
      sizes.setdefault(letter, set()).update(found)
      if len(found) > 1:
        twice.append(f'{letter} is {sorted(found)} in {frame.f_code.co_filename}:{frame.f_code.co_name}')

  sys.setprofile(look)
  try:
    run()
  finally:
    sys.setprofile(None)
  return sizes, twice


def test_a_letter_has_one_size_in_a_step_and_an_evaluation_of_unequal_sizes(tiny, random_model, packed, variant):
  """Where all sizes differ (B 6, L 10, M 3, T 13, ...), one letter with two meanings would have two
  sizes.
  """
  check_letters_of_a_step(tiny(**variant), random_model, packed)


def test_a_letter_has_one_size_with_latent_attention(tiny, random_model, packed):
  check_letters_of_a_step(tiny(kind='sequential', **LATENT), random_model, packed,
                          {'G': 4, 'J': 14, 'A': 40, 'U': 56, 'Q': 10})


def check_letters_of_a_step(c, random_model, packed, changes=types.MappingProxyType({})):
  config = Config(c, ObjectiveConfig(chunk=7), DataConfig(length=10), train=TrainConfig(batch=6))
  model, batch, ones = random_model(config.model), packed(config.model, 6, 10), jnp.ones(24, jnp.int32)

  def run():
    state = jax.eval_shape(lambda: training.init(config, jax.random.key(0)))
    jax.eval_shape(lambda state: training.step(config, state, batch, ones, jnp.ones(3), (True,) * 3), state)
    jax.eval_shape(lambda: held_out.evaluate_batch(config, model, batch, ones, ones > 0))

  sizes, twice = sizes_in(run)
  assert not twice
  known = {'B': 6, 'L': 10, 'S': 10, 'M': 3, 'D': 16, 'H': 4, 'G': 2, 'K': 8, 'V': 24, 'P': 1, 'T': 13, 'F': 20,
           'C': 32, 'Q': 20, 'E': 12, 'W': 10, 'J': 8} | changes
  assert {letter: found for letter, found in sizes.items() if letter.isupper()} == {
      letter: {known[letter]} for letter in sizes if letter.isupper()}
  assert set('BLSDHGKVMPt') <= set(sizes)


@pytest.mark.parametrize('attention', [{'kv_heads': 1}, LATENT | {'kv_heads': 2}], ids=['grouped', 'latent'])
def test_a_letter_has_one_size_in_every_function_of_a_decoder(tmp_path, family, attention):
  """Prompts of up to 32 tokens in 64 slots; a pass reads 4 tokens, 3 of them drafts."""
  config = experiment(tmp_path, model={'vocab': 259, 'layers': 5, 'futures': 4, **attention, **family})
  write(tmp_path / 'run', config, random_state(config))
  lm = mtp_jax.load(tmp_path / 'run')
  jax.clear_caches()  # so that every function is traced again
  sizes, twice = sizes_in(lambda: lm.generate(['ab', 'b', 'abc'], max_tokens=40, draft=3, max_length=60,
                                              temperature=0.7, top_k=9))
  assert not twice
  known = {'B': {3}, 'D': {16}, 'H': {2}, 'K': {8}, 'V': {259}, 'F': {24}, 'p': {32}, 'S': {32, 64}}
  known |= {'A': {40}, 'U': {56}, 'J': {14}} if 'kv_rank' in attention else {'G': {1}}
  assert {letter: sizes.get(letter) for letter in known} == known
  assert {3} <= sizes['k'] <= {0, 3} and {4, 32} <= sizes['i']
