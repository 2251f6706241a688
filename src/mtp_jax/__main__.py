"""python -m mtp_jax COMMAND: train, evaluate, generate, inspect and measure.

Exit codes: 0 done; 1 the run failed, or another process of its job did; 2 bad input, one line says what to mend; 130 and 143: interrupted by
Ctrl-C or SIGTERM, after saving a checkpoint to resume from.
"""
import time

STARTED = time.perf_counter()

import dataclasses
import json
import os
import sys
import typing
from collections.abc import Callable

import ml_collections
from absl import flags
from ml_collections import config_flags

from mtp_jax import config as schema
from mtp_jax.config import BadInput, Config

CONFIG = ('config', None, 'the experiment, such as configs/tiny.py; --config.section.field=value changes a field')
WORKDIR = ('workdir', None, 'folder of the run')
STEP = ('step', -1, 'step of the checkpoint; -1 is the newest')
INPUT = (
    ('input', None, "files, directories or globs, with commas between; text, .jsonl, .parquet, also .gz and .zst; gs:// and s3:// too"),
    ('format', 'auto', 'auto goes by the end of a name; text (a document a file), jsonl or parquet'),
    ('field', 'text', 'of a JSON object, or the column of a Parquet file, that holds the text'),
    ('keep', '', 'bad records to keep as they are: invalid_utf8, lone_surrogate, nul, with commas between; others are skipped'),
    ('max_document_bytes', 64 * 2**20, 'longer documents are skipped, as bad ones'),
    ('bad_share', 0.05, 'share of the records that may be skipped; beyond it the command stops'))
JSON = ('json', False, 'print one JSON object on the last line')


@dataclasses.dataclass(frozen=True)
class Command:
  run: Callable
  summary: str
  flags: tuple
  example: str


def train(f) -> int:
  """Starts, or resumes where the newest checkpoint in --workdir stands."""
  config = _config(f)
  _need(f, 'workdir')
  first, _, last = f.profile_steps.partition(':')
  if f.profile_steps and not (first.isdigit() and last.isdigit() and 0 < int(first) < int(last)):
    raise BadInput(f'--profile_steps={f.profile_steps}: must be a:b with 0 < a < b, the steps a to b-1')
  from mtp_jax import processes
  profiled = range(int(first), int(last)) if f.profile_steps else range(0)
  return processes.run(lambda: _exit_code(lambda: _fit(f, config, profiled)), config.train.heartbeat_seconds)


def _fit(f, config: Config, profile_steps: range) -> int:
  import jax

  from mtp_jax.train import NotFinite, fit
  try:
    outcome = fit(config, f.workdir, profile_steps)
  except NotFinite as error:
    print(f'mtp_jax: {error}', file=sys.stderr)
    return 1
  stopped = f'; stopped by signal {outcome.signal}, run the same command to resume' if outcome.signal else ''
  if jax.process_index() == 0:
    _report(f, {'step': outcome.step, 'validation': outcome.validation, 'signal': outcome.signal},
            [f'step {outcome.step} of {config.train.steps}, checkpoint in {f.workdir}{stopped}'])
  return 128 + outcome.signal if outcome.signal else 0


def evaluate(f) -> int:
  """On held-out documents: nats, accuracy and count of each future, bits per byte of future 0; how many drafts future 0 accepts."""
  _need_at_least(f, rows=0)
  lm = _load(f)
  if lm.corpus.identity['sources'] != lm.record['identity'].get('sources'):
    print("note: the documents here differ from those of the training run, so some held-out ones may have been trained on", file=sys.stderr)
  found = lm.evaluate(f.rows or None)
  table = [(m, f'{nats:.4f}', f'{accuracy:.4f}', count) for m, (nats, accuracy, count) in enumerate(zip(found['nats'], found['accuracy'], found['count']))]
  lines = [*_table(('future', 'nats', 'accuracy', 'count'), table), f'bits per byte of future 0: {found["bits_per_byte"]:.4f}']
  if lm.config.model.futures > 1:
    costs = lm.seconds_per_forward() if f.speed else None
    head, rows = ['draft'], [[draft] for draft in range(lm.config.model.futures)]
    for way, said in (('greedy', 'greedy'), ('sampled', 'speculative sampling')):
      per_forward = found[f'tokens_per_forward_{way}']
      head += [f'{said}: acceptance', 'tokens/forward']
      for row, a, n in zip(rows, [None, *found[f'acceptance_{way}']], per_forward):
        row += ['' if a is None else f'{a:.3f}', f'{n:.3f}']
      if costs:
        found[f'speed_up_{way}'] = [n * costs[0] / cost for n, cost in zip(per_forward, costs)]
        head.append('speed-up')
        for row, gain in zip(rows, found[f'speed_up_{way}']):
          row.append(f'{gain:.2f}')
    lines += ['', 'what decoding the held-out documents would take, by draft length; acceptance: of the draft of this depth, all before it accepted',
              *_table(head, rows)]
    if costs:
      found['seconds_per_forward'] = costs
      lines.append('speed-up: tokens per forward over the cost of a forward, measured here on one prompt: '
                   + ' '.join(f'{cost / costs[0]:.2f}' for cost in costs))
  _report(f, {'step': lm.step, **found}, lines)
  return 0


