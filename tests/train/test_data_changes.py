"""Other data are refused, damaged ones stop a run after saving it or are quarantined."""
import dataclasses
import pathlib
import re
import shutil

import pytest
from experiments import experiment, log_of

from mtp_jax import tokenizer
from mtp_jax.checkpoint.record import read_record, steps
from mtp_jax.config import BadInput
from mtp_jax.data.corpus import difference, open_corpus
from mtp_jax.data.files import files
from mtp_jax.data.folder import Damaged
from mtp_jax.data.parts import Options
from mtp_jax.data.prepare import prepare
from mtp_jax.train.fit import fit


@pytest.mark.parametrize('change, said', [
    ({'data': {'length': 32}}, 'length 16 -> 32'), ({'data': {'seed': 1}}, 'seed 0 -> 1'),
    ({'data': {'packing': 'best_fit'}}, 'packing stream -> best_fit'),
    ({'data': {'boundary': 'across'}}, 'boundary within -> across'),
    ({'data': {'validation_share': 0.4}}, 'source 0: documents .*, held_out_documents')])
def test_other_data_are_refused_with_what_changed_unless_accepted(
    uninterrupted, tmp_path, change, said):
  config, workdir = uninterrupted('parallel')
  shutil.copytree(workdir, tmp_path / 'run')
  changed = lambda **more: dataclasses.replace(config,
                                               data=dataclasses.replace(
                                                   config.data, **change['data'], **more),
                                                   train=dataclasses.replace(config.train, steps=7))
  with pytest.raises(BadInput,
                     match=rf'^config.data: not what the checkpoint in .*/run was trained on: {said}.*; '
                           r'restore that, choose another --workdir, '
                                     r'or set config.data.accept_changed=True'):
    fit(changed(), tmp_path / 'run', note=lambda line: None)
  lines = []
  assert fit(changed(accept_changed=True), tmp_path / 'run', note=lines.append).step == 7
  assert any(re.match(f'the data have changed: {said}', line) for line in lines)
  record = read_record(tmp_path / 'run')
  assert [source['rows'] for source in record['data']['sources']] == [7 * 8]
  assert difference(record['identity'],
                    open_corpus(changed().data, tokenizer.load('bytes')).identity) == []


@pytest.fixture
def damaged_set(tmp_path):
  """A config of 40 steps, and harm(split, block): flips a bit in that block of the first shard."""
  config = experiment(tmp_path, data={'sources': (str(tmp_path / 'set'),), 'paths': ()},
                      train={'checkpoint_every': 100, 'steps': 40, 'log_every': 1,
                             'evaluate_every': 4})
  (tmp_path / 'in').mkdir()
  for i in range(1500):
    (tmp_path / 'in' / f'{i}.txt').write_text(f'{i:05}' + 'x' * 145)
  source = prepare(files((str(tmp_path / 'in'),), ''), tokenizer.load('bytes'),
                   Options(validation_share=0.2), tmp_path / 'set', 0, '', note=print)

  def harm(split: str, number: int) -> str:
    stream = getattr(source, split)
    block, path = stream._record(0, number), pathlib.Path(source.folder.path(stream.shards[0].file))
    content = bytearray(path.read_bytes())
    content[content.find(block) + 7] ^= 1
    path.write_bytes(content)
    return path.name
  return config, harm


@pytest.mark.parametrize('split, block, at', [('train', 9, range(1, 40)), ('validation', 3, [4])])
def test_damaged_data_stop_a_run_after_saving_it_and_quarantined_it_goes_on(
    damaged_set, tmp_path, split, block, at):
  config, harm = damaged_set
  name = harm(split, block)
  with pytest.raises(Damaged, match=f'{name}: block {block} is damaged'):
    fit(config, tmp_path / 'run', note=lambda line: None)
  stopped, = steps(tmp_path / 'run')
  assert stopped in at
  assert read_record(tmp_path / 'run')['data']['mixed'] == stopped * 8
  goes_on, lines = dataclasses.replace(config,
                                       data=dataclasses.replace(
                                           config.data, on_damage='quarantine')), []
  assert fit(goes_on, tmp_path / 'run', note=lines.append).step == 40
  log = log_of(tmp_path / 'run')
  last = [record for record in log
          if record['kind'] == ('train' if split == 'train' else 'validation')][-1]
  assert last['quarantined_rows'] > 0
  assert [record['step'] for record in log if record['kind'] == 'train'] == [*range(1, 41)]
  assert any('quarantined' in line and f'block {block}' in line for line in lines)


@pytest.mark.parametrize('harm', ['missing', 'cut'])
def test_a_shard_that_is_missing_or_cut_off_stops_a_run_or_is_quarantined(
    damaged_set, tmp_path, harm):
  config, _ = damaged_set
  config = dataclasses.replace(config,
                               train=dataclasses.replace(config.train, steps=4, evaluate_every=0))
  path = tmp_path / 'set' / 'validation-00000.array_record'
  content = path.read_bytes()
  path.unlink() if harm == 'missing' else path.write_bytes(content[:-70_000])
  message = rf'{path.name}: (is missing|has [0-9,]+ of [0-9,]+ bytes); restore the file, or delete'
  with pytest.raises(Damaged, match=message):
    fit(config, tmp_path / 'run', note=lambda line: None)
  goes_on = dataclasses.replace(config,
                                data=dataclasses.replace(config.data, on_damage='quarantine'))
  fit(goes_on, tmp_path / 'run', note=lambda line: None)
  validation = log_of(tmp_path / 'run')[-1]
  assert validation['kind'] == 'validation'
  assert validation['quarantined_rows'] == config.train.evaluate_rows
  assert validation['count'] == [0, 0]
