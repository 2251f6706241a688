"""Trackers get the same numbers as metrics.jsonl; what was saved with an earlier field still opens."""
import json
import os
import re
import subprocess
import sys

import pytest
from experiments import experiment, random_state, write

from mtp_jax.checkpoint.record import FOLDER, METADATA, read_record
from mtp_jax.config import BadInput, Config, upgraded
from mtp_jax.report.log import Log, read_log
from mtp_jax.report.trackers import check_installed, open_trackers

RECORDS = [(1, 'train', {'loss': 1.5, 'nats': [1.0, 2.0]}), (1, 'validation', {'nats': [3.0, float('nan')]})]
FLAT = {'train/loss': 1.5, 'train/nats/0': 1.0, 'train/nats/1': 2.0, 'validation/nats/0': 3.0}


def written(workdir, *trackers: str, step: int = 0, records=RECORDS):
  log = Log(workdir, step, open_trackers(trackers, workdir, step, {'train': {'steps': 7}}))
  for record in records:
    log.write(*record)
  log.close()


def test_tensorboard_gets_every_number_of_the_log(tmp_path):
  written(tmp_path, 'tensorboard')
  events, = (tmp_path / 'tensorboard').glob('events.out.tfevents.*')
  assert all(tag.encode() in events.read_bytes() for tag in FLAT)


def wandb_records(data: bytes):
  """The records of a .wandb file: 7 bytes of header, then a LevelDB log: blocks of 32 KiB with
  entries of a checksum (4 bytes), a length (2), a kind (1: whole, 4: the last part) and a record.
  """
  from wandb.proto.wandb_internal_pb2 import Record
  place, parts = 7, b''
  while place + 7 <= len(data):
    left = 2**15 - place % 2**15
    if left < 7:
      place += left
      continue
    size, kind = int.from_bytes(data[place + 4:place + 6], 'little'), data[place + 6]
    parts += data[place + 7:place + 7 + size]
    place += 7 + size
    if kind in (1, 4):
      yield Record.FromString(parts)
      parts = b''


def offline_runs(workdir) -> list[dict[str, float]]:
  """The numbers of each offline run of Weights & Biases, in order, and its id."""
  runs = []
  for path in sorted((workdir / 'wandb').glob('offline-run-*/run-*.wandb')):
    runs.append({})
    for record in wandb_records(path.read_bytes()):
      if record.HasField('run'):
        runs[-1]['id'] = record.run.run_id
      runs[-1] |= {'/'.join(item.nested_key) or item.key: json.loads(item.value_json)
                   for item in record.history.item}
  return runs


@pytest.mark.filterwarnings('default')  # of wandb's own packages
def test_weights_and_biases_gets_every_number_of_the_log_without_a_network(tmp_path, monkeypatch):
  wandb = pytest.importorskip('wandb', reason="needs pip install -e '.[wandb]'")
  monkeypatch.setenv('WANDB_MODE', 'offline')
  written(tmp_path, 'wandb')
  written(tmp_path, 'wandb', step=1, records=[(2, 'train', {'loss': 0.5})])  # a resume
  wandb.teardown()  # ends its process, which writes the files
  first, resumed = offline_runs(tmp_path)
  assert first.items() >= FLAT.items()
  assert resumed['train/loss'] == 0.5 and resumed['_step'] == 2
  assert resumed['id'] == first['id']
  assert [record['step'] for record in read_log(tmp_path)] == [1, 2]


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(BadInput, match=re.escape("('wandb',): wandb is missing; pip install -e '.[wandb]'")):
    check_installed(('wandb',))


def test_weights_and_biases_without_a_login_is_one_line(tmp_path):
  pytest.importorskip('wandb', reason="needs pip install -e '.[wandb]'")
  program = f"""if True:
    import pathlib
    from mtp_jax.cli.command import exit_code_of
    from mtp_jax.report.trackers import open_trackers
    raise SystemExit(exit_code_of(lambda: open_trackers(('wandb',), pathlib.Path({str(tmp_path)!r}), 0, dict())))"""
  environment = {name: value for name, value in os.environ.items() if not name.startswith('WANDB')}
  ended = subprocess.run([sys.executable, '-c', program], env=environment | {'HOME': str(tmp_path)},
                         stdin=subprocess.DEVNULL, capture_output=True, text=True)
  assert ended.returncode == 2
  assert re.fullmatch('mtp_jax: config.train.trackers: wandb does not start: .*WANDB_MODE=offline\n', ended.stderr)


@pytest.mark.parametrize('wanted, trackers', [(True, ('tensorboard',)), (False, ())])
def test_a_checkpoint_of_the_field_tensorboard_still_opens(tmp_path, wanted, trackers):
  config = experiment(tmp_path)
  saved = config.to_dict()
  del saved['train']['trackers']
  saved['train']['tensorboard'] = wanted
  write(tmp_path / 'run', config, random_state(config))
  metadata = tmp_path / 'run' / FOLDER / '3' / METADATA
  checkpoint = json.loads(metadata.read_text())
  checkpoint['custom_metadata']['config'] = saved
  del checkpoint['custom_metadata']['digest']
  metadata.write_text(json.dumps(checkpoint))
  assert Config.from_dict(read_record(tmp_path / 'run')['config']).train.trackers == trackers
  assert upgraded(config.to_dict()) == config.to_dict()
