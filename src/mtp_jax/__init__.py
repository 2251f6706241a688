"""mtp_jax: pretraining and decoding of language models with multi-token prediction, in JAX.

    lm = mtp_jax.load('runs/tiny')
    lm.evaluate()['nats'], lm.generate('def ', max_tokens=64).text

Everything is imported on first use, so that importing the package costs nothing.
"""
import importlib

__version__ = '0.1.0'

_HOME = {'load': 'lm', 'LanguageModel': 'lm', 'Generation': 'lm', 'Config': 'config', 'ModelConfig': 'config', 'ObjectiveConfig': 'config',
         'DataConfig': 'config', 'OptimizerConfig': 'config', 'TrainConfig': 'config', 'MeshConfig': 'config', 'BadInput': 'config',
         'fit': 'train.fit'}
__all__ = list(_HOME)


def __getattr__(name: str):
  if name in _HOME:
    return getattr(importlib.import_module(f'mtp_jax.{_HOME[name]}'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return [*globals(), *_HOME]
