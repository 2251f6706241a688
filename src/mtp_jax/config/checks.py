"""Which configs are valid: the values of single fields, then rules across fields, section by
section.
"""
import dataclasses
import math

from mtp_jax.config.errors import BadInput, nearest
from mtp_jax.config.paths import check_local
from mtp_jax.config.weights import Segment, parse_weight

AT_LEAST_1 = (
    'model.vocab', 'model.width', 'model.layers', 'model.heads', 'model.kv_heads',
    'model.head_width', 'model.kv_rank', 'model.rope_width', 'model.feed_forward', 'model.experts_per_token',
    'model.expert_width', 'model.expert_groups', 'model.groups_per_token', 'model.futures', 'model.head_batch',
    'data.length', 'train.steps', 'train.batch', 'train.accumulate',
    'train.log_every', 'train.evaluate_rows', 'train.checkpoint_every',
    'train.skipped_allowed', 'train.spike_window', 'train.heartbeat_seconds', 'train.start_seconds',
    'mesh.data', 'mesh.fsdp', 'mesh.context', 'mesh.tensor', 'mesh.expert')
CHOICES = {
    'model.kind': ('parallel', 'linear', 'causal', 'anticausal', 'sequential'),
    'model.attention': ('grouped', 'latent'),
    'model.placement': ('matched', 'appended'),
    'model.hidden_input': ('post_norm', 'pre_norm'),
    'model.module_input': ('chain', 'trunk'),
    'model.router': ('sigmoid', 'softmax'),
    'model.dtype': ('float32', 'bfloat16'),
    'data.packing': ('stream', 'best_fit'),
    'data.boundary': ('within', 'across'),
    'data.on_damage': ('stop', 'quarantine'),
    'optimizer.moments': ('device', 'host'),
}
SCHEDULES = ('cosine', 'wsd')
TRACKERS = ('tensorboard', 'wandb')
REMAT = ('none', 'full', 'dots')
REMAT_PARTS = ('attention', 'qkv', 'mlp')


def check(config) -> None:
  """Raises BadInput for the first rule that a `Config` breaks."""
  _check_values(config)
  _check_model(config)
  _check_experts(config)
  _check_objective(config)
  _check_data(config)
  _check_train(config)
  _check_optimizer(config)
  _check_mesh(config)


def _value(config, field: str):
  section, name = field.split('.')
  return getattr(getattr(config, section), name)


def _require(config, field: str, ok: bool, fix: str) -> None:
  if not ok:
    raise BadInput(f'config.{field}={_value(config, field)!r}: {fix}')


def _require_multiple(config, field: str, divisor_field: str) -> None:
  value, divisor = _value(config, field), _value(config, divisor_field)
  _require(config, field, value % divisor == 0,
           f'must be a multiple of config.{divisor_field}={divisor}, such as {-(-value // divisor) * divisor}')


def _check_values(c) -> None:
  for section, values in vars(c).items():
    for field in dataclasses.fields(values):
      value = getattr(values, field.name)
      _require(c, f'{section}.{field.name}', not isinstance(value, float) or math.isfinite(value),
               'must be finite')
  for field in AT_LEAST_1:
    _require(c, field, _value(c, field) >= 1, 'must be at least 1')
  for field, choices in CHOICES.items():
    value = _value(c, field)
    _require(c, field, value in choices, nearest(value, choices))


def _check_model(c) -> None:
  m = c.model
  for part in m.remat.split(',') if m.remat not in REMAT else ():
    _require(c, 'model.remat', part in REMAT_PARTS,
             f'{part!r}: {nearest(part, REMAT + REMAT_PARTS)}')
  _require(c, 'model.head_width', m.head_width % 2 == 0, 'must be even for the rotary embedding')
  _require(c, 'model.rope_base', m.rope_base > 1, 'must be above 1')
  _require(c, 'model.norm_epsilon', m.norm_epsilon > 0, 'must be positive')
  taken = m.layers - m.trunk_layers
  _require(c, 'model.layers', m.trunk_layers >= 1,
           f'leaves no trunk: {taken} of them are futures; set at least {taken + 1}')
  _require(c, 'model.share_modules', not m.share_modules or m.kind == 'sequential',
           f"{m.kind} futures have no modules to share; set config.model.kind='sequential'")
  _require_multiple(c, 'model.heads', 'model.kv_heads')
  _require(c, 'model.query_rank', m.query_rank >= 0, 'must be a rank, or 0 for queries that are not compressed')
  _require(c, 'model.rope_width', m.rope_width % 2 == 0, 'must be even for the rotary embedding')
  if m.attention == 'latent':
    _require(c, 'model.kv_heads', m.kv_heads == m.heads,
             f'latent attention makes keys and values of every head; set {m.heads}, the number of heads')
    _require(c, 'model.qk_norm', not m.qk_norm, 'latent attention norms what it compresses instead; set False')
    _require(c, 'model.qkv_bias', not m.qkv_bias, 'latent attention has no biases; set False')
  if m.kind in ('parallel', 'linear'):
    _require_multiple(c, 'model.futures', 'model.head_batch')
  _require(c, 'model.logit_cap', m.logit_cap >= 0, 'must be positive, or 0 for none')