def generate(f) -> int:
  """Continues --prompt. Greedily, or with --same_seed, the text does not depend on the drafts, in float32; else its law does not."""
  if f.prompt is None:
    raise BadInput("--prompt: missing; such as --prompt='def main():'")
  if not f.prompt:
    raise BadInput('--prompt: empty; say what to continue')
  _need_at_least(f, draft=-1, max_tokens=0, max_length=0)
  from mtp_jax.requests import Criterion, choices
  choices(1, f.temperature, f.seed, f.top_k, f.top_p)
  criterion = Criterion(f.criterion, f.threshold, f.min_block)
  lm = _load(f)
  said = [f.prompt]  # before the first new text, so that nothing is printed when a number turns out to be wrong
  stream = (lambda row, ids, text: print((said.pop() if said else '') + text, end='', flush=True)) if f.stream and not f.json else None
  found = lm.generate(f.prompt, f.max_tokens or None, None if f.draft < 0 else f.draft, f.temperature, f.seed, top_k=f.top_k, top_p=f.top_p,
                      drafter=_drafter(f, lm), adaptive=f.adaptive, same_seed=f.same_seed, criterion=criterion, stop=f.stop or (),
                      max_length=f.max_length or None, stream=stream)
  mean_draft = sum(k * n for k, n in enumerate(found.passes)) / max(1, sum(found.passes) - 1)  # the pass over the prompt drafts nothing
  values = {'text': found.text[0], 'tokens': found.tokens, 'forwards': found.forwards, 'tokens_per_forward': found.tokens_per_forward,
            'seconds': found.seconds, 'acceptance': found.acceptance, 'mean_draft': mean_draft, 'lossless': found.lossless,
            'criterion': dataclasses.asdict(criterion)}
  lines = ['', f'{found.tokens} tokens in {found.forwards} forwards: {found.tokens_per_forward:.2f} tokens per forward, {found.seconds:.2f} s with compilation']
  if found.acceptance:
    lines.append('acceptance by depth: ' + ' '.join(f'{a:.2f}' for a in found.acceptance) + (f'; {mean_draft:.1f} drafts a pass' if f.adaptive else ''))
  trained = lm.config.model.futures - 1
  if f.drafter == 'futures' and len(found.acceptance) > trained:
    lines.append(f'drafts beyond depth {trained} are those of a module applied more often than it was trained for')
  if not found.lossless:
    lines.append(f'lossy: {criterion.name}, threshold {criterion.threshold:g}, blocks of {criterion.min_block} at least; '
                 'the text does not follow the law of the model')
  _report(f, values, lines if stream else [f.prompt + found.text[0], *lines])
  return 0


def inspect(f) -> int:
  """What a checkpoint, or a config, holds and costs: parameters and FLOPs by part, beside its next-token twin's."""
  if (f.workdir is None) == (f.config is None):
    raise BadInput('inspect: pass either --workdir=DIR or --config=FILE')
  import jax

  from mtp_jax import metrics, model
  lm = _load(f) if f.workdir else None
  config = lm.config if lm else _config(f)
  shapes = lambda c: jax.eval_shape(lambda key: model.Model(c, key), jax.random.key(0))
  own, twin = shapes(config.model), shapes(dataclasses.replace(config.model, futures=1, head_batch=1, share_modules=False))
  values = {'step': lm.step if lm else 0, 'parameters': metrics.parameters(own), 'flops_per_token': metrics.flops_per_token(own, config.data.length),
            'twin': {'parameters': metrics.parameters(twin), 'flops_per_token': metrics.flops_per_token(twin, config.data.length)},
            'conventions': model.conventions(config.model), 'parameters_sha256': metrics.parameters_sha256(lm.model) if lm else None,
            'config': config.to_dict()}
  parts = [(part, f'{values["parameters"][part]:,}', f'{values["flops_per_token"].get(part, 0):,}', f'{values["twin"]["parameters"][part]:,}',
            f'{values["twin"]["flops_per_token"].get(part, 0):,}') for part in values['parameters']]
  lines = [f'step {values["step"]}', *_table(('part', 'parameters', 'FLOPs/token', 'twin parameters', 'twin FLOPs/token'), parts),
           'FLOPs of the forward and backward pass; the twin is the same model with one future', '',
           *(f'{key}: {value}' for key, value in values['conventions'].items())]
  _report(f, values, lines + ([f'parameters SHA-256: {values["parameters_sha256"]}'] if lm else []))
  return 0


