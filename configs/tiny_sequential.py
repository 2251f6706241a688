"""tiny.py with sequential futures: one shared module, applied three times, instead of independent heads.

paper        DeepSeek-V3 (arXiv:2412.19437, section 2.2); one recursive module as in Nemotron 3 Super
             (arXiv:2604.12374)
parameters   1,577,472: 1.29 M in the trunk, 0.22 M in the module, which is larger than a block: it joins two states
FLOPs        16.4 M a token, forward and backward; causal 14.4 M
data         1.4 M tokens, 5 % of the standard library's own source
hardware     two CPU cores
time         not measured
expect       not measured
command      python -m mtp_jax train --config=configs/tiny_sequential.py --workdir=runs/tiny_sequential
"""
from mtp_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config():
  return Config(
      model=ModelConfig(width=128, layers=8, heads=4, kv_heads=2, head_width=32,
                        feed_forward=352, futures=4, kind='sequential', share_modules=True,
                        remat='none'),
      data=DataConfig(length=256),
      optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, final_ratio=0.05),
      train=TrainConfig(steps=700, batch=8, evaluate_every=350, checkpoint_every=350),
  ).to_config_dict()