def _check_experts(c) -> None:
  m = c.model
  for field in ('experts', 'shared_experts', 'dense_layers'):
    _require(c, f'model.{field}', getattr(m, field) >= 0, 'must not be negative')
  _require(c, 'model.expert_scale', m.expert_scale > 0, 'must be positive')
  if not m.experts:
    return
  _require_multiple(c, 'model.experts', 'model.expert_groups')
  _require(c, 'model.groups_per_token', m.groups_per_token <= m.expert_groups,
           f'must be at most config.model.expert_groups={m.expert_groups}')
  within = m.experts // m.expert_groups * m.groups_per_token
  _require(c, 'model.experts_per_token', m.experts_per_token <= within,
           f'must be at most {within}, the experts in the groups that a token may go to')
  _require(c, 'model.dense_layers', m.dense_layers < m.trunk_layers or m.experts_in_futures,
           f'leaves no block with experts: the trunk has {m.trunk_layers} blocks')
  _require(c, 'objective.balance_loss', c.objective.balance_loss >= 0, 'must not be negative')


def _check_objective(c) -> None:
  o, M = c.objective, c.model.futures
  _require(c, 'objective.weights', 1 <= len(o.weights) <= M,
           f'needs 1 to {M} numbers, one per future; the last one repeats')
  segments = []
  for weight in o.weights:
    segments += _path(c, 'objective.weights', weight)
  _path(c, 'objective.balance_rate', o.balance_rate)
  ok = all(any(o.weights_M(M, fraction)) for fraction in _turning_points(segments))
  _require(c, 'objective.weights', ok, 'must not all be 0 at once')
  _require(c, 'objective.chunk', o.chunk >= 0, 'must be at least 1, or 0 for a number that suits the vocabulary')
  _require(c, 'objective.z_loss', o.z_loss >= 0, 'must not be negative')


def _path(c, field: str, path: float | str) -> tuple[Segment, ...]:
  """How a number changes over training. Raises BadInput unless it is well written, finite and not negative."""
  try:
    first, changes = parse_weight(path)
  except ValueError as error:
    _require(c, field, False, f"{error}; write a number, or such as '0.3 step 0.676 0.1' or '0 linear 0:0.5 1'")
  ok = all(math.isfinite(value) and value >= 0 for value in (first, *(change.goal for change in changes)))
  _require(c, field, ok, 'must be finite and not negative')
  return changes


def _turning_points(segments: list[Segment]) -> list[float]:
  """Fractions of training between which no weight can become 0: where segments start and end, and
  their middles.
  """
  points = {0.0}
  for segment in segments:
    points |= {segment.start, (segment.start + segment.end) / 2, segment.end}
  return sorted(point for point in points if point < 1)


def _check_data(c) -> None:
  d = c.data
  _require(c, 'data.paths', not (d.sources and d.paths),
           'give either paths or sources; prepare the paths to have them as a source')
  _require(c, 'data.dataset', not (d.dataset and d.paths),
           'give either paths or a dataset; prepare the paths to have them as a source beside it')
  sources = len(d.sources) + bool(d.dataset)
  _require(c, 'data.weights', len(d.weights) in (0, sources),
           f'must be {sources} numbers, one per source, or () for their sizes')
  _require(c, 'data.weights', all(weight > 0 and math.isfinite(weight) for weight in d.weights),
           'must be positive; leave out a source that has no weight')
  _require(c, 'data.validation_share', 0 < d.validation_share < 1, 'must be between 0 and 1')
  check_local(d.cache, 'config.data.cache')
  _require(c, 'data.seed', 0 <= d.seed < 2**32, 'must be at least 0 and below 2**32')