def benchmark_train(f) -> int:
  """Steps of a config: seconds, tokens/s, and model-FLOP utilisation against the machine's own matmul, measured in the same run."""
  config = _config(f)
  _need_at_least(f, steps=1)
  other = None if f.against in (None, 'dense') else _load_config(f.against)
  from mtp_jax import benchmark
  if f.against is None:
    found = benchmark.train(config, f.steps, STARTED)
    _report(f, found, [f'{key}: {value:,.4g}' for key, value in found.items()])
    return 0
  found = benchmark.against(config, other, f.steps)
  rows = [(key, f'{value:,.4g}', f'{found["other"][key]:,.4g}') for key, value in found['config'].items()]
  ratio = found['time_ratio'] / found['flops_ratio']
  _report(f, found, [
      *_table(('', f'--config={_path(f)}', f.against), rows), '',
      f'time ratio {found["time_ratio"]:.3f}, the median over {f.steps} pairs of steps; FLOPs ratio {found["flops_ratio"]:.3f}; '
      f'one over the other {ratio:.3f}; memory ratio {found["memory_ratio"]:.3f}'])
  return 0


def certify(f) -> int:
  """On a small twin of the config: gradients equal in every way of running, no token leaks, FLOPs as counted. Exit code 1 on any breach."""
  config = _config(f)
  os.environ['JAX_PLATFORMS'] = 'cpu'
  _fake_devices(8)
  from mtp_jax import certify as certificate
  findings, verdict = [], {True: 'holds', False: 'BREACH'}
  for finding in certificate.certify(config):
    findings.append(finding)
    if not f.json:
      print(f'{verdict[finding.holds]:7} {finding.check:44} {finding.found:36} allowed {finding.allowed}', flush=True)
  breaches = sum(not finding.holds for finding in findings)
  pictures = certificate.pictures(certificate.small(config))
  _report(f, {'holds': not breaches, 'findings': [dataclasses.asdict(finding) for finding in findings], 'influence': pictures},
          ['', *pictures, '', f'{len(findings) - breaches} of {len(findings)} checks hold'])
  return 1 if breaches else 0


def plan(f) -> int:
  """Compiles the train step for a TPU slice, on a machine without one: memory of a chip, FLOPs, collectives, the least time of a step and of the run.

  A config whose mesh is of one device is spread over all chips. Several topologies, with commas, show weak scaling: as many rows a chip on each as
  on the first, the mesh growing along its data axis. All times are lower bounds, at the chips' published peaks.
  """
  config = _config(f)
  _need(f, 'topology')
  topologies = f.topology.split(',')
  if f.sweep and len(topologies) > 1:
    raise BadInput(f'--topology={f.topology}: --sweep takes one')
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  _fake_devices(max((int(name[4:]) for name in topologies if name.startswith('cpu:') and name[4:].isdigit()), default=1))
  from mtp_jax import plan as planning
  from mtp_jax.progress import say
  for name in topologies:
    planning.devices(name)  # refuses it
  say(f'compiling for {f.topology}; a step of a large model takes a minute or two')
  plans = (planning.sweep(config, f.topology, say) if f.sweep else planning.weak_scaling(config, topologies, say) if len(topologies) > 1
           else [planning.plan(config, f.topology)])
  if f.plot:
    planning.plot(plans, f.plot)
  found = [{key: value for key, value in vars(each).items() if key != 'hlo'} for each in plans]
  lines = _plan_lines(found[0], planning.shape(found[0]['mesh']))
  if len(plans) > 1:
    head = ('topology', 'mesh', 'accumulate', 'remat', 'HBM GiB', 'fits', 'step s', 'bound', 'MFU at most')
    lines = _table(head, [(d['topology'], planning.shape(d['mesh']), d['accumulate'], d['remat'],
                           f'{d["hbm_bytes"] / 2**30:.2f}', 'yes' if d['fits'] else 'no', f'{d["step_seconds"]:.3f}', d['bound'], f'{d["mfu_bound"]:.1%}')
                          for d in found]) + (['', 'the first of them:', *lines] if f.sweep else [])
  _report(f, {**found[0], 'plans': found} if len(plans) > 1 else found[0], lines)
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
      'sent by a chip in a step:', *('  ' + row for row in _table(('collective', 'mesh axes', ''), sent)[1:]), '',
      'least seconds of a step: ' + ', '.join(f'{kind} {seconds(t)}' for kind, t in d['seconds'].items() if t > 0),
      f'  bound by {d["bound"]}: {seconds(d["step_seconds"])} s, {d["tokens_per_second"]:,.0f} tokens/s, MFU at most {d["mfu_bound"]:.1%}',
      f'the run of {d["run_tokens"]:,} tokens: at least {d["run_days"]:.2f} days, {d["chip_hours"]:,.0f} chip-hours']


