"""A mesh lays out devices so that each row is read once by all who hold it, and only the data axis crosses slices."""
import dataclasses
import importlib.util
import itertools
import random

import jax
import numpy as np
import pytest

from mtp_jax.config import BadInput, Config, MeshConfig, ModelConfig
from mtp_jax.measure import plan
from mtp_jax.mesh import make_mesh, mesh_of_model, process_share
from mtp_jax.sharding import AXES


@dataclasses.dataclass(frozen=True)
class Described:
  """A device that is not here."""
  id: int
  process_index: int
  slice_index: int = 0
  platform: str = 'cpu'
  device_kind: str = 'cpu'


def shares(monkeypatch, sizes: dict, count: int, per_process: int) -> list[tuple[int, int]]:
  """What each of `count` processes must read."""
  mesh = make_mesh(MeshConfig(**sizes),
                   [Described(i, i // per_process) for i in range(count * per_process)])
  found = []
  for index in range(count):
    monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
    found.append(process_share(mesh))
  return found


@pytest.mark.parametrize('sizes, count, per_process, wanted', [
    ({'data': 8}, 2, 4, [(0, 2), (1, 2)]),
    ({'fsdp': 4, 'tensor': 2}, 2, 4, [(0, 2), (1, 2)]),
    ({'data': 2, 'fsdp': 2, 'context': 2}, 4, 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    ({'data': 2, 'context': 4}, 2, 4, [(0, 2), (1, 2)]),
    ({'context': 8}, 2, 4, [(0, 1), (0, 1)]),
    ({'tensor': 8}, 2, 4, [(0, 1), (0, 1)]),
    ({'expert': 8}, 2, 4, [(0, 2), (1, 2)]),
    ({'context': 4, 'tensor': 2}, 2, 4, [(0, 1), (0, 1)]),
    # rows over pairs of processes, tensor across each pair
    ({'fsdp': 2, 'tensor': 4}, 4, 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ({'data': 2, 'fsdp': 2, 'tensor': 4}, 8, 2,
     [(0, 4), (0, 4), (1, 4), (1, 4), (2, 4), (2, 4), (3, 4), (3, 4)]),
])
def test_processes_that_hold_the_same_rows_read_the_same_share(
    monkeypatch, sizes, count, per_process, wanted):
  assert shares(monkeypatch, sizes, count, per_process) == wanted


@pytest.mark.parametrize('count, per_process, refusals',
                         [(2, 4, 0), (4, 2, 0), (12, 1, 0), (3, 2, 2), (2, 6, 2), (6, 2, 3),
                          (3, 4, 5)])
def test_on_any_mesh_every_row_is_read_once_by_all_who_hold_it_or_the_mesh_is_refused(
    monkeypatch, count, per_process, refusals):
  """A process puts the rows it reads onto the groups of rows that its devices hold, in order.

  No shares are right where processes hold overlapping groups of rows that are not the same.
  """
  n, refused = count * per_process, 0
  for sizes in itertools.product(range(1, n + 1), repeat=3):
    if np.prod(sizes) != n:
      continue
    # of each device; data, fsdp and context are the slowest axes in this order
    rows = np.repeat(np.arange(sizes[0] * sizes[1]), sizes[2])
    held = [sorted({*rows[i * per_process:(i + 1) * per_process].tolist()}) for i in range(count)]
    fits = all(a == b or not {*a} & {*b} for a, b in itertools.combinations(held, 2))
    try:
      found = shares(monkeypatch, dict(zip(AXES, sizes)), count, per_process)
    except BadInput as error:
      assert not fits
      assert str(error).startswith(f'config.mesh: data x fsdp = {sizes[0] * sizes[1]} '
                                   f'cannot be divided among {count} processes')
      refused += 1
      continue
    assert fits
    place = {}  # group of rows -> the parts of the batch put there
    for groups, (index, parts) in zip(held, found):
      size = len(rows) // sizes[2] // parts
      for group, part in zip(groups, range(index * size, (index + 1) * size), strict=True):
        place.setdefault(group, set()).add(part)
    assert sorted(place) == list(range(sizes[0] * sizes[1])), (sizes, found)
    assert sorted(itertools.chain(*place.values())) == sorted(place), (sizes, found)
  assert refused == refusals


def slices_of(mesh) -> list[list[int]]:
  """Slices in which each place on the data axis has devices."""
  return [sorted({device.slice_index for device in devices.flat}) for devices in mesh.devices]


@pytest.mark.parametrize('sizes, slices, wanted', [
    ({'data': 2, 'fsdp': 8}, 2, [[0], [1]]),
    ({'data': 4, 'fsdp': 2, 'tensor': 2}, 2, [[0], [0], [1], [1]]),
    ({'data': 4, 'context': 4}, 4, [[0], [1], [2], [3]]),
    ({'data': 8, 'expert': 2}, 4, [[0], [0], [1], [1], [2], [2], [3], [3]]),
])
def test_each_slice_holds_a_stretch_of_the_data_axis_and_every_other_axis_stays_within_one(
    sizes, slices, wanted):
  devices = [Described(i, i // 4, i // (16 // slices)) for i in range(16)]
  for given in (devices, devices[::-1], random.Random(0).sample(devices, 16)):
    mesh = make_mesh(MeshConfig(**sizes), given)
    assert slices_of(mesh) == wanted and {*mesh.devices.flat} == {*devices}


@pytest.mark.parametrize('sizes',
                         [{'fsdp': 16}, {'data': 1, 'fsdp': 8, 'tensor': 2}, {'data': 3, 'fsdp': 4},
                          {'data': 2, 'fsdp': 4}])
def test_a_mesh_that_cuts_across_slices_or_leaves_chips_out_is_refused(sizes):
  message = ('^config.mesh: .*; the 16 devices are in 2 slices, each of which holds a part of the data axis: '
             'set config.mesh.data to a multiple of 2, and the product to 16$')
  with pytest.raises(BadInput, match=message):
    make_mesh(MeshConfig(**sizes), [Described(i, i // 4, i // 8) for i in range(16)])


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                    reason="needs the TPU compiler: pip install -e '.[tpu]'")
def test_two_slices_of_real_chips_are_laid_out_the_same_way():
  plan.devices('v5e:2x2')  # sets the environment variables that libtpu needs
  from jax.experimental import topologies
  devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:4x4',
                                         num_slices=2).devices
  assert len(devices) == 32 and {device.slice_index for device in devices} == {0, 1}
  assert len({device.process_index for device in devices}) == 8
  for sizes, wanted in (({'data': 2, 'fsdp': 16}, [[0], [1]]),
                        ({'data': 2, 'fsdp': 4, 'tensor': 4}, [[0], [1]]),
                        ({'data': 8, 'fsdp': 4}, [[0]] * 4 + [[1]] * 4)):
    mesh = make_mesh(MeshConfig(**sizes), devices)
    assert slices_of(mesh) == wanted
  for sizes in ({'fsdp': 32}, {'data': 1, 'fsdp': 16, 'tensor': 2}):
    with pytest.raises(BadInput, match='the 32 devices are in 2 slices'):
      make_mesh(MeshConfig(**sizes), devices)


def test_the_width_of_a_loaded_model_divides_over_all_axes_that_split_it_or_the_mesh_is_refused():
  config = Config(ModelConfig(width=12, experts=4, layers=6))
  assert mesh_of_model(config, {'fsdp': 2, 'expert': 2}).size == 4
  with pytest.raises(BadInput, match=r'fsdp x expert = 8 does not divide config\.model\.width=12'):
    mesh_of_model(config, {'fsdp': 4, 'expert': 2})
