"""The floor of a pass is what its tokens cost the model alone."""
import numpy as np
import pytest
from experiments import FAMILIES, random_lm

from mtp_jax.measure import benchmark_decode


@pytest.mark.parametrize('family', FAMILIES.values(), ids=FAMILIES)
def test_the_floor_of_a_pass_runs_no_head_that_plain_decoding_does_not(tmp_path, monkeypatch, family):
  lm, timed = random_lm(tmp_path, model={'layers': 4, 'futures': 3} | family), []

  def measure(engines, *_):
    timed.extend(engines)
    return np.ones(3, np.float32)

  monkeypatch.setattr(benchmark_decode, 'measure_pass_seconds', measure)
  benchmark_decode.benchmark_decode(lm, 1, 4, 4, 1)
  floors = [floor.engine.decoder.heads_in_forward for floor in timed[::3]]
  assert floors == [lm.decoder.heads_in_forward] * 3 and timed[0].seconds_of([lm.row('ab')], [8], 4) > 0
