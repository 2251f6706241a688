"""inspect, certify, benchmark: what a model holds, what it costs, whether it is right."""
import dataclasses
import os

from mtp_jax.cli.command import (
    CONFIG,
    DATA,
    JSON,
    MESH,
    STARTED,
    STEP,
    TOKENIZER,
    WORKDIR,
    Command,
    config_of,
    model_of,
    need_at_least,
    print_result,
    say,
    table,
    use_cpu_devices,
)
from mtp_jax.cli.run import drafter_of
from mtp_jax.config import BadInput, Config, files


def inspect(flags) -> int:
  """Parameters and FLOPs of a checkpoint or a config, by part, beside those of its next-token twin.

  The twin is the same model with one future.
  """
  if (flags.workdir is None) == (flags.config is None):
    raise BadInput('inspect: pass either --workdir=DIR or --config=FILE')
  lm = model_of(flags) if flags.workdir else None
  config = lm.config if lm else config_of(flags)
  from mtp_jax.formats.fitting import FORMATS, problems
  from mtp_jax.measure.counts import counts
  from mtp_jax.model import costs, model
  formats = {name: problems(name, config.model) for name in FORMATS}
  step, counted, conventions = lm.step if lm else 0, counts(config), model.conventions(config.model)
  sha256 = costs.parameters_sha256(lm.model) if lm else None
  sides, flops_of = (counted, counted['twin']), lambda part: 'total' if part == 'active' else part
  rows = [(part, *(f'{count:,}' for side in sides
                   for count in (side['parameters'][part], side['flops_per_token'].get(flops_of(part), 0))))
          for part in counted['parameters']]
  lines = [f'step {step}',
           *table(('part', 'parameters', 'FLOPs/token', 'twin parameters', 'twin FLOPs/token'),
                  rows),
           'FLOPs of the forward and backward pass; the twin is the same model with one future; active: what a',
           'token uses, of routed experts its own, of the embedding a row', '',
           *(f'{name}: {value}' for name, value in conventions.items()), '',
           *(f'export --format={name}: ' + ('; '.join(why) or 'yes') for name, why in formats.items())]
  if lm:
    lines.append(f'parameters SHA-256: {sha256}')
  print_result(flags,
               {'step': step, **counted, 'conventions': conventions, 'formats': formats, 'parameters_sha256': sha256,
                       'config': config.to_dict()}, lines)
  return 0


def certify(flags) -> int:
  """Checks a small float32 twin of the config; it is not a proof of the config itself.

  The twin has the config's kind of futures and objective, a few layers, small sizes and random
  parameters, on eight devices of the CPU. Its gradients must agree however a step is run, no token
  may reach a prediction that must not know it, and the FLOPs must be as counted. Exit code 1 if a
  check fails.
  """
  config = config_of(flags)
  os.environ['JAX_PLATFORMS'] = 'cpu'
  use_cpu_devices(8)
  from mtp_jax.measure import certify as certificate
  findings, verdict = [], {True: 'holds', False: 'BREACH'}
  for finding in certificate.certify(config):
    findings.append(finding)
    if not flags.json:
      line = f'{verdict[finding.holds]:7} {finding.check:44} {finding.found:36}'
      say(f'{line} allowed {finding.allowed}')
  breaches = sum(not finding.holds for finding in findings)
  pictures = certificate.pictures(certificate.small(config))
  values = {'holds': not breaches,
            'findings': [dataclasses.asdict(finding) for finding in findings],
            'influence': pictures}
  print_result(flags, values,
               ['', *pictures, '', f'{len(findings) - breaches} of {len(findings)} checks hold'])
  return 1 if breaches else 0


