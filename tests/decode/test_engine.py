"""Shapes, programs and reads of the host: what a request costs, however many there are of them."""
import dataclasses
import gc

import jax
import numpy as np
import pytest
from experiments import generate_clearly, random_lm

from mtp_jax.decode import engine
from mtp_jax.decode.engine import Engine, batch_size, measure_pass_seconds
from mtp_jax.decode.requests import sampling_parameters


@pytest.fixture(scope='module')
def lm(tmp_path_factory):
  return random_lm(tmp_path_factory.mktemp('engine'), model={'layers': 4, 'futures': 3}, objective={'weights': (1.0,)},
                   data={'length': 128})


class Clock:
  """Time that passes only when it is told to, but for a nanosecond a look."""
  now = 0.0

  def perf_counter(self) -> float:
    self.now += 1e-9
    return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
  monkeypatch.setattr(engine, 'time', Clock())
  return engine.time


def compiled(caplog, call) -> list[str]:
  """The decoding programs that the call compiles, by name."""
  caplog.clear()
  with jax.log_compiles(), caplog.at_level('WARNING'):
    call()
  messages = [message for message in caplog.messages if message.startswith('Finished XLA compilation')]
  return [name for name in ('prefill', 'decode_passes') for message in messages if name in message]


def test_a_batch_is_filled_up_to_one_of_few_sizes():
  sizes = [batch_size(rows) for rows in range(1, 1025)]
  assert sizes[:9] == [1, 2, 3, 4, 6, 6, 8, 8, 12]
  assert all(rows <= size <= 1.5 * rows for rows, size in enumerate(sizes, 1))
  assert len(set(sizes)) == 20


@pytest.mark.parametrize('sizes', [(5, 6), (8, 7), (9, 12, 11)], ids=str)
def test_batches_of_similar_size_share_their_programs(lm, caplog, sizes):
  first, *others = ([f'{i}' for i in range(rows)] for rows in sizes)
  options = {'max_tokens': 7, 'draft': 1}
  lm.generate(first, **options)
  for prompts in others:
    assert not compiled(caplog, lambda prompts=prompts: lm.generate(prompts, **options))


def test_a_batch_that_is_filled_up_generates_what_its_prompts_generate_alone(lm):
  prompts = [f'{i * i} é' for i in range(5)]
  for options in ({'draft': 1}, {'draft': 1, 'temperature': 0.8, 'seed': [3, 1, 4, 1, 5]}):
    together = generate_clearly(lm, prompts, max_tokens=12, **options)
    assert len(together.ids) == len(together.text) == 5
    for i, prompt in enumerate(prompts):
      alone = {name: value[i] if isinstance(value, list) else value for name, value in options.items()}
      assert lm.generate(prompt, max_tokens=12, **alone).ids[0] == together.ids[i]
    assert together.tokens == sum(map(len, together.ids))


def test_requests_of_one_shape_share_their_programs(lm, caplog):
  """Whatever the prompts, limits, seeds, stop strings and streams, and when passes are timed."""
  options = {'max_tokens': 7, 'draft': 1}
  assert compiled(caplog, lambda: lm.generate(['abc', 'de'], **options))
  sampler = lm.sampler(*sampling_parameters(2))
  one_draft = lm.engine(lm.drafter(draft=1), sampler, (1,))
  for call in (
      lambda: lm.generate(['x' * 20, 'yz'], seed=5, **options),
      lambda: lm.generate(['x', 'y' * 15], max_tokens=9, draft=1),
      lambda: lm.generate(['x', 'y'], stop='z', **options),
      lambda: lm.generate(['x', 'y'], stream=lambda *_: None, **options),
      lambda: measure_pass_seconds([one_draft], [lm.row('ab'), lm.row('c')], [9, 10])):
    assert not compiled(caplog, call)


def test_however_many_shapes_are_asked_for_few_programs_are_kept(lm, monkeypatch):
  """And a shape whose programs were dropped is decoded as before."""
  few = engine.functools.lru_cache(maxsize=4)(engine._compiled.__wrapped__)
  monkeypatch.setattr(engine, '_compiled', few)
  programs, texts, client = [], [], jax.local_devices()[0].client
  for max_tokens in (5, 40, 70, 100, 5):
    texts.append(lm.generate('ab', max_tokens=max_tokens, draft=0).ids[0])
    gc.collect()
    programs.append(len(client.live_executables()))
  assert programs[1:] == [programs[1]] * 4  # two a shape
  assert texts[0] == texts[-1]


