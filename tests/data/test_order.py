"""The order of rows: its sources differ, and each goes on at its own row after any change."""
import itertools
import json

import numpy as np
import pytest

from mtp_jax.data import rows as module
from mtp_jax.data.rows import Batches, Mixture, SourceRows


class Numbered:
  """A source whose row i holds only the number first + i."""

  def __init__(self, name: str, first: int, count: int):
    self.name, self.first, self.count, self.quarantined = name, first, count, 0

  def __len__(self) -> int:
    return self.count

  def batch(self, ids) -> dict:
    return {'tokens': self.first + np.array(ids, np.int32)[:, None]}


SIZES = {'a': 40, 'b': 40, 'c': 7, 'd': 300}
FIRST = {name: 1000 * s for s, name in enumerate(SIZES)}


def batches_of(names: str, weights, batch: int = 6, state: dict | None = None) -> Batches:
  rows = SourceRows([Numbered(name, FIRST[name], SIZES[name]) for name in names])
  batches = Batches(rows, weights, batch, seed=0)
  if state:
    batches.set_state(json.loads(json.dumps(state)))
  return batches


def draw(batches: Batches, steps: int) -> tuple[dict[str, list[int]], dict]:
  """The rows of each source, in order, and the state after them."""
  tokens = [int(token) for _ in range(steps) for token in next(batches)['tokens'][:, 0]]
  state = batches.get_state()
  batches.close()
  return {name: [t - FIRST[name] for t in tokens if 0 <= t - FIRST[name] < 1000] for name in SIZES}, state


@pytest.mark.parametrize('small', [0, 2**20])
@pytest.mark.parametrize('count', [1, 2, 3, 40, 300])
def test_an_order_is_a_permutation_every_epoch_another_one(monkeypatch, count, small):
  monkeypatch.setattr(module, 'SMALL', small)
  order = module._Order(range(5, 5 + count), 'key')
  epochs = [[int(order[k]) for k in range(e * count, (e + 1) * count)] for e in range(3)]
  assert all(sorted(epoch) == [*range(5, 5 + count)] for epoch in epochs)
  assert count < 40 or len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_of_a_small_source_is_that_of_a_generator_that_no_version_of_numpy_changes():
  order = module._Order(range(8), '1')
  assert order._seed == 0x6b86b273
  assert [order[16 + i] for i in range(8)] == np.random.RandomState([0x6b86b273, 2]).permutation(8).tolist()


@pytest.mark.parametrize('names', ['ab', 'ba', 'abc', 'aa'])
def test_two_sources_of_one_size_have_different_orders(names):
  rows = [Numbered(name, 1000 * s, 40) for s, name in enumerate(names)]
  batches = Batches(SourceRows(rows), [1] * len(names), len(names), seed=0)
  drawn = np.concatenate([next(batches)['tokens'][:, 0] for _ in range(40)])
  batches.close()
  orders = [tuple(drawn[drawn // 1000 == s] % 1000) for s in range(len(names))]
  assert all(sorted(order) == [*range(40)] for order in orders) and len(set(orders)) == len(names)


CHANGES = {
    'other weights': ('abd', (0.9, 0.1, 0.5), 'abd', (0.1, 0.8, 0.3)),
    'another list order': ('abd', (0.9, 0.1, 0.5), 'dba', (0.5, 0.1, 0.9)),
    'one more': ('ab', (0.9, 0.1), 'cab', (0.2, 0.9, 0.1)),
    'one less': ('abd', (0.9, 0.1, 0.5), 'da', (0.5, 0.9)),
    'the same': ('abd', (0.9, 0.1, 0.5), 'abd', (0.9, 0.1, 0.5)),
}


@pytest.mark.parametrize('names, weights, new_names, new_weights', CHANGES.values(), ids=CHANGES)
def test_every_source_goes_on_at_its_own_row_whatever_has_changed(names, weights, new_names, new_weights):
  """What it gives before and after is what it gives alone; so no row is repeated and none is left out."""
  before, state = draw(batches_of(names, weights), 9)
  between, state = draw(batches_of(new_names, new_weights, 4, state), 7)
  after, state = draw(batches_of(new_names, new_weights, 10, state), 11)
  assert state['mixed'] == (28 + 110 + (54 if names == new_names and weights == new_weights else 0))
  for name in new_names:
    drawn = before[name] + between[name] + after[name]
    alone, _ = draw(batches_of(name, (1,), 1), len(drawn))
    assert drawn == alone[name] and len(drawn) == next(s['rows'] for s in state['sources'] if s['name'] == name)


def test_a_source_that_replaced_another_goes_on_at_its_number():
  before, state = draw(batches_of('ab', (1, 1)), 3)
  _, state = draw(batches_of('ac', (1, 1), 2, state), 2)
  assert [(s['name'], s['rows']) for s in state['sources']] == [('a', 11), ('c', 11)]


def test_a_state_of_one_number_is_that_many_rows_of_the_mixture():
  one, _ = draw(batches_of('ab', (1, 3), 6), 8)
  two, _ = draw(batches_of('ab', (1, 3), 6, {'global_next_index': 18}), 5)
  assert all(one[name][-len(two[name]):] == two[name] for name in 'ab')


@pytest.mark.parametrize('weights', [
    (1,), (1, 1), (5, 1, 3), (1e-5, 1), (1, 1e-5), (0.123456, 0.876544), (7, 1e9, 3)], ids=str)
def test_a_mixture_gives_each_source_its_share_and_its_rows_in_turn(weights):
  mixture, taken = Mixture(weights), [0] * len(weights)
  for k in itertools.chain(range(3000)):
    assert mixture.counts(k) == taken
    s, row = mixture[k]
    assert row == taken[s]
    taken[s] += 1
    shares = np.array(weights) / sum(weights) * (k + 1)
    assert (np.abs(np.array(taken) - shares) < len(weights)).all()
  for k in (10**9, 10**12):
    assert sum(mixture.counts(k)) == k
    assert (np.abs(np.array(mixture.counts(k)) / k - np.array(weights) / sum(weights)) < 1e-8).all()
