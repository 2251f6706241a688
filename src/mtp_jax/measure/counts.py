"""Parameters and FLOPs of a config, beside its next-token twin: the same model with one future."""
import dataclasses

import jax

from mtp_jax.config import Config, ModelConfig
from mtp_jax.model import costs
from mtp_jax.model.model import Model


def next_token_twin(c: ModelConfig) -> ModelConfig:
  """The same model with one future, an ordinary language model."""
  return dataclasses.replace(c, futures=1, head_batch=1, share_modules=False)


def counts(config: Config) -> dict:
  """parameters and flops_per_token by part (see `costs`), and both of the next-token `twin`."""
  L = config.data.length
  return _counts(config.model, L) | {'twin': _counts(next_token_twin(config.model), L)}


def _counts(c: ModelConfig, length: int) -> dict:
  shapes = jax.eval_shape(lambda key: Model(c, key), jax.random.key(0))
  return {'parameters': costs.parameters(shapes), 'flops_per_token': costs.flops_per_token(c, length)}
