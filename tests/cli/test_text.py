"""Text reaches the model byte for byte, and any generation can be printed."""
import io
import os
import subprocess
import sys

import pytest

from mtp_jax import tokenizer
from mtp_jax.lm import LanguageModel


@pytest.fixture
def prompts(run, monkeypatch):
  """prompts(flags): the prompt and the stop strings that the model gets."""
  def go(flags: list[str]) -> tuple:
    caught = []
    generate = LanguageModel.generate

    def catch(self, prompt, *arguments, stop, **options):
      caught.append((prompt, stop))
      return generate(self, 'a', *arguments, **options)
    monkeypatch.setattr(LanguageModel, 'generate', catch)
    from mtp_jax.cli.main import main
    run('help')  # in the folder
    assert main(['generate', '--workdir=run', '--max_tokens=1', '--draft=0', *flags]) == 0
    return caught[0]
  return go


@pytest.mark.parametrize('flags, prompt', [
    (['--prompt=' + os.fsdecode(b'\xff\xfea')], b'\xff\xfea'),
    (['--prompt=é'], 'é'.encode()),
    ([r'--prompt=a\n'], rb'a\n'),
    ([r'--prompt=a\n\x41\101\\n\"', '--escapes'], b'a\nAA\\n"'),
    (['--prompt_file=prompt'], b'line\n\xff\n'),
    (['--prompt_file=-'], b'of stdin\n\x00'),
])
def test_a_prompt_is_the_bytes_that_were_typed(prompts, place, monkeypatch, flags, prompt):
  (place / 'prompt').write_bytes(b'line\n\xff\n')
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'of stdin\n\x00')))
  assert prompts(flags) == (prompt, ())


@pytest.mark.parametrize('flags, stop', [
    ([r'--stop=\n'], rb'\n'), ([r'--stop=\n', '--escapes'], b'\n'), (['--stop=' + os.fsdecode(b'\xff')], b'\xff')])
def test_a_stop_string_is_the_bytes_that_were_typed(prompts, flags, stop):
  assert prompts(['--prompt=a', *flags])[1] == stop


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'utf-8'])
def test_what_a_terminal_cannot_print_is_escaped_and_nothing_is_lost(place, encoding):
  command = [sys.executable, '-m', 'mtp_jax', 'generate', '--workdir=run', '--prompt=é→', '--max_tokens=4', '--draft=0']
  done = subprocess.run(command, cwd=place, capture_output=True, env=os.environ | {'PYTHONIOENCODING': encoding})
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('é→'.encode(encoding, errors='backslashreplace'))
  assert b'tokens per forward' in done.stdout


def test_text_and_bytes_are_the_same_stop_string():
  from mtp_jax.decode.detokenizer import Detokenizer
  for stop in ('é', 'é'.encode()):
    text = Detokenizer(tokenizer.load('bytes'), [stop])
    text.add(list('aébc'.encode()), last=True)
    assert text.stopped and text.text == 'a'


@pytest.mark.parametrize('escape', [r'\8', r'\9', r'\q', '\\', r'\x4', r'\777'])
def test_an_escape_that_is_none_is_one_line(run, escape):
  code, _, err = run(f"generate --workdir=run --escapes --prompt='{escape}'")
  assert code == 2 and len(err) == 1 and 'no such escape' in err[0]
