"""Decoding planned ahead of time: what a pass multiplies, moves and is worth, against counts by hand."""
import importlib.util
import json
import math

import jax
import pytest
from experiments import experiment, random_state, write, write_config_file

from mtp_jax.cli.main import main
from mtp_jax.config import BadInput, Config, DataConfig, MeshConfig, ModelConfig
from mtp_jax.measure.plan_decode import asked_bytes, decoding_sizes, plan_decode
from mtp_jax.model import costs
from mtp_jax.model.block import Block
from mtp_jax.model.model import Model

S, ACCEPTANCE = 64, [0.9, 0.5]


def small(**model) -> Config:
  """Compiles in seconds; two key heads."""
  return Config(ModelConfig(**{'vocab': 264, 'width': 64, 'layers': 5, 'heads': 4, 'kv_heads': 2, 'head_width': 16,
                               'feed_forward': 128, 'futures': 3} | model), data=DataConfig(length=S))


@pytest.mark.parametrize('kind', ['parallel', 'sequential'])
def test_a_pass_multiplies_what_its_tokens_need_and_speeds_up_by_its_tokens_over_its_cost(kind):
  """Without drafts the forward of one token a row, exactly; with two the forward of three tokens, and at most
  both heads over all three and over those that are computed again.
  """
  config, B = small(kind=kind), 4
  c = config.model
  plain, drafted = plan_decode(config, 'cpu:2', [B], [2], S, ACCEPTANCE)
  assert [(made.batch, made.draft, made.fits) for made in (plain, drafted)] == [(B, 0, True), (B, 2, True)]
  blocks, unembed = c.trunk_layers + (kind == 'parallel'), 2 * c.width * c.vocab
  token = blocks * Block.flops(c, S) + unembed
  head = Block.flops(c, S) + 4 * c.width**2 + unembed
  assert plain.flops == B * token
  assert 3 * B * token < drafted.flops <= 3 * B * token + 2 * 3 * B * head

  parameters = costs.parameters(jax.eval_shape(lambda: Model(c, jax.random.key(0))))['total']
  caches = 4 * 2 * blocks * B * S * c.kv_heads * c.head_width
  # what joins two states is whole on each device
  assert plain.parameter_bytes == pytest.approx(4 * parameters / 2, rel=0.15)
  assert plain.state_bytes == pytest.approx(caches / 2, rel=0.1)
  for made in (plain, drafted):
    assert made.hbm_bytes >= made.parameter_bytes + made.state_bytes
    assert made.memory_traffic_bytes > caches / 2 and made.pass_seconds == made.seconds['compute'] > 0
  assert drafted.sent_bytes > plain.sent_bytes > 0

  cost = drafted.pass_seconds / plain.pass_seconds
  assert plain.speed_up == plain.tokens_per_pass == 1 and drafted.tokens_per_pass == 1 + 0.9 + 0.9 * 0.5
  assert drafted.speed_up == pytest.approx(drafted.tokens_per_pass / cost)
  assert drafted.tokens_per_second == pytest.approx(B * drafted.tokens_per_pass / drafted.pass_seconds)


def test_a_pass_over_latents_multiplies_in_the_absorbed_form():
  """The matrices of a block, then scores and sums as wide as the latents, which all heads share."""
  config, B = small(attention='latent', kv_heads=4, kv_rank=24, rope_width=8, query_rank=32), 4
  c = config.model
  made, = plan_decode(config, 'cpu:1', [B], [0], S)
  blocks, latents = c.trunk_layers + 1, c.kv_rank + c.rope_width
  token = blocks * (Block.flops(c, 0) + 2 * c.heads * (latents + c.kv_rank) * S) + 2 * c.width * c.vocab
  assert made.flops == B * token
  assert made.state_bytes == pytest.approx(4 * blocks * B * S * latents, rel=0.1)


def test_one_device_multiplies_the_same_and_sends_nothing():
  one, two = (plan_decode(small(), f'cpu:{n}', [1], [0], S)[0] for n in (1, 2))
  assert one.flops == two.flops and one.sent_bytes == 0 < two.sent_bytes
  assert two.parameter_bytes < 0.6 * one.parameter_bytes


def test_chips_go_to_the_tensor_axis_as_far_as_they_divide_it_and_the_rest_to_fsdp():
  sizes = lambda chips, **model: decoding_sizes(small(**model), chips, 'chips')
  assert sizes(8) == MeshConfig(tensor=2, fsdp=4)
  assert sizes(8, kv_heads=4) == MeshConfig(tensor=4, fsdp=2)
  assert sizes(1) == MeshConfig()
  with pytest.raises(BadInput, match='--topology=chips: 6 chips divide neither heads'):
    sizes(6)


