"""What a run needs before its first step, checked against the config and against the checkpoint
it resumes.
"""
import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Collection, Iterator

from mtp_jax.checkpoint.record import (
    FOLDER,
    TOKENIZER,
    DamagedCheckpoint,
    check_conventions,
    check_resumes,
    check_tokenizer,
    choose,
    folder_of,
    folders,
    locate,
    steps,
    whole_record,
)
from mtp_jax.config import BadInput, Config
from mtp_jax.config.errors import cannot, in_words
from mtp_jax.data.corpus import Corpus, difference, load_tokenizer, open_corpus
from mtp_jax.data.prepared_set import INDEX
from mtp_jax.model.model import conventions
from mtp_jax.report.display import Meter, print_stderr
from mtp_jax.tokenizer import Tokenizer, check_vocabulary
from mtp_jax.train import processes
from mtp_jax.train.optimizer import schedule
from mtp_jax.train.own_files import OwnFiles
from mtp_jax.train.watch import watched

WHOLE, DAMAGED, UNREADABLE = range(3)  # what a process finds of a checkpoint, the worst one last


@dataclasses.dataclass(frozen=True)
class Opened:
  """Tokenizer, documents, and the record of the checkpoint to resume, None for a new run.

  damaged: steps with a newer checkpoint, which is not whole.
  """
  tokenizer: Tokenizer
  corpus: Corpus
  record: dict | None
  damaged: tuple[int, ...]

  @property
  def step(self) -> int:
    """The step to go on from; 0 for a new run."""
    return self.record['step'] if self.record else 0


def open_run(config: Config, workdir: pathlib.Path, note: Callable[[str], None],
             damaged: Collection[int] = ()) -> Opened:
  """Opens the tokenizer, the documents and the newest checkpoint in workdir that is whole. Prepares
  config.data.paths where needed. Every process of a job must call it.

  Args:
    note: gets a line for each change since the checkpoint, for each newer checkpoint that is damaged, and for each
      source that the run never reads.
    damaged: steps whose checkpoint is known to be damaged.

  Raises:
    BadInput: config, data and checkpoint do not fit together.
  """
  hang_seconds = config.train.hang_seconds
  with cannot('read', f'--workdir={workdir}', 'make it readable, or choose another'):
    _check_workdir(workdir)
    processes.check_same(hang_seconds, config=json.dumps(config.to_dict()),
                         checkpoint=f'steps {folders(workdir)}, complete {steps(workdir)}')
    record = _newest_record(workdir, note, damaged, hang_seconds) if folders(workdir) else None
  changes = []
  if record:
    changes += check_resumes(config, record, workdir)
    check_conventions(conventions(config.model), record, workdir)
  tokens = _tokenizer(config.data.tokenizer, workdir, note)
  check_vocabulary(config, tokens)
  if record:
    check_tokenizer(f'config.data.tokenizer={config.data.tokenizer}', tokens.digest, record,
                    'use the same tokenizer, or another --workdir')
  corpus = open_corpus(config.data, tokens, print_stderr, functools.partial(WatchedMeter, hang_seconds),
                       functools.partial(watched, hang_seconds))
  corpus.sides()  # raises where one has less than a row
  if record:
    changes += _check_data(config, corpus, record, workdir) + rate_change(config, record) + rows_change(config, record)
  changes += corpus.left_out(config.train.rows_before(config.train.steps))
  for change in changes:
    note(change)
  newer = tuple(step for step in steps(workdir) if record and step > record['step'])
  return Opened(tokens, corpus, record, newer)


def _newest_record(workdir: pathlib.Path, note: Callable[[str], None], damaged: Collection[int],
                   hang_seconds: float) -> dict:
  """That of the newest checkpoint that is whole; each process of a job reads a share of its files.

  All processes decide alike. One that cannot read its share ends all, and one that finds damage makes all use an
  older checkpoint.
  """
  def checked(step: int) -> dict:
    record, error, kind = None, None, WHOLE
    try:
      record = whole_record(workdir, step, *processes.place())
    except BadInput as refused:
      error, kind = refused, DAMAGED if isinstance(refused, DamagedCheckpoint) else UNREADABLE
    worst = processes.largest(kind, hang_seconds)
    by_another = f'as another process of this job has found; its files are in {folder_of(workdir, step)}'
    if worst == UNREADABLE:
      raise error if kind == worst else BadInput(f'checkpoint {step}: cannot be read, {by_another}')
    if worst == DAMAGED:
      raise error or DamagedCheckpoint(step, f'checkpoint {step}: is damaged, {by_another}')
    return record

  return choose(workdir, None, checked, note, damaged)


