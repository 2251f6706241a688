"""Descriptions of slices, and how long a collective takes on their links."""
import dataclasses
import importlib.util

import numpy as np
import pytest

from mtp_jax.chips import CHIPS, Chip
from mtp_jax.config import BadInput, MeshConfig
from mtp_jax.measure.topology import chips_per_host, collective_seconds, devices
from mtp_jax.measure.traffic import Collective
from mtp_jax.mesh import make_mesh

IMPOSSIBLE = ['v9', 'v9z:4x4', 'v5p:4x4', 'v5e:4', 'cpu', 'cpu:0', 'cpu:x', 'cpu:2x2', '2xcpu:4',
              '0xv5e:4x4', 'v5e:0x4',
              'v5e:4x', '']


@pytest.mark.parametrize('topology', IMPOSSIBLE)
def test_a_topology_that_cannot_be_is_refused_without_a_compiler(topology, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  line = f'^--topology={topology}: must be a chip of v4, .* and the sizes of its slice; write such as v5p:2x2x2'
  with pytest.raises(BadInput, match=line):
    devices(topology)


def test_more_devices_than_this_machine_has_are_refused():
  line = '--topology=cpu:9: there are 8 CPU devices; XLA_FLAGS=--xla_force_host_platform_device_count=N makes N'
  with pytest.raises(BadInput, match=line):
    devices('cpu:9')


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu')
@pytest.mark.parametrize('topology', ['v5p:4x4x4', 'v5e:4x4', '2xv5e:4x4', 'v6e:4x4'])
def test_a_host_of_a_slice_has_four_chips(topology):
  assert chips_per_host(devices(topology)) == 4


@dataclasses.dataclass(frozen=True)
class Place:
  """A chip of a described slice."""
  coords: tuple[int, int, int]
  slice_index: int = 0


class Torus:
  """A mesh over slices of so many chips along each dimension."""

  def __init__(self, *sizes: int, slices: int = 1):
    self.devices = np.array([Place(coords, i) for i in range(slices)
                             for coords in np.ndindex(*sizes)])


@pytest.mark.parametrize('torus, group, kind, seconds', [
    (Torus(4, 4, 4), range(64), 'all-gather', (12 / 3, 0)),  # three rings
    (Torus(4, 4, 4), (0, 1, 2, 3), 'all-gather', (12, 0)),
    (Torus(4, 4, 4), (0, 1, 4, 5), 'all-gather', (12 / 2, 0)),
    (Torus(4, 4, 4), (0, 63), 'collective-permute', (12, 0)),
    (Torus(2, 4, 8), range(64), 'all-gather', (12 / 1.5, 0)),
    # no dimension closes, so each has half
    (Torus(2, 8, 1), range(16), 'all-gather', (12 / (0.5 + 1), 0)),
    # in two dimensions each closes by itself
    (Torus(2, 2, 2, slices=2), (0, 8), 'all-gather', (0, 12 / 0.5)),
])
def test_a_group_uses_the_links_of_every_dimension_it_covers(torus, group, kind, seconds):
  """12 bytes; a ring carries 1 byte/s along a dimension, a line half of it, the network 0.5."""
  chip = Chip(1, 1, 1, link_bandwidth=1.0, network_bandwidth=0.5, ring=4)
  assert collective_seconds(Collective(kind, tuple(group), 12.0), torus, chip) == seconds


def test_chips_have_peaks_that_belong_together():
  """Memory is faster than links, and links are faster than the network."""
  for name, chip in CHIPS.items():
    assert 150 < chip.flops / chip.hbm_bandwidth < 600, name
    assert chip.hbm_bandwidth > 3 * chip.link_bandwidth, name
    assert not chip.network_bandwidth >= chip.link_bandwidth, name  # nan where it is not published


def test_a_mesh_of_slices_is_refused_when_it_cuts_across_them():
  class Device:
    def __init__(self, i: int):
      self.slice_index, self.process_index, self.id = i // 4, 0, i
      self.platform, self.device_kind = 'tpu', 'TPU v5'

  line = (r'config.mesh: data 1 x fsdp 8 .* the 8 devices are in 2 slices.*'
          'set config.mesh.data to a multiple of 2')
  with pytest.raises(BadInput, match=line):
    make_mesh(MeshConfig(fsdp=8), [Device(i) for i in range(8)])
