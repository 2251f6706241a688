"""plan: what a train step, or a pass of decoding, takes on TPU chips that are not here."""
import dataclasses
import math
import os

from mtp_jax.cli.command import (
    CONFIG,
    JSON,
    Command,
    config_of,
    need,
    need_at_least,
    print_result,
    table,
    use_cpu_devices,
)
from mtp_jax.cli.failures import CHIPS_PER_HOST, MTBF, STATED, expected, stated_costs
from mtp_jax.config import BadInput, Config


def plan(flags) -> int:
  """Compiles the train step for a TPU slice, on a machine without one.

  Prints the memory of a chip, FLOPs, collectives, and the least time of a step and of the run, at
  the chips' published peaks. A config whose mesh has one device is spread over all chips. Several
  topologies show weak scaling: the same number of rows per chip on each as on the first, the mesh
  growing along its data axis. Exit code 1 if nothing fits.

  With --decode it compiles a greedy pass of decoding instead, for each draft length and number of
  rows, and prints its memory, FLOPs, traffic and least time and, from the acceptance of drafts,
  the speed-up to expect. A config whose mesh has one device is spread over the tensor axis.

  With --mtbf_hours it prints the best checkpoint interval and the goodput to expect where hosts
  fail (launch/README.md); without --topology nothing else, and nothing is compiled.
  """
  costs = stated_costs(flags)
  if costs and (flags.decode or flags.sweep or ',' in (flags.topology or '')):
    raise BadInput(f'--mtbf_hours={flags.mtbf_hours:g}: takes one topology, without --sweep and --decode')
  if flags.decode:
    return _plan_decode(flags)
  for name in ('batch', 'draft', 'max_length', 'acceptance', 'workdir'):
    if flags[name].present:
      raise BadInput(f'--{name}: only together with --decode')
  if costs and not (flags.topology or flags.xla):
    values, lines = expected(flags, costs, config_of(flags).train.checkpoint_every)
    print_result(flags, {'failures': values}, lines)
    return 0
  need(flags, 'topology')
  config = config_of(flags)
  topologies = flags.topology.split(',')
  if flags.xla and (flags.sweep or len(topologies) > 1):
    raise BadInput(f'--xla={flags.xla}: takes one topology, without --sweep')
  if flags.sweep and len(topologies) > 1:
    raise BadInput(f'--topology={flags.topology}: --sweep takes one')
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  use_cpu_devices(max(map(_cpu_count, topologies)))
  from mtp_jax.measure import sweep, topology
  from mtp_jax.measure.plan import mesh_text, plan
  from mtp_jax.report.display import print_stderr
  for name in topologies:
    topology.devices(name)  # refuses a wrong one before anything is compiled
  print_stderr(f'compiling for {flags.topology}; a step of a large model takes a minute or two')
  if flags.sweep:
    plans = sweep.sweep(config, flags.topology, print_stderr)
  elif len(topologies) > 1:
    plans = sweep.weak_scaling(config, topologies, print_stderr)
  else:
    plans = [plan(config, flags.topology, _options(flags.xla))]
  if flags.plot and not costs:
    sweep.plot(plans, flags.plot)
  values = [{name: value for name, value in vars(made).items() if name != 'hlo'} for made in plans]
  lines = _plan_lines(plans[0], mesh_text(plans[0].mesh))
  if len(plans) > 1:
    head = ('topology', 'mesh', 'accumulate', 'remat', 'HBM GiB', 'fits', 'step s', 'bound',
            'MFU at most')
    rows = [(made.topology, mesh_text(made.mesh), made.accumulate, made.remat,
             f'{made.hbm_bytes / 2**30:.2f}', 'yes' if made.fits else 'no',
             f'{made.step_seconds:.3f}', made.bound, f'{made.mfu_bound:.1%}') for made in plans]
    lines = table(head, rows) + (['', 'the first of them:', *lines] if flags.sweep else [])
  if costs:
    if not flags.step_seconds:
      costs = dataclasses.replace(costs, step_seconds=plans[0].step_seconds)
    if not flags['chips_per_host'].present:
      costs = dataclasses.replace(costs, chips_per_host=topology.chips_per_host(topology.devices(flags.topology)))
    values[0]['failures'], planned = expected(flags, costs, config.train.checkpoint_every)
    lines += ['', *planned]
  print_result(flags, {**values[0], 'plans': values} if len(plans) > 1 else values[0], lines)
  return 0 if any(made.fits for made in plans) else 1


