"""A checkpoint as a folder that other frameworks load.

    *.safetensors, *.safetensors.index.json     the tensors, in one file or several
    config.json or params.json                  what they are; its entry `mtp_jax` tells what it has no names for
    generation_config.json, tokenizer files     what decoding needs
    mtp/                                        futures that no server reads
    README.md                                   the model card

Arrays are read from the checkpoint one after the other, so that the memory holds the largest of
them, not the model. The folder is written under another name, and gets its own once it is whole.
"""
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

import jax
import ml_dtypes
import numpy as np

from mtp_jax.checkpoint import store
from mtp_jax.config import BadInput, Config, ModelConfig, local_path
from mtp_jax.config.errors import cannot
from mtp_jax.formats import card
from mtp_jax.formats.fitting import check, foldable, folded
from mtp_jax.formats.format import Format
from mtp_jax.formats.safetensors import Writer
from mtp_jax.formats.tensors import Arrays, Tensor
from mtp_jax.formats.tokenizers import tokenizer_files
from mtp_jax.model.model import Model, conventions
from mtp_jax.tokenizer import Tokenizer, decodable

TYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}
SIDECAR = 'mtp'
NATIVE = 'mtp_jax'  # the entry of config.json for what its format has no names for
SMALLEST_SCALE = 1e-6  # of a final norm that is folded: another norm is divided by it


@dataclasses.dataclass(frozen=True)
class Source:
  """A model to export: its config, tokenizer and record, and a function that reads one array by its
  name.
  """
  config: Config
  tokenizer: Tokenizer
  record: dict
  read: Callable[[str], np.ndarray]

  @property
  def model(self) -> ModelConfig:
    return self.config.model

  def with_model(self, c: ModelConfig) -> 'Source':
    """With another config of the model."""
    return dataclasses.replace(self, config=dataclasses.replace(self.config, model=c))


def arrays_of(c: ModelConfig) -> Arrays:
  """The shapes of a model's arrays."""
  shapes = jax.eval_shape(lambda: Model(c, jax.random.key(0)))
  return Arrays({name: x.shape for name, x in store.by_path(shapes).items()},
                c.rope_width if c.attention == 'latent' else c.head_width)


def with_final_norm_folded(source: Source) -> Source:
  """The same model with final norm 1: its scale is a factor of the unembedding, and a divisor of
  the module's norm.
  """
  c, scale_D = source.model, np.asarray(source.read('final_norm_D'))
  if np.abs(scale_D).min() < SMALLEST_SCALE:
    raise BadInput(f'final_norm_D: a scale of {np.abs(scale_D).min():.1g} is too small to fold; give --nofold')

  def read(name: str) -> np.ndarray:
    if name == 'final_norm_D':
      return np.ones_like(scale_D)
    if name == 'futures.out_norm_D':
      return np.asarray(source.read(name)) / scale_D
    if name == 'unembed_VD':
      return np.asarray(source.read('embed_VD' if c.tie_embeddings else 'unembed_VD')) * scale_D
    return source.read(name)

  return dataclasses.replace(source.with_model(folded(c)), read=read)


def export(source: Source, name: str, output, dtype: str = 'float32', shard_bytes: int = 5 * 10**9,
           fold: bool = True,
           copies: bool = True) -> dict:
  """Writes a model in a format: {'tensors': how many, 'bytes': of them, 'files': names, 'folded':
  bool}.

  Args:
    name: of the format.
    output: a folder that is not there yet, or is empty.
    dtype: of the tensors, float32 or bfloat16.
    shard_bytes: of a file of tensors, at most.
    fold: fold the final norm where a module reads the state before it, and readers may give it the
      one after it.
    copies: also write tensors that others hold too, for older readers.

  Raises:
    BadInput: the format cannot hold the model, or the folder cannot be written.
  """
  chosen = check(name, source.model)
  if dtype not in TYPES:
    raise BadInput(f"--dtype={dtype}: must be {' or '.join(TYPES)}")
  is_folded = foldable(source.model) and (chosen.norm_read == 'post_norm' or chosen.norm_read == 'either' and fold)
  if is_folded:
    source = with_final_norm_folded(source)
  output = local_path(output, '--output')
  with cannot('write', f'--output={output}', 'give a folder that can be written'):
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
      raise BadInput(f'--output={output}: is there already; give a new folder')
    unfinished = output.with_name(f'{output.name}.unfinished')
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    result = _write(source, name, chosen, unfinished, output, TYPES[dtype], shard_bytes, copies,
                    is_folded)
    if output.exists():
      output.rmdir()
    unfinished.replace(output)
  return result


