"""tiny.py as a small DeepSeek-V3: blocks of experts, and one sequential module of the same kind.

Of 16 routed experts and one shared one each token uses three, which multiply as much as the dense feed-forward of
the first block.

paper        DeepSeek-V3 (arXiv:2412.19437), sections 2.1.2 and 2.2
parameters   6,132,336: 5.20 M in the trunk, 0.87 M in the module; a token uses 1.58 M
FLOPs        12.8 M a token, forward and backward; causal 11.3 M
data         1.4 M tokens, 5 % of the standard library's own source
hardware     two CPU cores
time         1.55 x as long as the dense model of equal FLOPs, --config.model.experts=0
expect       validation at 2.07 bits per byte, as the dense model; 1.79 tokens per forward with one draft
command      python -m mtp_jax train --config=configs/tiny_moe.py --workdir=runs/tiny_moe
"""
from mtp_jax.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig


def get_config():
  return Config(
      model=ModelConfig(kind='sequential', placement='appended', width=128, layers=7, heads=4, kv_heads=2,
                        head_width=32, feed_forward=360, experts=16, experts_per_token=2, shared_experts=1,
                        expert_width=120, dense_layers=1, futures=2, remat='none'),
      objective=ObjectiveConfig(weights=(1.0, 0.3), balance_rate='0.01 step 0.95 0'),
      data=DataConfig(length=256),
      optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, final_ratio=0.05),
      train=TrainConfig(steps=700, batch=8, evaluate_every=350, checkpoint_every=350),
  ).to_config_dict()
