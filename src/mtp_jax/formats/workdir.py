"""An imported model as the workdir of a run: its checkpoint is of step 0, with a new optimizer."""
import json
import pathlib
import secrets

import jax

from mtp_jax.checkpoint import store
from mtp_jax.checkpoint.record import CONFIG, RUN, TOKENIZER
from mtp_jax.config import BadInput, Config
from mtp_jax.config.errors import cannot
from mtp_jax.data.folder import Folder as Files
from mtp_jax.formats.importing import Folder
from mtp_jax.mesh import mesh_of_model
from mtp_jax.model.model import Model, conventions
from mtp_jax.train import step as training

PROGRAM = 'config.py'  # for train --config
SOURCE = '''"""The model of {folder}, as it was imported."""
from mtp_jax.config import Config


def get_config():
  return Config.from_dict({values}).to_config_dict()
'''


def write(folder: Folder, workdir: pathlib.Path) -> tuple[Config, Model]:
  """Writes a workdir that train resumes from, and that everything else reads.

  Raises:
    BadInput: the workdir is there already, or cannot be written; or the tensors are not those of
      the model.
  """
  where = f'--workdir={workdir}'
  with cannot('write', where, 'give a folder that can be written'):
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
      raise BadInput(f'{where}: is there already; give a new folder')
  config, mesh = folder.config, mesh_of_model(folder.config)
  with jax.set_mesh(mesh):
    model = folder.model(training.abstract(config, mesh).model)
    state = training.fresh(config, model)
  record = {'step': 0, 'config': config.to_dict(), 'conventions': conventions(config.model),
            'tokenizer': folder.tokenizer.digest,
            'identity': {'imported': f'{folder.format} {folder.path.name}'},
            'data': {'global_next_index': 0}, 'run': secrets.token_hex(8)}
  writer = store.Writer(workdir, config.train.checkpoints_kept)
  writer.save(0, state.model, state.without_model(), record)
  writer.close()
  files = Files(workdir, '--workdir')
  files.write(CONFIG, f'{json.dumps(config.to_dict(), indent=2)}\n'.encode())
  files.write(PROGRAM, SOURCE.format(folder=folder.path.name,
                                     values=repr(config.to_dict())).encode())
  files.write(RUN, f'{record["run"]}\n'.encode())
  if folder.tokenizer.model:
    files.write(TOKENIZER, folder.tokenizer.model)
  return config, model
