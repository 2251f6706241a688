"""A checkpoint comes back bit by bit, on any mesh; one that does not fit or is incomplete is refused or skipped."""
import dataclasses
import gc
import json
import resource

import jax
import numpy as np
import pytest
from experiments import experiment, random_state, same_bits, write

import mtp_jax
from mtp_jax.checkpoint import store
from mtp_jax.checkpoint.record import FOLDER, check_resumes, read_record, steps
from mtp_jax.config import BadInput, Config, MeshConfig, ModelConfig, TrainConfig
from mtp_jax.mesh import make_mesh
from mtp_jax.model.model import conventions
from mtp_jax.train import step as training
from mtp_jax.train.fit import fit
from mtp_jax.train.opening import rate_change, rows_change

ONE, EIGHT = MeshConfig(), MeshConfig(fsdp=4, tensor=2)


@pytest.fixture(scope='module')
def eight(tmp_path_factory):
  """A config of eight devices, its state, and the folder where that was saved."""
  folder = tmp_path_factory.mktemp('eight')
  config = experiment(folder, mesh={'fsdp': 4, 'tensor': 2})
  state = random_state(config)
  write(folder / 'run', config, state)
  return config, state, folder / 'run'


@pytest.fixture(scope='module')
def latent(tmp_path_factory):
  """The same of latent attention; the ranks are over fsdp."""
  folder = tmp_path_factory.mktemp('latent')
  ranks = {'attention': 'latent', 'kv_rank': 20, 'query_rank': 12, 'rope_width': 4}
  config = experiment(folder, model=ranks, mesh={'fsdp': 4, 'tensor': 2})
  state = random_state(config)
  write(folder / 'run', config, state)
  return config, state, folder / 'run'


@pytest.fixture
def run(tmp_path):
  """A fresh checkpoint of step 3 for a test to damage: (config, folder)."""
  config = experiment(tmp_path)
  write(tmp_path / 'run', config, random_state(config))
  return config, tmp_path / 'run'


@pytest.mark.parametrize('mesh', [
    ONE, EIGHT, MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(tensor=2),
    MeshConfig(fsdp=2, context=2)], ids=str)
@pytest.mark.parametrize('saved', ['eight', 'latent'])
def test_a_state_of_eight_devices_is_bit_equal_on_any_mesh(saved, mesh, request):
  config, state, workdir = request.getfixturevalue(saved)
  config, mesh = dataclasses.replace(config, mesh=mesh), make_mesh(mesh)
  with jax.set_mesh(mesh):
    loaded = training.restore(config, workdir, 3, mesh)
  assert same_bits(loaded, state)
  assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(loaded))


def test_the_parameters_of_eight_devices_are_bit_equal_in_load(eight):
  _, state, workdir = eight
  lm = mtp_jax.load(workdir)
  assert same_bits(lm.model, state.model) and lm.mesh.size == 8


def test_load_falls_back_to_one_device_when_the_mesh_is_too_large(tmp_path):
  config = experiment(tmp_path)
  state = random_state(config)
  larger = dataclasses.replace(config, mesh=MeshConfig(data=16),
                               train=TrainConfig(batch=16, evaluate_rows=16))
  write(tmp_path / 'run', larger, state)
  lm = mtp_jax.load(tmp_path / 'run')
  assert same_bits(lm.model, state.model) and lm.mesh.size == 1


def test_a_tree_comes_back_from_a_plain_dict(eight):
  _, state, _ = eight
  nested = store.as_dict(state.model)
  assert list(nested['trunk'])
  assert all(type(x) is dict or x.dtype == np.float32 for x in nested.values())
  assert same_bits(store.from_dict(state.model, nested), state.model)


@pytest.mark.parametrize('model, message', [
    ({'feed_forward': 32},
     r'futures.feed_forward.down_FD is float32\[2, 24, 16\], but the config asks for float32\[2, 32, 16\]'),
    ({'qk_norm': True},
     r'futures\.attention\.k_norm_K is missing from the checkpoint; nearest name: futures\.'),
    ({'tie_embeddings': True},
     'unembed_VD is in the checkpoint but not in the model; nearest name: embed_VD'),
    ({'kind': 'sequential'}, 'futures'),
], ids=['shape', 'missing', 'left over', 'family'])
def test_other_names_and_shapes_are_refused(eight, model, message):
  config, _, workdir = eight
  config = dataclasses.replace(config, mesh=ONE, model=dataclasses.replace(config.model, **model))
  mesh = make_mesh(ONE)
  with jax.set_mesh(mesh), pytest.raises(BadInput, match=message):
    training.restore(config, workdir, 3, mesh)


def test_a_checkpoint_without_one_of_its_folders_is_refused(run):
  config, workdir = run
  folder = workdir / FOLDER / '3'
  (folder / 'training').rename(folder / 'optimizer')
  mesh = make_mesh(ONE)
  message = '3: is incomplete, it has no folder training'
  with jax.set_mesh(mesh), pytest.raises(BadInput, match=message):
    training.restore(config, workdir, 3, mesh)


