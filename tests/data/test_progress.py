"""Progress is handed in by the caller; without a meter nothing is shown."""
import pytest

from mtp_jax import tokenizer
from mtp_jax.data.files import files
from mtp_jax.data.parts import Options
from mtp_jax.data.prepare import prepare
from mtp_jax.data.progress import NoMeter


class Recorder(NoMeter):
  """Keeps all that `prepare` reports."""

  def __init__(self, total: int, ready: int):
    self.opened = total, ready
    self.shown = []

  def show(self, size: int, documents: int, tokens: int) -> None:
    self.shown.append((size, documents, tokens))


@pytest.fixture
def inputs(tmp_path):
  (tmp_path / 'in').mkdir()
  for i in range(40):
    (tmp_path / 'in' / f'{i}.txt').write_text('x' * (i + 1))
  return files((str(tmp_path / 'in'),), '--input')


@pytest.mark.parametrize('workers', [0, 2])
def test_a_meter_ends_at_the_sums_of_the_set(inputs, tmp_path, workers):
  meters = []

  def progress(total, ready):
    meters.append(Recorder(total, ready))
    return meters[-1]
  options = Options(validation_share=0.2, shard_bytes=200)
  bytes_ = tokenizer.load('bytes')
  prepared = prepare(inputs, bytes_, options, tmp_path / 'set', workers, '--input', progress=progress)
  size = sum(file.bytes for file in inputs)
  meter, = meters
  assert meter.opened == (size, 0) and meter.shown == sorted(meter.shown)
  assert meter.shown[-1] == (size, 40, prepared.train.tokens + prepared.validation.tokens)


def test_without_note_and_progress_nothing_is_printed(inputs, tmp_path, capfd):
  for _ in range(2):  # the second time it is complete already
    prepare(inputs, tokenizer.load('bytes'), Options(validation_share=0.2), tmp_path / 'set', 0, '--input')
  assert capfd.readouterr() == ('', '')
