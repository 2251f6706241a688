"""The log of a run: what a resume drops, and what a cut-off line does not do."""
import json

import pytest

from mtp_jax.report.log import FILE, Log, read_log


def test_a_resumed_log_drops_what_lies_past_the_checkpoint(tmp_path):
  log = Log(tmp_path, 0)
  for step in (1, 2, 3, 4):
    log.write(step, 'train', {'loss': step / 2, 'nats': [1.0, 2.0]})
    if step % 2 == 0:
      log.write(step, 'validation', {'nats': [3.0]})
  log.close()
  with log.path.open('a') as file:
    file.write('{"step": 5, "kind": "tr')  # cut off by a crash
  Log(tmp_path, 4).close()
  train = lambda step: {'step': step, 'kind': 'train', 'loss': step / 2, 'nats': [1.0, 2.0]}
  validation = {'step': 2, 'kind': 'validation', 'nats': [3.0]}
  records = lambda: [json.loads(line) for line in log.path.read_text().splitlines()]
  # a run repeats the validation at its checkpoint
  assert records() == [train(1), train(2), validation, train(3), train(4)]
  Log(tmp_path, 2).close()
  assert records() == [train(1), train(2)]


@pytest.mark.parametrize('cut', ['', '{', '3', 'null', '{"step": 1}', '\udcff'])
def test_a_cut_off_line_never_blocks_a_resume(tmp_path, cut):
  (tmp_path / 'metrics.jsonl').write_bytes(b'{"step": 1, "kind": "train"}\n' + cut.encode(errors='surrogateescape'))
  log = Log(tmp_path, 1)
  log.write(2, 'train', {})
  log.close()
  assert [json.loads(line)['step'] for line in log.path.read_text().splitlines()] == [1, 2]


def test_the_log_is_read_back_without_a_line_that_a_crash_cut_off(tmp_path):
  assert read_log(tmp_path) == []
  log = Log(tmp_path, 0)
  log.write(1, 'train', {'loss': float('nan'), 'nats': [0.5]})
  log.close()
  with (tmp_path / FILE).open('a') as file:
    file.write('{"step": 2, "kind": "tr')
  assert read_log(tmp_path) == [{'step': 1, 'kind': 'train', 'loss': None, 'nats': [0.5]}]