def benchmark_train(flags) -> int:
  """Seconds of a train step, tokens/s and model-FLOP utilisation (MFU), on the config's own data.

  MFU is against the chip's published peak, or on a CPU against a matrix product measured in the
  same run. `mfu` counts attention over the whole length, `mfu_causal` over half of it.
  """
  config = config_of(flags)
  need_at_least(flags, steps=1)
  if flags.against is None:
    from mtp_jax.measure.benchmark_train import benchmark_train
    values = benchmark_train(config, flags.steps, STARTED)
    print_result(flags, values, [f'{name}: {value:,.4g}' for name, value in values.items()])
    return 0
  other = None if flags.against == 'dense' else files.load([f'--config={flags.against}'], 'against')
  from mtp_jax.measure.benchmark_train import benchmark_against
  values = benchmark_against(config, other, flags.steps)
  rows = [(name, f'{value:,.4g}', f'{values["other"][name]:,.4g}')
          for name, value in values['config'].items()]
  time_ratio, flops_ratio = values['time_ratio'], values['flops_ratio']
  print_result(flags, values, [
      *table(('', f'--config={files.path(flags.config)}', flags.against), rows), '',
      f'time ratio {time_ratio:.3f}, the median over {flags.steps} pairs of steps; FLOPs ratio '
      f'{flops_ratio:.3f}; one over the other {time_ratio / flops_ratio:.3f}; memory ratio '
      f'{values["memory_ratio"]:.3f}'])
  return 0


def benchmark_data(flags) -> int:
  """Speed of batches on the device, and of `prepare` with bytes and with SentencePiece."""
  config = Config() if flags.config is None else config_of(flags)
  if not flags.seconds > 0:
    raise BadInput(f'--seconds={flags.seconds}: must be positive')
  from mtp_jax.measure.benchmark_data import benchmark_data
  values = benchmark_data(config, flags.seconds)
  print_result(flags, values, [
      f'rows to batches on the device: {values["tokens_per_second"]:,.0f} tokens/s, '
      f'{values["rows_per_second"]:,.0f} rows/s of {config.data.length} tokens; '
      f'{values["share_of_memory_speed"]:.2f} x the same from an array in memory',
      'prepare, in one process, byte tokenizer: '
      f'{values["prepare_bytes_per_second"] / 1e6:,.1f} MB/s; SentencePiece: '
      f'{values["sentencepiece_bytes_per_second"] / 1e6:,.2f} MB/s, '
      f'{values["share_of_raw_encoding"]:.2f} x its raw encoding'])
  return 0


def benchmark_decode(flags) -> int:
  """Tokens per forward and speed-up over plain autoregression, on held-out prompts.

  Every draft length and batch size is timed in alternation, in one process.
  """
  need_at_least(flags, prompts=1, prompt_tokens=1, max_tokens=1, repeats=1, draft=-1)
  sizes = flags.batch.split(',')
  if not all(size.isdigit() and int(size) > 0 for size in sizes):
    raise BadInput(f'--batch={flags.batch}: must be numbers of prompts decoded at once, '
                   'such as 1,8')
  if flags.against not in ('', 'transformers'):
    raise BadInput(f"--against={flags.against}: must be 'transformers', or nothing")
  lm = model_of(flags)
  from mtp_jax.measure.benchmark_decode import benchmark_decode, plot
  values = benchmark_decode(
      lm, flags.prompts, flags.prompt_tokens, flags.max_tokens, flags.repeats,
      tuple(map(int, sizes)), None if flags.draft < 0 else flags.draft, drafter_of(flags, lm),
      flags.temperature, flags.against == 'transformers')
  if flags.plot:
    plot(values, flags.plot)
  print_result(flags, values, _decode_lines(flags, values))
  return 0


