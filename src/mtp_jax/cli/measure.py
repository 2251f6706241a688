"""inspect, certify, plan, benchmark: what a config or a model holds, costs and proves."""
import dataclasses
import os

from mtp_jax.cli.command import (
    CONFIG,
    JSON,
    STARTED,
    STEP,
    WORKDIR,
    Command,
    config_of,
    model_of,
    need,
    need_at_least,
    print_result,
    table,
    use_cpu_devices,
)
from mtp_jax.cli.run import drafter_of
from mtp_jax.config import BadInput, Config, files


def inspect(flags) -> int:
  """What a checkpoint, or a config, holds and costs: parameters and FLOPs by part, beside its next-token twin's."""
  if (flags.workdir is None) == (flags.config is None):
    raise BadInput('inspect: pass either --workdir=DIR or --config=FILE')
  import jax

  from mtp_jax.model import costs, model
  lm = model_of(flags) if flags.workdir else None
  config = lm.config if lm else config_of(flags)
  shapes = lambda c: jax.eval_shape(lambda key: model.Model(c, key), jax.random.key(0))
  own, twin = shapes(config.model), shapes(dataclasses.replace(config.model, futures=1, head_batch=1, share_modules=False))
  values = {'step': lm.step if lm else 0, 'parameters': costs.parameters(own), 'flops_per_token': costs.flops_per_token(own, config.data.length),
            'twin': {'parameters': costs.parameters(twin), 'flops_per_token': costs.flops_per_token(twin, config.data.length)},
            'conventions': model.conventions(config.model), 'parameters_sha256': costs.parameters_sha256(lm.model) if lm else None,
            'config': config.to_dict()}
  parts = [(part, f'{values["parameters"][part]:,}', f'{values["flops_per_token"].get(part, 0):,}', f'{values["twin"]["parameters"][part]:,}',
            f'{values["twin"]["flops_per_token"].get(part, 0):,}') for part in values['parameters']]
  lines = [f'step {values["step"]}', *table(('part', 'parameters', 'FLOPs/token', 'twin parameters', 'twin FLOPs/token'), parts),
           'FLOPs of the forward and backward pass; the twin is the same model with one future', '',
           *(f'{key}: {value}' for key, value in values['conventions'].items())]
  print_result(flags, values, lines + ([f'parameters SHA-256: {values["parameters_sha256"]}'] if lm else []))
  return 0


def benchmark_train(flags) -> int:
  """Steps of a config: seconds, tokens/s, and model-FLOP utilisation against the machine's own matmul, measured in the same run."""
  config = config_of(flags)
  need_at_least(flags, steps=1)
  other = None if flags.against in (None, 'dense') else files.load([f'--config={flags.against}'], 'against')
  from mtp_jax.measure import benchmark
  if flags.against is None:
    found = benchmark.train(config, flags.steps, STARTED)
    print_result(flags, found, [f'{key}: {value:,.4g}' for key, value in found.items()])
    return 0
  found = benchmark.against(config, other, flags.steps)
  rows = [(key, f'{value:,.4g}', f'{found["other"][key]:,.4g}') for key, value in found['config'].items()]
  ratio = found['time_ratio'] / found['flops_ratio']
  print_result(flags, found, [
      *table(('', f'--config={files.path(flags.config)}', flags.against), rows), '',
      f'time ratio {found["time_ratio"]:.3f}, the median over {flags.steps} pairs of steps; FLOPs ratio {found["flops_ratio"]:.3f}; '
      f'one over the other {ratio:.3f}; memory ratio {found["memory_ratio"]:.3f}'])
  return 0


def certify(flags) -> int:
  """On a small twin of the config: gradients equal in every way of running, no token leaks, FLOPs as counted. Exit code 1 on any breach."""
  config = config_of(flags)
  os.environ['JAX_PLATFORMS'] = 'cpu'
  use_cpu_devices(8)
  from mtp_jax.measure import certify as certificate
  findings, verdict = [], {True: 'holds', False: 'BREACH'}
  for finding in certificate.certify(config):
    findings.append(finding)
    if not flags.json:
      print(f'{verdict[finding.holds]:7} {finding.check:44} {finding.found:36} allowed {finding.allowed}', flush=True)
  breaches = sum(not finding.holds for finding in findings)
  pictures = certificate.pictures(certificate.small(config))
  print_result(flags, {'holds': not breaches, 'findings': [dataclasses.asdict(finding) for finding in findings], 'influence': pictures},
          ['', *pictures, '', f'{len(findings) - breaches} of {len(findings)} checks hold'])
  return 1 if breaches else 0


