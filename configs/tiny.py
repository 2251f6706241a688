"""A multi-token model of code that trains in minutes on two CPU cores.

paper        Gloeckle et al. 2024 (arXiv:2404.19737): four parallel futures, one block each, equal parameters
parameters   1,544,320: 0.74 M in the trunk, 0.74 M in the futures
FLOPs        12.8 M a token, forward and backward; causal 11.2 M
data         1.4 M tokens, 5 % of the standard library's own source
hardware     two CPU cores
time         four minutes
expect       validation at 2.34 bits per byte, 2.21 tokens per forward with three drafts
command      python -m mtp_jax train --config=configs/tiny.py --workdir=runs/tiny
"""
from mtp_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config():
  return Config(
      model=ModelConfig(width=128, layers=8, heads=4, kv_heads=2, head_width=32,
                        feed_forward=352, futures=4, remat='none'),
      data=DataConfig(length=256),
      optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, final_ratio=0.05),
      train=TrainConfig(steps=700, batch=8, evaluate_every=350, checkpoint_every=350),
  ).to_config_dict()
