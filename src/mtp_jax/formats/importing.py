"""A folder of another framework as a model: into a workdir, or into memory.

Every tensor is placed by the table that `export` writes from, and each array of the model is filled
by it: a tensor that is missing, or of which the table knows nothing, is named.
"""
import dataclasses
import json
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from mtp_jax.checkpoint import store
from mtp_jax.config import BadInput, Config, DataConfig, ModelConfig
from mtp_jax.config.errors import cannot, one_line
from mtp_jax.formats import safetensors
from mtp_jax.formats.detect import format_of_settings, settings_of
from mtp_jax.formats.export import NATIVE, SIDECAR, arrays_of, by_arrays
from mtp_jax.formats.fitting import FORMATS, format_of, problems
from mtp_jax.formats.format import Format
from mtp_jax.formats.tensors import Arrays, Tensor
from mtp_jax.model.model import Model, conventions
from mtp_jax.tokenizer import Tokenizer
from mtp_jax.tokenizer import load as load_tokenizer

IGNORED = ('rope.freqs', 'rotary_emb.inv_freq')  # computed, not learned
SCALES = '_scale_inv'  # ends the name of the scales of a block-quantised tensor
BLOCK = 128  # rows and columns of such a block
LENGTH = 2048  # tokens of a row, for a model whose folder allows more


@dataclasses.dataclass(frozen=True)
class Folder:
  """What a folder says of its model, and its tensors, which are read where they are looked at."""
  path: pathlib.Path
  format: str
  config: Config
  tokenizer: Tokenizer
  arrays: Arrays
  tensors: list[Tensor]
  found: Mapping[str, np.ndarray]
  step: int

  @property
  def chosen(self) -> Format:
    return FORMATS[self.format]

  def model(self, abstract: Model) -> Model:
    """The model, each array placed as asked.

    Args:
      abstract: shapes and shardings of its arrays.
    """
    wanted, placed = store.by_path(abstract), {}
    for names, group in by_arrays(self.tensors):
      target = {name: np.empty(self.arrays.shapes[name], np.float32) for name in names}
      for tensor in group:
        self._place(tensor, target)
      placed |= {name: jax.device_put(array, wanted[name].sharding)
                 for name, array in target.items()}
    return store.from_dict(abstract, _nested(placed))

  def _place(self, tensor: Tensor, target: dict[str, np.ndarray]) -> None:
    array = self._read(tensor.name)
    if tensor.zeros:
      if np.any(array):
        raise BadInput(f'{self.path}: {tensor.name} is not 0, but models with qkv_bias=False have no biases')
    elif tensor.copy:
      whole = self.arrays.to_theirs(tensor, target.__getitem__)
      if not np.array_equal(whole, array):
        raise BadInput(f'{self.path}: {tensor.name} is not the tensor that it must be a copy of')
    else:
      self.arrays.to_ours(tensor, array, target)

  def _read(self, name: str) -> np.ndarray:
    """A tensor in float32; one that is quantised in blocks is multiplied by their scales."""
    array, scales = self.found[name].astype(np.float32), self.found.get(name + SCALES)
    if scales is None:
      return array
    by_row = np.repeat(scales.astype(np.float32), BLOCK, 0)[:array.shape[0]]
    return array * np.repeat(by_row, BLOCK, 1)[:, :array.shape[1]]


def _nested(arrays: dict) -> dict:
  nested = {}
  for name, array in arrays.items():
    *parents, last = name.split('.')
    parent = nested
    for key in parents:
      parent = parent.setdefault(key, {})
    parent[last] = array
  return nested


def open_folder(path: pathlib.Path, where: str, name: str = '', tokenizer: str = '',
                length: int = 0) -> Folder:
  """Reads what a folder says of its model, and checks that its tensors are those of the model.

  Args:
    where: the flag or argument that named it, for messages.
    name: of the format; '': as config.json tells.
    tokenizer: a SentencePiece model file, or 'bytes'; '': that of the folder.
    length: tokens of a row; 0: as the folder tells, but at most LENGTH if it is no export of ours.

  Raises:
    BadInput: it is no such folder, models here cannot be so, or a tensor is missing, unknown or of
      another shape.
  """
  where = f'{where}={path}'
  with cannot('read', where, 'make it readable, or give another folder'):
    if not path.is_dir():
      raise BadInput(f'{where}: no such folder')
    settings = settings_of(path)
  if settings is None:
    raise BadInput(f'{where}: has no config.json, nor params.json, that is a JSON object')
  name = name or format_of_settings(settings, where)
  chosen = format_of(name)
  found = safetensors.read(path, where)
  c, native = _model_config(settings, name, chosen, found, f'{where}: {chosen.settings}')
  length = length or native.get('length') or min(settings.get('max_position_embeddings') or LENGTH,
                                                 LENGTH)
  tokens, token_name = _tokenizer(path, tokenizer, native, where)
  try:
    config = Config(model=c, data=DataConfig(tokenizer=token_name, length=length))
  except BadInput as error:
    raise BadInput(f'{where}: {error}') from None
  if tokens.size > c.vocab:
    raise BadInput(f'{where}: its tokenizer has {tokens.size} ids, more than its {c.vocab} embeddings')
  arrays, tensors, sidecar = arrays_of(c), chosen.tensors(c), chosen.sidecar(c)
  if sidecar:
    if not (path / SIDECAR).is_dir():
      raise BadInput(f'{where}: lacks the folder {SIDECAR}, which holds {sidecar[0].name}')
    found |= safetensors.read(path / SIDECAR, where)
  found = _checked(found, arrays, tensors + sidecar, c, where)
  present = [tensor for tensor in tensors + sidecar if tensor.name in found]
  return Folder(path, name, config, tokens, arrays, present, found, native.get('step', 0))