def _options(text: str) -> dict[str, str] | None:
  """{'name': 'value'} of 'name=value,...'."""
  pairs = [pair.partition('=') for pair in text.split(',')] if text else []
  if not all(name and equals and value for name, equals, value in pairs):
    raise BadInput(f'--xla={text}: must be options of the compiler with their values, such as '
                   'xla_tpu_enable_async_collective_fusion=true')
  return {name.removeprefix('--'): value for name, _, value in pairs} or None


def _plan_decode(flags) -> int:
  """Plans of decoding passes, as a table."""
  need(flags, 'topology')
  need_at_least(flags, draft=-1, max_length=0)
  for name in ('sweep', 'plot', 'xla'):
    if flags[name].value:
      raise BadInput(f'--{name}: not together with --decode')
  batches = flags.batch.split(',')
  if not all(size.isdecimal() and int(size) > 0 for size in batches):
    raise BadInput(f'--batch={flags.batch}: must be numbers of rows decoded at once, such as 1,8,64')
  acceptance = _acceptances(flags)
  config = _recorded_config(flags.workdir) if flags.config is None and flags.workdir else config_of(flags)
  most = config.model.futures - 1 if flags.draft < 0 else flags.draft
  if acceptance and len(acceptance) < most:
    raise BadInput(f'--acceptance: {len(acceptance)} depths, but {most} drafts; give one number a depth, or --draft')
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  use_cpu_devices(_cpu_count(flags.topology))
  from mtp_jax.decode.engine import SHAPE_MULTIPLE
  from mtp_jax.measure.plan_decode import plan_decode
  from mtp_jax.report.display import print_stderr
  slots = -(-((flags.max_length or config.data.length) + most) // SHAPE_MULTIPLE) * SHAPE_MULTIPLE
  print_stderr(f'compiling for {flags.topology}; a pass of a large model takes a minute or two')
  plans = plan_decode(config, flags.topology, [int(size) for size in batches], range(most + 1), slots, acceptance,
                      print_stderr)
  print_result(flags, {'plans': [vars(made) for made in plans]}, _decode_lines(plans, acceptance))
  return 0 if any(made.fits for made in plans) else 1


def _acceptances(flags) -> list[float]:
  """By depth, of --acceptance or of the newest validation of --workdir; none if neither is given."""
  if flags.acceptance:
    try:
      rates = [float(rate) for rate in flags.acceptance.split(',')]
    except ValueError:
      rates = [-1.0]
    if not all(0 <= rate <= 1 for rate in rates):
      raise BadInput(f'--acceptance={flags.acceptance}: must be numbers from 0 to 1, one a depth, such as 0.8,0.7,0.6')
    return rates
  if not flags.workdir:
    return []
  from mtp_jax.checkpoint.record import locate
  from mtp_jax.report.log import read_log
  workdir, _ = locate(flags.workdir)
  validations = [record for record in read_log(workdir) if record['kind'] == 'validation']
  rates = validations[-1].get('acceptance_greedy', []) if validations else []
  if not rates or None in rates:
    raise BadInput(f'--workdir={flags.workdir}: no validation has measured the acceptance of drafts; give --acceptance')
  return rates


def _recorded_config(workdir: str) -> Config:
  from mtp_jax.checkpoint.record import locate, read_record
  return Config.from_dict(read_record(*locate(workdir))['config'])


def _decode_lines(plans, acceptance: list[float]) -> list[str]:
  from mtp_jax.measure.plan import mesh_text
  first = plans[0]
  head = ['batch', 'drafts', 'HBM GiB', 'fits', 'GFLOPs', 'read+written GiB', 'sent MiB', 'least ms', 'bound']
  head += ['cost', 'tokens/pass', 'speed-up', 'tokens/s'] if acceptance else ['cost']
  rows, plain = [], None
  for made in plans:
    plain = made if made.draft == 0 else plain
    row = [made.batch, made.draft, f'{made.hbm_bytes / 2**30:.2f}' if made.hbm_bytes == made.hbm_bytes else '?',
           'yes' if made.fits else 'NO']
    if made.fits:
      row += [f'{made.flops / 1e9:,.1f}', f'{made.memory_traffic_bytes / 2**30:.3f}', f'{made.sent_bytes / 2**20:.2f}',
              f'{1e3 * made.pass_seconds:.3f}', made.bound]
      row += [f'{made.pass_seconds / plain.pass_seconds:.3f}' if plain.fits else '']
      if acceptance and plain.fits:
        row += [f'{made.tokens_per_pass:.2f}', f'{made.speed_up:.2f}', f'{made.tokens_per_second:,.0f}']
    rows.append(row + [''] * (len(head) - len(row)))
  worded = ' '.join(f'{rate:.3g}' for rate in acceptance)
  return [
      f'decoding on {math.prod(first.mesh.values())} chips of {first.topology}: {mesh_text(first.mesh)}; caches of '
      f'{first.slots} tokens; {_size_text(first.parameter_bytes)} of parameters on each of '
      f'{_size_text(first.hbm_capacity_bytes)}',
      *([f'acceptance by depth {worded}; speed-up if passes take their least time'] if acceptance else []),
      *table(head, rows),
      'HBM, read, written and sent: of one chip; FLOPs and tokens/s: of all. The float32 parameters that load() keeps '
      'are not counted']


def _cpu_count(topology: str) -> int:
  """8 for 'cpu:8', 1 for a TPU slice."""
  return int(topology[4:]) if topology.startswith('cpu:') and topology[4:].isdigit() else 1


def _plan_lines(p, mesh: str) -> list[str]:
  sent = [(kind, over, _size_text(size)) for kind, by_axes in p.collective_bytes.items()
          for over, size in by_axes.items()]
  overlapped = ', '.join(f'{over} {share:.0%}' for over, share in p.overlapped_share.items())
  host = f', in the host {_size_text(p.host_bytes)}' if p.host_bytes else ''
  by_kind = ', '.join(f'{kind} {_seconds_text(seconds)}' for kind, seconds in p.seconds.items()
                      if seconds > 0)
  return [
      f'{p.parameters:,} parameters on {p.chips} chips of {p.topology}: {mesh}, microbatches '
      f'{p.accumulate}, remat {p.remat}; compiled in {p.compile_seconds:.0f} s',
      '',
      f'memory of a chip, at the peak: {_size_text(p.hbm_bytes)} of '
      f'{_size_text(p.hbm_capacity_bytes)}: {"fits" if p.fits else "DOES NOT FIT"}',
      f'  state and batch {_size_text(p.argument_bytes)}, the rest '
      f'{_size_text(p.hbm_bytes - p.argument_bytes)}, '
      f"results that do not take an argument's place {_size_text(p.output_bytes)}{host}",
      f'memory of a chip in a validation: {_size_text(p.validation_hbm_bytes)}',
      f'FLOPs of a token: {p.flops_per_token:.4g} multiplied; model FLOPs, which count nothing '
      f'twice: {p.model_flops_per_token:.4g} with attention over the whole length, '
      f'{p.model_flops_per_token_causal:.4g} over half of it (causal)',
      '',
      'sent by a chip in a step:',
      *('  ' + row for row in table(('collective', 'mesh axes', ''), sent)[1:]),
      f'of these bytes, while matrix products run: {overlapped or "none"}',
      '',
      f'least seconds of a step: {by_kind}',
      f'  bound by {p.bound}: {_seconds_text(p.step_seconds)} s, {p.tokens_per_second:,.0f} '
      f'tokens/s, MFU at most {p.mfu_bound:.1%}, causal {p.mfu_bound_causal:.1%}',
      f'the run of {p.run_tokens:,} tokens: at least {p.run_days:.2f} days, '
      f'{p.chip_hours:,.0f} chip-hours']


def _size_text(size: float) -> str:
  return f'{size / 2**30:.2f} GiB' if size >= 2**27 else f'{size / 2**20:.2f} MiB'


def _seconds_text(seconds: float) -> str:
  return f'{seconds:.3f}' if seconds >= 0.01 else f'{seconds:.1e}'


COMMANDS = {
    'plan': Command(
        plan, 'memory, FLOPs, collectives and least time of a step, or of decoding, on a TPU slice, without one',
        (CONFIG,
         ('topology', None,
          'a slice: v5p:4x4x4, v5e:16x16, v6e:16x16; several slices: 2xv5e:16x16; '
          'this machine: cpu:8; several of these, separated by commas'),
         ('sweep', False,
          'try meshes, rematerialisation and, while nothing fits, smaller microbatches'),
         ('xla', '', "options of the compiler, to compare: 'name=value,name=value'"),
         ('plot', '', 'a PNG of the seconds of a step over the number of chips; with --mtbf_hours: of goodput'),
         MTBF, *STATED, CHIPS_PER_HOST,
         ('decode', False, 'plan decoding: a pass of each draft length'),
         ('batch', '1', 'decode: rows decoded at once; several: 1,8,64'),
         ('draft', -1, 'decode: longest draft; -1: as many tokens as there are futures'),
         ('max_length', 0, 'decode: tokens of prompt and new text; 0: as many as the training rows have'),
         ('acceptance', '', 'decode: fraction of drafts accepted at depth 1, 2, ..., for the speed-up: 0.8,0.7,0.6'),
         ('workdir', None, 'decode: a run, whose newest validation has the acceptance and whose config counts if '
                           'there is no --config'),
         JSON),
        'plan --config=configs/gloeckle.py:7b,4 --topology=v5p:4x4x4'),
}
