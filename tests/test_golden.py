"""One train step of every kind of model from a fixed seed, to the last bit on the machine that
wrote it down.

A change that only moves code keeps every number here. `python tests/test_golden.py` prints the
table anew.
"""
import hashlib
import math
import os
import pathlib

import conftest  # noqa: F401  sets XLA's flags before jax starts, also when this file is run as a script
import jax
import numpy as np
import pytest
from experiments import FAMILIES

from mtp_jax.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from mtp_jax.train import step as training

# loss, gradient norm, update norm, nats of each future, parameters weighted by cos(0), cos(1), ...;
# SHA-256 of the parameters.
MACHINE = 'f28961a5 jax 0.10.2'
GOLDEN = {
    'parallel': ([6.473332405090332, 3.222806930541992, 0.010228018276393414, 3.755735397338867,
        3.702897787094116, 3.3797504901885986, 17.669078640387017],
        'e584485b921dd2e6ae6d9f836a5548f6de4af5f82c1afe995863f49f447343e8'),
    'linear': ([6.224873065948486, 3.3087964057922363, 0.011234072037041187, 3.5509395599365234,
        3.5668628215789795, 3.4758896827697754, 3.4385076377398347],
        '5556c375a5476fb8e1a6654c66cda12457c6e4a400a2c7bbfba91c4c4c89f4b8'),
    'causal': ([6.548480033874512, 3.7086997032165527, 0.010306863114237785, 3.755735397338867,
        3.750626802444458, 3.5869531631469727, 17.673269440644102],
        'ada4d2ecbda15aebbae50340a4bf9bafaeaa27d443c47a7f88882051c69b4f7c'),
    'anticausal': ([6.43109655380249, 4.1898016929626465, 0.010772150941193104, 3.73069167137146,
        3.6664440631866455, 3.3797504901885986, 17.673642919635498],
        '94c866dd07e036625799001a2d5bed7c1e97db850751e59d8548b5f74cc7cfd9'),
    'post_norm': ([6.373378753662109, 2.8733277320861816, 0.010992338880896568, 3.7168121337890625,
        3.4817261695861816, 3.573770761489868, 14.757801101465637],
        '49bcec2a891e232b3d594f31fa2ebb1f60ee3ef6c1cdc7421b07a52cd77d382c'),
    'pre_norm': ([6.373378753662109, 2.873430013656616, 0.010991650633513927, 3.7168121337890625,
        3.4817261695861816, 3.573770523071289, 14.757920583737612],
        '252638a5eebdd7f2469d207d510daeed1356a84663bf774b08967367078dbe13'),
    'shared': ([6.38336181640625, 3.230334758758545, 0.011220128275454044, 3.7818832397460938,
        3.3987624645233154, 3.516618490219116, 7.263895951909245],
        'ee7edef890c0f6ce38a95ec2e1409931c5983cb0015aba19246d1ff34358787a'),
}


def machine() -> str:
  """What decides the last bits: the processor, what compiles for it, and how many cores it may use."""
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  about = cpuinfo.read_text().partition('\n\n')[0] if cpuinfo.exists() else ''
  kept = sorted(line for line in about.splitlines() if line.startswith(('model', 'stepping', 'cache size', 'flags')))
  kept += sorted({*os.environ['XLA_FLAGS'].split()})  # conftest.py's may be there twice
  kept.append(str(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()))
  return f'{hashlib.sha256(chr(10).join(kept).encode()).hexdigest()[:8]} jax {jax.__version__}'


def rows(c: ModelConfig) -> dict:
  """Four rows of documents of 1 to 9 tokens; the last row ends in padding."""
  rng, T = np.random.default_rng(0), 24 + c.futures
  segments = np.stack([np.repeat(np.arange(1, T + 1), rng.integers(1, 10, T))[:T] for _ in range(4)])
  starts = np.stack([np.flatnonzero(np.r_[True, np.diff(row) > 0])[row - 1] for row in segments])
  segments[3, T - 7:] = 0
  batch = {'tokens': rng.integers(0, c.vocab, (4, T)), 'segments': segments, 'positions': np.arange(T) - starts}
  return {name: np.int32(x) for name, x in batch.items()}


def step(family: str) -> tuple[list[float], str]:
  """(the numbers of GOLDEN, SHA-256 of the parameters), whatever the parameters are called."""
  model = ModelConfig(vocab=24, width=16, layers=5, heads=4, kv_heads=2, head_width=8, feed_forward=20, futures=3,
                      **FAMILIES[family])
  config = Config(model, ObjectiveConfig(weights=(1.0, 0.5, 0.25), chunk=10, z_loss=1e-3), DataConfig(length=24),
                  OptimizerConfig(warmup_steps=0, epsilon=1e-2), TrainConfig(batch=4))
  state = training.compiled_init(config, jax.random.key(0))
  state, metrics = training.compiled_step(config, state, rows(model), np.ones(model.vocab, np.int32), 0.0)
  digests = sorted(hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in jax.tree.leaves(state.model))
  weighted = math.fsum(np.sum(np.float64(x).ravel() * np.cos(np.arange(x.size))) for x in jax.tree.leaves(state.model))
  numbers = [*(float(metrics[name]) for name in ('loss', 'gradient_norm', 'update_norm')), *metrics['nats'].tolist(),
             float(weighted)]
  return numbers, hashlib.sha256(''.join(digests).encode()).hexdigest()


@pytest.mark.parametrize('family', GOLDEN)
def test_a_step_is_the_one_written_down(family):
  numbers, digest = step(family)
  wanted, wanted_digest = GOLDEN[family]
  np.testing.assert_allclose(numbers, wanted, rtol=1e-6)
  if machine() == MACHINE:
    assert (numbers, digest) == (wanted, wanted_digest)


if __name__ == '__main__':
  print(f'MACHINE = {machine()!r}')
  for name in GOLDEN:
    print(f'    {name!r}: {step(name)},')
