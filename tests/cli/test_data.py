"""From text to a trained model by the commands alone; what inspection shows and finds."""
import json
import shutil

import pytest


def test_text_is_prepared_inspected_and_trained_on(run, run_json, place):
  """The second time the prepared set is reused."""
  lines = [json.dumps({'body': f'document {i} ' + 'x' * (i % 40)}) for i in range(400)]
  (place / 'lines.jsonl').write_text('\n'.join(['{"body": ', *lines]))
  prepare = ('prepare --input=lines.jsonl --field=body --output=prepared --validation_share=0.1 '
             '--shard_bytes=4000')
  values = run_json(prepare)
  assert (values['records'], values['bad']) == (401, {'broken_json': {'skipped': 1, 'kept': 0}})
  assert values['train']['documents'] + values['validation']['documents'] == 400
  assert values['train']['shards'] > 3
  assert run_json(f'{prepare} --workers=0') == values
  code, out, _ = run(prepare)
  assert code == 0 and 'bad records: broken_json 1 skipped, 0 kept' in out
  assert out[-1] == "train on it with: --config.data.sources=\"('prepared',)\""

  inspected = run_json('inspect-data --data=prepared --verify --plot=lengths.png')
  train = inspected['train']
  assert {key: train[key] for key in values['train']} == values['train']
  assert inspected['damaged'] == [] and train['bytes_per_token'] == 1
  assert sum(train['lengths'].values()) == train['documents']
  assert (place / 'lengths.png').read_bytes().startswith(b'\x89PNG')

  trained = run_json('train --config=tiny.py --workdir=new --config.train.steps=3 '
                     '''"--config.data.sources=('prepared',)" "--config.data.paths=()" '''
                     '--config.data.packing=best_fit')
  assert trained['step'] == 3
  account = run_json('goodput --workdir=new --plot=goodput.png')
  assert (account['runs'], account['steps'], account['lost_steps']) == (1, 3, 0)
  assert 0 < account['goodput'] < 1 and (place / 'goodput.png').exists()
  assert sum(account['seconds'].values()) == pytest.approx(account['wall_seconds'])
  shutil.rmtree(place / 'new')


def test_inspection_shows_every_future_of_a_row_and_ends_it_with_the_document(run, place):
  """Documents of one letter each, four times: every cell of the first positions."""
  (place / 'letters').mkdir()
  for letter in 'abcdefgh':
    (place / 'letters' / letter).write_text(letter * 4)
  run('prepare --input=letters --output=letters-set --validation_share=0.2 --workers=0')
  code, out, _ = run('inspect-data --data=letters-set --length=16 --futures=3 --rows=1 '
                     '--positions=8')
  cells = [[cell.strip() for cell in line.split('│')[1:-1]] for line in out if line.startswith('│')]
  assert code == 0 and len(cells) == 8 and any(line.startswith('├') for line in out)
  letters = cells[1][3], cells[-1][3]  # of the two documents
  start = int(cells[0][0])
  for t, row in enumerate(cells, start):
    document, position = divmod(t, 6)
    text = ['<bos>', *4 * [letters[document]], '<eos>', '·', '·', '·']
    assert row == [str(t), str(document + 1), str(position), *text[position:position + 4]]


def test_a_flipped_bit_is_found_by_inspection(run, place):
  run('prepare --input=documents --output=flipped --validation_share=0.2 --workers=0')
  path = place / 'flipped' / 'train-00000.array_record'
  content = bytearray(path.read_bytes())
  content[-1] ^= 1  # where ArrayRecord pads the file: harmless, yet not what was written
  path.write_bytes(content)
  code, out, _ = run('inspect-data --data=flipped --verify')
  assert code == 1
  assert 'train-00000.array_record: its digest is not that of the index; restore' in out[-1]
  assert run('inspect-data --data=flipped')[0] == 0


def test_a_tokenizer_is_trained_on_the_same_inputs(run, run_json, place):
  functions = [f'def function_{i}(x):\n    return x + {i}\n' for i in range(500)]
  lines = [json.dumps({'text': text}) for text in functions]
  (place / 'lines.jsonl').write_text('\n'.join(lines))
  values = run_json('train-tokenizer --input=lines.jsonl --output=code.model --vocab=320')
  assert values['vocab'] == 320 and values['bytes_per_token'] > 2
  assert 20 < values['held_out_documents'] < 80
  prepared = run_json('prepare --input=lines.jsonl --output=pieces --tokenizer=code.model '
                      '--workers=0')
  assert prepared['train']['tokens'] < 10_000
  code, _, err = run('train-tokenizer --input=lines.jsonl --output=other.model --vocab=90000')
  assert code == 2 and err[-1].startswith('mtp_jax: vocabulary of 90000: ')
  assert not (place / 'other.model').exists()
