"""What the report shows of a run, gathered from its workdir: logs, costs by part, and a text."""
import json
import pathlib

from mtp_jax.checkpoint.record import CONFIG, locate, steps
from mtp_jax.config import BadInput, Config, upgraded
from mtp_jax.config.errors import in_words
from mtp_jax.lm import LanguageModel, load
from mtp_jax.measure.counts import counts
from mtp_jax.report import goodput
from mtp_jax.report.events import FILE as EVENTS
from mtp_jax.report.events import read_events
from mtp_jax.report.log import read_log
from mtp_jax.report.page import Run, Sample


def gather(path: str, prompt: str, max_tokens: int, temperature: float, seed: int) -> Run:
  """A run as the page shows it; it may still be going on.

  Args:
    path: its workdir, which is also its name on the page.
    prompt: of the sample; '': the beginning of a held-out document.
    max_tokens: of the sample, at most, within a row; 0: none.

  Raises:
    BadInput: the path is no workdir, or the model cannot be asked for such a sample.
  """
  workdir, step = locate(path)
  config = _config(workdir)
  counted = counts(config)
  account = goodput.account(read_events(workdir)) if (workdir / EVENTS).exists() else None
  return Run(path, config, read_log(workdir), account, counted['parameters'], counted['flops_per_token'],
             _sample(workdir, step, prompt, max_tokens, temperature, seed))


def _config(workdir: pathlib.Path) -> Config:
  try:
    values = json.loads((workdir / CONFIG).read_text())
  except OSError as error:
    raise BadInput(f'--workdir={workdir}: no {CONFIG} there ({error.strerror or in_words(error)}); give the workdir '
                   'of a run') from None
  except ValueError as error:
    raise BadInput(f'{workdir / CONFIG}: not a config ({error}); start the run again, which writes it') from None
  return Config.from_dict(upgraded(values))


def _sample(workdir: pathlib.Path, step: int | None, prompt: str, max_tokens: int, temperature: float,
            seed: int) -> Sample | str:
  """A text from that checkpoint, by default the newest, or why there is none."""
  if max_tokens == 0:
    return 'No sample was asked for.'
  if not steps(workdir):
    return 'There is no checkpoint yet to generate from.'
  lm = load(workdir, step)
  try:
    prompt = prompt or _held_out_prompt(lm)
  except BadInput as error:
    return f'No sample, for no held-out document is here to begin with: {error}. --prompt=... gives one.'
  room = lm.config.data.length - len(lm.row(prompt))
  result = lm.generate(prompt, max_tokens=min(max_tokens, max(1, room)), temperature=temperature, seed=seed)
  acceptance = ' '.join(f'{a:.2f}' for a in result.acceptance)
  about = (f'Step {lm.step:,}, temperature {temperature:g}, seed {seed}: {result.tokens} tokens in {result.forwards} '
           f'passes, {result.tokens_per_forward:.2f} a pass; acceptance by depth {acceptance or "–"}.')
  return Sample(prompt, [lm.tokenizer.decode([token]) for token in result.ids[0]], result.depths[0], about)


def _held_out_prompt(lm: LanguageModel) -> str:
  """The beginning of a held-out document, up to a quarter of a row.

  Raises:
    BadInput: no held-out document is here, or none is long enough.
  """
  return lm.tokenizer.text(lm.held_out_prompts(1, max(1, lm.config.data.length // 4))[0])
