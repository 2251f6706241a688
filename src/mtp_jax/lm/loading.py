"""From a workdir to a `LanguageModel`."""
import dataclasses
import pathlib
import types
from collections.abc import Mapping, Sequence

import jax

from mtp_jax.checkpoint import store
from mtp_jax.checkpoint.record import check_conventions, choose, locate, whole_record
from mtp_jax.config import BadInput, Config, local_path
from mtp_jax.config.paths import absolute
from mtp_jax.data.corpus import other_documents, tokenizer_of_run
from mtp_jax.decode.requests import check_is, one_or_several
from mtp_jax.formats.detect import is_folder
from mtp_jax.formats.importing import open_folder
from mtp_jax.lm.language_model import LanguageModel
from mtp_jax.mesh import mesh_of_model
from mtp_jax.model.model import conventions
from mtp_jax.programs import keep_programs
from mtp_jax.train import step as training


def load(workdir, step: int | None = None, *, tokenizer: str | None = None,
         data: str | Sequence[str] | None = None,
         mesh: Mapping[str, int] | None = None) -> LanguageModel:
  """The model of a checkpoint, whatever the number of devices that saved it, or of a folder of another
  framework.

  Args:
    workdir: of a training run, or a path inside it, such as that of one checkpoint; or a folder with
      config.json and safetensors in one of the formats that `export` writes.
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
  if is_folder(workdir):
    return _of_folder(local_path(workdir, 'workdir'), step, tokenizer, data, mesh)
  workdir, step = locate(workdir, step, 'workdir')
  workdir = absolute(workdir)

  def load_step(step: int) -> LanguageModel:
    return _loaded(workdir, whole_record(workdir, step, without='training'), tokenizer, data, mesh)

  return choose(workdir, step, load_step)


def _loaded(workdir: pathlib.Path, record: dict, tokenizer, data, mesh) -> LanguageModel:
  config = Config.from_dict(record['config'])
  check_conventions(conventions(config.model), record, workdir)
  check_is((str, pathlib.Path, types.NoneType), tokenizer=tokenizer)
  tokens = tokenizer_of_run(workdir, record, tokenizer, 'tokenizer')
  config = _with_documents(config, data)
  mesh = _mesh(config, mesh)
  with jax.set_mesh(mesh):
    parameters = training.abstract(config, mesh).model
    model = store.restore(workdir, record['step'], parameters=parameters)['parameters']
  return LanguageModel(config, tokens, model, record['step'], record, mesh)


def _of_folder(folder: pathlib.Path, step, tokenizer, data, mesh) -> LanguageModel:
  """The model of a folder of another framework."""
  if step not in (None, 0):
    raise BadInput(f'step={step}: {folder} is of another framework, and has no steps')
  check_is((str, pathlib.Path, types.NoneType), tokenizer=tokenizer)
  opened = open_folder(folder, 'workdir', tokenizer=str(tokenizer or ''))
  config = _with_documents(opened.config, data)
  mesh = _mesh(config, mesh)
  with jax.set_mesh(mesh):
    model = opened.model(training.abstract(config, mesh).model)
  record = {'step': opened.step, 'config': config.to_dict(), 'conventions': conventions(config.model),
            'tokenizer': opened.tokenizer.digest, 'identity': {'imported': opened.format}}
  return LanguageModel(config, opened.tokenizer, model, opened.step, record, mesh)


def _with_documents(config: Config, data) -> Config:
  if data is None:
    return config
  names = one_or_several('data', data, (str, pathlib.Path))
  return dataclasses.replace(config, data=other_documents(config.data, names))


def _mesh(config: Config, mesh) -> jax.sharding.Mesh:
  keep_programs(config)
  return mesh_of_model(config, mesh)
