"""The JobSet of launch/ against a schema of it, and what a cluster would do with it."""
import json
import math
import re
import sys

import jsonschema
import pytest
import yaml
from scripts import LAUNCH, ROOT

from mtp_jax.cli.main import main
from mtp_jax.config import TrainConfig


@pytest.fixture
def jobset() -> dict:
  return yaml.safe_load((LAUNCH / 'gke_jobset.yaml').read_text())


@pytest.fixture(scope='module')
def schema() -> jsonschema.Draft202012Validator:
  found = json.loads((ROOT / 'tests' / 'launch' / 'jobset_schema.json').read_text())
  jsonschema.Draft202012Validator.check_schema(found)
  return jsonschema.Draft202012Validator(found, format_checker=jsonschema.FormatChecker())


def job(jobset: dict) -> dict:
  return jobset['spec']['replicatedJobs'][0]['template']['spec']


def pod(jobset: dict) -> dict:
  return job(jobset)['template']['spec']


def test_the_jobset_is_one(jobset, schema):
  schema.validate(jobset)


BROKEN = {
    'another version': lambda x: x.update(apiVersion='jobset.x-k8s.io/v1'),
    'policy of the job among those of the set':
        lambda x: x['spec'].update(podFailurePolicy=job(x).pop('podFailurePolicy')),
    'policy misspelt': lambda x: x['spec'].update(failurePolices=x['spec'].pop('failurePolicy')),
    'no such action': lambda x: x['spec']['failurePolicy']['rules'][0].update(action='Restart'),
    'no such reason': lambda x: x['spec']['failurePolicy']['rules'][0].update(onJobFailureReasons=['ExitCode']),
    'no regular expression': lambda x: x['spec']['failurePolicy']['rules'][0].update(onJobFailureMessagePatterns=['(']),
    'pods that Kubernetes restarts itself': lambda x: pod(x).update(restartPolicy='OnFailure'),
    'exit code as text': lambda x: job(x)['podFailurePolicy']['rules'][0]['onExitCodes'].update(values=['143']),
    'codes and conditions in one rule':
        lambda x: job(x)['podFailurePolicy']['rules'][0].update(
            onPodConditions=[{'type': 'DisruptionTarget', 'status': 'True'}]),
    'condition without status': lambda x: job(x)['podFailurePolicy']['rules'][2]['onPodConditions'][0].pop('status'),
    'boolean label': lambda x: pod(x)['nodeSelector'].update({'cloud.google.com/gke-spot': True}),
    'topology as a number of chips':
        lambda x: pod(x)['nodeSelector'].update({'cloud.google.com/gke-tpu-topology': '8'}),
    'no chips': lambda x: pod(x)['containers'][0]['resources'].pop('limits'),
}


@pytest.mark.parametrize('damage', BROKEN)
def test_a_broken_jobset_is_refused(jobset, schema, damage):
  BROKEN[damage](jobset)
  with pytest.raises(jsonschema.ValidationError):
    schema.validate(jobset)


def test_hosts_times_chips_are_the_topology_and_the_mesh_is_all_slices(jobset):
  chips = math.prod(map(int, pod(jobset)['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x')))
  resources = pod(jobset)['containers'][0]['resources']
  assert resources['requests'] == resources['limits']
  assert job(jobset)['parallelism'] == job(jobset)['completions'] == chips / resources['limits']['google.com/tpu']
  slices = jobset['spec']['replicatedJobs'][0]['replicas']
  mesh = {axis: int(size) for axis,
          size in re.findall(r'--config\.mesh\.(\w+)=(\d+)', '\n'.join(pod(jobset)['containers'][0]['args']))}
  assert math.prod(mesh.values()) == slices * chips and mesh['data'] % slices == 0


def test_the_arguments_of_the_jobset_are_a_config(jobset, monkeypatch, capsys):
  command, *flags = pod(jobset)['containers'][0]['args']
  assert command == 'train'
  monkeypatch.chdir(ROOT)
  monkeypatch.delitem(sys.modules, 'config_config', raising=False)
  code = main(['inspect', *(flag for flag in flags if flag.startswith('--config'))])
  assert code == 0, capsys.readouterr().err


def test_workdir_data_and_tokenizer_are_in_a_bucket_so_no_volume_is_needed(jobset):
  args = pod(jobset)['containers'][0]['args']
  places = [flag.partition('=')[2] for flag in args if re.match(r'--workdir|--config\.data\.(sources|tokenizer)', flag)]
  assert len(places) == 3 and all(place.lstrip("('").startswith('gs://BUCKET/') for place in places)
  assert 'volumes' not in pod(jobset) and 'volumeMounts' not in pod(jobset)['containers'][0]


def test_no_two_jobs_share_a_slice_and_no_two_runs_a_workdir(jobset):
  assert jobset['metadata']['annotations'] == {
      'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}
  assert jobset['spec']['failurePolicy']['restartStrategy'] == 'BlockingRecreate' and job(jobset)['backoffLimit'] == 0


def test_there_is_time_to_save(jobset):
  """As much as on Slurm, and more than the others need to notice that a host is gone."""
  on_slurm = int(re.search(r'--signal=TERM@(\d+)', (LAUNCH / 'slurm.sbatch').read_text())[1])
  # Slurm may be a minute early, not late
  assert pod(jobset)['terminationGracePeriodSeconds'] >= on_slurm > 60 + 2 * TrainConfig().heartbeat_seconds


def answer(jobset: dict, code: int | None, container: str = 'train') -> str:
  """What happens when a container exits with this code, or, None, a pod is evicted: Kubernetes' two
  lists of rules, the first match of each.
  """
  reason, message = 'BackoffLimitExceeded', 'Job has reached the specified backoff limit'
  for index, rule in enumerate(job(jobset)['podFailurePolicy']['rules']):
    assert rule['action'] == 'FailJob'
    codes = rule.get('onExitCodes', {})
    if code is not None and code in codes.get('values', ()) and codes.get('containerName', container) == container:
      reason, message = 'PodFailurePolicy', (f'Container {container} for pod default/mtp-jax-slice-0-2-143x2 failed '
                                             f'with exit code {code} matching FailJob rule at index {index}')
      break
    if code is None and {'type': 'DisruptionTarget', 'status': 'True'} in rule.get('onPodConditions', ()):
      reason, message = 'PodFailurePolicy', ('Pod default/mtp-jax-slice-0-1-x has condition DisruptionTarget matching '
                                             f'FailJob rule at index {index}')
      break
  for rule in jobset['spec']['failurePolicy']['rules']:
    if reason in rule['onJobFailureReasons'] and any(re.search(pattern, message)
                                                     for pattern in rule['onJobFailureMessagePatterns']):
      return rule['action']
  return 'RestartJobSet'


@pytest.mark.parametrize('code, wanted',
                         [(143, 'RestartJobSetAndIgnoreMaxRestarts'), (None, 'RestartJobSetAndIgnoreMaxRestarts'),
                          (2, 'FailJobSet'),
                                          (1, 'RestartJobSet'), (137, 'RestartJobSet'), (12, 'RestartJobSet')])
def test_only_restarts_after_a_failure_are_counted_and_bad_input_is_not_tried_again(jobset, code, wanted):
  assert answer(jobset, code) == wanted
  assert jobset['spec']['failurePolicy']['maxRestarts'] > 0


def test_exit_codes_of_containers_beside_the_training_mean_nothing(jobset):
  assert answer(jobset, 143, container='sidecar') == answer(jobset, 2, container='sidecar') == 'RestartJobSet'