def prepare(f) -> int:
  """Reads text, JSON lines or Parquet once and writes token shards: the same bytes however many workers, however often interrupted."""
  _need(f, 'input')
  _need(f, 'output')
  _need_at_least(f, workers=-1, shard_bytes=0)
  from mtp_jax import tokenizer
  from mtp_jax.data.inputs import files
  from mtp_jax.data.prepare import Options, prepare
  within = [given for given in _inputs(f) if os.path.isdir(given) and os.path.realpath(f.output).startswith(os.path.realpath(given) + os.sep)]
  if within:
    raise BadInput(f'--output={f.output}: lies within the input {within[0]}, which would read it; choose another folder')
  options = Options(_reading(f), f.validation_share, f.shard_bytes, f.bad_share)
  tokens = tokenizer.load(f.tokenizer, '--tokenizer')
  workers = os.cpu_count() if f.workers < 0 else f.workers
  try:
    found = prepare(files(_inputs(f), '--input'), tokens, options, f.output, workers, '--input')
  except KeyboardInterrupt:
    print('mtp_jax: interrupted; run the same command, it goes on where it stopped', file=sys.stderr)
    return 130
  index, values = found.index, {'train': found.train.counts, 'validation': found.validation.counts}
  bad = [f'bad records: {kind} {n["skipped"]:,} skipped, {n["kept"]:,} kept' for kind, n in index['bad'].items()]
  _report(f, {'fingerprint': found.fingerprint, 'records': index['records'], 'bad': index['bad'], **values}, [
      *(f'{split}: {n["documents"]:,} documents, {n["tokens"]:,} tokens, {n["bytes"]:,} bytes, {n["shards"]} shards' for split, n in values.items()),
      *bad, *([f'they are listed in {found.folder.url}/bad_records.jsonl'] if bad else []), f'fingerprint {found.fingerprint}',
      f"train on it with: --config.data.sources=\"('{f.output}',)\"" + (
          '' if f.tokenizer == 'bytes' else f' --config.data.tokenizer={f.tokenizer} --config.model.vocab={tokens.size}')])
  return 0


def train_tokenizer(f) -> int:
  """Trains a SentencePiece model on a sample of what `prepare` would read; it gives every byte back, whatever the text."""
  _need(f, 'input')
  _need(f, 'output')
  _need_at_least(f, sample_bytes=1, vocab=260)
  if f.kind not in ('bpe', 'unigram'):
    raise BadInput(f'--kind={f.kind}: must be bpe or unigram')
  if os.path.exists(f.output) or not os.path.isdir(os.path.dirname(f.output) or '.'):
    raise BadInput(f'--output={f.output}: must be a new file, in a folder that is there')
  from mtp_jax import tokenizer
  from mtp_jax.data.inputs import Fault, files, name_hash
  from mtp_jax.data.prepare import sample
  documents, held_out, skipped = [], [], []
  for found in sample(files(_inputs(f), '--input'), _reading(f), f.sample_bytes, '--input'):
    if isinstance(found, Fault):
      skipped += [] if found.kept else [found]
    else:
      (held_out if name_hash(found.name) % 10 == 0 else documents).append(found.text)
  records = len(documents) + len(held_out) + len(skipped)
  if len(skipped) > f.bad_share * records:
    first = f'{skipped[0].kind} in {skipped[0].file}' + (f' ({skipped[0].detail}; --field={f.field})' if skipped[0].detail else '')
    raise BadInput(f'--input={f.input}: {len(skipped):,} of {records:,} records are bad, more than --bad_share={f.bad_share}; the first is {first}')
  if not documents or not held_out:
    raise BadInput(f'--input={f.input}: {records - len(skipped)} documents are too few, for one of ten is held out; give more')
  size = lambda texts: sum(map(len, texts))
  print(f'training {f.kind} on {len(documents):,} documents, {size(documents) / 1e6:,.1f} MB', file=sys.stderr, flush=True)
  model = tokenizer.train(documents, f.vocab, f.kind)
  tokens = tokenizer.SentencePiece(model)
  began = time.perf_counter()
  count = sum(len(tokens.encode(text)) for text in held_out)
  seconds = time.perf_counter() - began
  with open(f.output + '.unfinished', 'wb') as file:
    file.write(model)
  os.replace(f.output + '.unfinished', f.output)
  values = {'vocab': tokens.size, 'bytes_per_token': size(held_out) / count, 'held_out_documents': len(held_out), 'held_out_bytes': size(held_out),
            'bytes_per_second': size(held_out) / seconds, 'digest': tokens.digest}
  _report(f, values, [f'{f.output}: {tokens.size:,} ids; {values["bytes_per_token"]:.3f} bytes per token on {len(held_out):,} held-out documents '
                      f'({size(held_out) / 1e6:,.1f} MB), {values["bytes_per_second"] / 1e6:.1f} MB/s',
                      f'use it with: --tokenizer={f.output}, and --config.data.tokenizer={f.output} --config.model.vocab={tokens.size}'])
  return 0


