"""Models of Gloeckle et al. 2024 (arXiv:2404.19737), Tables S14 (shapes) and S13 (hyper-parameters), with any number of futures.

    --config=configs/gloeckle.py:7b,4      four parallel futures        --config=configs/gloeckle.py:7b,1      the next-token twin

Equal parameters: M futures take M blocks from the trunk. Feed-forward width 8/3 of the width, up to a multiple of 256 (the paper gives
none; 12 x layers x width^2 non-embedding parameters are its own count), vocabulary 32,000.

parameters   0.3b 297 M, 0.6b 631 M, 1.3b 1.36 B, 3b 3.02 B, 7b 6.74 B, 13b 13.0 B
data         2^23 tokens a step, 91 B tokens up to 3b, 209.7 B for 7b and 13b
slice        0.3b to 7b fit v5e:16x16, 13b too; v5p:4x4x4 with microbatches of 4 rows a chip
command      python -m mtp_jax plan --config=configs/gloeckle.py:7b,4 --topology=v5p:4x4x4
"""
from mtp_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

SHAPES = {  # width, layers, heads, steps, warm-up
    '0.3b': (1024, 18, 16, 10_850, 1000), '0.6b': (1280, 27, 20, 10_850, 1000), '1.3b': (2048, 24, 16, 10_850, 1000),
    '3b': (2560, 36, 20, 10_850, 1000), '7b': (4096, 32, 32, 25_000, 2000), '13b': (5120, 40, 40, 25_000, 1000)}


def get_config(which: str = '0.3b,4'):
  size, futures = which.split(',')
  width, layers, heads, steps, warmup = SHAPES[size]
  return Config(
      model=ModelConfig(vocab=32_000, width=width, layers=layers, heads=heads, kv_heads=heads, head_width=width // heads,
                        feed_forward=-(-8 * width // 768) * 256, futures=int(futures), dtype='bfloat16', remat='full'),
      data=DataConfig(length=4096),
      optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=warmup, final_ratio=0.03),
      train=TrainConfig(steps=steps, batch=2048, evaluate_rows=2048),
  ).to_config_dict()
