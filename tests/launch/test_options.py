"""The options of the TPU compiler that the launch files set."""
import re

import pytest
from scripts import LAUNCH

from mtp_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from mtp_jax.measure.plan import plan


def set_by(name: str) -> set[str]:
  return set(re.findall(r'--(xla_[a-z_]+=\w+)', (LAUNCH / name).read_text()))


def test_the_launch_files_set_the_same_options_and_the_page_compares_them():
  options = set_by('gke_jobset.yaml')
  assert options and options == set_by('tpu_vm.sh')
  page = (LAUNCH / 'README.md').read_text()
  assert all(f'`{option.partition("=")[0]}` alone' in page for option in options)


@pytest.mark.slow
def test_the_compiler_knows_them():
  pytest.importorskip('libtpu')
  model = ModelConfig(vocab=264, width=128, layers=3, heads=1, kv_heads=1, head_width=128, feed_forward=128, futures=1)
  train = TrainConfig(batch=4, evaluate_rows=4)
  config = Config(model, data=DataConfig(length=128), train=train, mesh=MeshConfig(fsdp=4))
  options = dict(option.split('=') for option in set_by('gke_jobset.yaml'))
  assert plan(config, 'v5e:2x2', options).fits
