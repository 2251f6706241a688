"""From a workdir to a `LanguageModel`."""
import dataclasses
import pathlib
import types
from collections.abc import Sequence

import jax

from mtp_jax.checkpoint import store
from mtp_jax.checkpoint.record import TOKENIZER, check_conventions, check_tokenizer, locate, read_record
from mtp_jax.config import BadInput, Config, MeshConfig
from mtp_jax.data.corpus import load_tokenizer, other_documents
from mtp_jax.decode.requests import check_is, one_or_several
from mtp_jax.lm.language_model import LanguageModel
from mtp_jax.mesh import make_mesh
from mtp_jax.model.model import conventions
from mtp_jax.train import step as training


def load(workdir, step: int | None = None, *, tokenizer: str | None = None,
         data: str | Sequence[str] | None = None) -> LanguageModel:
  """The model of a checkpoint, whatever the number of devices that saved it.

  The parameters are placed on the config's mesh if there are enough devices, else on one device.

  Args:
    workdir: of a training run, or a path inside it, such as that of one checkpoint.
    step: by default the newest checkpoint.
    tokenizer: a SentencePiece model file; by default the one that the workdir keeps.
    data: what `corpus` and `evaluate` read instead of the documents of the training run: prepared
      sets, or text files and folders of them.

  Raises:
    BadInput: there is no such checkpoint, or its record and its arrays disagree.
  """
  workdir, step = locate(workdir, step, 'workdir')
  workdir = workdir.absolute()
  record = read_record(workdir, step)
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
  try:
    mesh = make_mesh(config.mesh)
  except BadInput:
    mesh = make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    parameters = training.abstract(config, mesh).model
    model = store.restore(workdir, record['step'], parameters=parameters)['parameters']
  return LanguageModel(config, tokens, model, record['step'], record, mesh)
