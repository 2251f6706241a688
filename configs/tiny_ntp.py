"""The next-token twin of tiny.py: one future, as many parameters; the four head blocks are in the trunk.

paper        Gloeckle et al. 2024 (arXiv:2404.19737): the baseline of equal parameters
parameters   1,544,320: 1.48 M in the trunk
FLOPs        12.2 M a token, forward and backward; causal 10.6 M
data         1.4 M tokens, 5 % of the standard library's own source
hardware     two CPU cores
time         a step of tiny.py takes 0.96 x as long
expect       not measured
command      python -m mtp_jax train --config=configs/tiny_ntp.py --workdir=runs/tiny_ntp
"""
from mtp_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config():
  return Config(
      model=ModelConfig(width=128, layers=8, heads=4, kv_heads=2, head_width=32,
                        feed_forward=352, futures=1, remat='none'),
      data=DataConfig(length=256),
      optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, final_ratio=0.05),
      train=TrainConfig(steps=700, batch=8, evaluate_every=350, checkpoint_every=350),
  ).to_config_dict()
