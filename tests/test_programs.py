"""Compiled programs are kept on disk: the next process compiles nothing again, whoever else uses the folder."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CHILD = """
import json, sys
import jax, jax.numpy as jnp
from mtp_jax import programs
from mtp_jax.config import Config, DataConfig, TrainConfig
jax.jit(lambda x: x - 1)(1.0)  # a notebook's own first program
programs.LEAST_SECONDS = 0
counts = {'cache_hits': 0, 'cache_misses': 0}
def count(event, **_):
  name = event.rpartition('/')[2]
  if name in counts:
    counts[name] += 1
jax.monitoring.register_event_listener(count)
kept = TrainConfig(programs_kept=sys.argv[2] == 'True')
programs.keep_programs(Config(data=DataConfig(cache=sys.argv[1]), train=kept))
found = float(jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.ones((8, 8))))
print(json.dumps([counts['cache_hits'], counts['cache_misses'], found]))
"""


def start(cache: pathlib.Path, kept: bool = True, **environment) -> subprocess.Popen:
  variables = {name: value for name, value in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'}
  return subprocess.Popen([sys.executable, '-c', CHILD, str(cache), str(kept)], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables | environment)


def result(process: subprocess.Popen) -> tuple[list, str]:
  """([hits, misses, what was computed], stderr)"""
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  return json.loads(out), err


def files(cache: pathlib.Path) -> list[pathlib.Path]:
  return [path for path in cache.rglob('*-cache') if path.is_file()]


def test_a_second_process_finds_every_program_of_the_first(tmp_path):
  (hits, misses, first), _ = result(start(tmp_path))
  assert hits == 0 < misses and len(files(tmp_path)) == misses
  (hits, misses_again, second), said = result(start(tmp_path))
  assert (hits, misses_again) == (misses, 0) and second == first and not said


def test_processes_that_start_together_agree(tmp_path):
  (_, _, first), (_, _, second) = (result(process)[0] for process in [start(tmp_path), start(tmp_path)])
  assert first == second
  (_, misses, third), _ = result(start(tmp_path))
  assert misses == 0 and third == first


def test_a_program_that_was_cut_off_is_compiled_again(tmp_path):
  (_, misses, first), _ = result(start(tmp_path))
  for path in files(tmp_path):
    path.write_bytes(path.read_bytes()[:-100])
  (_, _, again), said = result(start(tmp_path))
  assert again == first and 'Traceback' not in said


@pytest.mark.parametrize('kept, environment', [(False, {}), (True, {'JAX_COMPILATION_CACHE_DIR': 'own'})])
def test_no_folder_is_made_where_that_is_turned_off_or_jax_has_one(tmp_path, kept, environment):
  environment = {name: str(tmp_path / value) for name, value in environment.items()}
  result(start(tmp_path / 'cache', kept, **environment))
  assert not (tmp_path / 'cache').exists()


def test_a_cache_that_cannot_be_written_changes_nothing(tmp_path):
  (tmp_path / 'file').write_text('')
  (hits, misses, _), said = result(start(tmp_path / 'file'))
  assert (hits, misses) == (0, 0) and not said