@pytest.mark.parametrize('pass_seconds', [1e-5, 1e-3, 0.1, 3.0])
def test_the_device_never_runs_long_before_the_host_is_back(lm, clock, monkeypatch, pass_seconds):
  """So that Ctrl-C is heard, however long the text and however slow a pass; and the host is back
  seldom, so that passes wait for nothing.
  """
  asked, decode_passes = [], Engine.decode_passes
  plain = generate_clearly(lm, ['ab', 'c'], max_tokens=100, draft=0)

  def timed(self, state, passes=engine.UNLIMITED):
    asked.append(int(passes))
    clock.now += pass_seconds * min(int(passes), 100)
    return decode_passes(self, state, passes)

  monkeypatch.setattr(Engine, 'decode_passes', timed)
  assert lm.generate(['ab', 'c'], max_tokens=100, draft=0).ids == plain.ids
  assert asked[0] <= 8 and all(passes == 1 or passes * pass_seconds <= 1 for passes in asked[1:])
  if pass_seconds < 1e-2:
    assert len(asked) <= 4


SLOWNESS = {
    'slow at first': lambda now: 10 if now < 1.3 else 1,
    'slow at last': lambda now: 1 if now < 0.4 else 10,
    'slower and slower': lambda now: 1 + now / 4,
    'in waves': lambda now: 1.5 + np.sin(20 * now)}


@pytest.mark.parametrize('slowness', SLOWNESS.values(), ids=SLOWNESS)
def test_what_slows_the_machine_slows_every_draft_length(lm, clock, monkeypatch, slowness):
  """Timed in alternation, a draft costs what it costs, within the slowing of a single round."""
  def timed(self, state, passes=1):
    clock.now += 1e-3 * int(passes) * (1 + 0.1 * self.drafter.depth) * slowness(clock.now)
    return state

  monkeypatch.setattr(Engine, 'decode_passes', timed)
  seconds = lm.seconds_per_forward()
  np.testing.assert_allclose(np.array(seconds) / seconds[0], [1, 1.1, 1.2], rtol=0.06)


@pytest.mark.parametrize('prompts', [1, 3])
@pytest.mark.parametrize('options', [{'draft': 0}, {'draft': 2}, {'draft': 3, 'drafter': 'lookup'}], ids=str)
def test_with_a_stop_string_the_figures_are_of_the_passes_up_to_it(lm, prompts, options):
  """They are those of a generation whose limits are where the stop string ended it."""
  prompts = [f'{i * i} é' for i in range(prompts)]
  free = generate_clearly(lm, prompts, max_tokens=60, **options)
  stop = [lm.tokenizer.decode(row[10:12]).decode(errors='ignore') for row in free.ids]
  stop = [string for string in stop if string]
  stopped = lm.generate(prompts, max_tokens=60, stop=stop, **options)
  lengths = [len(row) for row in stopped.ids]
  assert stop and min(lengths) < 60
  limited = lm.generate(prompts, max_tokens=lengths, **options)
  figures = lambda generation: {name: getattr(generation, name) for name in (
      'ids', 'depths', 'tokens', 'forwards', 'tokens_per_forward', 'offered', 'accepted', 'passes')}
  assert figures(stopped) == figures(limited)
  if options['draft'] == 0:
    assert stopped.tokens_per_forward == 1


def test_an_engine_with_several_lengths_times_each_of_them_by_one_program(lm, clock, monkeypatch):
  def timed(self, state, passes=1):
    length = self.lengths[0 if self.pass_costs is None else int(np.argmin(self.pass_costs))]
    clock.now += int(passes) * (1 + length)
    return state

  monkeypatch.setattr(Engine, 'decode_passes', timed)
  sampler = lm.sampler(*sampling_parameters(1))
  for lengths in ((2,), (1, 2)):
    several = lm.engine(lm.drafter(draft=2), sampler, lengths)
    seconds = measure_pass_seconds(several.of_each_length(), [lm.row('ab')], [20])
    np.testing.assert_allclose(seconds, [1 + length for length in lengths], rtol=1e-6)
    assert dataclasses.replace(several, pass_costs=seconds).key([lm.row('ab')], [20]) == several.key(
        [lm.row('b')], [30])
