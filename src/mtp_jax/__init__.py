"""mtp_jax: pretraining and decoding of language models with multi-token prediction, in JAX.

    lm = mtp_jax.load('runs/tiny')
    lm.evaluate()['nats'], lm.generate('def ', max_tokens=64).text

Names are imported on first use, so that importing the package takes no time.
"""
import importlib

__version__ = '0.1.0'

_CONFIG = ('Config', 'ModelConfig', 'ObjectiveConfig', 'DataConfig', 'OptimizerConfig', 'TrainConfig',
           'MeshConfig', 'BadInput')
_ROOM_OF = {'load': 'lm', 'LanguageModel': 'lm', 'Generation': 'lm', 'Score': 'lm', 'fit': 'train.fit',
            **dict.fromkeys(_CONFIG, 'config')}
__all__ = list(_ROOM_OF)


def __getattr__(name: str):
  if name in _ROOM_OF:
    return getattr(importlib.import_module(f'mtp_jax.{_ROOM_OF[name]}'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return [*globals(), *_ROOM_OF]
