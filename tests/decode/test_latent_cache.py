"""Decoding with latent attention, every kind of model: the text of an uncached forward, on one device and on eight."""
import math
import re

import jax
import numpy as np
import pytest
from decoding import (
  LENGTHS_B,
  LIMITS_B,
  NEVER,
  M,
  PROMPTS_Bp,
  S,
  decode_passes,
  equal_where_settled,
  generate,
  half_trained_models,
  rows,
  settled_lengths,
  start,
  tallies,
  uncached,
)
from experiments import FAMILIES, LATENT

from mtp_jax.config import MeshConfig
from mtp_jax.decode.placement import MeshCache, decoding_mesh
from mtp_jax.measure.hlo import arrays, parse, size_bytes
from mtp_jax.measure.traffic import SENT_BYTES
from mtp_jax.mesh import make_mesh
from mtp_jax.sharding import letters

KINDS = {name: LATENT | FAMILIES[name] for name in
         ('parallel', 'linear', 'causal', 'anticausal', 'post_norm', 'trunk', 'experts')}
KINDS['whole queries'] = LATENT | FAMILIES['trunk'] | FAMILIES['pre_norm'] | {'query_rank': 0}


@pytest.fixture(scope='module')
def trained(tiny, random_model):
  return half_trained_models(tiny, random_model)


def mesh_of(**sizes):
  return decoding_mesh(make_mesh(MeshConfig(**sizes)))


def latents(state) -> list:
  """Every latent array of a state, trunk and drafter."""
  return [x for x in jax.tree.leaves((state.caches, state.memory)) if x.shape[2:] in ((40,), (6,))]


@pytest.mark.parametrize('kind', KINDS)
def test_every_draft_length_generates_what_an_uncached_forward_generates(trained, kind):
  model = trained(KINDS[kind])
  free = lambda m: uncached(m, PROMPTS_Bp, LENGTHS_B, LIMITS_B, NEVER)
  text, settled, forwards = free(model), settled_lengths(model, free), []
  for draft in (0, 1, M - 1):
    state = generate(model, PROMPTS_Bp, draft=draft)
    assert equal_where_settled(rows(state), text, settled) and state.done_B.all()
    forwards.append(int(tallies(state)[0].sum()))
  assert tallies(state)[2].any(0)[:2].all()  # drafts of depth 1 and 2 were accepted
  assert forwards[0] == (LIMITS_B - LENGTHS_B).sum() and forwards[-1] < forwards[0]


@pytest.mark.parametrize('kind', ['parallel', 'causal', 'post_norm', 'trunk', 'experts', 'whole queries'])
def test_a_mesh_of_eight_devices_generates_what_one_device_generates(trained, kind):
  model, mesh = trained(KINDS[kind]), mesh_of(fsdp=4, tensor=2)
  one_device = lambda m: rows(generate(m, PROMPTS_Bp, draft=M - 1))
  state = generate(model, PROMPTS_Bp, draft=M - 1, mesh=mesh)
  assert equal_where_settled(rows(state), one_device(model), settled_lengths(model, one_device))


@pytest.mark.parametrize('lengths', [(0,), (M - 1,), (1, 2, M - 1)], ids=str)
@pytest.mark.parametrize('kind', ['parallel', 'post_norm'])
def test_no_pass_copies_or_transposes_latents(tiny, random_model, kind, lengths):
  """In the compiled loop, of one row and of several: every array of the state is updated in place."""
  for n in (1, 3):
    parts, state = start(random_model(tiny(futures=M, **KINDS[kind])), PROMPTS_Bp[:n], LENGTHS_B[:n], LIMITS_B[:n],
                         draft=max(lengths))
    pass_costs = np.ones(len(lengths), np.float32) if len(lengths) > 1 else None
    text = decode_passes.lower(*parts, state, NEVER, np.int32(5), pass_costs, lengths=lengths).compile().as_text()
    shapes = {x.shape for x in latents(state)}
    assert shapes == {(n, S + 8, 40), (n, S + 8, 6)}
    for rows_, slots, width in shapes:
      assert f'f32[{rows_},{slots},{width}]' in text
      for shape in (f'{rows_},{slots},{width}', f'{rows_},{width},{slots}', f'{slots},{width}', f'{width},{slots}'):
        assert not re.findall(rf'= f32\[{shape}\]\S* (?:copy|transpose)\(', text)
    assert text.split('entry_computation_layout')[0].count('-alias') == len(jax.tree.leaves(state))


@pytest.mark.parametrize('sizes, n', [({'fsdp': 4, 'tensor': 2}, 4), ({'context': 2, 'fsdp': 2, 'tensor': 2}, 1)],
                         ids=str)
def test_devices_hold_the_latents_of_their_rows_and_a_pass_sends_activations_alone(trained, sizes, n):
  """Devices that read for other heads hold the same latents. Ranks are over fsdp and heads over tensor."""
  mesh = mesh_of(**sizes)
  batch = (x[3:3 + n] if n == 1 else x[:n] for x in (PROMPTS_Bp, LENGTHS_B, LIMITS_B))
  parts, state = start(trained(KINDS['post_norm']), *batch, draft=2, mesh=mesh)
  part = lambda x: x.addressable_shards[0].data.size
  for path, x in jax.tree_util.tree_leaves_with_path(parts[0]):
    axes = {'D': (), 'A': (), 'U': (), 'CD': ('fsdp',), 'DA': ('fsdp',), 'DU': ('fsdp',), 'Do': ('fsdp',)}
    named = axes.get(letters(path), ('fsdp', 'tensor'))
    assert part(x) == x.size // math.prod(mesh.shape[axis] for axis in named), jax.tree_util.keystr(path)
  in_state = jax.tree.leaves((state.caches, state.memory), is_leaf=lambda x: isinstance(x, MeshCache))
  caches = [x for x in in_state if isinstance(x, MeshCache)]
  assert len(caches) == len(parts[0].layers) + 2
  assert all(part(x) == x.size // n for x in jax.tree.leaves(caches))

  text = decode_passes.lower(*parts, state, NEVER, np.int32(5), lengths=(2,)).compile().as_text()
  sent = [array for lines in parse(text)[0].values() for line in lines.values()
          if line.kind.removesuffix('-start') in SENT_BYTES for array in arrays(line.type)]
  assert sent
  if n == 1:  # activations of one row are smaller than any matrix of a head or of latents
    smallest = min(x.nbytes for path, x in jax.tree_util.tree_leaves_with_path(parts[0])
                   if len(letters(path)) > 1 and letters(path) != 'Do')
    assert max(map(size_bytes, sent)) < smallest