def inspect_data(f) -> int:
  """What a prepared set holds, and rows of it as the model sees them: documents, inputs, the target of each future."""
  _need(f, 'data')
  _need_at_least(f, length=1, futures=1, rows=0, positions=1)
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  from mtp_jax.data.shards import Folder, open_set
  try:
    config = Config(data=schema.DataConfig(sources=(f.data,), length=f.length, packing=f.packing, boundary=f.boundary)).data
  except BadInput as error:
    raise BadInput(str(error).replace('config.data.', '--')) from error
  source = open_set(Folder(f.data, '--data'), config.cache)
  wrong = source.verify() if f.verify else []
  from mtp_jax import inspection
  from mtp_jax.data.corpus import Corpus, tokenizer_of
  tokens = tokenizer_of(source)
  found = inspection.summary(source) | ({'damaged': wrong} if f.verify else {})
  if f.plot:
    inspection.plot(found, f.plot)
  lines = [f'fingerprint {source.fingerprint}; {found["records"]:,} records'
           + ''.join(f'; {kind}: {n["skipped"]:,} skipped, {n["kept"]:,} kept' for kind, n in found['bad'].items())]
  for split in ('train', 'validation'):
    n = found[split]
    lines += ['', f'{split}: {n["documents"]:,} documents, {n["tokens"]:,} tokens, {n["bytes"]:,} bytes, {n["bytes_per_token"]:.3f} bytes per token, '
              f'{n["shards"]} shards', *inspection.bars(n['lengths'])]
  if f.rows and not wrong:
    rows = Corpus(config, tokens, (source,)).rows(f.futures)
    lines += ['', *inspection.shown(rows, tokens, f.futures, f.rows, f.positions, sys.stdout.isatty())]
  if f.verify:
    lines += wrong or ['every byte of every shard is what was written']
  _report(f, found, lines)
  return 1 if wrong else 0


def goodput(f) -> int:
  """Where the time of a run went, over all its restarts; goodput is the share spent in steps that were not lost."""
  _need(f, 'workdir')
  from mtp_jax import goodput as log
  events = log.read(f.workdir)
  found = log.account(events)
  if f.plot:
    log.plot(events, f.plot)
  rows = [(kind, f'{seconds:,.1f}', f'{seconds / max(found["wall_seconds"], 1e-9):.1%}') for kind, seconds in found['seconds'].items() if seconds]
  _report(f, found, [*_table(('', 'seconds', 'share'), rows), '',
                     f'goodput {found["goodput"]:.1%} of {found["wall_seconds"]:,.1f} s; {found["runs"]} runs, {found["steps"]:,} steps, '
                     f'{found["lost_steps"]:,} steps lost'])
  return 0


def benchmark_data(f) -> int:
  """Rows to batches on the device, preparation with the byte tokenizer, and with SentencePiece against its own raw encoding."""
  config = _config(f) if f['config'].value is not None else Config()
  if not f.seconds > 0:
    raise BadInput(f'--seconds={f.seconds}: must be positive')
  from mtp_jax import benchmark
  found = benchmark.data(config, f.seconds)
  _report(f, found, [
      f'rows to batches on the device: {found["tokens_per_second"]:,.0f} tokens/s, {found["rows_per_second"]:,.0f} rows/s of {config.data.length} tokens; '
      f'{found["share_of_memory_speed"]:.2f} x the same from an array in memory',
      f'prepare, byte tokenizer: {found["prepare_bytes_per_second"] / 1e6:,.1f} MB/s in one process',
      f'prepare, SentencePiece: {found["sentencepiece_bytes_per_second"] / 1e6:,.2f} MB/s in one process, '
      f'{found["share_of_raw_encoding"]:.2f} x its raw encoding'])
  return 0