def plan(flags) -> int:
  """Compiles the train step for a TPU slice, on a machine without one: memory of a chip, FLOPs, collectives, the least time of a step and of the run.

  A config whose mesh is of one device is spread over all chips. Several topologies, with commas, show weak scaling: as many rows a chip on each as
  on the first, the mesh growing along its data axis. All times are lower bounds, at the chips' published peaks.
  """
  config = config_of(flags)
  need(flags, 'topology')
  topologies = flags.topology.split(',')
  if flags.sweep and len(topologies) > 1:
    raise BadInput(f'--topology={flags.topology}: --sweep takes one')
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  use_cpu_devices(max((int(name[4:]) for name in topologies if name.startswith('cpu:') and name[4:].isdigit()), default=1))
  from mtp_jax.measure import plan as planning
  from mtp_jax.report.display import print_stderr
  for name in topologies:
    planning.devices(name)  # refuses it
  print_stderr(f'compiling for {flags.topology}; a step of a large model takes a minute or two')
  if flags.sweep:
    plans = planning.sweep(config, flags.topology, print_stderr)
  elif len(topologies) > 1:
    plans = planning.weak_scaling(config, topologies, print_stderr)
  else:
    plans = [planning.plan(config, flags.topology)]
  if flags.plot:
    planning.plot(plans, flags.plot)
  found = [{key: value for key, value in vars(each).items() if key != 'hlo'} for each in plans]
  lines = _plan_lines(found[0], planning.shape(found[0]['mesh']))
  if len(plans) > 1:
    head = ('topology', 'mesh', 'accumulate', 'remat', 'HBM GiB', 'fits', 'step s', 'bound', 'MFU at most')
    lines = table(head, [(d['topology'], planning.shape(d['mesh']), d['accumulate'], d['remat'],
                           f'{d["hbm_bytes"] / 2**30:.2f}', 'yes' if d['fits'] else 'no', f'{d["step_seconds"]:.3f}', d['bound'], f'{d["mfu_bound"]:.1%}')
                          for d in found]) + (['', 'the first of them:', *lines] if flags.sweep else [])
  print_result(flags, {**found[0], 'plans': found} if len(plans) > 1 else found[0], lines)
  return 0 if any(each.fits for each in plans) else 1


def _plan_lines(d: dict, mesh: str) -> list[str]:
  gib = lambda size: f'{size / 2**30:.2f} GiB' if size >= 2**27 else f'{size / 2**20:.2f} MiB'
  seconds = lambda t: f'{t:.3f}' if t >= 0.01 else f'{t:.1e}'
  sent = [(kind, over, gib(size)) for kind, by_axes in d['collective_bytes'].items() for over, size in by_axes.items()]
  return [
      f'{d["parameters"]:,} parameters on {d["chips"]} chips of {d["topology"]}: {mesh}, microbatches {d["accumulate"]}, remat {d["remat"]}; '
      f'compiled in {d["compile_seconds"]:.0f} s', '',
      f'memory of a chip, at the peak: {gib(d["hbm_bytes"])} of {gib(d["hbm_capacity_bytes"])}: {"fits" if d["fits"] else "DOES NOT FIT"}',
      f'  state and batch {gib(d["argument_bytes"])}, besides them at the peak {gib(d["hbm_bytes"] - d["argument_bytes"])}, '
      f'results that take no argument\'s place {gib(d["output_bytes"])}' + (f', in the host {gib(d["host_bytes"])}' if d['host_bytes'] else ''),
      f'FLOPs of a token: {d["flops_per_token"]:.4g} multiplied; {d["model_flops_per_token"]:.4g} by the count of MFU, which has nothing twice and '
      'attention over the whole length', '',
      'sent by a chip in a step:', *('  ' + row for row in table(('collective', 'mesh axes', ''), sent)[1:]), '',
      'least seconds of a step: ' + ', '.join(f'{kind} {seconds(t)}' for kind, t in d['seconds'].items() if t > 0),
      f'  bound by {d["bound"]}: {seconds(d["step_seconds"])} s, {d["tokens_per_second"]:,.0f} tokens/s, MFU at most {d["mfu_bound"]:.1%}',
      f'the run of {d["run_tokens"]:,} tokens: at least {d["run_days"]:.2f} days, {d["chip_hours"]:,.0f} chip-hours']


def benchmark_data(flags) -> int:
  """Rows to batches on the device, preparation with the byte tokenizer, and with SentencePiece against its own raw encoding."""
  config = config_of(flags) if flags['config'].value is not None else Config()
  if not flags.seconds > 0:
    raise BadInput(f'--seconds={flags.seconds}: must be positive')
  from mtp_jax.measure import benchmark
  found = benchmark.data(config, flags.seconds)
  print_result(flags, found, [
      f'rows to batches on the device: {found["tokens_per_second"]:,.0f} tokens/s, {found["rows_per_second"]:,.0f} rows/s of {config.data.length} tokens; '
      f'{found["share_of_memory_speed"]:.2f} x the same from an array in memory',
      f'prepare, byte tokenizer: {found["prepare_bytes_per_second"] / 1e6:,.1f} MB/s in one process',
      f'prepare, SentencePiece: {found["sentencepiece_bytes_per_second"] / 1e6:,.2f} MB/s in one process, '
      f'{found["share_of_raw_encoding"]:.2f} x its raw encoding'])
  return 0


