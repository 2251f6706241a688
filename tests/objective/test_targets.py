"""What each future predicts, and where it counts."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.objective import Read


@pytest.mark.parametrize('seed', range(4))
def test_targets_equal_a_double_loop(tiny, packed, seed):
  c = tiny(futures=5)
  batch = packed(c, 6, 10, seed)
  read, wanted_count = Read.of(batch, 5), []
  for m in range(5):
    y_BL, counted_BL = read.targets_MBL[m], read.counted_MBL[m]
    wanted = np.zeros((6, 10), bool)
    for b, t in np.ndindex(6, 10):
      segment = batch['segments'][b, t]
      wanted[b, t] = segment != 0 and batch['segments'][b, t + 1 + m] == segment
      assert y_BL[b, t] == batch['tokens'][b, t + 1 + m]
    np.testing.assert_array_equal(counted_BL, wanted)
    wanted_count.append(wanted.sum())
  np.testing.assert_array_equal(read.count_M, wanted_count)
  for cut, name in ((read.inputs_BL, 'tokens'), (read.positions_BL, 'positions'), (read.segments_BL, 'segments')):
    np.testing.assert_array_equal(cut, batch[name][:, :10])
  assert any(min(np.unique(row, return_counts=True)[1]) == 1
             for row in batch['segments']), 'some document must be shorter than M'


def test_targets_end_with_their_document():
  batch = {'tokens': jnp.arange(10, 18)[None], 'segments': jnp.array([[1, 1, 1, 2, 3, 3, 3, 0]]),
           'positions': jnp.arange(8)[None]}
  read = Read.of(batch, 3)
  tables = {0: [1, 1, 0, 0, 1], 1: [1, 0, 0, 0, 1], 2: [0, 0, 0, 0, 0]}
  for m, table in tables.items():
    np.testing.assert_array_equal(read.targets_MBL[m, 0], np.arange(10, 15) + m + 1)
    np.testing.assert_array_equal(read.counted_MBL[m, 0], np.array(table, bool))


def test_microbatches_are_every_nth_row(tiny, packed):
  read = Read.of(packed(tiny(futures=2), 6, 8), 2)
  for i in range(3):
    part = jax.tree.map(lambda x, i=i: x[i], read.microbatches(3))
    for name in ('inputs_BL', 'positions_BL', 'segments_BL'):
      np.testing.assert_array_equal(getattr(part, name), getattr(read, name)[i::3])
    for name in ('targets_MBL', 'counted_MBL'):
      np.testing.assert_array_equal(getattr(part, name), getattr(read, name)[:, i::3])


def test_bytes_are_those_of_the_targets_that_count():
  """Future 0 of five inputs: é is two bytes, a and b one, an end none; targets stay within documents."""
  batch = {'tokens': jnp.array([[0, 3, 1, 1, 4, 2, 0]]),
           'segments': jnp.array([[1, 1, 1, 2, 2, 2, 0]]), 'positions': jnp.zeros((1, 7), int)}
  byte_length_V = jnp.array([0, 1, 1, 2, 0])
  #         input:  bos  é    a   | a    eos     target: é 2, a 1, across, eos 0, b 1
  assert int(Read.of(batch, 2).target_bytes(byte_length_V)) == 2 + 1 + 0 + 1