def benchmark_decode(f) -> int:
  """Held-out prompts, every draft length and batch size in alternation: tokens per forward and speed-up over plain autoregression."""
  _need_at_least(f, prompts=1, prompt_tokens=1, max_tokens=1, repeats=1, draft=-1)
  sizes = f.batch.split(',')
  if not all(size.isdigit() and int(size) > 0 for size in sizes):
    raise BadInput(f'--batch={f.batch}: must be numbers of prompts decoded at once, such as 1,8')
  if f.against not in ('', 'transformers'):
    raise BadInput(f"--against={f.against}: must be 'transformers', or nothing")
  lm = _load(f)
  from mtp_jax import benchmark
  found = benchmark.decode(lm, f.prompts, f.prompt_tokens, f.max_tokens, f.repeats, tuple(map(int, sizes)), None if f.draft < 0 else f.draft,
                           _drafter(f, lm), f.temperature, f.against == 'transformers')
  if f.plot:
    benchmark.plot(found, f.plot)
  head = ('batch', 'drafts', 'speed-up', 'tokens/forward', 'overhead/step', 'tokens/s', 'drafting', 'acceptance by depth')
  lines = _table(head, [(d['batch'], d['draft'], f'{d["speed_up"]:.2f}', f'{d["tokens_per_forward"]:.2f}', f'{d["overhead"]:.2f}',
                         f'{d["tokens_per_second"]:,.0f}', f'{d["drafting"]:.0%}', ' '.join(f'{a:.2f}' for a in d['acceptance'])) for d in found['rows']])
  way = 'greedy' if f.temperature == 0 else f'temperature {f.temperature:g}'
  about = f'{f.prompts} held-out prompts of {f.prompt_tokens} tokens, {f.max_tokens} new tokens each, {way}, drafts by {f.drafter}'
  if f.temperature == 0:
    differing = sum(d['differing'] for d in found['rows'])
    about += f'; {differing} texts differ from plain decoding' if differing else '; every text is that of plain decoding'
  for theirs in found['transformers']:
    rows = [d for d in found['rows'] if d['batch'] == theirs['batch']]
    best = max(rows, key=lambda d: d['tokens_per_second'])
    times = lambda row, rate=theirs['tokens_per_second']: f'{row["tokens_per_second"] / rate:.2f} x'
    lines.append(f'transformers, batch {theirs["batch"]}: {theirs["tokens_per_second"]:,.0f} tokens/s, {theirs["differing"]} texts differ; '
                 f'plain decoding here is {times(rows[0])} that, with {best["draft"]} drafts {times(best)}')
  sample = found['sample']
  _report(f, found, [about, *lines, '', 'a sample, from the bar on:', sample['prompt'][-200:] + '|' + sample['text'][:300]])
  return 0


