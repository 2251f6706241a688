"""DeepSeek-V3: latent attention, experts and one sequential module; and the 16B model of its ablation.

    --config=configs/deepseek_v3.py:671b     DeepSeek-V3
    --config=configs/deepseek_v3.py:16b      the smaller model of Table 4, in the shape of DeepSeek-V2-Lite

The batch grows from 3,072 to 15,360 rows during the first 469 B tokens, a fifteenth of it at a time. A group of
experts is that of a node: a token goes to four of eight.

paper        DeepSeek-V3 (arXiv:2412.19437, sections 2 and 4.2, Table 4); DeepSeek-V2 (arXiv:2405.04434, appendix B)
parameters   682,636,487,424: 669.2 B in the trunk, 11.6 B in the module; a token uses 37.3 B, 36.6 B without the
             module. 16b: 16.3 B, of which a token uses 2.54 B
FLOPs        292 G a token, forward and backward; causal 261 G. 16b: 20.0 G, causal 18.3 G
data         14.8 T tokens, 62.9 M a step
hardware     v5p:4x4x4 holds 16b, v5p:8x16x16 holds 671b; compiled for, never run
time         at least 13.8 days for 16b, 71.6 for 671b
expect       not measured
command      python -m mtp_jax plan --config=configs/deepseek_v3.py:16b --topology=v5p:4x4x4 --config.mesh.fsdp=8
             --config.mesh.expert=8
"""
from mtp_jax.config import BadInput, Config, DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig

SHAPES = {
    '671b': {'vocab': 129_280, 'width': 7168, 'layers': 61, 'heads': 128, 'kv_heads': 128, 'query_rank': 1536,
             'feed_forward': 18_432, 'experts': 256, 'experts_per_token': 8, 'shared_experts': 1, 'expert_width': 2048,
             'dense_layers': 3, 'expert_groups': 8, 'groups_per_token': 4, 'expert_scale': 2.5},
    '16b': {'vocab': 102_400, 'width': 2048, 'layers': 27, 'heads': 16, 'kv_heads': 16, 'feed_forward': 10_944,
            'experts': 64, 'experts_per_token': 6, 'shared_experts': 2, 'expert_width': 1408, 'dense_layers': 1},
}
RUNS = {  # highest learning rate, steps, rows, microbatches, share of the rows; fractions of the steps at which 67.6 %,
    # 96.6 % and 98.9 % of the tokens are done
    '671b': (2.2e-4, 241_000, 15_360, 15, '0.2 linear 0:0.055 1', (0.683, 0.967, 0.989)),
    '16b': (4.2e-4, 70_464, 4608, 18, 1.0, (0.676, 0.966, 0.989)),
}


def get_config(which: str = '671b'):
  if which not in SHAPES:
    raise BadInput(f'{which!r}: must be {" or ".join(SHAPES)}')
  learning_rate, steps, batch, accumulate, share, (falls, fallen, last) = RUNS[which]
  return Config(
      model=ModelConfig(kind='sequential', placement='appended', futures=2, attention='latent', kv_rank=512,
                        rope_width=64, head_width=128, dtype='bfloat16', remat='full', **SHAPES[which]),
      objective=ObjectiveConfig(weights=(1.0, f'0.3 step {falls} 0.1'), balance_rate=f'0.001 step {fallen} 0',
                                balance_loss=1e-4),
      data=DataConfig(length=4096),
      optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=2000,
                                schedule=f'1 cosine {falls}:{fallen} 0.1 step {last} 0.0332'),
      train=TrainConfig(steps=steps, batch=batch, batch_share=share, accumulate=accumulate,
                        evaluate_rows=batch // accumulate),
  ).to_config_dict()
