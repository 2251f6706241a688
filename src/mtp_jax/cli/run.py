"""train, generate, verify: what is done with a workdir."""
import dataclasses
import sys

from mtp_jax.cli.command import (
    CONFIG,
    JSON,
    MESH,
    STEP,
    TOKENIZER,
    WORKDIR,
    Command,
    config_of,
    exit_code_of,
    model_of,
    need,
    need_at_least,
    print_result,
    say,
    table,
)
from mtp_jax.cli.text import typed, typed_or_read
from mtp_jax.config import BadInput, Config
from mtp_jax.config.errors import cannot


def train(flags) -> int:
  """Starts a run, or resumes it from the newest checkpoint in --workdir.

  With --replay_step=N it instead runs step N again, twice from the checkpoint before it, and writes
  nothing there. Exit code 0 if both agree with each other, bit for bit, and with the log; 1 if not:
  then the machine errs, or the program is another or, on a GPU, not deterministic.
  """
  config = config_of(flags)
  need(flags, 'workdir')
  profiled = _profiled(flags.profile_steps)
  need_at_least(flags, replay_step=0)
  from mtp_jax.train import processes
  work = (lambda: _replay(flags, config)) if flags.replay_step else (lambda: _fit(flags, config, profiled))
  return processes.run(lambda: exit_code_of(work), config.train.heartbeat_seconds, config.train.start_seconds)


def _profiled(steps: str) -> range:
  """The steps of 'a:b'; none of ''."""
  first, _, last = steps.partition(':')
  if steps and not (first.isdigit() and last.isdigit() and 0 < int(first) < int(last)):
    raise BadInput(f'--profile_steps={steps}: must be a:b with 0 < a < b, the steps a to b-1')
  return range(int(first), int(last)) if steps else range(0)


def _fit(flags, config: Config, profiled: range) -> int:
  import jax

  from mtp_jax.train.fit import NotFinite, NotReproducible, fit
  try:
    outcome = fit(config, flags.workdir, profiled)
  except (NotFinite, NotReproducible) as error:
    print(f'mtp_jax: {error}', file=sys.stderr)
    return 1
  line = f'step {outcome.step} of {config.train.steps}, '
  line += f'checkpoint in {flags.workdir}' if outcome.step else 'no checkpoint yet'
  if outcome.signal:
    line += f'; stopped by signal {outcome.signal}, run the same command to resume'
  values = {'step': outcome.step, 'validation': outcome.validation, 'signal': outcome.signal}
  if jax.process_index() == 0:
    print_result(flags, values, [line])
  return 128 + outcome.signal if outcome.signal else 0


def _replay(flags, config: Config) -> int:
  import jax

  from mtp_jax.train.replay import replay
  found = replay(config, flags.workdir, flags.replay_step)
  start = f'the checkpoint of step {found.start}' if found.start else 'the beginning'
  lines = [f'step {found.step}, twice from {start}: '
           + (f'the same state and metrics, bit for bit; loss {found.loss}' if found.same else
              f'NOT the same state and metrics ({" and ".join(d[:12] for d in found.digests)}): the machine errs, or, '
              'on a GPU, the program is not deterministic')]
  if found.logged and found.loss == found.logged_loss:
    lines.append(f'the log has that loss: {f"{found.cause}, from" if found.cause else "the step depends on"} data and '
                 'parameters, not on the machine')
  elif found.logged:
    lines.append(f'the log has loss {found.logged_loss}: the machine erred then, or config, devices or the compiled '
                 'program were others')
  else:
    lines.append(f'the log has no record of step {found.step}' + (f'; {found.cause}' if found.cause else ''))
  if jax.process_index() == 0:
    print_result(flags, dataclasses.asdict(found) | {'agrees': found.agrees}, lines)
  return 0 if found.agrees else 1


