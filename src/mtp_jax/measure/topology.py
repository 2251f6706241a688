"""Slices of TPUs that are not here, as XLA's compiler library describes them, and how fast their
chips send.

XLA's TPU compiler is a library (`pip install -e '.[tpu]'`), which needs no TPU to describe one.
"""
import functools
import importlib.util
import math
import os
import re

import jax
import numpy as np

from mtp_jax.chips import CHIPS, Chip, peak_flops
from mtp_jax.config import BadInput
from mtp_jax.measure.traffic import Collective

DIMENSIONS = {'v4': 3, 'v5e': 2, 'v5p': 3, 'v6e': 2, 'cpu': 1}
EXAMPLES = 'write such as v5p:2x2x2, v5e:4x4, 2xv5e:16x16 or cpu:8'


@functools.cache
def devices(topology: str) -> list:
  """Descriptions of the chips of one slice ('v5p:4x4x4') or several ('2xv5e:16x16'), or CPU devices
  of this machine ('cpu:8').

  Raises:
    BadInput: there is no such topology, or libtpu is missing.
  """
  match = re.fullmatch(r'(?:([1-9]\d*)x)?(\w+):([1-9]\d*(?:x[1-9]\d*)*)', topology)
  slices, generation, sizes = match.groups() if match else ('', '', '')
  if DIMENSIONS.get(generation) != sizes.count('x') + 1 or (slices and generation == 'cpu'):
    raise BadInput(f'--topology={topology}: must be a chip of {", ".join(DIMENSIONS)} and the '
                   'sizes of its slice; '
                   + EXAMPLES)
  if generation == 'cpu':
    return _cpu_devices(topology, int(sizes))
  if importlib.util.find_spec('libtpu') is None:
    raise BadInput("--topology: needs the TPU compiler; install it with: pip install -e '.[tpu]'")
  # By default libtpu asks a server on the network which machine it is on, and refuses a second
  # process that loads it.
  os.environ.update(TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1',
                    TPU_WORKER_HOSTNAMES='localhost',
                    TPU_ACCELERATOR_TYPE='v5p-8', TPU_STDERR_LOG_LEVEL='3')
  from jax.experimental import topologies
  options = {'num_slices': int(slices)} if slices else {}
  if set(sizes.split('x')) == {'1'}:  # one chip, a part of a host
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=f'{generation}:{sizes}',
                                        **options).devices
  except Exception as error:
    raise BadInput(f'--topology={topology}: {first_line(error)}; {EXAMPLES}') from None


def _cpu_devices(topology: str, count: int) -> list:
  available = jax.devices('cpu')
  if count > len(available):
    raise BadInput(f'--topology={topology}: there are {len(available)} CPU devices; '
                   'XLA_FLAGS=--xla_force_host_platform_device_count=N makes N')
  return available[:count]


def slice_count(chips: list) -> int:
  """How many slices the chips belong to."""
  return len({getattr(chip, 'slice_index', 0) for chip in chips})


def chips_per_host(chips: list) -> int:
  return len(chips) // len({chip.process_index for chip in chips})


def chip_of(chips: list) -> Chip:
  """Peaks of one of the chips; of a CPU device its share of the machine's FLOP/s and memory."""
  kind = chips[0].device_kind
  if kind in CHIPS:
    return CHIPS[kind]
  memory_bytes = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return Chip(peak_flops() / len(chips), memory_bytes / len(chips), math.nan, math.nan, math.nan)


def collective_seconds(collective: Collective, mesh, chip: Chip) -> tuple[float, float]:
  """(seconds on the links of a slice, seconds on the network between slices) of what each chip
  sends.

  A group of chips uses the links of every dimension of the torus that it covers, a permutation
  those of one. A dimension that does not close to a ring has half the bandwidth. The three
  dimensions of a 3-D slice close together or not at all.
  """
  members = [mesh.devices.flat[place] for place in collective.group]
  if slice_count(members) > 1:
    return 0.0, collective.sent_bytes / chip.network_bandwidth
  seconds = collective.sent_bytes / chip.link_bandwidth  # over both links of one closed dimension
  if not hasattr(members[0], 'coords'):
    return seconds, 0.0
  sizes = np.array([member.coords for member in mesh.devices.flat]).max(0) + 1
  closed = sizes % chip.ring == 0
  if sizes[2] > 1 and not closed.all():
    closed[:] = False
  coordinates = np.array([member.coords for member in members])
  covered = [len(set(along.tolist())) > 1 for along in coordinates.T]
  bandwidths = np.where(closed, 1, 0.5)[covered]
  one_link = collective.kind == 'collective-permute'
  return seconds / (bandwidths.max() if one_link else bandwidths.sum()), 0.0


def first_line(error: Exception) -> str:
  return str(error).splitlines()[0][:200]
