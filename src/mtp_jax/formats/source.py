"""What `export` reads: a checkpoint, array by array, or a model in memory."""
import pathlib

import numpy as np

from mtp_jax.checkpoint import store
from mtp_jax.checkpoint.record import (
    TOKENIZER,
    check_conventions,
    check_run,
    check_tokenizer,
    check_whole,
    choose,
    record_of,
)
from mtp_jax.config import Config
from mtp_jax.config.paths import absolute
from mtp_jax.data.corpus import load_tokenizer
from mtp_jax.formats.export import Source
from mtp_jax.model.model import conventions


def of_checkpoint(workdir: pathlib.Path, step: int | None = None,
                  tokenizer: str | None = None) -> Source:
  """That of a step, or of the newest one that is whole.

  Raises:
    BadInput: there is none, or the tokenizer is another.
  """
  workdir = absolute(workdir)

  def checked(step: int) -> dict:
    check_whole(workdir, step, without='training')
    record = record_of(workdir, step)
    check_run(workdir, record)
    return record

  record = choose(workdir, step, checked)
  config = Config.from_dict(record['config'])
  check_conventions(conventions(config.model), record, workdir)
  where, name = ('--tokenizer', tokenizer) if tokenizer else ('config.data.tokenizer',
                                                              config.data.tokenizer)
  if not tokenizer and name != 'bytes' and (workdir / TOKENIZER).exists():
    name = str(workdir / TOKENIZER)
  tokens = load_tokenizer(name, where)
  check_tokenizer(f'{where}={name}', tokens.digest, record, 'give the original file as --tokenizer')
  return Source(config, tokens, record, lambda name: store.parameter(workdir, record['step'], name))


def of_model(lm) -> Source:
  """That of a `LanguageModel`."""
  arrays = store.by_path(lm.model)
  return Source(lm.config, lm.tokenizer, lm.record, lambda name: np.asarray(arrays[name]))
