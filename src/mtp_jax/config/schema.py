"""The schema of an experiment: six frozen sections of fields, each with a default and a meaning.

`configs/*.py` define get_config(), which returns `Config(...).to_config_dict()`: an
ml_collections.ConfigDict, so that --config.model.layers=12 works. It becomes a `Config` again
before anything else happens, and a `Config` checks itself: a wrong name, type or combination
raises `BadInput` with one line that says what is wrong, where, and how to fix it. Nothing here
imports JAX.
"""
import dataclasses
import functools
import itertools
import types
import typing
from collections.abc import Mapping

import ml_collections

from mtp_jax.config.checks import check
from mtp_jax.config.earlier_versions import FIX
from mtp_jax.config.errors import BadInput, nearest
from mtp_jax.config.weights import weight_at


def _field(default, meaning: str):
  """A field of a section; `train --help` shows its meaning."""
  return dataclasses.field(default=default, metadata={'meaning': meaning})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder and its futures.

  Sources: Gloeckle et al. 2024, arXiv:2404.19737; DeepSeek-V3, arXiv:2412.19437.
  """
  vocab: int = _field(264, 'V: rows of the embedding; at least as many as the tokenizer has ids')
  width: int = _field(128, 'D: width of the residual stream')
  layers: int = _field(8, 'transformer blocks between the embedding and one prediction; see placement')
  heads: int = _field(4, 'H: query heads')
  kv_heads: int = _field(2, 'G: key and value heads; H/G query heads share each')
  head_width: int = _field(32, 'K: width of one attention head; even')
  attention: str = _field(
      'grouped', 'grouped: grouped-query; latent: multi-head latent attention (DeepSeek-V3), whose keys and values '
                 'are compressed to kv_rank and whose heads have a rotary part of rope_width besides head_width')
  query_rank: int = _field(0, 'latent: U, rank of compressed queries; 0: they are not compressed')
  kv_rank: int = _field(512, 'latent: A, rank of compressed keys and values')
  rope_width: int = _field(64, 'latent: width of the rotary part of a query or key; even')
  feed_forward: int = _field(352, 'F: hidden width of SwiGLU')
  experts: int = _field(0, 'E: routed experts of a block; 0: every feed-forward is dense')
  experts_per_token: int = _field(2, 'routed experts that each token goes to')
  shared_experts: int = _field(1, 'experts that every token goes to')
  expert_width: int = _field(128, 'W: hidden width of an expert')
  dense_layers: int = _field(1, 'first blocks of the trunk whose feed-forward stays dense, beside experts')
  future_experts: bool = _field(True, "whether the futures' blocks have experts as well")
  router: str = _field(
      'sigmoid', 'affinity of a token and an expert: sigmoid (DeepSeek-V3), or softmax over the experts')
  expert_groups: int = _field(1, 'groups of experts, such as those of one node')
  groups_per_token: int = _field(1, 'groups of experts that a token may go to')
  expert_scale: float = _field(1.0, 'factor of the sum over the routed experts')
  futures: int = _field(4, 'M: predictions at each position; 1 is the plain language model')
  kind: str = _field(
      'parallel', 'parallel or linear: independent heads; causal or anticausal: chains of heads '
                  '(all Gloeckle et al.); sequential: modules (DeepSeek-V3)')
  placement: str = _field(
      'matched', 'matched: extra futures take their blocks from the trunk, for equal parameters; '
                 'appended: the trunk keeps its blocks')
  share_modules: bool = _field(False, 'sequential: one module, applied M-1 times, instead of M-1 modules')
  hidden_input: str = _field(
      'post_norm', 'sequential: a module reads the previous state after its norm (post_norm) or '
                   'before it (pre_norm)')
  module_input: str = _field(
      'chain', "sequential: what the second and later modules read besides a token: the previous module's state "
               '(chain: DeepSeek-V3), or the state of the trunk, as the first does (trunk: MiMo)')
  head_batch: int = _field(
      1, 'parallel, linear: heads computed at once, forward and backward; must divide M. More fill a chip '
         'that one head leaves idle, and keep more in memory: 564, 806 and 1,244 MiB of temporary memory '
         'with 1, 2 and 4 heads of configs/small.py; on two CPU cores a step of tiny.py takes 1.12 and 1.31 x the '
         'time with 2 and 4')
  qk_norm: bool = _field(False, 'apply RMSNorm to every query and key head before the rotary embedding')
  qkv_bias: bool = _field(False, 'grouped: add a bias to every query, key and value (Qwen2)')
  rope_base: float = _field(10_000.0, 'base of the wavelengths of the rotary embedding')
  norm_epsilon: float = _field(1e-6, 'added to the mean square in RMSNorm')
  tie_embeddings: bool = _field(False, 'use the embedding as the unembedding')
  logit_cap: float = _field(0.0, 'logits are cap * tanh(logits / cap); 0: no cap')
  dtype: str = _field('float32', 'type to compute in: float32 or bfloat16; parameters are always float32')
  remat: str = _field(
      'full', 'what the backward pass of a block recomputes: none, full, dots (all but matmuls), '
              'or all but the parts named, with commas: attention, qkv, mlp')

  @property
  def dense_trunk_layers(self) -> int:
    """Blocks of the trunk whose feed-forward is dense, the first ones."""
    return min(self.dense_layers, self.trunk_layers) if self.experts else self.trunk_layers

  @property
  def expert_trunk_layers(self) -> int:
    """Blocks of the trunk that have experts, after the dense ones."""
    return self.trunk_layers - self.dense_trunk_layers

  @property
  def experts_in_futures(self) -> bool:
    """Whether the futures' blocks have experts."""
    return bool(self.experts) and self.future_experts and self.kind != 'linear'

  @property
  def own_heads(self) -> int:
    """Number of heads or modules with weights of their own: the length of the axis M of the model's futures. 0 in a
    plain language model; 1 for sequential futures that share a module.
    """
    if self.share_modules:
      return min(1, self.futures - 1)
    return self.futures - self.first_own_head

  @property
  def first_own_head(self) -> int:
    """The first future with a head or module of its own: 1 where future 0 reads the trunk
    directly, else 0.
    """
    return int(self.kind == 'sequential' or self.futures == 1)

  @property
  def independent(self) -> bool:
    """Whether every future reads the trunk; else it reads its neighbour in a chain."""
    return self.kind in ('parallel', 'linear') or self.kind == 'sequential' and self.module_input == 'trunk'

  def heads_to_run(self, active: tuple[bool, ...]) -> list[int]:
    """Active heads and, in a chain, those they depend on."""
    heads = [m for m in range(self.first_own_head, self.futures) if active[m]]
    if self.independent or not heads:
      return heads
    if self.kind == 'anticausal':
      return list(range(heads[0], self.futures))
    return list(range(self.first_own_head, heads[-1] + 1))

  def heads_at_a_time(self, active: tuple[bool, ...]) -> int:
    """The largest number up to head_batch that divides the number of heads to run; 1 for chains and modules."""
    heads = len(self.heads_to_run(active))
    batched = self.kind in ('parallel', 'linear')
    return max(g for g in range(1, self.head_batch + 1) if heads % g == 0) if batched else 1

  @property
  def trunk_layers(self) -> int:
    """N: blocks of the trunk. Where the head of future 0 is a block, `layers` counts it."""
    if self.kind == 'linear':
      return self.layers
    if self.placement == 'matched':
      return self.layers - self.own_heads
    return self.layers - (1 - self.first_own_head)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """The loss: the weight of every future over training, and how many logits exist at once.

  A weight is a number, or a path in words through the fraction of training that is done:

      '0.3 step 0.676 0.1' (DeepSeek-V3)     '0 linear 0:0.5 1'
      '1 cosine 0.2:1 0.1'                   '0 step 0.25 1 step 0.5 0'
  """
  weights: tuple[float | str, ...] = _field(
      (1.0,), "weight of each future in the loss, a number or such as '0.3 step 0.676 0.1'; the "
              "last one repeats")
  chunk: int = _field(0, 'positions per device whose logits exist at once; 0: as many as keep them within 256 MiB, '
                         'but 128 to 1024')
  balance_rate: float | str = _field(
      0.001, "how far the biases of experts move after each step towards an even load, a number or such as "
             "'0.001 step 0.966 0'")
  balance_loss: float = _field(
      0.0001, 'weight of the loss that balances the experts within each row; it is in no metric')
  z_loss: float = _field(0.0, 'weight of the squared log-partition function in the loss (PaLM: 1e-4)')

  def positions(self, vocab: int) -> int:
    """Positions per device whose float32 logits exist at once: `chunk` or, if that is 0, a power of two."""
    most = 2**28 // (4 * vocab)
    return self.chunk or min(1024, max(128, 2**(most.bit_length() - 1)))

  def weights_M(self, futures: int, fraction: float = 0.0) -> tuple[float, ...]:
    """The weight of each future when this fraction of training is done."""
    weights = (self.weights + self.weights[-1:] * futures)[:futures]
    return tuple(weight_at(weight, fraction) for weight in weights)

  def balance_rate_at(self, fraction: float) -> float:
    """balance_rate when this fraction of training is done."""
    return weight_at(self.balance_rate, fraction)

  def active(self, futures: int, fraction: float = 0.0) -> tuple[bool, ...]:
    """Which futures have a weight above 0 when this fraction of training is done."""
    return tuple(weight > 0 for weight in self.weights_M(futures, fraction))


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The documents, the tokenizer, and how rows are cut from them."""
  sources: tuple[str, ...] = _field((), 'folders that `prepare` wrote')
  weights: tuple[float, ...] = _field((), 'rows from each source, as ratios; (): in proportion to their tokens')
  paths: tuple[str, ...] = _field(
      (), "without sources: text files, one document each, JSON lines, Parquet, or directories of "
          "them, read as prepare reads them; (): the Python standard library's source")
  dataset: str = _field(
      '', "instead of paths, or one more source, the last: 'package.module:function', which returns a "
          'grain.MapDataset of documents (see data/dataset.py)')
  validation: tuple[str, ...] = _field(
      (), 'what to hold out instead of a share: beside sources or a dataset folders that `prepare` wrote, else '
          'files or directories')
  tokenizer: str = _field('bytes', 'bytes, or the path of a SentencePiece model file')
  length: int = _field(256, 'L: input tokens of a row; M more follow, so that every future has a target')
  packing: str = _field('stream', 'stream: rows follow one another, without padding; '
                                  'best_fit: no document of up to L tokens is cut')
  boundary: str = _field('within', 'within: attention and futures end with the document; across: they do not')
  validation_share: float = _field(
      0.05, 'of paths and dataset: fraction held out: of the documents, chosen by a hash of their content; of '
            'few long ones the end of each')
  seed: int = _field(0, 'of the order of rows, which differs in each epoch')
  on_damage: str = _field(
      'stop', 'damaged data: stop the run, or quarantine: their rows become padding and are '
              'counted')
  accept_changed: bool = _field(False, 'resume even though the data differ from those of the checkpoint')
  cache: str = _field('~/.cache/mtp_jax', 'folder for prepared paths, packings and copies of remote shards')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW (arXiv:1711.05101) with linear warm-up; defaults of Gloeckle et al., Table S13."""
  learning_rate: float = _field(3e-4, 'highest learning rate')
  warmup_steps: int = _field(100, 'steps of linear warm-up from 0')
  schedule: str = _field(
      'cosine', "after the warm-up: cosine, wsd (stable, then linear decay), or the factor of the rate as a path "
                "through all steps, such as '1 cosine 0.683:0.967 0.1 step 0.989 0.033' (DeepSeek-V3)")
  decay_share: float = _field(0.2, 'wsd: fraction of all steps spent decaying')
  final_ratio: float = _field(0.03, 'last learning rate / highest')
  b1: float = _field(0.9, 'decay of the first moment')
  b2: float = _field(0.95, 'decay of the second moment')
  epsilon: float = _field(1e-8, "Adam's epsilon")
  weight_decay: float = _field(0.1, 'decoupled weight decay, of matrices only')
  clip: float = _field(1.0, 'largest global norm of the gradient')
  moments: str = _field('device', "memory of the moments between steps: device, or host (the machine's)")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The length of a run, and what is recorded, saved and watched."""
  steps: int = _field(1000, 'optimizer steps in all')
  batch: int = _field(32, 'B: rows per step, over all devices')
  batch_share: float | str = _field(
      1.0, "share of the batch that a step reads, down to whole microbatches: a number, or a path through all steps, "
           "such as '0.2 linear 0:0.055 1' (DeepSeek-V3), which warms the batch up; each size is compiled once")
  accumulate: int = _field(1, 'microbatches of a whole batch; the gradient is that of all rows of a step')
  seed: int = _field(0, 'of the initial parameters')
  log_every: int = _field(10, 'steps between records of the log')
  evaluate_every: int = _field(200, 'steps between validations; 0: only at the end')
  evaluate_rows: int = _field(64, 'held-out rows in a validation')
  checkpoint_every: int = _field(200, 'steps between checkpoints; one is also saved at the end')
  checkpoints_kept: int = _field(3, 'newest checkpoints to keep, at least 2')
  unsaved_seconds: float = _field(7200.0, 'a run that could save nothing for so long ends; one of several processes '
                                  'ends at the first save that fails')
  skipped_allowed: int = _field(
      10, 'bad steps in a row (not finite, or spikes), after which the run goes back to its newest checkpoint and '
          'leaves out the rows it has read since')
  rollbacks_allowed: int = _field(2, 'times that it goes back to the same checkpoint; then it ends with exit code 1')
  spike_factor: float = _field(
      0.0, 'a step whose loss or gradient norm is this many deviations above the median of the last spike_window good '
           'steps is bad and skipped; 0: none is. Gradient norms have heavy tails: of 2,000 steps of a good run '
           '6 skips 29, 10 skips 13 and 20 none')
  spike_window: int = _field(128, 'good steps before which no step counts as a spike')
  self_check_every: int = _field(
      0, 'steps between those that are run twice, from the same state and batch; where the results differ in a bit the '
         'run ends with exit code 1. Such a step takes twice as long, and holds a copy of parameters and moments in '
         'the memory where they rest; 0: never')
  hang_seconds: float = _field(
      1800.0, 'a wait for devices, data, a checkpoint or another process that takes longer ends the process with exit '
              'code 1, the stacks of all threads and a line; 0: never')
  start_seconds: int = _field(300, 'processes of a job wait so long for each other at the start')
  heartbeat_seconds: int = _field(10, 'a process of the job without a sign of life for so long is dead, and all end')
  programs_kept: bool = _field(True, 'keep compiled programs in config.data.cache, where the next start finds them')
  trackers: tuple[str, ...] = _field(
      ('tensorboard',), 'where the records go besides metrics.jsonl: tensorboard, wandb (an extra), both or none: ()')

  def rows_at(self, step: int) -> int:
    """Rows that a step reads; the first is step 0."""
    return self.rows_before(step + 1) - self.rows_before(step)

  def rows_before(self, step: int) -> int:
    """Rows of all steps before this one."""
    beyond = max(0, step - self.steps)
    return _rows_before(self)[step - beyond] + beyond * self.batch


@functools.lru_cache(maxsize=8)
def _rows_before(t: TrainConfig) -> list[int]:
  microbatch = t.batch // t.accumulate
  shares = [t.batch_share] * t.steps
  if isinstance(t.batch_share, str):
    shares = [weight_at(t.batch_share, step / t.steps) for step in range(t.steps)]
  microbatches = (max(1, int(share * t.accumulate + 1e-6)) for share in shares)
  return list(itertools.accumulate((microbatch * n for n in microbatches), initial=0))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis of the mesh; their product is at most the number of devices."""
  data: int = _field(1, 'splits the batch; parameters are replicated')
  fsdp: int = _field(1, 'splits the batch, parameters and moments')
  context: int = _field(1, 'splits the length')
  tensor: int = _field(1, 'splits heads, feed-forward and vocabulary')
  expert: int = _field(1, 'splits experts, and like fsdp the batch, all other parameters and moments')