def test_what_a_refused_program_asks_for_is_read_in_the_compilers_words():
  text = 'RESOURCE_EXHAUSTED: XLA:TPU compile error. Ran out of memory in memory space hbm. Used {} of 15G hbm.'
  assert asked_bytes(ValueError(text.format('20.50G'))) == 20.5 * 2**30
  assert asked_bytes(ValueError(text.format('1.5T'))) == 1.5 * 2**40
  assert math.isnan(asked_bytes(ValueError('RESOURCE_EXHAUSTED')))


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """small.py and run/, a run of such a model with a log of two validations."""
  folder = tmp_path_factory.mktemp('plan')
  config = experiment(folder, model={'futures': 3, 'layers': 4}, data={'length': 32})
  write_config_file(folder / 'small.py', config)
  write(folder / 'run', config, random_state(config))
  write(folder / 'silent', config, random_state(config))
  records = [{'step': step, 'kind': kind, **({'acceptance_greedy': rates} if kind == 'validation' else {})}
             for step, kind, rates in ((1, 'validation', [0.1, 0.1]), (3, 'validation', [0.8, 0.6]), (3, 'train', []))]
  (folder / 'run' / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
  return folder


def test_acceptance_comes_from_a_flag_or_from_the_newest_validation_of_a_run(place, capsys):
  def plans(*flags):
    assert main(['plan', '--decode', '--topology=cpu:2', '--json', *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])['plans']

  of_run = plans(f'--workdir={place / "run"}')
  given = plans(f'--config={place / "small.py"}', '--acceptance=0.8,0.6')
  assert [made['tokens_per_pass'] for made in of_run] == pytest.approx([1, 1.8, 1.8 + 0.8 * 0.6])
  for made, other in zip(of_run, given, strict=True):
    assert (made['slots'], made['flops']) == (64, other['flops'])
    assert made['speed_up'] == pytest.approx(other['speed_up'])
  assert main(['plan', '--decode', '--topology=cpu:2', f'--workdir={place / "run"}', '--batch=1,2', '--draft=1']) == 0
  printed = capsys.readouterr().out.splitlines()
  assert printed[0].startswith('decoding on 2 chips of cpu:2: tensor 2') and 'acceptance by depth 0.8 0.6' in printed[1]
  assert [line.split()[:2] for line in printed[3:7]] == [['1', '0'], ['1', '1'], ['2', '0'], ['2', '1']]


@pytest.mark.parametrize('flags, message', [
    ('--config=small.py --batch=0', '--batch=0: must be numbers of rows decoded at once, such as 1,8,64'),
    ('--config=small.py --batch=1;8', '--batch=1;8: must be'),
    ('--config=small.py --draft=3', '--draft=3: this model has 3 futures, so 0 to 2 can draft'),
    ('--config=small.py --acceptance=0.9', '--acceptance: 1 depths, but 2 drafts'),
    ('--config=small.py --acceptance=0.9,1.5', '--acceptance=0.9,1.5: must be numbers from 0 to 1'),
    ('--config=small.py --acceptance=high', '--acceptance=high: must be numbers from 0 to 1'),
    ('--config=small.py --max_length=-1', '--max_length=-1: must be at least 0'),
    ('--config=small.py --sweep', '--sweep: not together with --decode'),
    ('--config=small.py --config.mesh.fsdp=4', 'config.mesh: 4 devices, but cpu:2 has 2'),
    ('--workdir=silent', '--workdir=silent: no validation has measured the acceptance of drafts; give --acceptance'),
    ('', '--config: missing'),
], ids=str)
def test_bad_input_is_one_line(place, monkeypatch, capsys, flags, message):
  monkeypatch.chdir(place)
  assert main(['plan', '--decode', '--topology=cpu:2', *flags.split()]) == 2
  lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith('compiling')]
  assert len(lines) == 1 and message in lines[0]


def test_flags_of_decoding_need_it(place, monkeypatch, capsys):
  monkeypatch.chdir(place)
  assert main(['plan', '--config=small.py', '--topology=cpu:2', '--batch=8']) == 2
  assert '--batch: only together with --decode' in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                    reason="needs the TPU compiler: pip install -e '.[tpu]'")
@pytest.mark.slow
def test_caches_that_fill_a_chip_do_not_fit_and_half_of_them_do():
  """On a chip of 16 GiB, with the chip's own words on how much they ask for."""
  config = small(width=1024, heads=16, kv_heads=16, head_width=128, feed_forward=1024, dtype='bfloat16', futures=1,
                 layers=1)
  row = 2 * 2 * 16 * 128 * 2**16  # bytes of a row of 65,536 slots: 0.5 GiB
  half, whole = plan_decode(config, 'v5e:1x1', [12, 40], [0], 2**16)
  assert half.fits and 12 * row <= half.state_bytes <= half.hbm_bytes < half.hbm_capacity_bytes == 16 * 2**30
  assert not whole.fits and not whole.hbm_bytes < 40 * row and math.isnan(whole.pass_seconds)
