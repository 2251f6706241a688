"""Eight byte-level futures, made to be decoded from: a deep narrow trunk, and heads that are one linear map each.

paper        Gloeckle et al. 2024 (arXiv:2404.19737): eight futures over bytes (Tables 1 and S3), linear heads
             (Table S4)
parameters   3,152,000: 2.95 M in the trunk, 0.13 M in the futures
FLOPs        26.4 M a token, forward and backward; causal 23.2 M
data         6.1 M tokens, 21 % of the standard library's own source
hardware     two CPU cores
time         54 minutes
expect       validation at 1.76 bits per byte, 3.07 tokens per forward with seven drafts
command      python -m mtp_jax train --config=configs/bytes_m8.py --workdir=runs/bytes_m8
"""
from mtp_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config():
  return Config(
      model=ModelConfig(kind='linear', width=128, layers=16, heads=4, kv_heads=2, head_width=32,
                        feed_forward=352, futures=8, remat='none'),
      data=DataConfig(length=256),
      optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100, final_ratio=0.05),
      train=TrainConfig(steps=3000, batch=8, evaluate_every=1000, checkpoint_every=500),
  ).to_config_dict()