def _write(source: Source, name: str, chosen: Format, folder: pathlib.Path, output: pathlib.Path,
           dtype,
           shard_bytes: int, copies: bool, is_folded: bool) -> dict:
  c, arrays = source.model, arrays_of(source.model)
  tensors = [tensor for tensor in chosen.tensors(c) if copies or not tensor.copy]
  total = write_tensors(folder, arrays, tensors, source.read, dtype, shard_bytes, chosen.stem)
  if sidecar := chosen.sidecar(c):
    (folder / SIDECAR).mkdir()
    total += write_tensors(folder / SIDECAR, arrays, sidecar, source.read, dtype, shard_bytes)
    _write_json(folder / SIDECAR / 'config.json', {NATIVE: conventions(c)})
  _write_json(folder / chosen.settings, settings(source, chosen, np.dtype(dtype).name))
  if chosen.settings == 'config.json':
    _write_json(folder / 'generation_config.json', generation_settings(source))
  for file, content in tokenizer_files(source.tokenizer, source.config.data.length).items():
    (folder / file).write_bytes(content)
  text = card.text(source.config, source.record, name, chosen, output, np.dtype(dtype).name,
                   is_folded)
  (folder / 'README.md').write_text(text)
  for path in folder.rglob('*'):
    if path.is_file():
      _sync(path)
  files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())
  return {'tensors': len(tensors) + len(sidecar), 'bytes': total, 'files': files,
          'folded': is_folded}


def write_tensors(folder: pathlib.Path, arrays: Arrays, tensors: list[Tensor], read, dtype,
                  shard_bytes: int,
                  stem: str = 'model') -> int:
  """Writes tensors into files, one array of the model after the other. Returns their bytes."""
  type_of = lambda tensor: np.float32 if tensor.float32 else dtype
  wanted = {tensor.name: (type_of(tensor), arrays.tensor_shape(tensor)) for tensor in tensors}
  writer = Writer(folder, wanted, shard_bytes, stem)
  try:
    for names, group in by_arrays(tensors):
      loaded = {name: read(name) for name in names}
      for tensor in group:
        writer.write(tensor.name, arrays.to_theirs(tensor, loaded.__getitem__))
      del loaded
    writer.close()
  except BaseException:
    writer.abandon()
    raise
  return sum(int(np.prod(shape)) * np.dtype(kind).itemsize for kind, shape in wanted.values())


def by_arrays(tensors: list[Tensor]) -> Iterator[tuple[list[str], list[Tensor]]]:
  """Groups of tensors with the arrays that they hold; no array is in two groups. Tensors of zeros
  need none.
  """
  groups: list[tuple[set, list]] = []
  for tensor in tensors:
    names = set() if tensor.zeros else {part.ours for part in tensor.parts}
    together = [group for group in groups if group[0] & names]
    groups = [group for group in groups if not group[0] & names]
    groups.append((names.union(*(group[0] for group in together)),
                   [*(other for group in together for other in group[1]), tensor]))
  yield from ((sorted(names), group) for names, group in groups)


def settings(source: Source, chosen: Format, dtype: str) -> dict:
  """The content of config.json, or of the file that the format has instead."""
  c, data, tokens = source.model, source.config.data, source.tokenizer
  native = {'model': dataclasses.asdict(c), 'conventions': conventions(c), 'length': data.length,
            'tokenizer': 'tokenizer.model' if tokens.model else 'bytes',
            'tokenizer_digest': tokens.digest,
            'step': source.record['step']}
  if chosen.settings != 'config.json':
    return {**chosen.entries(c), NATIVE: native}
  return {**chosen.entries(c), 'max_position_embeddings': data.length, 'dtype': dtype,
          'torch_dtype': dtype,
          **_special_ids(tokens), NATIVE: native}


def _special_ids(tokens: Tokenizer) -> dict:
  return {'bos_token_id': tokens.bos, 'eos_token_id': tokens.eos, 'pad_token_id': tokens.pad}


def generation_settings(source: Source) -> dict:
  """The content of generation_config.json: ids that stand for no bytes are never generated, as
  here.
  """
  suppressed = np.flatnonzero(~decodable(source.config, source.tokenizer)).tolist()
  return {**_special_ids(source.tokenizer), 'do_sample': False, 'suppress_tokens': suppressed,
          '_from_model_config': False}


def _write_json(path: pathlib.Path, content: dict) -> None:
  path.write_text(json.dumps(content, indent=2) + '\n')


def _sync(path: pathlib.Path) -> None:
  with path.open('rb') as file:
    os.fsync(file.fileno())