def generate(flags) -> int:
  """Continues --prompt, or the content of --prompt_file, byte for byte.

  Greedily, or with --same_seed, the text does not depend on the drafts, in float32; otherwise its
  distribution does not.
  """
  prompt, stop = _prompt(flags), typed(flags, 'stop')
  need_at_least(flags, draft=-1, max_tokens=0, max_length=0, n=1)
  from mtp_jax.decode.requests import Criterion, sampling_parameters
  sampling_parameters(1, flags.temperature, flags.seed, flags.top_k, flags.top_p)
  criterion = Criterion(flags.criterion, flags.threshold, flags.min_block)
  if flags.stream and flags.n > 1:
    raise BadInput(f'--stream: shows one sample, but --n={flags.n}')
  lm = model_of(flags)
  prompt_text = (prompt or b'').decode(errors='replace')
  unprinted = [prompt_text]  # printed with the first new text, so that an error comes before it

  def stream(row, ids, text):
    say((unprinted.pop() if unprinted else '') + text, end='')

  streams = flags.stream and not flags.json
  generation = lm.generate(
      prompt, flags.max_tokens or None, None if flags.draft < 0 else flags.draft,
      flags.temperature, flags.seed, n=flags.n, top_k=flags.top_k, top_p=flags.top_p,
      drafter=drafter_of(flags, lm), adaptive=flags.adaptive, same_seed=flags.same_seed,
      criterion=criterion, stop=stop or (), max_length=flags.max_length or None,
      stream=stream if streams else None)
  names = ('finish_reason', 'tokens', 'forwards', 'tokens_per_forward', 'seconds', 'acceptance', 'mean_draft',
           'lossless')
  values = {'text': generation.text[0], 'texts': generation.text,
            **{name: getattr(generation, name) for name in names}, 'criterion': dataclasses.asdict(criterion)}
  trained_depth = lm.config.model.futures - 1
  lines = ['', *_generation_lines(flags, generation, criterion, trained_depth)]
  texts = [prompt_text + text for text in generation.text]
  if flags.n > 1:
    texts = [f'--- {i}\n{text}' for i, text in enumerate(texts)]
  print_result(flags, values, lines if streams else [*texts, *lines])
  return 0


def _prompt(flags) -> bytes | None:
  """--prompt, or the content of --prompt_file; None with --unconditional."""
  if flags.unconditional:
    if flags.prompt is not None or flags.prompt_file is not None:
      raise BadInput('--unconditional: begins a document, so it takes no --prompt and no --prompt_file')
    return None
  if flags.prompt is None and flags.prompt_file is None:
    raise BadInput("--prompt: give either --prompt='def main():' or --prompt_file=FILE, or --unconditional")
  prompt = typed_or_read(flags, 'prompt')
  if not prompt:
    raise BadInput(f'--{"prompt" if flags.prompt_file is None else "prompt_file"}: empty; '
                   'pass the text to continue')
  return prompt


def _generation_lines(flags, generation, criterion, trained_depth: int) -> list[str]:
  """Figures in words. trained_depth: the largest draft depth that the model was trained for."""
  lines = [f'{generation.tokens} tokens in {generation.forwards} forwards: '
           f'{generation.tokens_per_forward:.2f} tokens per forward, '
           f'{generation.seconds:.2f} s with compilation']
  if generation.acceptance:
    by_depth = ' '.join(f'{a:.2f}' for a in generation.acceptance)
    adaptive = f'; {generation.mean_draft:.1f} drafts a pass' if flags.adaptive else ''
    lines.append(f'acceptance by depth: {by_depth}{adaptive}')
  if flags.drafter == 'futures' and len(generation.acceptance) > trained_depth:
    lines.append(f'drafts beyond depth {trained_depth} come from a module applied more often than '
                 'it was trained for')
  if not generation.lossless:
    lines.append(f'lossy: {criterion.name}, threshold {criterion.threshold:g}, blocks of '
                 f'{criterion.min_block} at least; '
                 "the text does not follow the model's distribution")
  return lines


