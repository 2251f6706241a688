"""report: one page about one run or several, for a person to look at."""
import pathlib

from mtp_jax.cli.command import JSON, Command, need, need_at_least, print_result
from mtp_jax.config import BadInput, expanded


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
  output = pathlib.Path(flags.output) if flags.output else locate(expanded(names[0], '--workdir'))[0] / 'report.html'
  from mtp_jax.decode.requests import sampling_parameters
  sampling_parameters(1, flags.temperature, flags.seed)
  from mtp_jax.measure.runs import gather
  from mtp_jax.report.page import page
  runs = [gather(name, flags.prompt, flags.max_tokens, flags.temperature, flags.seed) for name in names]
  try:
    output.write_text(page(runs), encoding='utf-8')
  except OSError as error:
    raise BadInput(f'--output={output}: {error.strerror}; give a file in a folder that exists') from None
  values = {'output': str(output), 'runs': [{'name': run.name, 'records': len(run.records)} for run in runs]}
  print_result(flags, values, [f'report: {output}; open it in a browser'])
  return 0


COMMANDS = {
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