def test_another_type_is_refused_and_never_cast(tmp_path):
  config = experiment(tmp_path)
  state = random_state(config)
  to_half = lambda x: jax.device_put(np.asarray(x, np.float16), x.sharding)
  half = dataclasses.replace(state, model=jax.tree.map(to_half, state.model))
  write(tmp_path / 'run', config, half)
  with pytest.raises(BadInput,
                     match=r'is float16\[264, 16\], but the config asks for float32\[264, 16\]'):
    mtp_jax.load(tmp_path / 'run')


@pytest.mark.parametrize('unlink', [
    ['_CHECKPOINT_METADATA', 'commit_success.txt'], ['commit_success.txt'],
    ['_CHECKPOINT_METADATA']], ids=str)
def test_an_incomplete_step_is_skipped_and_set_aside(run, unlink):
  config, workdir = run
  state = random_state(config)
  folder = workdir / FOLDER
  for n in ('', '-1'):  # a run may die twice in the same place
    write(workdir, config, state, step=500)
    for name in unlink:
      (folder / '500' / name).unlink()
    assert steps(workdir) == [3] and read_record(workdir)['step'] == 3
    store.Writer(workdir, 3).close()
    names = {path.name for path in folder.iterdir() if not path.name.startswith('_')}
    assert names == {'3', 'incomplete-500', f'incomplete-500{n}'}
  write(workdir, config, state, step=500)
  assert steps(workdir) == [3, 500]


def test_an_empty_folder_of_a_step_does_not_block_it(run):
  config, workdir = run
  (workdir / FOLDER / '500').mkdir()
  assert steps(workdir) == [3]
  write(workdir, config, random_state(config), step=500)
  assert steps(workdir) == [3, 500]


def test_only_the_newest_checkpoints_are_kept(run):
  config, workdir = run
  state, writer = random_state(config), store.Writer(workdir, 2)
  for step in (4, 5, 6):
    write(workdir, config, state, step, writer=writer)
  writer.close()
  assert steps(workdir) == [5, 6]


# Other threads and coroutines of Orbax fail later, without anybody to catch it.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning',
                            'ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_failed_save_is_an_error_and_leaves_the_older_checkpoint_and_the_next_save_alone(run):
  config, workdir = run
  state, writer = random_state(config), store.Writer(workdir, 3)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  # a file of more than 2,000 bytes cannot be written, even by root
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
  try:
    with pytest.raises(OSError, match='a checkpoint could not be written to'):
      write(workdir, config, state, 4, writer=writer)
      writer.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert steps(workdir) == [3]
  assert same_bits(mtp_jax.load(workdir).model, state.model)
  write(workdir, config, state, 5, writer=writer)
  writer.close()
  assert steps(workdir) == [3, 5]
  gc.collect()


def with_record(change):
  """Orbax's metadata as JSON, with a changed record."""
  return lambda metadata: json.dumps(metadata | {'custom_metadata': change(metadata['custom_metadata'])})


def without(key: str):
  return with_record(lambda record: {name: value for name, value in record.items() if name != key})


RECORDS = {
    'empty file': lambda metadata: '',
    'cut off': lambda metadata: json.dumps(metadata)[:200],
    'no object': lambda metadata: '[]',
    'no record': with_record(lambda record: None),
    'only a step': with_record(lambda record: {'step': 3}),
    'config of another type': with_record(lambda record: record | {'config': 'x'}),
    **{f'no {key}': without(key)
       for key in ('config', 'conventions', 'tokenizer', 'identity', 'data')},
}


@pytest.mark.parametrize('damage', RECORDS.values(), ids=RECORDS)
def test_a_damaged_record_is_refused(eight, tmp_path, damage):
  source = eight[2] / FOLDER / '3'
  folder = tmp_path / FOLDER / '3'
  folder.mkdir(parents=True)
  (folder / 'commit_success.txt').write_text('')
  metadata = json.loads((source / '_CHECKPOINT_METADATA').read_text())
  (folder / '_CHECKPOINT_METADATA').write_text(damage(metadata))
  message = 'lacks the record of config and conventions .*; there is no older one: restore the folder 3 from a copy'
  with pytest.raises(BadInput, match=message):
    read_record(tmp_path)


@pytest.mark.parametrize('change', [
    {'target': 'future m predicts token t+m'}, {'module_input': 'trunk'}, {'rotary': None},
    {'new in a later version': 1}],
    ids=str)
def test_contradicting_conventions_are_refused(tmp_path, change):
  config = experiment(tmp_path)
  write(tmp_path / 'run', config, random_state(config),
        conventions=conventions(config.model) | change)
  message = f'conventions contradict this version in {next(iter(change))}'
  with pytest.raises(BadInput, match=message):
    mtp_jax.load(tmp_path / 'run')
  with pytest.raises(BadInput, match=message):
    fit(config, tmp_path / 'run')


def test_modules_of_the_trunk_are_recorded_and_an_old_record_means_the_chain():
  of = lambda **fields: conventions(ModelConfig(kind='sequential', **fields))
  assert 'module_input' not in of() and of(module_input='trunk') == of() | {'module_input': 'trunk'}