COMMANDS = {
    'train': Command(train, 'pretrain, or resume', (
        CONFIG, WORKDIR,
        ('profile_steps', '', 'a:b writes a jax.profiler trace of the steps a to b-1'), JSON),
        'train --config=configs/tiny.py --workdir=runs/tiny --config.train.steps=200'),
    'evaluate': Command(evaluate, 'held-out nats, accuracy, bits per byte', (
        WORKDIR, STEP,
        ('rows', 0, 'only so many rows, at even distances; 0 is all'),
        ('speed', True, 'time a forward of each draft length, for the speed-up to expect'), JSON),
        'evaluate --workdir=runs/tiny'),
    'generate': Command(generate, 'continue a prompt, drafting ahead', (
        WORKDIR, STEP,
        ('prompt', None, 'text to continue'),
        ('max_tokens', 0, 'new tokens at most; 0: what --max_length leaves, at most 256'),
        ('max_length', 0, 'tokens in all; 0: the rows the model was trained on'),
        ('drafter', 'futures', "futures, lookup (what followed the same few tokens before), or the workdir of a smaller model"),
        ('draft', -1, 'tokens drafted: 0 is plain autoregression, -1 as many as there are futures'),
        ('adaptive', False, 'draft 1 to --draft tokens, as recent acceptance and measured costs advise; implies --same_seed'),
        ('temperature', 0.0, '0 is greedy'),
        ('top_k', 0, 'draw from so many of the likeliest tokens; 0: all'),
        ('top_p', 1.0, 'draw from the fewest likeliest tokens that hold this mass'),
        ('seed', 0, 'of the sampling'),
        ('same_seed', False, 'a sample that does not depend on the drafts; fewer of them are accepted'),
        ('criterion', 'exact', 'what accepts a draft: exact, or lossy_top_k, lossy_distance, lossy_typical'),
        ('threshold', 0.0, 'of a lossy criterion: k, distance, or the bound of typical acceptance'),
        ('min_block', 1, 'tokens of a pass at least; above 1 is lossy'),
        ('stop', '', 'a string that ends the text'),
        ('stream', False, 'print the text as it grows'), JSON),
        "generate --workdir=runs/tiny --prompt='def main():' --max_tokens=200"),
    'inspect': Command(inspect, 'parameters, FLOPs, conventions, digest', (WORKDIR, STEP, CONFIG, JSON), 'inspect --config=configs/tiny.py'),
    'goodput': Command(goodput, 'where the time of a run went', (
        WORKDIR,
        ('plot', '', 'a PNG, a bar for each run'), JSON),
        'goodput --workdir=runs/tiny'),
    'certify': Command(certify, 'prove gradients, influence and FLOPs of a config', (CONFIG, JSON), 'certify --config=configs/tiny.py'),
    'plan': Command(plan, 'memory, FLOPs, collectives and least time of the step on a TPU slice, without one', (
        CONFIG,
        ('topology', None, 'chips and how they stand: v5p:4x4x4, v5e:16x16, v6e:16x16, several slices: 2xv5e:16x16, this machine: cpu:8; with commas several'),
        ('sweep', False, 'try meshes, rematerialisation and, while nothing fits, smaller microbatches; the fastest first'),
        ('plot', '', 'a PNG of the seconds of a step over the number of chips'), JSON),
        'plan --config=configs/gloeckle.py:7b,4 --topology=v5p:4x4x4'),
    'prepare': Command(prepare, 'text to token shards, once', (
        *INPUT,
        ('tokenizer', 'bytes', 'bytes, or the path of a SentencePiece model file'),
        ('output', None, 'folder of the set, empty or of this very set'),
        ('validation_share', 0.01, 'share of the documents held out, chosen by a hash of their names'),
        ('workers', -1, 'processes; -1 is one a core, 0 works in the process at hand'),
        ('shard_bytes', 0, 'of input in a shard; 0: a 64th of all, within 4 and 256 MiB'), JSON),
        "prepare --input='corpus/*.jsonl.gz' --output=data/corpus"),
    'train-tokenizer': Command(train_tokenizer, 'a SentencePiece model for such text', (
        *INPUT,
        ('output', None, 'the model file'),
        ('vocab', 32_000, 'ids, bos, eos, pad and 256 bytes included'),
        ('kind', 'bpe', 'bpe or unigram'),
        ('sample_bytes', 100_000_000, 'of text to train on, from all over the inputs'), JSON),
        "train-tokenizer --input='corpus/*.jsonl.gz' --output=corpus.model --vocab=32000"),
    'inspect-data': Command(inspect_data, 'what a prepared set holds and shows a model', (
        ('data', None, 'folder that prepare wrote'),
        ('length', 256, 'L, as config.data.length'),
        ('futures', 4, 'M, as config.model.futures'),
        ('packing', 'stream', 'stream or best_fit'),
        ('boundary', 'within', 'within or across'),
        ('rows', 2, 'rows shown, at even distances'),
        ('positions', 24, 'positions shown of each, around the first document boundary'),
        ('verify', False, 'read every byte and compare digests; exit code 1 if one differs'),
        ('plot', '', 'a PNG of the lengths of documents'), JSON),
        'inspect-data --data=data/corpus'),
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


def main(arguments: list[str]) -> int:
  return _exit_code(lambda: _run(arguments))


def _exit_code(work: Callable[[], int]) -> int:
  """That of the work, or of what it raised, which is told in a line."""
  try:
    return work()
  except BadInput as error:
    print(f'mtp_jax: {error}', file=sys.stderr)
    return 2
  except OSError as error:
    print(f'mtp_jax: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('mtp_jax: interrupted', file=sys.stderr)
    return 130


def _run(arguments: list[str]) -> int:
  words = 2 if arguments[:1] == ['benchmark'] and arguments[1:2] and not arguments[1].startswith('-') else 1
  name, rest = ' '.join(arguments[:words]), arguments[words:]
  if name in ('', '--help', '-h', 'help') or (name == 'benchmark'):
    print(_overview())
    return 0
  if name not in COMMANDS:
    raise BadInput(f'{name}: no such command; {schema.nearest(name, COMMANDS)}')
  command = COMMANDS[name]
  if '--help' in rest or '-h' in rest:
    print(_help(name, command))
    return 0
  values = flags.FlagValues()
  for flag, default, meaning in command.flags:
    if flag == 'config':
      _check_overrides(rest)
      config_flags.DEFINE_config_file(flag, default, meaning, flag_values=values, lock_config=True, sys_argv=[name, *rest])
    else:
      define = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, float: flags.DEFINE_float}.get(type(default), flags.DEFINE_string)
      define(flag, default, meaning, flag_values=values)
  known = [flag for flag, *_ in command.flags]
  for argument in rest:
    flag = argument.lstrip('-').partition('=')[0].partition('.')[0]
    if argument.startswith('-') and flag not in known and flag.removeprefix('no') not in known:
      raise BadInput(f'{argument}: {name} has no such flag; {schema.nearest(flag, known)}')
  try:
    extra = values([name, *rest])[1:]
  except BadInput:
    raise
  except (flags.Error, OSError, ValueError, TypeError) as error:
    raise BadInput(' '.join(str(error).split())) from None
  except Exception as error:  # whatever a config file, which is a program, may raise
    raise BadInput(' '.join(f'--config: {type(error).__name__}: {error}'.split())) from None
  if extra:
    raise BadInput(f'{extra[0]}: not expected here; flags are written --name=value')
  return command.run(values)


def _check_overrides(arguments: list[str]) -> None:
  """Names of --config.section.field=value, and the config file, before anything is loaded."""
  names = [argument.lstrip('-').partition('=')[0] for argument in arguments]
  for name in names:
    if name.startswith('config.') and names.count(name) > 1:
      raise BadInput(f'--{name}: given {names.count(name)} times; say it once')
  for argument in arguments:
    flag, equals, value = argument.lstrip('-').partition('=')
    if flag.removeprefix('no').startswith('config.'):
      schema.check_name(flag.removeprefix('no').removeprefix('config.'))
    if flag == 'config':
      if not equals:
        raise BadInput(f'{argument}: flags are written --name=value, such as --config=configs/tiny.py')
      _check_file('config', value)


def _check_file(flag: str, value: str) -> None:
  path = value.partition(':')[0]
  if not os.path.isfile(path):
    folder = os.path.dirname(path) or '.'
    there = sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith('.py')) if os.path.isdir(folder) else []
    raise BadInput(f'--{flag}={path}: no such file' + (f'; {schema.nearest(path, there)}' if there else ''))


