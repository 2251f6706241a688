"""Decoding on a mesh of eight devices against one device: the same tokens, and no weight is moved."""
import math

import jax
import numpy as np
import pytest
from decoding import (
  LENGTHS_B,
  LIMITS_B,
  NEVER,
  M,
  PROMPTS_Bp,
  V,
  decode_passes,
  equal_where_settled,
  generate,
  half_trained_models,
  rows,
  settled_lengths,
  start,
  tallies,
)
from experiments import FAMILIES

from mtp_jax.config import MeshConfig
from mtp_jax.decode.decoder import Decoder
from mtp_jax.decode.drafters import DraftModel, PromptLookup
from mtp_jax.decode.placement import MeshCache, decoding_mesh
from mtp_jax.measure.hlo import arrays, parse, size_bytes
from mtp_jax.measure.traffic import SENT_BYTES
from mtp_jax.mesh import make_mesh
from mtp_jax.sharding import letters

ALL = PROMPTS_Bp, LENGTHS_B, LIMITS_B


@pytest.fixture(scope='module')
def trained(tiny, random_model):
  return half_trained_models(tiny, random_model)


def mesh_of(**sizes):
  return decoding_mesh(make_mesh(MeshConfig(**sizes)))


def check_equal(model, batch, mesh, **options):
  """Generates on the mesh and on one device, and returns what the former did."""
  one_device = lambda m: rows(generate(m, *batch, draft=M - 1, **options))
  state = generate(model, *batch, draft=M - 1, mesh=mesh, **options)
  assert equal_where_settled(rows(state), one_device(model), settled_lengths(model, one_device))
  return state


def test_every_family_generates_on_a_mesh_what_it_generates_on_one_device(trained, variant):
  state = check_equal(trained(variant), ALL, mesh_of(fsdp=4, tensor=2))
  assert tallies(state)[2].any(0).all()  # drafts of every depth were accepted


@pytest.mark.parametrize('sizes, parts', [({'expert': 4, 'fsdp': 2}, 4), ({'expert': 2, 'data': 3}, 6),
                                          ({'fsdp': 2, 'tensor': 2}, 4), ({'fsdp': 8}, 1)], ids=str)
def test_experts_are_spread_over_all_devices_that_divide_them_and_generate_the_same(trained, sizes, parts):
  model, mesh = trained(FAMILIES['experts']), mesh_of(**sizes)
  feed_forward = Decoder.of(model, V, mesh).layers[-1].feed_forward
  for matrix in (feed_forward.gate_EDW, feed_forward.down_EWD):
    assert math.prod(matrix[...].sharding.shard_shape(matrix.shape)) == math.prod(matrix.shape) // parts
  check_equal(model, ALL, mesh)


def test_samples_of_one_seed_are_the_same_on_a_mesh(trained, family):
  check_equal(trained(family), ALL, mesh_of(data=2, fsdp=2, tensor=2), temperature=0.8, top_k=9, same_seed=True)


@pytest.mark.parametrize('sizes, order', [
    ({'fsdp': 8}, [3]), ({'data': 4, 'tensor': 2}, [3, 0, 4, 1]), ({'context': 2, 'fsdp': 2}, [3, 0])], ids=str)
def test_any_number_of_rows_is_decoded_on_any_mesh(trained, family, sizes, order):
  """Rows that divide over the devices, and rows that do not."""
  check_equal(trained(family), [x[order] for x in ALL], mesh_of(**sizes))


@pytest.mark.parametrize('name', ['lookup', 'draft model', 'shared module', 'adaptive'])
def test_every_drafter_drafts_on_a_mesh(trained, name):
  """A draft model lies on the mesh of the model; a shared module goes beyond its depth."""
  model, mesh = trained({'kind': 'sequential', 'share_modules': True}), mesh_of(fsdp=4, tensor=2)
  another = Decoder.of(trained({'kind': 'parallel'}), V, mesh)
  drafter = {'lookup': PromptLookup(5), 'draft model': DraftModel(another, 5)}.get(name)
  adaptive = {'lengths': (1, 3, 5), 'pass_costs': np.ones(3, np.float32)} if name == 'adaptive' else {}
  plain = lambda m: rows(generate(m, PROMPTS_Bp, draft=0))
  state = generate(model, PROMPTS_Bp, draft=5, drafter=drafter, mesh=mesh, **adaptive)
  assert equal_where_settled(rows(state), plain(model), settled_lengths(model, plain))
  assert tallies(state)[2].any()


def test_each_device_holds_its_part_of_every_matrix_and_of_the_caches(trained, family):
  """Four rows of two key heads fill eight devices, one row two."""
  for sizes, n in (({'fsdp': 4, 'tensor': 2}, 4), ({'context': 2, 'fsdp': 2, 'tensor': 2}, 1)):
    mesh = mesh_of(**sizes)
    (decoder, *_), state = start(trained(family), *(x[:n] for x in ALL), draft=M - 1, mesh=mesh)
    for path, x in jax.tree_util.tree_leaves_with_path(decoder):
      axes = {'D': (), 'K': (), 'CD': ('fsdp',)}.get(letters(path), ('fsdp', 'tensor'))
      assert part(x) == x.size // math.prod(mesh.shape[axis] for axis in axes), jax.tree_util.keystr(path)
    in_state = jax.tree.leaves((state.caches, state.memory), is_leaf=lambda x: isinstance(x, MeshCache))
    caches = [x for x in in_state if isinstance(x, MeshCache)]
    assert len(caches) >= len(decoder.layers) + M - 1
    assert all(part(x) == x.size // (2 * n) for x in jax.tree.leaves(caches))


def part(x) -> int:
  """Entries that one device holds."""
  return x.addressable_shards[0].data.size


@pytest.mark.parametrize('sizes', [{'fsdp': 4, 'tensor': 2}, {'fsdp': 8}], ids=str)
def test_a_pass_sends_activations_and_neither_weights_nor_caches(trained, family, sizes):
  """Of one row, so that activations are smaller than the smallest matrix. The state is updated in place."""
  parts, state = start(trained(family), *(x[3:4] for x in ALL), draft=2, mesh=mesh_of(**sizes))
  text = decode_passes.lower(*parts, state, NEVER, np.int32(5), lengths=(2,)).compile().as_text()
  sent = [array for lines in parse(text)[0].values() for line in lines.values()
          if line.kind.removesuffix('-start') in SENT_BYTES for array in arrays(line.type)]
  smallest = min(x.nbytes for path, x in jax.tree_util.tree_leaves_with_path(parts[0]) if len(letters(path)) > 1)
  assert sent and max(map(size_bytes, sent)) < smallest
  assert text.split('entry_computation_layout')[0].count('-alias') == len(jax.tree.leaves(state))
