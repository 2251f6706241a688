"""The schema of an experiment: six frozen sections, each field with its default and one line of meaning.

A config file is an experiment: `configs/*.py` defines `get_config()`, which returns `Config(...).to_config_dict()`, so that
`--config.model.layers=12` works. At the door it becomes a `Config` again, and `Config` checks itself: a wrong name, type or
combination raises `BadInput` with one line that says what, where and how to mend it. Nothing here imports JAX.
"""
import dataclasses
import types
import typing
from collections.abc import Mapping

import ml_collections

from mtp_jax.config.checks import check
from mtp_jax.config.errors import BadInput, nearest
from mtp_jax.config.weights import weight_at


def _field(default, meaning: str):
  return dataclasses.field(default=default, metadata={'meaning': meaning})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder trunk and its futures (Gloeckle et al. 2024, arXiv:2404.19737; DeepSeek-V3, arXiv:2412.19437)."""
  vocab: int = _field(264, 'V: rows of the embedding, at least the size of the tokenizer')
  width: int = _field(128, 'D: the residual stream')
  layers: int = _field(8, 'transformer blocks on the way of one prediction, see placement')
  heads: int = _field(4, 'H: query heads')
  kv_heads: int = _field(2, 'G: key and value heads, shared by H/G query heads each')
  head_width: int = _field(32, 'K: width of one head, even')
  feed_forward: int = _field(352, 'F: hidden width of SwiGLU')
  futures: int = _field(4, 'M: predictions at each position; 1 is the plain language model')
  kind: str = _field('parallel', 'parallel, linear: independent heads; causal, anticausal: chains of heads (all Gloeckle); sequential: modules (DeepSeek-V3)')
  placement: str = _field('matched', 'matched: extra futures take their blocks from the trunk; appended: the trunk keeps them')
  share_modules: bool = _field(False, 'sequential: one module, applied recursively, instead of M-1')
  hidden_input: str = _field('post_norm', "sequential: modules read the previous state after its norm (post_norm) or before (pre_norm)")
  head_batch: int = _field(1, 'parallel, linear: how many futures run at once, forward and backward; must divide M')
  qk_norm: bool = _field(False, 'RMSNorm of every query and key head before the rotary embedding')
  rope_base: float = _field(10_000.0, 'wavelength base of the rotary embedding')
  norm_epsilon: float = _field(1e-6, 'added to the mean square in RMSNorm')
  tie_embeddings: bool = _field(False, 'use the embedding as unembedding')
  logit_cap: float = _field(0.0, 'logits are cap * tanh(logits / cap); 0 leaves them as they are')
  dtype: str = _field('float32', 'compute type: float32 or bfloat16; parameters are always float32')
  remat: str = _field('full', 'what a block recomputes in the backward pass: none, full, dots (all but matmuls), or all but what is named, with commas: '
                              'attention, qkv, mlp')

  @property
  def own_heads(self) -> int:
    """What is stacked as futures: M heads, or the sequential modules that hold weights of their own; nothing in a plain language model."""
    if self.share_modules:
      return min(1, self.futures - 1)
    return self.futures - self.first_own_head

  @property
  def first_own_head(self) -> int:
    """The first future with a head or module of its own: 1 where future 0 reads the trunk itself, else 0."""
    return int(self.kind == 'sequential' or self.futures == 1)

  @property
  def independent(self) -> bool:
    """Whether every future reads the trunk, and none another future."""
    return self.kind in ('parallel', 'linear')

  def heads_to_run(self, active: tuple[bool, ...]) -> list[int]:
    """Futures whose heads must run so that the active ones can be read: themselves, and in a chain all that they hang from."""
    asked = [m for m in range(self.first_own_head, self.futures) if active[m]]
    if self.independent or not asked:
      return asked
    return list(range(asked[0], self.futures) if self.kind == 'anticausal' else range(self.first_own_head, asked[-1] + 1))

  @property
  def trunk_layers(self) -> int:
    """N: blocks in the trunk. A head that is a block stands on the way of the next token, as its last one."""
    if self.kind == 'linear':
      return self.layers
    if self.placement == 'matched':
      return self.layers - self.own_heads
    return self.layers - (1 - self.first_own_head)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """The loss of every future, its weight at each moment of training, and how much of it is alive at once.

  A weight is a number, or a path through the fraction of training that is done, in words: '0.3 step 0.676 0.1' (DeepSeek-V3),
  '0 linear 0:0.5 1', '1 cosine 0.2:1 0.1', '0 step 0.25 1 step 0.5 0'.
  """
  weights: tuple[float | str, ...] = _field((1.0,), "weight of each future in the loss, a number or such as '0.3 step 0.676 0.1'; the last one repeats")
  chunk: int = _field(1024, 'positions whose logits are alive at once, on each device')
  z_loss: float = _field(0.0, 'weight of the squared log-partition added to each nat (PaLM: 1e-4)')

  def weights_M(self, futures: int, fraction: float = 0.0) -> tuple[float, ...]:
    """The weight of each future when this fraction of training is done."""
    return tuple(weight_at(weight, fraction) for weight in (self.weights + self.weights[-1:] * futures)[:futures])

  def active(self, futures: int, fraction: float = 0.0) -> tuple[bool, ...]:
    """Which futures have a weight that is not 0, hence are computed, when this fraction of training is done."""
    return tuple(weight > 0 for weight in self.weights_M(futures, fraction))


@dataclasses.dataclass(frozen=True)
class DataConfig:
  sources: tuple[str, ...] = _field((), 'folders that `prepare` wrote')
  weights: tuple[float, ...] = _field((), 'share of the rows that come from each source, up to a factor; () is in proportion to their tokens')
  paths: tuple[str, ...] = _field((), "without sources: text files, a document each, or directories of them; () is the Python standard library's own source")
  tokenizer: str = _field('bytes', 'bytes, or the path of a SentencePiece model file')
  length: int = _field(256, 'L: input tokens of a row; a row holds M more, so that every future has a target')
  packing: str = _field('stream', 'stream: rows follow one another, without padding; best_fit: a document of up to L tokens is never cut')
  boundary: str = _field('within', 'within: attention and futures end with the document; across: they do not')
  validation_share: float = _field(0.05, 'of paths: share of the documents held out, chosen by a hash of their path')
  seed: int = _field(0, 'order of the rows; another order each epoch')
  on_damage: str = _field('stop', 'a block that is not what was written stops the run, or, quarantine: its rows become padding, and are counted')
  accept_changed: bool = _field(False, 'resume although the data are no longer those of the checkpoint')
  cache: str = _field('~/.cache/mtp_jax', 'where what is derived from paths, packings and remote shards is kept')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW (arXiv:1711.05101) with linear warm-up; defaults of Gloeckle et al. Table S13."""
  learning_rate: float = _field(3e-4, 'peak')
  warmup_steps: int = _field(100, 'linear from 0')
  schedule: str = _field('cosine', 'cosine, or wsd: warm-up, stable, linear decay')
  decay_share: float = _field(0.2, 'wsd: share of the steps spent decaying')
  final_ratio: float = _field(0.03, 'learning rate at the end / peak')
  b1: float = _field(0.9, 'decay of the first moment')
  b2: float = _field(0.95, 'decay of the second moment')
  epsilon: float = _field(1e-8, "Adam's epsilon")
  weight_decay: float = _field(0.1, 'decoupled; on matrices, never on vectors')
  clip: float = _field(1.0, 'largest global norm of the gradient')
  moments: str = _field('device', "where the moments rest between steps: device, or host, its machine's memory")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  steps: int = _field(1000, 'optimizer steps in all')
  batch: int = _field(32, 'B: rows in a step, over all devices')
  accumulate: int = _field(1, 'microbatches a step is computed in, exactly')
  seed: int = _field(0, 'initial parameters')
  log_every: int = _field(10, 'steps between two lines of the log')
  evaluate_every: int = _field(200, 'steps between validations; 0: only at the end')
  evaluate_rows: int = _field(64, 'rows of a validation during training')
  checkpoint_every: int = _field(200, 'steps between checkpoints; one is also saved at the end')
  checkpoints_kept: int = _field(3, 'newest checkpoints kept')
  skipped_allowed: int = _field(10, 'non-finite steps in a row after which the run stops')
  hang_seconds: float = _field(1800.0, 'a step longer than this ends the process with exit code 1 and the stacks of all threads; 0: never')
  heartbeat_seconds: int = _field(10, 'a process of the job without a sign of life for so long is taken for dead, and all end')
  tensorboard: bool = _field(True, 'write TensorBoard event files beside the log')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis of the mesh; their product must not exceed the devices there are."""
  data: int = _field(1, 'batch; parameters replicated')
  fsdp: int = _field(1, 'batch; parameters and moments sharded')
  context: int = _field(1, 'length')
  tensor: int = _field(1, 'heads, feed-forward and vocabulary')
  expert: int = _field(1, 'experts')


@dataclasses.dataclass(frozen=True)
class Config:
  """An experiment. Building one checks it; see `from_dict` for the way back from ml_collections or JSON.

  Raises:
    BadInput: naming the field, its value and the fix.
  """
  model: ModelConfig = ModelConfig()
  objective: ObjectiveConfig = ObjectiveConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  train: TrainConfig = TrainConfig()
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    for name, kind in SECTIONS.items():
      section = getattr(self, name)
      object.__setattr__(self, name, _section(kind, vars(section) if isinstance(section, kind) else section, name))
    check(self)

  def to_dict(self) -> dict:
    return dataclasses.asdict(self)

  def to_config_dict(self) -> ml_collections.ConfigDict:
    """Locked, so that an unknown name cannot slip in."""
    return ml_collections.ConfigDict(self.to_dict()).lock()

  @classmethod
  def from_dict(cls, values: Mapping) -> 'Config':
    """From a `ConfigDict`, or from JSON (whose lists become tuples)."""
    return cls(**{name: _section(kind, values.get(name, {}), name) for name, kind in typing.get_type_hints(cls).items()
                  } | {name: check_name(name) for name in values if name not in SECTIONS})


SECTIONS = {f.name: f.type for f in dataclasses.fields(Config)}


def check_name(path: str) -> None:
  """Raises BadInput unless `path` ('model.layers') is a field, naming the nearest one."""
  section, _, name = path.partition('.')
  if section not in SECTIONS:
    everywhere = [s for s, kind in SECTIONS.items() if section in {f.name for f in dataclasses.fields(kind)}]
    hint = f"did you mean '{everywhere[0]}.{section}'?" if everywhere and not name else nearest(section, SECTIONS)
    raise BadInput(f'config.{path}: no such section; {hint}')
  names = [f.name for f in dataclasses.fields(SECTIONS[section])]
  if name not in names:
    raise BadInput(f'config.{path}: {"a section, set its fields" if not name else "no such field"}; {nearest(name, names)}')


def _section(kind, values: Mapping, section: str):
  if not isinstance(values, (Mapping, ml_collections.ConfigDict)):
    raise BadInput(f'config.{section}={values!r}: must be a section, {kind.__name__}')
  hints, typed = typing.get_type_hints(kind), {}
  for name, value in values.items():
    check_name(f'{section}.{name}')
    typed[name] = _typed(hints[name], value, f'config.{section}.{name}')
  return kind(**typed)


def _typed(kind, value, where: str):
  if isinstance(kind, types.UnionType):
    return value if isinstance(value, str) else _typed(typing.get_args(kind)[0], value, where)
  if typing.get_origin(kind) is tuple:
    if not isinstance(value, (tuple, list)):
      raise BadInput(f'{where}={value!r}: must be a tuple, such as ({value!r},)')
    return tuple(_typed(typing.get_args(kind)[0], v, where) for v in value)
  if kind is float and type(value) is int:
    return float(value)
  if type(value) is not kind:
    raise BadInput(f'{where}={value!r}: must be of type {kind.__name__}, not {type(value).__name__}')
  return value