def verify(flags) -> int:
  """Reads all files of every checkpoint in --workdir, or of --step alone, and compares them with what was saved.

  Changes nothing. The exit code is 1 if one is not whole; `train`, `evaluate` and `generate` use the newest that is.
  """
  need(flags, 'workdir')
  need_at_least(flags, step=-1)
  from mtp_jax.checkpoint import manifest
  from mtp_jax.checkpoint.record import folder_of, folders, locate, read_record, state
  workdir, step = locate(flags.workdir, None if flags.step < 0 else flags.step)
  with cannot('read', f'--workdir={workdir}', 'make it readable, or give another folder'):
    found = folders(workdir)
  if not found:
    read_record(workdir)  # says what to do
  if step not in (None, *found):
    raise BadInput(f'step {step}: {workdir} holds the steps {", ".join(map(str, found))}')
  checkpoints = []
  for number in found if step is None else [step]:
    row = {'step': number, 'bytes': manifest.size_bytes(folder_of(workdir, number)), 'state': state(workdir, number)}
    if folder_of(workdir, number).exists():  # else the run has removed it
      checkpoints.append(row)
  whole = [row['state'].startswith('whole') for row in checkpoints]
  rows = [(row['step'], f'{row["bytes"]:,}', row['state']) for row in checkpoints]
  print_result(flags, {'checkpoints': checkpoints, 'whole': sum(whole)}, table(('step', 'bytes', ''), rows))
  return 0 if all(whole) else 1


def drafter_of(flags, lm):
  """--drafter as `LanguageModel.generate` takes it: a name, or a loaded draft model.

  Raises:
    BadInput: there is no such drafter, or the draft model has another tokenizer.
  """
  if flags.drafter in ('futures', 'lookup'):
    return flags.drafter
  from mtp_jax.checkpoint.record import check_tokenizer, locate, read_record
  from mtp_jax.lm import load
  try:
    record = read_record(*locate(flags.drafter, where='--drafter'))
  except BadInput as error:
    raise BadInput(f"--drafter={flags.drafter}: neither 'futures' nor 'lookup', nor the workdir of "
                   f'a model: {error}') from None
  check_tokenizer(f'--drafter={flags.drafter}', lm.tokenizer.digest, record,
                  'a draft model must share the tokenizer of the model')
  return load(flags.drafter)


COMMANDS = {
    'train': Command(
        train, 'pretrain, or resume',
        (CONFIG, WORKDIR,
         ('profile_steps', '', 'a:b writes a jax.profiler trace of the steps a to b-1'),
         ('replay_step', 0, 'a step to run again, twice, instead of training'),
         JSON),
        'train --config=configs/tiny.py --workdir=runs/tiny --config.train.steps=200'),
    'generate': Command(
        generate, 'continue a prompt, drafting ahead',
        (WORKDIR, STEP, TOKENIZER, MESH,
         ('prompt', None, 'text to continue'),
         ('prompt_file', None, 'a file that holds it; -: stdin'),
         ('unconditional', False, 'begin a document, without a prompt'),
         ('n', 1, 'samples; with --temperature they differ'),
         ('escapes', False, r'read \n, \t, \xHH and such in --prompt and --stop as in C'),
         ('max_tokens', 0, 'largest number of new tokens; 0: what --max_length leaves, up to 256'),
         ('max_length', 0, 'tokens of prompt and new text; 0: as many as the training rows had'),
         ('drafter', 'futures',
          'futures, lookup (copies what followed the same few tokens before), or the workdir of a '
          'smaller model'),
         ('draft', -1, 'drafts in a pass; 0: plain decoding, -1: one from each future past the next token'),
         ('adaptive', False,
          'choose 0 to --draft tokens from recent acceptance and measured costs; sets --same_seed'),
         ('temperature', 0.0, '0 is greedy'),
         ('top_k', 0, 'sample from this many most probable tokens; 0: all'),
         ('top_p', 1.0, 'sample from the fewest tokens that have this probability together'),
         ('seed', 0, 'seed of the sampling'),
         ('same_seed', False, 'a sample that does not depend on the drafts; accepts fewer of them'),
         ('criterion', 'exact',
          'how drafts are accepted: exact, or lossy_top_k, lossy_distance, lossy_typical'),
         ('threshold', 0.0, 'of a lossy criterion: k, distance, or bound of typical acceptance'),
         ('min_block', 1, 'least number of tokens a pass accepts; above 1 is lossy'),
         ('stop', '', 'a string that ends the text'),
         ('stream', False, 'print the text as it grows'),
         JSON),
        "generate --workdir=runs/tiny --prompt='def main():' --max_tokens=200"),
    'verify': Command(
        verify, 'whether the checkpoints of a run are whole',
        (WORKDIR, ('step', -1, 'of the checkpoint; -1: all'), JSON),
        'verify --workdir=runs/tiny'),
}