def _model_config(settings: dict, name: str, chosen: Format, found,
                  where: str) -> tuple[ModelConfig, dict]:
  """(the model's config, what only an export of ours tells)."""
  native = settings.get(NATIVE) or {}
  untied = {'tie_word_embeddings': 'lm_head.weight' not in found}
  try:
    if 'model' not in native:
      fields = chosen.fields(untied | settings)
      dtype = settings.get('dtype') or settings.get('torch_dtype') or 'float32'
      c = Config.from_dict({'model': fields | {'dtype': 'bfloat16' if dtype == 'bfloat16' else 'float32'}}).model
    else:
      c = Config.from_dict({'model': native['model']}).model
      _check_native(c, native, chosen, settings)
  except BadInput as error:
    raise BadInput(f'{where}: {error}') from None
  except (TypeError, AttributeError) as error:
    raise BadInput(f'{where}: cannot be understood ({one_line(error)})') from None
  if why := problems(name, c):
    raise BadInput(f'{where}: {"; ".join(why)}')
  return c, native


def _check_native(c: ModelConfig, native: dict, chosen: Format, settings: dict) -> None:
  """Raises BadInput unless the entry of ours and all others tell of one model."""
  if native.get('conventions') != json.loads(json.dumps(conventions(c))):
    raise BadInput(f'{NATIVE}.conventions: are not those of this version; its weights would be misread')
  for key, value in json.loads(json.dumps(chosen.entries(c))).items():
    if settings.get(key) != value:
      raise BadInput(f'{key}={settings.get(key)!r}: its entry {NATIVE}.model says {value!r}; correct one of them')


def _tokenizer(path: pathlib.Path, name: str, native: dict, where: str) -> tuple[Tokenizer, str]:
  if not name:
    if (path / 'tokenizer.model').is_file():
      name = str((path / 'tokenizer.model').absolute())
    elif native.get('tokenizer') == 'bytes':
      name = 'bytes'
    else:
      raise BadInput(f'{where}: has no tokenizer.model; other tokenizers are not read here, so give --tokenizer, the '
                     'path of a SentencePiece model, or bytes')
  tokens = load_tokenizer(name, where if name != 'bytes' else '--tokenizer')
  if native.get('tokenizer_digest', tokens.digest) != tokens.digest:
    raise BadInput(f'{where}: its tokenizer is not the one it was exported with; restore the file')
  return tokens, name


def _checked(found: dict[str, np.ndarray], arrays: Arrays, tensors: list[Tensor], c: ModelConfig,
             where: str) -> dict[str, np.ndarray]:
  """The tensors that are used. Raises BadInput for one that is missing, unknown, or of another
  shape.
  """
  known = {tensor.name: tensor for tensor in tensors}
  scales = {name + SCALES for name in known}
  for name in found.keys() - known.keys() - scales:
    if name.endswith(IGNORED):
      continue
    if name == 'lm_head.weight' and c.tie_embeddings:
      if not np.array_equal(found[name], found.get('model.embed_tokens.weight')):
        raise BadInput(f'{where}: {name} is not the embedding, but config.json ties them')
      continue
    raise BadInput(f'{where}: {name} is in no table of its format; {_counts(found, known)}')
  for name, tensor in known.items():
    if name not in found:
      if tensor.copy:
        continue
      raise BadInput(f'{where}: lacks {name}; {_counts(found, known)}')
    shape = arrays.tensor_shape(tensor)
    if found[name].shape != shape:
      raise BadInput(f'{where}: {name} has shape {list(found[name].shape)}, not {list(shape)} as config.json tells')
  return {name: array for name, array in found.items() if name in known or name in scales}


def _counts(found, known) -> str:
  missing, extra = len(known.keys() - found.keys()), len(found.keys() - known.keys())
  return f'{missing} tensors are missing, {extra} are unknown'
