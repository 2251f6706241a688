"""report: one page about one run or several, for a person to look at; goodput: where their time went."""
import math

from mtp_jax.cli.command import JSON, WORKDIR, Command, need, need_at_least, print_result, table
from mtp_jax.cli.failures import CHIPS_PER_HOST, MTBF, expected, refuse_alone
from mtp_jax.config import BadInput, Config, folder_path
from mtp_jax.config.errors import in_words


def report(flags) -> int:
  """Writes one HTML page: losses, futures, drafts, time, memory and FLOPs, a sample, the config.

  The file loads nothing and runs no script. Several runs are laid over each other.
  """
  need(flags, 'workdir')
  need_at_least(flags, max_tokens=0)
  names = flags.workdir.split(',')
  if not all(names) or len(set(names)) < len(names):
    raise BadInput(f'--workdir={flags.workdir}: holds an empty name, or one twice; write A,B,...')
  from mtp_jax.checkpoint.record import locate
  output = folder_path(flags.output, '--output') if flags.output else locate(names[0])[0] / 'report.html'
  from mtp_jax.decode.requests import sampling_parameters
  sampling_parameters(1, flags.temperature, flags.seed)
  from mtp_jax.measure.runs import gather
  from mtp_jax.report.page import page
  runs = [gather(name, flags.prompt, flags.max_tokens, flags.temperature, flags.seed) for name in names]
  try:
    output.write_bytes(page(runs).encode())
  except OSError as error:
    raise BadInput(f'--output={output}: {error.strerror or in_words(error)}; give a file in a folder '
                   'that exists') from None
  values = {'output': str(output), 'runs': [{'name': run.name, 'records': len(run.records)} for run in runs]}
  print_result(flags, values, [f'report: {output}; open it in a browser'])
  return 0


def goodput(flags) -> int:
  """Where the time of a run went, over all its restarts.

  Goodput is the fraction of the time spent in steps that were kept. With --mtbf_hours also the best
  checkpoint interval and the goodput to expect where hosts fail, from the run's own seconds of a
  save, a start and a step (launch/README.md).
  """
  need(flags, 'workdir')
  refuse_alone(flags, 'chips_per_host')
  from mtp_jax.checkpoint.record import locate, read_record
  from mtp_jax.report import failures, goodput
  from mtp_jax.report.events import read_events
  workdir, step = locate(flags.workdir)
  events = read_events(workdir)
  account = goodput.account(events)
  wall = account['wall_seconds']
  rows = [(kind, f'{seconds:,.1f}', f'{seconds / max(wall, 1e-9):.1%}')
          for kind, seconds in account['seconds'].items() if seconds]
  lines = [*table(('', 'seconds', 'share'), rows), '',
           f'goodput {account["goodput"]:.1%} of {wall:,.1f} s; starts: {account["runs"]}, '
           f'{account["steps"]:,} steps, {account["lost_steps"]:,} steps lost']
  if flags.mtbf_hours != math.inf:
    costs = failures.Costs(flags.mtbf_hours, chips_per_host=flags.chips_per_host,
                           **failures.measured_seconds(events, f'--workdir={workdir}'))
    config = Config.from_dict(read_record(workdir, step)['config'])
    account['failures'], planned = expected(flags, costs, config.train.checkpoint_every)
    lines += ['', *planned]
  elif flags.plot:
    goodput.plot(events, flags.plot)
  print_result(flags, account, lines)
  return 0


COMMANDS = {
    'goodput': Command(
        goodput, 'where the time of a run went, and what failures will cost',
        (WORKDIR,
         ('plot', '', 'a PNG, one bar per run; with --mtbf_hours: goodput over chips'),
         MTBF, CHIPS_PER_HOST,
         JSON),
        'goodput --workdir=runs/tiny'),
    'report': Command(
        report, 'a page about runs: curves, drafts, time, a sample',
        (('workdir', None, 'folder of the run; several, separated by commas, are laid over each other'),
         ('output', '', 'the HTML file; the default is report.html in the first workdir'),
         ('prompt', '', "what the sample continues; '': the beginning of a held-out document"),
         ('max_tokens', 200, 'new tokens of the sample at most, within the row length of training; 0: no sample'),
         ('temperature', 0.8, 'of the sample; 0 is greedy'),
         ('seed', 0, 'of the sample'),
         JSON),
        'report --workdir=runs/tiny'),
}
