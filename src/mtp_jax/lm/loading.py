"""From a workdir to a `LanguageModel`."""
import dataclasses
import pathlib
import types
from collections.abc import Mapping, Sequence

import jax

from mtp_jax.checkpoint import store
from mtp_jax.checkpoint.record import (
    TOKENIZER,
    check_conventions,
    check_run,
    check_tokenizer,
    check_whole,
    choose,
    locate,
    record_of,
)
from mtp_jax.config import Config
from mtp_jax.config.paths import absolute
from mtp_jax.data.corpus import load_tokenizer, other_documents
from mtp_jax.decode.requests import check_is, one_or_several
from mtp_jax.lm.language_model import LanguageModel
from mtp_jax.mesh import mesh_of_model
from mtp_jax.model.model import conventions
from mtp_jax.programs import keep_programs
from mtp_jax.train import step as training


def load(workdir, step: int | None = None, *, tokenizer: str | None = None,
         data: str | Sequence[str] | None = None,
         mesh: Mapping[str, int] | None = None) -> LanguageModel:
  """The model of a checkpoint, whatever the number of devices that saved it.

  Args:
    workdir: of a training run, or a path inside it, such as that of one checkpoint.
    step: by default the newest checkpoint that is whole; a line tells why a newer one is not used.
    tokenizer: a SentencePiece model file; by default the one that the workdir keeps.
    data: what `corpus` and `evaluate` read instead of the documents of the training run: prepared
      sets, or text files and folders of them.
    mesh: devices along each axis, on which the model is placed, decodes and is evaluated, such as
      {'tensor': 4, 'fsdp': 2}; by default the config's mesh if there are enough devices, else one
      device.

  Raises:
    BadInput: there is no such checkpoint, its record and its arrays disagree, or the mesh does not
      fit the model or the devices.
  """
  workdir, step = locate(workdir, step, 'workdir')
  workdir = absolute(workdir)

  def load_step(step: int) -> LanguageModel:
    check_whole(workdir, step, without='training')
    record = record_of(workdir, step)
    check_run(workdir, record)
    return _loaded(workdir, record, tokenizer, data, mesh)

  return choose(workdir, step, load_step)


def _loaded(workdir: pathlib.Path, record: dict, tokenizer, data, mesh) -> LanguageModel:
  config = Config.from_dict(record['config'])
  check_conventions(conventions(config.model), record, workdir)
  check_is((str, pathlib.Path, types.NoneType), tokenizer=tokenizer)
  where, name = 'tokenizer', tokenizer
  if tokenizer is None:
    where, name = 'config.data.tokenizer', config.data.tokenizer
    if name != 'bytes' and (workdir / TOKENIZER).exists():
      name = workdir / TOKENIZER
  tokens = load_tokenizer(str(name), where)
  check_tokenizer(f'{where}={name}', tokens.digest, record, 'give the original file as tokenizer')
  if data is not None:
    names = one_or_several('data', data, (str, pathlib.Path))
    config = dataclasses.replace(config, data=other_documents(config.data, names))
  keep_programs(config)
  mesh = mesh_of_model(config, mesh)
  with jax.set_mesh(mesh):
    parameters = training.abstract(config, mesh).model
    model = store.restore(workdir, record['step'], parameters=parameters)['parameters']
  return LanguageModel(config, tokens, model, record['step'], record, mesh)