def _config(f) -> Config:
  _need(f, 'config')
  try:
    values = f.config
  except OSError as error:
    raise BadInput(f'--config: {" ".join(str(error).split())}') from None
  if not isinstance(values, ml_collections.ConfigDict):
    raise BadInput(f'--config: get_config() returned {type(values).__name__}, but must return Config(...).to_config_dict()')
  return Config.from_dict(values.to_dict())


def _load_config(path: str) -> Config:
  """A second config file, without overrides."""
  _check_file('against', path)
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', None, '', flag_values=values, lock_config=True, sys_argv=['', f'--config={path}'])
  try:
    values(['', f'--config={path}'])
  except Exception as error:  # whatever a config file, which is a program, may raise
    raise BadInput(' '.join(f'--against={path}: {type(error).__name__}: {error}'.split())) from None
  return _config(values)


def _path(f) -> str:
  return config_flags.get_config_filename(f['config'])


def _fake_devices(count: int) -> None:
  """Has JAX, which has not started yet, see so many CPU devices, unless the user has said how many."""
  if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={count} {os.environ.get("XLA_FLAGS", "")}'


def _need(f, flag: str) -> None:
  if f[flag].value is None:
    raise BadInput(f'--{flag}: missing; see --help')


def _need_at_least(f, **least) -> None:
  for flag, number in least.items():
    if f[flag].value < number:
      raise BadInput(f'--{flag}={f[flag].value}: must be at least {number}')


def _inputs(f) -> tuple[str, ...]:
  given = tuple(f.input.split(','))
  if not all(given):
    raise BadInput(f'--input={f.input}: holds an empty name; write files, directories or globs with commas between')
  return given


def _reading(f):
  from mtp_jax.data.inputs import Reading
  return Reading(f.format, f.field, tuple(kind for kind in f.keep.split(',') if kind), f.max_document_bytes)


def _load(f):
  _need(f, 'workdir')
  _need_at_least(f, step=-1)
  from mtp_jax import checkpoint
  checkpoint.metadata(f.workdir, None if f.step < 0 else f.step)  # complains before JAX starts
  from mtp_jax.lm import load
  return load(f.workdir, None if f.step < 0 else f.step)


def _drafter(f, lm):
  """--drafter as `LanguageModel.generate` takes it: its name, or the model, refused before it is loaded when its tokenizer is another."""
  if f.drafter in ('futures', 'lookup'):
    return f.drafter
  from mtp_jax import checkpoint
  from mtp_jax.lm import load
  try:
    record = checkpoint.metadata(f.drafter, None)
  except BadInput as error:
    raise BadInput(f"--drafter={f.drafter}: neither 'futures' nor 'lookup', nor the workdir of a model: {error}") from None
  checkpoint.check_same('--drafter=' + f.drafter, lm.tokenizer.digest, record, 'tokenizer', 'a draft model must share the tokenizer of the model')
  return load(f.drafter)


def _report(f, values: dict, lines: list[str]) -> None:
  from mtp_jax import metrics
  print(json.dumps(metrics.finite(values)) if f.json else '\n'.join(lines))


def _table(head, rows) -> list[str]:
  cells = [[str(cell) for cell in row] for row in [head, *rows]]
  widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
  return ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]


def _overview() -> str:
  rows = _table(('command', ''), [(name, command.summary) for name, command in COMMANDS.items()])[1:]
  return '\n'.join(['python -m mtp_jax COMMAND [--flag=value ...]', '', *('  ' + row for row in rows), '', 'python -m mtp_jax COMMAND --help tells its flags.'])


def _help(name: str, command: Command) -> str:
  shown = lambda default: '' if default in (None, '') else f'[{default}]'
  rows = _table(('', '', ''), [(f'--{flag}', shown(default), meaning) for flag, default, meaning in command.flags])[1:]
  lines = [f'python -m mtp_jax {name}: {command.summary}', '', command.run.__doc__, '', *('  ' + row for row in rows), '',
           f'python -m mtp_jax {command.example}']
  if name == 'train':
    fields = []
    for section, kind in typing.get_type_hints(Config).items():
      fields += [(f'--config.{section}.{field.name}', f'[{field.default}]', field.metadata['meaning']) for field in dataclasses.fields(kind)]
    lines += ['', 'fields of a config, with the defaults that a config file may change:', '', *('  ' + row for row in _table(('', '', ''), fields)[1:])]
  return '\n'.join(lines)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