def _decode_lines(flags, values: dict) -> list[str]:
  choice = 'greedy' if flags.temperature == 0 else f'temperature {flags.temperature:g}'
  about = (f'{flags.prompts} held-out prompts of {flags.prompt_tokens} tokens, {flags.max_tokens} '
           f'new tokens each, {choice}, drafts by {flags.drafter}')
  if flags.temperature == 0:
    differing = sum(row['differing'] for row in values['rows'])
    about += (f'; {differing} texts differ from plain decoding' if differing
              else '; every text is that of plain decoding')
  head = ('batch', 'drafts', 'speed-up', 'tokens/forward', 'cost of a pass', 'tokens/s', 'floor', 'pass/floor',
          'drafting', 'acceptance by depth')
  rows = [(row['batch'], row['draft'], f'{row["speed_up"]:.2f}', f'{row["tokens_per_forward"]:.2f}',
           f'{row["overhead"]:.2f}', f'{row["tokens_per_second"]:,.0f}', f'{row["floor_seconds"] * 1e6:,.0f} us',
           f'{row["over_floor"]:.2f}', f'{row["drafting"]:.0%}',
           ' '.join(f'{rate:.2f}' for rate in row['acceptance'])) for row in values['rows']]
  lines = [about, *table(head, rows)]
  lines += [f'adaptive, batch {row["batch"]}: {row["speed_up"]:.2f} x plain decoding, '
            f'{row["tokens_per_forward"]:.2f} tokens per forward, {row["mean_draft"]:.1f} drafts a pass'
            for row in values['adaptive']]
  for theirs in values['transformers']:
    ours = [row for row in values['rows'] if row['batch'] == theirs['batch']]
    best = max(ours, key=lambda row: row['tokens_per_second'])
    plain_ratio, best_ratio = (row['tokens_per_second'] / theirs['tokens_per_second']
                               for row in (ours[0], best))
    per_second = f'{theirs["tokens_per_second"]:,.0f} tokens/s'
    lines.append(f'transformers, batch {theirs["batch"]}: {per_second}, {theirs["differing"]} texts '
                 f'differ; plain decoding here is {plain_ratio:.2f} x that, '
                 f'with {best["draft"]} drafts {best_ratio:.2f} x')
  sample = values['sample']
  return [*lines, '', 'a sample; the new text begins after the bar:',
          sample['prompt'][-200:] + '|' + sample['text'][:300]]


COMMANDS = {
    'inspect': Command(
        inspect, 'parameters, FLOPs, conventions, digest',
        (WORKDIR, STEP, TOKENIZER, CONFIG, JSON),
        'inspect --config=configs/tiny.py'),
    'certify': Command(
        certify, 'check gradients, leakage and FLOPs of a small float32 twin of a config',
        (CONFIG, JSON),
        'certify --config=configs/tiny.py'),
    'benchmark data': Command(
        benchmark_data, 'speed of making batches and of preparing text',
        (CONFIG,
         ('seconds', 3.0, 'time to spend on each way to make batches'),
         JSON),
        'benchmark data'),
    'benchmark train': Command(
        benchmark_train, 'speed and utilisation of the train step, alone or against another',
        (CONFIG,
         ('against', None,
          "another config, whose steps are timed in alternation; 'dense': the same model with all "
          'logits at once'),
         ('steps', 20, 'steps to time'),
         JSON),
        'benchmark train --config=configs/small.py'),
    'benchmark decode': Command(
        benchmark_decode, 'speed-up by draft length',
        (WORKDIR, STEP, TOKENIZER, DATA, MESH,
         ('prompts', 8, 'held-out prompts'),
         ('prompt_tokens', 128, 'tokens of each prompt'),
         ('max_tokens', 128, 'new tokens of each'),
         ('batch', '1', 'prompts decoded at once; several sizes: 1,8'),
         ('drafter', 'futures', 'futures, lookup, or the workdir of a smaller model'),
         ('draft', -1, 'longest draft; -1: as many tokens as there are futures'),
         ('temperature', 0.0, '0 is greedy'),
         ('repeats', 3, 'timed runs of each draft length; the median counts'),
         ('against', '', "'transformers': also time Hugging Face's on the same weights, on the CPU"),
         ('plot', '', 'a PNG of tokens per forward and speed-up'),
         JSON),
        'benchmark decode --workdir=runs/tiny'),
}
