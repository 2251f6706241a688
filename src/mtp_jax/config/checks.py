"""Which configs make sense: ranges of single fields, then the rules across sections."""
import dataclasses
import math

from mtp_jax.config.errors import BadInput, nearest
from mtp_jax.config.weights import weight_path


def check(c) -> None:
  """Ranges of single fields, then the rules across sections."""
  m, o, d, p, t, x = c.model, c.objective, c.data, c.optimizer, c.train, c.mesh

  def need(ok: bool, field: str, fix: str):
    if not ok:
      section, name = field.split('.')
      raise BadInput(f'config.{field}={getattr(getattr(c, section), name)!r}: {fix}')

  def divides(whole: str, part: str):
    a, b = (getattr(getattr(c, s), n) for s, n in (whole.split('.'), part.split('.')))
    need(a % b == 0, whole, f'must be a multiple of config.{part}={b}, such as {max(1, a // b) * b}')

  for section, values in vars(c).items():
    for f in dataclasses.fields(values):
      value = getattr(values, f.name)
      if isinstance(value, float):
        need(math.isfinite(value), f'{section}.{f.name}', 'must be finite')
  for field in ('model.vocab model.width model.layers model.heads model.kv_heads model.head_width model.feed_forward model.futures '
                'model.head_batch objective.chunk data.length train.steps train.batch train.accumulate train.log_every '
                'train.evaluate_rows train.checkpoint_every train.checkpoints_kept train.skipped_allowed train.heartbeat_seconds '
                'mesh.data mesh.fsdp mesh.context mesh.tensor mesh.expert').split():
    section, name = field.split('.')
    need(getattr(getattr(c, section), name) >= 1, field, 'must be at least 1')
  for field, choices in {'model.kind': ('parallel', 'linear', 'causal', 'anticausal', 'sequential'), 'model.placement': ('matched', 'appended'),
                         'model.hidden_input': ('post_norm', 'pre_norm'), 'model.dtype': ('float32', 'bfloat16'),
                         'data.packing': ('stream', 'best_fit'),
                         'data.boundary': ('within', 'across'), 'data.on_damage': ('stop', 'quarantine'), 'optimizer.schedule': ('cosine', 'wsd'),
                         'optimizer.moments': ('device', 'host')}.items():
    section, name = field.split('.')
    value = getattr(getattr(c, section), name)
    need(value in choices, field, nearest(value, choices))

  if m.remat not in ('none', 'full', 'dots'):
    unknown = [name for name in m.remat.split(',') if name not in ('attention', 'qkv', 'mlp')]
    need(not unknown, 'model.remat', f'{unknown and unknown[0]!r}: {nearest(unknown and unknown[0], ("none", "full", "dots", "attention", "qkv", "mlp"))}')
  need(m.head_width % 2 == 0, 'model.head_width', 'must be even for the rotary embedding')
  need(m.rope_base > 1, 'model.rope_base', 'must be above 1')
  need(m.norm_epsilon > 0, 'model.norm_epsilon', 'must be positive')
  need(m.trunk_layers >= 1, 'model.layers', f'leaves no trunk: {m.layers - m.trunk_layers} of them are futures; set at least {m.layers - m.trunk_layers + 1}')
  need(not m.share_modules or m.kind == 'sequential', 'model.share_modules', "parallel futures are independent; set config.model.kind='sequential'")
  divides('model.heads', 'model.kv_heads')
  if m.independent:
    divides('model.futures', 'model.head_batch')
  need(m.logit_cap >= 0, 'model.logit_cap', 'must be positive, or 0 for none')
  need(len(o.weights) >= 1 and len(o.weights) <= m.futures, 'objective.weights', f'needs 1 to {m.futures} numbers, one a future; the last one repeats')
  paths = []
  for weight in o.weights:
    try:
      paths.append(weight_path(weight))
    except ValueError as error:
      need(False, 'objective.weights', f"{error}; write a number, or such as '0.3 step 0.676 0.1' or '0 linear 0:0.5 1'")
  need(all(math.isfinite(w) and w >= 0 for value, turns in paths for w in (value, *(goal for *_, goal in turns))),
       'objective.weights', 'must be finite and not negative')
  places = sorted({0.0, *(place for _, turns in paths for _, start, end, _ in turns for place in (start, (start + end) / 2, end) if place < 1)})
  need(all(any(o.weights_M(m.futures, place)) for place in places), 'objective.weights', 'must not all be 0 at once')
  need(o.z_loss >= 0, 'objective.z_loss', 'must not be negative')

  need(not (d.sources and d.paths), 'data.paths', 'give either paths or sources; prepare the paths to have them as a source')
  need(not d.weights or len(d.weights) == len(d.sources), 'data.weights', f'must be {len(d.sources)} numbers, one a source, or () for their sizes')
  need(all(weight > 0 and math.isfinite(weight) for weight in d.weights), 'data.weights', 'must be positive; leave out a source that has no weight')
  need(0 < d.validation_share < 1, 'data.validation_share', 'must lie between 0 and 1')
  need(0 <= d.seed < 2**32, 'data.seed', 'must be at least 0 and below 2**32')
  need(t.seed >= 0, 'train.seed', 'must not be negative')
  need(t.hang_seconds >= 0, 'train.hang_seconds', 'must not be negative; 0 waits for ever')
  need(t.evaluate_every >= 0, 'train.evaluate_every', 'must not be negative; 0 validates only at the end')
  need(p.learning_rate > 0, 'optimizer.learning_rate', 'must be positive')
  need(0 <= p.warmup_steps < t.steps, 'optimizer.warmup_steps', f'must be at least 0 and below config.train.steps={t.steps}')
  need(p.schedule == 'cosine' or p.warmup_steps + p.decay_share * t.steps <= t.steps, 'optimizer.decay_share', 'warm-up and decay do not fit into the steps')
  for name in ('b1', 'b2'):
    need(0 <= getattr(p, name) < 1, f'optimizer.{name}', 'must be at least 0 and below 1')
  for name in ('decay_share', 'final_ratio'):
    need(0 <= getattr(p, name) <= 1, f'optimizer.{name}', 'must lie between 0 and 1')
  for name in ('epsilon', 'clip'):
    need(getattr(p, name) > 0, f'optimizer.{name}', 'must be positive')
  need(p.weight_decay >= 0, 'optimizer.weight_decay', 'must not be negative')

  need(x.expert == 1, 'mesh.expert', 'must be 1, this model has no experts')
  rows = x.data * x.fsdp
  divides('train.batch', 'train.accumulate')
  step_rows = rows * t.accumulate
  need(t.batch % step_rows == 0, 'train.batch', f'a microbatch must be a multiple of data x fsdp = {rows} rows, '
       f'such as {-(-t.batch // step_rows) * step_rows} in all')
  need(t.evaluate_rows % rows == 0, 'train.evaluate_rows', f'must be a multiple of data x fsdp = {rows}')
  divides('data.length', 'mesh.context')
  for axis, field in (('fsdp', 'width'), ('tensor', 'heads'), ('tensor', 'kv_heads'), ('tensor', 'feed_forward'), ('tensor', 'vocab')):
    divides(f'model.{field}', f'mesh.{axis}')
