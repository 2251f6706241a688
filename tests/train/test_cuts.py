"""A run that is cut at any step and resumed proves that it is the run that was not cut."""
import json

import pytest
from experiments import experiment, log_of
from test_train import fit_to

from mtp_jax.data.progress import quiet
from mtp_jax.report.events import FILE
from mtp_jax.train.fit import fit

FAMILIES = {
    'parallel': {},
    'sequential': {'kind': 'sequential', 'layers': 4, 'futures': 3},
    'experts': {'kind': 'sequential', 'layers': 3, 'futures': 2, 'experts': 4, 'experts_per_token': 2,
                'expert_width': 8, 'shared_experts': 1, 'dense_layers': 1},
}
STEPS = 12


def fingerprints(workdir) -> dict:
  """Those of parameters and moments at the last step, as the event log has them."""
  events = [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]
  last = [event for event in events if event['kind'] == 'checkpoint' and event['step'] == STEPS]
  return {part: last[-1][part] for part in ('parameters', 'training')}


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_ten_cuts_change_no_bit_of_parameters_moments_and_log(folder, tmp_path, family):
  train = {'steps': STEPS, 'evaluate_every': 0, 'checkpoint_every': 5}
  config = experiment(folder, model=FAMILIES[family], train=train, objective={'balance_rate': 0.01})
  fit(config, tmp_path / 'whole', note=quiet)
  whole = fingerprints(tmp_path / 'whole'), log_of(tmp_path / 'whole')
  for cut in range(2, STEPS):
    workdir = tmp_path / f'cut {cut}'
    assert fit_to(config, workdir, cut).step == cut
    fit(config, workdir, note=quiet)
    assert (fingerprints(workdir), log_of(workdir)) == whole, cut