class WatchedMeter(Meter):
  """A meter that ends the process when it is shown nothing for so many seconds."""

  def __init__(self, seconds: float, total: int, ready: int):
    super().__init__(total, ready)
    self._watch = watched(seconds, 'the next document of config.data.paths')

  def __enter__(self) -> Meter:
    self._goes_on = self._watch.__enter__()
    return super().__enter__()

  def __exit__(self, *error) -> None:
    self._watch.__exit__(*error)
    super().__exit__(*error)

  def show(self, size: int, documents: int, tokens: int) -> None:
    self._goes_on()
    super().show(size, documents, tokens)


def _check_workdir(workdir: pathlib.Path) -> None:
  if workdir.exists() and not workdir.is_dir():
    raise BadInput(f'--workdir={workdir}: cannot be a folder, it is a file; choose another')
  if (workdir / FOLDER).exists() and not (workdir / FOLDER).is_dir():
    raise BadInput(f'--workdir={workdir}: its {FOLDER} is a file, no folder; move it away, or choose another')
  if (workdir / INDEX).exists():
    raise BadInput(f'--workdir={workdir}: holds a prepared set; choose another')
  if FOLDER in workdir.parts and (run := locate(workdir)[0]) != workdir:
    raise BadInput(f'--workdir={workdir}: is inside the run {run}; give that to go on with it')


@contextlib.contextmanager
def only_run(files: OwnFiles, opened: Opened, hang_seconds: float) -> Iterator[None]:
  """Lets one run at a time write in a workdir; see own_files.py.

  The first process of a job takes the lock. Every process must call this, and goes on when that one has
  it; so a run that is refused has written nothing. Where the file system has no locks nothing is refused.

  Raises:
    BadInput: another run writes there, or has since this one was opened.
  """
  owner, refusal = None, ''
  try:
    if files.is_first or files.bucket is not None:
      try:
        owner, refusal = files.take()
      except OSError as error:
        refusal = f'cannot write ({in_words(error)}); give a folder that can be written'
    if files.is_first:
      if not refusal and max(set(steps(files.workdir)) - set(opened.damaged), default=0) != opened.step:
        refusal = 'another process has saved a checkpoint there; run the same command again'
    if processes.total(bool(refusal), hang_seconds):
      raise BadInput(f'--workdir={files.workdir}: {refusal or "another process of this job is refused"}')
    yield
  finally:
    if owner:
      owner.close()


def _tokenizer(name: str, workdir: pathlib.Path, note: Callable[[str], None]) -> Tokenizer:
  """The tokenizer of config.data.tokenizer; the copy in the workdir if that file is gone."""
  kept = workdir / TOKENIZER
  try:
    return load_tokenizer(name)
  except BadInput:
    if not kept.exists():
      raise
  note(f'config.data.tokenizer={name}: cannot be read here; {kept} is used')
  return load_tokenizer(str(kept))


def _check_data(config: Config, corpus: Corpus, record: dict, workdir: pathlib.Path) -> list[str]:
  """How the data differ from the checkpoint's, where config.data.accept_changed allows it."""
  changes = difference(corpus.identity, record['identity'])
  if changes and not config.data.accept_changed:
    raise BadInput(f'config.data: not what the checkpoint in {workdir} was trained on: {"; ".join(changes)}; '
                   'restore that, choose another --workdir, or set config.data.accept_changed=True '
                   'to go on with these data, each source from its own row number')
  return [f'the data have changed: {change}' for change in changes]


def rate_change(config: Config, record: dict) -> list[str]:
  """The learning rate after the checkpoint, where the config gives another than the checkpoint's
  own by more than 1 %; in one line.
  """
  step, configs = record['step'], (Config.from_dict(record['config']), config)
  old, new = (float(schedule(c.optimizer, c.train.steps)(step)) for c in configs)
  if abs(new - old) <= 0.01 * max(new, old):
    return []
  return [f'the learning rate goes from {old:.3g} to {new:.3g} at step {step:,}, as the schedule of '
          f'{config.train.steps:,} steps has it; that of the checkpoint was for {configs[0].train.steps:,}']


def rows_change(config: Config, record: dict) -> list[str]:
  """The rows of the step after the checkpoint, where the config gives others than the checkpoint's own; in one line."""
  step, configs = record['step'], (Config.from_dict(record['config']), config)
  old, new = (c.train.rows_at(step) for c in configs)
  return [] if old == new else [f'the rows of a step go from {old:,} to {new:,} at step {step:,}']
