"""Whether a folder is one of another framework, and of which format. Imports no JAX."""
import json
import os
import pathlib
from collections.abc import Mapping

from mtp_jax.config import BadInput
from mtp_jax.formats.fitting import FORMATS

FILES = ('config.json', 'params.json')


def is_folder(path) -> bool:
  """Whether it is a folder of another framework on this machine, no workdir; False of what is no path."""
  if not isinstance(path, (str, pathlib.Path)) or '://' in str(path):
    return False
  settings = settings_of(pathlib.Path(os.path.expanduser(path)))
  return bool(settings and settings.keys() & {'model_type', 'architectures', 'n_layers'})


def settings_of(path: pathlib.Path) -> dict | None:
  """The content of config.json or params.json; None if there is neither, or it is no JSON object.
  """
  for file in (pathlib.Path(path) / name for name in FILES):
    try:
      content = json.loads(file.read_text())
    except (ValueError, RecursionError, OSError):
      continue
    return content if isinstance(content, dict) else None
  return None


def format_of_settings(settings: Mapping, where: str) -> str:
  """The format that config.json or params.json tells of. Raises BadInput for an unknown one."""
  if 'n_layers' in settings and 'dim' in settings:
    return 'meta'
  architectures, kind = settings.get('architectures') or [], settings.get('model_type')
  if 'MiMoForCausalLM' in architectures or kind == 'mimo':
    return 'mimo'
  if kind not in FORMATS:
    raise BadInput(f'{where}: is of model_type {kind}, which is not read here; formats: {", ".join(FORMATS)}')
  return kind