@pytest.mark.parametrize('section, field, value', [
    ('model', 'layers', 4), ('model', 'futures', 1), ('model', 'kind', 'sequential'),
    ('model', 'placement', 'appended'),
    ('model', 'rope_base', 100.0), ('train', 'steps', 2)])
def test_what_a_checkpoint_fixes_cannot_change(eight, section, field, value):
  config, _, workdir = eight
  old = config.to_dict()
  old |= {'objective': {'chunk': 8}, 'optimizer': {'warmup_steps': 1}}
  changed = Config.from_dict(old | {section: old[section] | {field: value}})
  with pytest.raises(BadInput,
                     match=f'config.{section}.{field}={value!r}: the checkpoint in .*; set '):
    check_resumes(changed, read_record(workdir), workdir)


def test_what_a_checkpoint_does_not_fix_may_change_and_is_reported(eight):
  config, _, workdir = eight
  train = dataclasses.replace(config.train, batch=16)
  model = dataclasses.replace(config.model, remat='none')
  changed = dataclasses.replace(config, mesh=ONE, train=train, model=model)
  assert check_resumes(config, read_record(workdir), workdir) == []
  assert check_resumes(changed, read_record(workdir), workdir) == [
      "config.model.remat: 'full' -> 'none'", 'config.train.batch: 8 -> 16',
      'config.mesh.fsdp: 4 -> 1', 'config.mesh.tensor: 2 -> 1']


def older(record: dict, *fields: str) -> dict:
  """The record of a version that did not have these fields."""
  config = {section: {name: value for name, value in values.items() if f'{section}.{name}' not in fields}
            for section, values in record['config'].items()}
  return record | {'config': config}


@pytest.mark.parametrize('field, value', [('rope_base', 500_000.0), ('logit_cap', 30.0), ('qk_norm', True)])
def test_a_field_of_the_model_that_a_checkpoint_lacks_had_its_default(eight, field, value):
  config, _, workdir = eight
  record = older(read_record(workdir), f'model.{field}')
  assert check_resumes(config, record, workdir) == []
  changed = dataclasses.replace(config, model=dataclasses.replace(config.model, **{field: value}))
  default = getattr(ModelConfig(), field)
  with pytest.raises(BadInput, match=f'config.model.{field}={value!r}: the checkpoint in .* has {default!r}; set'):
    check_resumes(changed, record, workdir)


def test_any_other_field_that_a_checkpoint_lacks_is_reported_against_its_default(eight):
  config, _, workdir = eight
  record = older(read_record(workdir), 'optimizer.b2', 'train.hang_seconds')
  changed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, b2=0.9))
  assert check_resumes(config, record, workdir) == []
  assert check_resumes(changed, record, workdir) == ['config.optimizer.b2: 0.95 -> 0.9']


@pytest.mark.parametrize('schedule', ['cosine', 'wsd'])
@pytest.mark.parametrize('steps, rates', [(100, None), (1000, ('9e-06', '0.000')), (101, None)])
def test_a_longer_run_says_the_old_and_the_new_learning_rate(schedule, steps, rates):
  optimizer = {'schedule': schedule, 'warmup_steps': 10, 'learning_rate': 3e-4}
  old = Config(optimizer=optimizer, train={'steps': 100})
  new = Config(optimizer=optimizer, train={'steps': steps})
  lines = rate_change(new, {'step': 100, 'config': old.to_dict()})
  if steps == 101:
    assert len(lines) == (schedule == 'wsd')  # 9e-6 -> 2.4e-5; a cosine is flat at its end
  else:
    assert bool(lines) == bool(rates)
  if rates:
    assert lines[0].startswith(f'the learning rate goes from {rates[0]} to {rates[1]}')
    assert lines[0].endswith('as the schedule of 1,000 steps has it; that of the checkpoint was for 100')


def test_a_longer_run_says_that_its_batch_grows_more_slowly():
  train = {'accumulate': 4, 'batch_share': '0.25 linear 0:1 1'}
  old, new = (Config(train=train | {'steps': steps}) for steps in (200, 400))
  assert rows_change(new, {'step': 100, 'config': old.to_dict()}) == [
      'the rows of a step go from 16 to 8 at step 100']
  assert rows_change(old, {'step': 100, 'config': old.to_dict()}) == []


def test_a_folder_without_checkpoints_is_bad_input(tmp_path):
  with pytest.raises(BadInput,
                     match='holds no checkpoint; train one with: python -m mtp_jax train'):
    read_record(tmp_path)


@pytest.mark.parametrize('step, message', [
    (7, '^step 7: .* holds the steps 3$'), (np.int64(7), '^step 7: .* holds the steps 3$'),
    ('3', "^step='3': must be an int, not str$"), (3.0, '^step=3.0: must be an int, not float$')])
def test_a_step_that_is_missing_or_no_integer_is_bad_input(eight, step, message):
  with pytest.raises(BadInput, match=message):
    read_record(eight[2], step)


@pytest.mark.parametrize('step', [3, np.int64(3), np.int32(3)])
def test_any_integer_names_a_step(eight, step):
  assert read_record(eight[2], step)['step'] == 3