def benchmark_decode(flags) -> int:
  """Held-out prompts, every draft length and batch size in alternation: tokens per forward and speed-up over plain autoregression."""
  need_at_least(flags, prompts=1, prompt_tokens=1, max_tokens=1, repeats=1, draft=-1)
  sizes = flags.batch.split(',')
  if not all(size.isdigit() and int(size) > 0 for size in sizes):
    raise BadInput(f'--batch={flags.batch}: must be numbers of prompts decoded at once, such as 1,8')
  if flags.against not in ('', 'transformers'):
    raise BadInput(f"--against={flags.against}: must be 'transformers', or nothing")
  lm = model_of(flags)
  from mtp_jax.measure import benchmark
  found = benchmark.decode(
      lm, flags.prompts, flags.prompt_tokens, flags.max_tokens, flags.repeats, tuple(map(int, sizes)),
      None if flags.draft < 0 else flags.draft, drafter_of(flags, lm), flags.temperature, flags.against == 'transformers')
  if flags.plot:
    benchmark.plot(found, flags.plot)
  head = ('batch', 'drafts', 'speed-up', 'tokens/forward', 'overhead/step', 'tokens/s', 'drafting', 'acceptance by depth')
  lines = table(head, [(d['batch'], d['draft'], f'{d["speed_up"]:.2f}', f'{d["tokens_per_forward"]:.2f}', f'{d["overhead"]:.2f}',
                         f'{d["tokens_per_second"]:,.0f}', f'{d["drafting"]:.0%}', ' '.join(f'{a:.2f}' for a in d['acceptance'])) for d in found['rows']])
  way = 'greedy' if flags.temperature == 0 else f'temperature {flags.temperature:g}'
  about = f'{flags.prompts} held-out prompts of {flags.prompt_tokens} tokens, {flags.max_tokens} new tokens each, {way}, drafts by {flags.drafter}'
  if flags.temperature == 0:
    differing = sum(d['differing'] for d in found['rows'])
    about += f'; {differing} texts differ from plain decoding' if differing else '; every text is that of plain decoding'
  for theirs in found['transformers']:
    rows = [d for d in found['rows'] if d['batch'] == theirs['batch']]
    best = max(rows, key=lambda d: d['tokens_per_second'])
    times = lambda row, rate=theirs['tokens_per_second']: f'{row["tokens_per_second"] / rate:.2f} x'
    lines.append(f'transformers, batch {theirs["batch"]}: {theirs["tokens_per_second"]:,.0f} tokens/s, {theirs["differing"]} texts differ; '
                 f'plain decoding here is {times(rows[0])} that, with {best["draft"]} drafts {times(best)}')
  sample = found['sample']
  print_result(flags, found, [about, *lines, '', 'a sample, from the bar on:', sample['prompt'][-200:] + '|' + sample['text'][:300]])
  return 0


COMMANDS = {
    'inspect': Command(inspect, 'parameters, FLOPs, conventions, digest', (WORKDIR, STEP, CONFIG, JSON), 'inspect --config=configs/tiny.py'),
    'certify': Command(certify, 'prove gradients, influence and FLOPs of a config', (CONFIG, JSON), 'certify --config=configs/tiny.py'),
    'plan': Command(plan, 'memory, FLOPs, collectives and least time of the step on a TPU slice, without one', (
        CONFIG,
        ('topology', None, 'chips and how they stand: v5p:4x4x4, v5e:16x16, v6e:16x16, several slices: 2xv5e:16x16, this machine: cpu:8; with commas several'),
        ('sweep', False, 'try meshes, rematerialisation and, while nothing fits, smaller microbatches; the fastest first'),
        ('plot', '', 'a PNG of the seconds of a step over the number of chips'), JSON),
        'plan --config=configs/gloeckle.py:7b,4 --topology=v5p:4x4x4'),
    'benchmark data': Command(benchmark_data, 'speed of batches and of preparation', (
        CONFIG,
        ('seconds', 3.0, 'spent on each measurement of batches'), JSON),
        'benchmark data'),
    'benchmark train': Command(benchmark_train, 'speed and utilisation of the train step, alone or against another', (
        CONFIG,
        ('against', None, "another config, its steps timed in alternation; 'dense': the same model with all logits at once"),
        ('steps', 20, 'steps timed'), JSON),
        'benchmark train --config=configs/small.py'),
    'benchmark decode': Command(benchmark_decode, 'speed-up by draft length', (
        WORKDIR, STEP,
        ('prompts', 8, 'held-out prompts'),
        ('prompt_tokens', 128, 'tokens of each'),
        ('max_tokens', 128, 'new tokens of each'),
        ('batch', '1', 'prompts decoded at once; several sizes: 1,8'),
        ('drafter', 'futures', 'futures, lookup, or the workdir of a smaller model'),
        ('draft', -1, 'longest draft; -1 as many as there are futures'),
        ('temperature', 0.0, '0 is greedy'),
        ('repeats', 3, 'timed runs of each draft length; the median counts'),
        ('against', '', "'transformers': Hugging Face's, same weights, plain decoding on the CPU"),
        ('plot', '', 'a PNG of tokens per forward and speed-up'), JSON),
        'benchmark decode --workdir=runs/tiny'),
}