def _check_train(c) -> None:
  t = c.train
  _require(c, 'train.seed', t.seed >= 0, 'must not be negative')
  _require(c, 'train.checkpoints_kept', t.checkpoints_kept >= 2,
           'must be at least 2, so that there is another where the newest is damaged')
  _require(c, 'train.unsaved_seconds', t.unsaved_seconds >= 0, 'must not be negative; 0 ends at the first that fails')
  _require(c, 'train.hang_seconds', t.hang_seconds >= 0, 'must not be negative; 0 waits forever')
  _require(c, 'train.self_check_every', t.self_check_every >= 0, 'must not be negative; 0 checks no step')
  _require(c, 'train.rollbacks_allowed', t.rollbacks_allowed >= 0, 'must not be negative; 0 ends the run at once')
  _require(c, 'train.spike_factor', t.spike_factor >= 0, 'must be positive, such as 20, or 0 for no spikes')
  _require(c, 'train.evaluate_every', t.evaluate_every >= 0,
           'must not be negative; 0 validates only at the end')
  for tracker in t.trackers:
    _require(c, 'train.trackers', tracker in TRACKERS,
             f"{tracker!r}: must be {' or '.join(TRACKERS)}, both as {TRACKERS}, none as ()")
  _require(c, 'train.trackers', len(set(t.trackers)) == len(t.trackers), 'names one twice')


def _check_optimizer(c) -> None:
  p, steps = c.optimizer, c.train.steps
  _require(c, 'optimizer.learning_rate', p.learning_rate > 0, 'must be positive')
  _require(c, 'optimizer.warmup_steps', 0 <= p.warmup_steps < steps,
           f'must be at least 0 and below config.train.steps={steps}')
  if p.schedule not in SCHEDULES:
    _require(c, 'optimizer.schedule', p.schedule[:1].isdigit(),
             f'{nearest(p.schedule, SCHEDULES)}, or a path, such as 1 linear 0.8:1 0.1')
    _path(c, 'optimizer.schedule', p.schedule)
  _require(c, 'optimizer.decay_share',
           p.schedule != 'wsd' or p.warmup_steps + p.decay_share * steps <= steps,
           'warm-up and decay do not fit into the steps')
  for name in ('b1', 'b2'):
    _require(c, f'optimizer.{name}', 0 <= getattr(p, name) < 1, 'must be at least 0 and below 1')
  for name in ('decay_share', 'final_ratio'):
    _require(c, f'optimizer.{name}', 0 <= getattr(p, name) <= 1, 'must be between 0 and 1')
  for name in ('epsilon', 'clip'):
    _require(c, f'optimizer.{name}', getattr(p, name) > 0, 'must be positive')
  _require(c, 'optimizer.weight_decay', p.weight_decay >= 0, 'must not be negative')


def _check_mesh(c) -> None:
  t, x = c.train, c.mesh
  _require(c, 'mesh.expert', x.expert == 1 or c.model.experts, 'this model has no experts; use config.mesh.fsdp')
  _require_multiple(c, 'train.batch', 'train.accumulate')
  changes = _path(c, 'train.batch_share', t.batch_share)
  shares = [parse_weight(t.batch_share)[0], *(change.goal for change in changes)]
  _require(c, 'train.batch_share', min(shares) * t.accumulate > 1 - 1e-6 and max(shares) <= 1,
           f'must be between one microbatch, 1/{t.accumulate} of the batch, and 1; with a larger '
           'config.train.accumulate microbatches are smaller')
  rows = x.data * x.fsdp * x.expert
  rows_per_step = rows * t.accumulate
  product = 'data x fsdp x expert' if x.expert > 1 else 'data x fsdp'
  _require(c, 'train.batch', t.batch % rows_per_step == 0,
           f'a microbatch must be a multiple of {product} = {rows} rows, '
           f'such as {-(-t.batch // rows_per_step) * rows_per_step} in all')
  _require(c, 'train.evaluate_rows', t.evaluate_rows % rows == 0, f'must be a multiple of {product} = {rows}')
  _require_multiple(c, 'data.length', 'mesh.context')
  _require_multiple(c, 'model.width', 'mesh.fsdp')
  parts = x.fsdp * x.expert
  divided = ('width', 'kv_rank', 'query_rank') if c.model.attention == 'latent' else ('width',)
  for field in divided:
    _require(c, f'model.{field}', getattr(c.model, field) % parts == 0,
             f'must be a multiple of fsdp x expert = {parts}')
  for field in ('heads', 'kv_heads', 'feed_forward', 'vocab'):
    _require_multiple(c, f'model.{field}', 'mesh.tensor')
  if c.model.experts:
    _require_multiple(c, 'model.expert_width', 'mesh.tensor')
    _require_multiple(c, 'model.experts', 'mesh.expert')
