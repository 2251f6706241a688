"""Ten million parameters at length 512: the smallest model worth leaving overnight on a CPU.

paper        Gloeckle et al. 2024 (arXiv:2404.19737): four parallel futures, equal parameters; hyper-parameters of
             Table S13
parameters   11,218,560: 4.72 M in the trunk, 6.29 M in the futures
FLOPs        85.0 M a token, forward and backward; causal 76.8 M
data         24.6 M tokens, most of the standard library's own source once
hardware     two CPU cores
time         17 s to the end of the first step; the rest not measured
expect       not measured
command      python -m mtp_jax train --config=configs/small.py --workdir=runs/small
"""
from mtp_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config():
  return Config(
      model=ModelConfig(width=384, layers=7, heads=6, kv_heads=2, head_width=64,
                        feed_forward=1024, futures=4, remat='none'),
      data=DataConfig(length=512),
      optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200),
      train=TrainConfig(steps=6000, batch=8, evaluate_every=1000, checkpoint_every=500),
  ).to_config_dict()
