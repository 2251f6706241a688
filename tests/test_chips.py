"""The peak of the processor that runs."""
import math

import jax
import pytest

from mtp_jax import chips
from mtp_jax.config import MeshConfig
from mtp_jax.mesh import make_mesh


def test_the_peak_of_a_cpu_is_measured():
  assert 1e8 < chips.peak_flops(0.01) < 1e14


@pytest.mark.parametrize('sizes', [MeshConfig(), MeshConfig(fsdp=2, tensor=2)], ids=str)
def test_the_peak_can_be_measured_on_any_mesh(sizes):
  with jax.set_mesh(make_mesh(sizes)):
    assert 0 < chips.peak_flops(seconds=0.01) < math.inf
