"""Models of Gloeckle et al. 2024 with any number of futures, of equal parameters.

    --config=configs/gloeckle.py:7b,4         four parallel futures
    --config=configs/gloeckle.py:7b,1         the next-token twin
    --config=configs/gloeckle.py:7b_bytes,8   eight over bytes, at length 8192

M futures take M blocks from the trunk. Feed-forward width 8/3 of the width, up to a multiple of 256 (the paper
gives none; 12 x layers x width^2 non-embedding parameters are its own count), vocabulary 32,000, of bytes 264.

paper        Gloeckle et al. 2024 (arXiv:2404.19737), Tables S14 (shapes) and S13 (hyper-parameters)
parameters   0.3b 296,784,896, 0.6b 630,526,720, 1.3b 1,364,297,728, 3b 3,018,775,040, 7b 6,738,415,616,
             13b 13,015,864,320, 7b_bytes 6,478,434,304
FLOPs        a token, forward and backward: 0.3b,1 2.49 G, 0.3b,4 3.08 G, 7b,1 46.1 G, 7b,4 48.4 G, 13b,1 87.2 G,
             13b,4 90.1 G, 7b_bytes,8 51.8 G
data         2^23 tokens a step, 91 B tokens up to 3b, 209.7 B for 7b and 13b; 12 x 2^20 a step, 314.6 B bytes for
             7b_bytes
hardware     v5p:4x4x4 holds every one, v5e:16x16 holds 7b, and 13b in two microbatches; compiled for, never run
time         at least 4.9 days for 7b,4 on v5p:4x4x4
expect       not measured
command      python -m mtp_jax plan --config=configs/gloeckle.py:7b,4 --topology=v5p:4x4x4
"""
from mtp_jax.config import BadInput, Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

SHAPES = {  # width, layers, heads, steps, warm-up
    '0.3b': (1024, 18, 16, 10_850, 1000),
    '0.6b': (1280, 27, 20, 10_850, 1000),
    '1.3b': (2048, 24, 16, 10_850, 1000),
    '3b': (2560, 36, 20, 10_850, 1000),
    '7b': (4096, 32, 32, 25_000, 2000),
    '13b': (5120, 40, 40, 25_000, 1000),
}


def get_config(which: str = '0.3b,4'):
  size, _, futures = which.partition(',')
  if size.removesuffix('_bytes') not in SHAPES or not futures.isdecimal():
    raise BadInput(f'{which!r}: must be a size and a number of futures, such as 7b,4 or 7b_bytes,8; '
                   f'sizes: {", ".join(SHAPES)}')
  of_bytes = size.endswith('_bytes')
  width, layers, heads, steps, warmup = SHAPES[size.removesuffix('_bytes')]
  vocab, length, batch = (264, 8192, 1536) if of_bytes else (32_000, 4096, 2048)
  return Config(
      model=ModelConfig(vocab=vocab, width=width, layers=layers, heads=heads, kv_heads=heads,
                        head_width=width // heads, feed_forward=-(-8 * width // 768) * 256,
                        futures=int(futures), dtype='bfloat16', remat='full'),
      data=DataConfig(length=length),
      optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=warmup, final_ratio=0.03),
      train=TrainConfig(steps=steps, batch=batch, evaluate_rows=batch),
  ).to_config_dict()
