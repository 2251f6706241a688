"""Every notebook runs from top to bottom on a checkpoint trained for a few steps."""
import pathlib
import shutil

import nbclient
import nbformat
import pytest

from mtp_jax.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  from mtp_jax.train.fit import fit
  folder = tmp_path_factory.mktemp('run')
  names = ('config/schema.py', 'data/rows.py', 'train/step.py', 'model/model.py', 'lm/language_model.py',
           'model/costs.py')
  for i, name in enumerate(names):
    shutil.copy(ROOT / 'src' / 'mtp_jax' / name, folder / f'{i}.py')
  config = Config(
      model=ModelConfig(width=32, layers=5, heads=4, head_width=8, feed_forward=64,
                        futures=4), objective=ObjectiveConfig(chunk=64),
      data=DataConfig(paths=tuple(str(folder / f'{i}.py') for i in range(len(names) - 1)), length=64,
                      validation=(str(folder / f'{len(names) - 1}.py'),), cache=str(folder / 'cache')),
      optimizer=OptimizerConfig(warmup_steps=1),
      train=TrainConfig(steps=5, batch=4, evaluate_rows=8, log_every=1, evaluate_every=2, checkpoint_every=3))
  fit(config, folder / 'run')
  return folder / 'run'


@pytest.mark.filterwarnings('default')  # of Jupyter's own packages
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(path, workdir, monkeypatch):
  monkeypatch.setenv('MTP_JAX_WORKDIR', str(workdir))
  notebook = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(notebook, timeout=300, resources={'metadata': {'path': str(ROOT / 'notebooks')}}).execute()
  outputs = [output.get('data', {}) for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs]
  assert sum('image/png' in data for data in outputs) == 4
  texts = [data['text/html'] for data in outputs if 'text/html' in data]
  assert ['drafted by future 3' in text for text in texts] == [True] * 5 + [False]
  assert '>ï</span>' in texts[-1] and 'nats; expected ' in texts[-1]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_without_output_and_fits_a_page(path):
  code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == 'code']
  assert not any(cell.outputs for cell in code)
  assert max(len(line) for cell in code for line in cell.source.splitlines()) <= 100
