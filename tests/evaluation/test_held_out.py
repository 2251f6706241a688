"""Evaluation divides sums once, and counts bytes as they are."""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import experiment, least_margin, random_state

from mtp_jax import objective, tokenizer
from mtp_jax.config import MeshConfig, ObjectiveConfig
from mtp_jax.data.corpus import open_corpus
from mtp_jax.data.rows import validation_batches
from mtp_jax.evaluation.held_out import evaluate, evaluate_batch
from mtp_jax.measure.traffic import traffic
from mtp_jax.mesh import make_mesh, put
from mtp_jax.objective import Read


def test_evaluation_divides_sums_once(folder):
  """Against float64 sums over the rows, one at a time."""
  config = experiment(folder)
  model, tokens, mesh = random_state(config).model, tokenizer.load('bytes'), make_mesh(config.mesh)
  corpus = open_corpus(config.data, tokens)
  rows = corpus.held_out(2)
  byte_length_V = np.pad(tokens.byte_lengths, (0, 5))
  with jax.set_mesh(mesh):
    found = evaluate(config, model, validation_batches(rows, 16), byte_length_V, np.ones(264, bool),
                     mesh)
    one = jax.jit(lambda batch: objective.loss(model, Read.of(batch, 2), jnp.zeros(2),
                                               ObjectiveConfig(chunk=8))[1])
    sums = [jax.device_get(one(put(rows.batch([i]), mesh))) for i in range(len(rows))]
  nats, correct, count = (sum(np.asarray(getattr(s, name), np.float64) for s in sums)
                          for name in ('nats_M', 'correct_M', 'count_M'))
  assert found['count'] == count.tolist() and len(rows) % 16  # the last batch is filled up
  np.testing.assert_allclose(found['nats'], nats / count, rtol=1e-6)
  assert least_margin(model, rows.batch(range(len(rows)))) > 1e-4  # no count depends on rounding
  assert found['accuracy'] == (correct / count).tolist()
  # each byte is a target once
  bits, held_out_bytes = nats[0] / math.log(2), corpus.sources[0].validation.bytes
  assert found['bits_per_byte'] == pytest.approx(bits / held_out_bytes, rel=1e-6)


def test_evaluation_on_a_mesh_is_that_on_one_device(folder):
  found = {}
  for mesh in (MeshConfig(), MeshConfig(fsdp=4, tensor=2)):
    config = experiment(folder, mesh=dataclasses.asdict(mesh))
    tokens, mesh = tokenizer.load('bytes'), make_mesh(mesh)
    rows = open_corpus(config.data, tokens).held_out(2)
    with jax.set_mesh(mesh):
      found[mesh.size] = evaluate(config, random_state(config).model,
                                  validation_batches(rows, 16, 16),
                                  np.pad(tokens.byte_lengths, (0, 5)), np.ones(264, bool), mesh)
  # no count depends on rounding
  assert least_margin(random_state(config).model, rows.batch(range(len(rows)))) > 1e-4
  assert found[1]['count'] == found[8]['count'] and found[1]['accuracy'] == found[8]['accuracy']
  # means of float32 sums in another order
  np.testing.assert_allclose(found[8]['nats'], found[1]['nats'], rtol=1e-6)
  assert found[8]['bits_per_byte'] == pytest.approx(found[1]['bits_per_byte'], rel=1e-6)


@pytest.mark.parametrize('text', ['plain text\n', 'é🙂 ﬁ\n'])
def test_bits_per_byte_of_a_uniform_model_are_log2_of_its_vocabulary_times_tokens_by_bytes(
    folder, tmp_path, text):
  """With an unembedding of 0 each of V ids costs log2(V) bits; n bytes and their end are n + 1 targets."""
  (tmp_path / 'documents').mkdir()
  for i in range(12):
    (tmp_path / 'documents' / f'{i}.txt').write_text(text * (i + 1))
  config = experiment(folder, data={'paths': (str(tmp_path / 'documents'),)})
  tokens, mesh = tokenizer.load('bytes'), make_mesh(config.mesh)
  corpus = open_corpus(config.data, tokens)
  held_out = corpus.sources[0].validation
  to_uniform = lambda path, x: x * 0 if 'unembed_VD' in str(path) else x
  model = jax.tree_util.tree_map_with_path(to_uniform, random_state(config).model)
  with jax.set_mesh(mesh):
    found = evaluate(config, model, validation_batches(corpus.held_out(2), 16),
                     np.pad(tokens.byte_lengths, (0, 5)), np.ones(264, bool), mesh)
  assert held_out.bytes % len(text.encode()) == 0
  targets = held_out.bytes + held_out.documents
  assert found['bits_per_byte'] == pytest.approx(math.log2(264) * targets / held_out.bytes, rel=1e-6)


def test_devices_sum_their_counts_as_often_however_long_the_rows(folder):
  """A sum over devices at every position would be slow. On CPUs it could also stop several processes for ever: XLA runs
  the sums of a loop, and other collectives, in an order that differs among devices.
  """
  def summed_bytes(length: int) -> float:
    config = experiment(folder, mesh={'fsdp': 8}, objective={'chunk': length}, data={'length': length},
                        train={'batch': 16})
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
      batch = {name: np.zeros((8, length + config.model.futures), np.int32)
               for name in ('tokens', 'segments', 'positions')}
      batch = put(batch, mesh)
      lowered = evaluate_batch.lower(config, random_state(config).model, batch, jnp.ones(264, jnp.int32),
                                      jnp.ones(264, bool))
    return sum(c.sent_bytes for c in traffic(lowered.compile().as_text()).collectives if c.kind == 'all-reduce')

  assert 0 < summed_bytes(16) == summed_bytes(64)