@dataclasses.dataclass(frozen=True)
class Config:
  """An experiment; checks itself when it is made.

  Raises:
    BadInput: with the field, its value and the fix.
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
      values = vars(section) if isinstance(section, kind) else section
      object.__setattr__(self, name, _section(name, values))
    check(self)

  def to_dict(self) -> dict:
    """{'model': {'vocab': ...}, ...}"""
    return dataclasses.asdict(self)

  def to_config_dict(self) -> ml_collections.ConfigDict:
    """The same as a ConfigDict, locked, so that a misspelt name is an error."""
    return ml_collections.ConfigDict(self.to_dict()).lock()

  @classmethod
  def from_dict(cls, values: Mapping) -> 'Config':
    """From a dict, a `ConfigDict`, or JSON, whose lists become tuples; a missing field keeps its default."""
    if not isinstance(values, (Mapping, ml_collections.ConfigDict)):
      raise BadInput(f'config={values!r}: must hold the sections {", ".join(SECTIONS)}')
    for name in values:
      if name not in SECTIONS:
        raise _no_such_section(str(name))
    return cls(**{name: _section(name, values.get(name, {})) for name in SECTIONS})


SECTIONS = {field.name: field.type for field in dataclasses.fields(Config)}


def check_name(path: str) -> None:
  """Raises BadInput unless `path`, such as 'model.layers', is a field."""
  section, _, name = path.partition('.')
  if section not in SECTIONS:
    raise _no_such_section(path)
  names = [field.name for field in dataclasses.fields(SECTIONS[section])]
  if path in FIX:
    raise BadInput(f'config.{path}: no such field any more; {FIX[path]}')
  if name not in names:
    what = 'no such field' if name else 'a section, set its fields'
    raise BadInput(f'config.{path}: {what}; {nearest(name, names, _elsewhere(section))}')


def _no_such_section(path: str) -> BadInput:
  section, _, name = path.partition('.')
  return BadInput(f'config.{path}: no such section; {nearest(section, SECTIONS, {} if name else _elsewhere(""))}')


def _elsewhere(section: str) -> dict[str, str]:
  """'train.steps' by 'steps', of the fields of all other sections."""
  return {field.name: f'{other}.{field.name}' for other, kind in reversed(SECTIONS.items()) if other != section
          for field in dataclasses.fields(kind)}


def _section(section: str, values: Mapping):
  kind = SECTIONS[section]
  if not isinstance(values, (Mapping, ml_collections.ConfigDict)):
    raise BadInput(f'config.{section}={values!r}: must be a section, {kind.__name__}')
  hints, typed = typing.get_type_hints(kind), {}
  for name, value in values.items():
    check_name(f'{section}.{name}')
    typed[name] = _typed(hints[name], value, f'config.{section}.{name}')
  return kind(**typed)


def _typed(kind, value, where: str):
  """The value as this type: an int becomes a float, a list a tuple. Raises BadInput."""
  if isinstance(kind, types.UnionType):  # float | str
    return value if isinstance(value, str) else _typed(float, value, where)
  if typing.get_origin(kind) is tuple:
    if not isinstance(value, (tuple, list)):
      raise BadInput(f'{where}={value!r}: must be a tuple, such as ({value!r},)')
    return tuple(_typed(typing.get_args(kind)[0], item, where) for item in value)
  if kind is float and type(value) is int and abs(value) < 2**63:
    return float(value)
  if type(value) is not kind:
    raise BadInput(f'{where}={value!r}: must be of type {kind.__name__}, not {type(value).__name__}')
  if kind is int and abs(value) >= 2**63:
    raise BadInput(f'{where}={value}: must be below 2**63')
  return value
