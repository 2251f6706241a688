"""What `export` reads: a checkpoint, array by array, or a model in memory."""
import pathlib

import numpy as np

from mtp_jax.checkpoint import store
from mtp_jax.checkpoint.record import check_conventions, choose, whole_record
from mtp_jax.config import Config
from mtp_jax.config.paths import absolute
from mtp_jax.data.corpus import tokenizer_of_run
from mtp_jax.formats.export import Source
from mtp_jax.model.model import conventions


def of_checkpoint(workdir: pathlib.Path, step: int | None = None,
                  tokenizer: str | None = None) -> Source:
  """That of a step, or of the newest one that is whole.

  Raises:
    BadInput: there is none, or the tokenizer is another.
  """
  workdir = absolute(workdir)
  record = choose(workdir, step, lambda step: whole_record(workdir, step, without='training'))
  config = Config.from_dict(record['config'])
  check_conventions(conventions(config.model), record, workdir)
  tokens = tokenizer_of_run(workdir, record, tokenizer, '--tokenizer')
  return Source(config, tokens, record, lambda name: store.parameter(workdir, record['step'], name))


def of_model(lm) -> Source:
  """That of a `LanguageModel`."""
  arrays = store.by_path(lm.model)
  return Source(lm.config, lm.tokenizer, lm.record, lambda name: np.asarray(arrays[name]))
