"""Failures planned for: the flags and the table that `goodput` and `plan` have in common."""
import dataclasses
import math

from mtp_jax.cli.command import table
from mtp_jax.config import BadInput

MTBF = ('mtbf_hours', math.inf,
        'mean hours between failures of a host: prints the best checkpoint interval and the goodput to expect, '
        'for 8 to 50,000 chips')
CHIPS_PER_HOST = ('chips_per_host', 8, 'chips that fail together; with --topology, those of one of its hosts')
STATED = (('save_seconds', 0.0, 'with --mtbf_hours: for which a save keeps the steps waiting'),
          ('restart_seconds', 0.0, 'with --mtbf_hours: from a failure to the next step'),
          ('step_seconds', 0.0, 'with --mtbf_hours: of a step; 0: the least on --topology'))


def expected(flags, costs, checkpoint_every: int) -> tuple[dict, list[str]]:
  """(values, lines) of the model of failures; draws its picture if --plot is given."""
  from mtp_jax.report import failures
  rows = [failures.expect(costs, chips, checkpoint_every) for chips in failures.CHIPS]
  if flags.plot:
    failures.plot(costs, checkpoint_every, flags.plot)
  values = {**dataclasses.asdict(costs), 'checkpoint_every': checkpoint_every,
            'rows': [dataclasses.asdict(row) for row in rows]}
  return values, _lines(costs, checkpoint_every, rows)


def stated_costs(flags):
  """`failures.Costs` of --mtbf_hours and the flags with it; None without. A step whose seconds
  --topology will tell takes one.

  Raises:
    BadInput: a number is missing or outside its limits.
  """
  from mtp_jax.report.failures import Costs
  names = [name for name, *_ in STATED]
  refuse_alone(flags, *names, CHIPS_PER_HOST[0])
  if flags.mtbf_hours == math.inf:
    return None
  for name in names[:2] if flags.topology else names:
    if not flags[name].present:
      raise BadInput(f'--{name}: missing; goodput --workdir=DIR --mtbf_hours={flags.mtbf_hours:g} takes it from a run')
  step_seconds = 1.0 if flags.topology and flags.step_seconds == 0 else flags.step_seconds
  return Costs(flags.mtbf_hours, flags.save_seconds, flags.restart_seconds, step_seconds, flags.chips_per_host)


def refuse_alone(flags, *names: str) -> None:
  """Raises BadInput if one of these flags was given, but not --mtbf_hours."""
  for name in names:
    if flags[name].present and flags.mtbf_hours == math.inf:
      raise BadInput(f'--{name}: only together with --mtbf_hours')


def _lines(costs, checkpoint_every: int, rows) -> list[str]:
  head = ('chips', 'hosts', 'MTBF h', 'Young s', 'Daly s', 'steps', 'goodput', 'simulated',
          f'every {checkpoint_every:,} steps', 'simulated')
  cells = [(f'{row.chips:,}', f'{row.hosts:,}', f'{row.mtbf_hours:,.4g}', f'{row.young_seconds:,.1f}',
            f'{row.daly_seconds:,.1f}', f'{row.best.steps:,}', *_goodput(row.best), *_goodput(row.config))
           for row in rows]
  lines = [
      f'a host ({costs.chips_per_host} of the chips) fails every {costs.mtbf_hours:,.6g} h; save '
      f'{costs.save_seconds:.3g} s, restart {costs.restart_seconds:.3g} s, step {costs.step_seconds:.3g} s',
      *table(head, cells), '',
      "goodput: at Daly's interval in whole steps, and at that of the config; simulated: with its standard error"]
  beyond = [row.chips for row in rows if costs.save_seconds >= 7200 * row.mtbf_hours]
  if beyond:
    lines.append(f"from {beyond[0]:,} chips on a save takes 2 MTBF or longer: beyond Daly's formula, which then takes "
                 'the MTBF')
  return lines


def _goodput(expected) -> tuple[str, str]:
  return f'{expected.goodput:.2%}', f'{expected.simulated:.2%} ± {expected.standard_error:.2%}'
