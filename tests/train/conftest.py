"""Runs that several files of this folder look at."""
import functools
import pathlib

import pytest
from experiments import RUNS, experiment

from mtp_jax import chips
from mtp_jax.config import Config
from mtp_jax.train.fit import fit


@pytest.fixture(scope='module', autouse=True)
def peak():
  """The machine's peak is not measured."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(chips, 'peak_flops', lambda: 1e9)
    yield


@pytest.fixture(scope='module')
def uninterrupted(folder):
  """(config, folder of a run that was never stopped) of a family."""
  @functools.cache
  def make(family: str) -> tuple[Config, pathlib.Path]:
    config = experiment(folder, **RUNS[family])
    fit(config, folder / family, note=lambda line: None)
    return config, folder / family
  return make
