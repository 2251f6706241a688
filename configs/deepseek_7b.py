"""A dense 7B model with one sequential module, trained like DeepSeek-V3.

The second prediction has weight 0.3, and 0.1 in the last third of training.

paper        DeepSeek-V3 (arXiv:2412.19437, sections 2.2 and 4.2): the module, its weight, and when the weight drops
             (10 of 14.8 T tokens); DeepSeek LLM 7B (arXiv:2401.02954, Table 2): shape, vocabulary and schedule, whose
             two drops of the learning rate are a linear decay here
parameters   7,146,315,776: 6.07 B in the trunk, 0.24 B in the module, which is dropped or drafts
FLOPs        49.1 G a token, forward and backward; causal 46.0 G
data         2.0 T tokens, 9.4 M a step
hardware     v5p:4x4x4, compiled for it, never run
time         at least 46.7 days
expect       not measured
command      python -m mtp_jax plan --config=configs/deepseek_7b.py --topology=v5p:4x4x4
"""
from mtp_jax.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig


def get_config():
  return Config(
      model=ModelConfig(kind='sequential', placement='appended', vocab=102_400, width=4096, layers=30,
                        heads=32, kv_heads=32, head_width=128, feed_forward=11_008, futures=2, dtype='bfloat16',
                        remat='full'),
      objective=ObjectiveConfig(weights=(1.0, '0.3 step 0.676 0.1')),
      data=DataConfig(length=4096),
      optimizer=OptimizerConfig(learning_rate=4.2e-4, warmup_steps=2000, schedule='wsd', decay_share=0.2,
                                final_ratio=0.1),
      train=TrainConfig(steps=211_928, batch=2304, evaluate_rows=2304),
  ).to_config_dict()
