"""A step of a run, once more and twice, bit by bit: does the machine compute what it should?

From the newest checkpoint before the step all steps up to it are run, with the batches they had,
and again from the same checkpoint. Where the two differ, the machine errs, or the program is not
deterministic. Where both agree and the loss is that of the log, a bad step comes from the data or
the parameters. Where both agree and the log has another loss, the machine erred then, or was
another one. Nothing is written to the workdir.
"""
import dataclasses
from collections.abc import Collection

import jax

from mtp_jax.checkpoint.record import DamagedCheckpoint, steps, whole_record
from mtp_jax.config import BadInput, Config, folder_path
from mtp_jax.config.paths import absolute
from mtp_jax.data.progress import quiet
from mtp_jax.mesh import make_mesh, process_share, put
from mtp_jax.programs import keep_programs
from mtp_jax.report.display import print_stderr
from mtp_jax.report.log import finite, read_log
from mtp_jax.tokenizer import byte_lengths
from mtp_jax.train.guards import CAUSES, Guard, changes_loss
from mtp_jax.train.opening import Opened, open_run
from mtp_jax.train.self_check import digest
from mtp_jax.train.step import compiled_init, compiled_step, restore


@dataclasses.dataclass(frozen=True)
class Replay:
  """What two runs of a step gave.

  Fields:
    step, start: the step, and that of the checkpoint; 0 for the beginning.
    same: whether both gave the same state and metrics, bit for bit.
    digests: fingerprints of both.
    loss: of the first; None where it is not finite.
    cause: why the step is skipped, '' for a good one.
    logged: whether the log has the step. logged_loss: its loss.
  """
  step: int
  start: int
  same: bool
  digests: tuple[str, str]
  loss: float | None
  cause: str
  logged: bool
  logged_loss: float | None

  @property
  def agrees(self) -> bool:
    """With itself and with the log."""
    return self.same and (not self.logged or self.loss == self.logged_loss)


def replay(config: Config, workdir, step: int, note=print_stderr) -> Replay:
  """Runs a step of the run in workdir twice; the first step is 1.

  Raises:
    BadInput: there is no such run or step, or config, data and checkpoint do not fit together.
  """
  workdir = absolute(folder_path(workdir))
  log = [record for record in read_log(workdir) if record['kind'] == 'train']
  last = max([*steps(workdir), *(record['step'] for record in log)], default=0)
  if not 1 <= step <= min(last, config.train.steps):
    raise BadInput(f'--replay_step={step}: must be a step that the run in {workdir} has done, 1 to {last}')
  keep_programs(config)
  opened = open_run(config, workdir, quiet if jax.process_index() else note)
  newest, record = opened.record, _record_before(workdir, step, opened.damaged, note)
  opened = dataclasses.replace(opened, record=record)
  mesh = make_mesh(config.mesh)
  left_out = _rows_left_out(opened, newest, log, step)
  with jax.set_mesh(mesh):
    runs = [_run_to(config, workdir, opened, mesh, step, left_out) for _ in range(2)]
  (first, metrics), (second, _) = runs
  logged = [record for record in log if record['step'] == step]
  cause = metrics['skip_cause']
  return Replay(step, opened.step, first == second, (first, second),
                finite(metrics['loss']), CAUSES[cause - 1] if cause else '', bool(logged),
                logged[0]['loss'] if logged else None)


def _record_before(workdir, step: int, damaged: Collection[int], note) -> dict | None:
  """That of the newest whole checkpoint before the step; None for the beginning."""
  for start in sorted((s for s in steps(workdir) if s < step and s not in damaged), reverse=True):
    try:
      return whole_record(workdir, start)
    except DamagedCheckpoint as error:
      note(f'{error}; an older checkpoint is used')
  return None


def _rows_left_out(opened: Opened, newest: dict | None, log: list[dict], step: int) -> int:
  """Rows that roll-backs to the checkpoint left out before the step: as the record of the newest
  checkpoint has it, or where that is the same one, the log.
  """
  if newest and newest['step'] > opened.step:
    return sum(rows for at, rows in newest.get('skipped_rows', []) if at == opened.step)
  later = [record for record in log if record['step'] >= step]
  before = sum(rows for _, rows in (opened.record or {}).get('skipped_rows', []))
  return later[0].get('skipped_rows', 0) - before if later else 0


def _run_to(config: Config, workdir, opened: Opened, mesh, last: int, left_out: int) -> tuple[str, dict]:
  """(digest of the next state and the metrics, the metrics) of a step, from the checkpoint."""
  M, t = config.model.futures, config.train
  batches = opened.corpus.batches(opened.corpus.rows(M), t.batch, *process_share(mesh),
                                  place=lambda batch: put(batch, mesh), rows_before=t.rows_before)
  byte_length_V = jax.device_put(byte_lengths(config, opened.tokenizer), jax.NamedSharding(mesh, jax.P()))
  guard = Guard.resumed(config, opened.corpus.identity, opened.record)
  if opened.record:
    batches.set_state(opened.record['data'], opened.step)
    state = restore(config, workdir, opened.step, mesh)
  else:
    state = compiled_init(config, jax.random.key(t.seed))
  if left_out:
    batches.skip(left_out)
    state = dataclasses.replace(state, skipped_in_a_row=jax.numpy.zeros_like(state.skipped_in_a_row))
  try:
    for n in range(opened.step, last):
      if changes_loss(config, n):
        guard.forget()
      state, metrics = compiled_step(config, state, next(batches), byte_length_V, n / t.steps, guard.limits(n + 1))
      if n == last - 1:
        found = digest(state, metrics)
      metrics = jax.device_get(metrics)
      guard.add(n + 1, metrics['loss'].item(), metrics['gradient_norm'].item(), int(metrics['skip_cause']))
  finally:
    batches.close()
  return found, jax.tree.map(lambda x: x.tolist(), metrics)
