"""lm-evaluation-harness runs a local task on a workdir: its figures are those computed by hand."""
import importlib.util
import json
import math
import os
import subprocess
import sys

import hypothesis
import numpy as np
import numpy_forward
import pytest
from experiments import generate_clearly, random_lm
from test_any_argument import ANY, allowed, times

from mtp_jax.config import BadInput

if not importlib.util.find_spec('lm_eval'):
  pytest.skip("lm_eval is not installed; pip install -e '.[lm_eval]'", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings('default')  # of lm_eval's own packages

TASKS = {
    'choices': """
task: choices
output_type: multiple_choice
doc_to_text: "{{question}} "
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    'texts': """
task: texts
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
    'continued': """
task: continued
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{continuation}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""}


@pytest.fixture(scope='module')
def lm(tmp_path_factory):
  return random_lm(tmp_path_factory.mktemp('harness'), model={'layers': 4, 'futures': 3}, data={'length': 32})


@pytest.fixture(scope='module')
def docs(lm):
  """Questions, the last of which is longer than a row; every second one has the model's own continuation as answer."""
  rng, docs = np.random.default_rng(0), []
  for i in range(12):
    question = ''.join(rng.choice([*'abc 12é'], 1 + i if i < 11 else 50)).strip() or 'a'
    choices = [''.join(rng.choice([*'xyz 7'], n)) for n in (1, 3, 6)]
    docs.append({'question': question, 'choices': choices, 'answer': int(rng.integers(3))})
  texts = generate_clearly(lm, [doc['question'] for doc in docs[:11]], max_tokens=8, stop=['e', '\n']).text
  return [doc | {'continuation': text if i % 2 else 'no'} for i, (doc, text) in enumerate(zip(docs, [*texts, 'no']))]


@pytest.fixture(scope='module')
def tasks(docs, tmp_path_factory):
  """A folder of task files, and their documents."""
  folder = tmp_path_factory.mktemp('tasks')
  (folder / 'data.jsonl').write_text(''.join(json.dumps(doc) + '\n' for doc in docs))
  where = f'dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / "data.jsonl"}}}}}\ntest_split: test\n'
  for name, task in TASKS.items():
    (folder / f'{name}.yaml').write_text(task.replace('max_gen_toks: 12', 'max_gen_toks: 8') + where)
  return folder


@pytest.fixture(scope='module')
def results(lm, tasks, tmp_path_factory):
  """What lm_eval reports of the tasks, with its samples; no network is used."""
  with pytest.MonkeyPatch.context() as patch:
    for name, value in {'HF_HOME': str(tmp_path_factory.mktemp('hf')), 'HF_HUB_OFFLINE': '1'}.items():
      patch.setenv(name, value)
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    patch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path_factory.mktemp('datasets'))
    from mtp_jax.harness import Harness
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(model=Harness(lm, batch_size=4), tasks=[*TASKS], task_manager=manager, bootstrap_iters=0)


def by_hand(lm, text: str, before: int = 0) -> float:
  """The log-probability of a text's bytes after the first so many, in a float64 forward, in windows of half a row."""
  ids, total = np.array([lm.tokenizer.bos, *text.encode()]), 0.0
  L = lm.config.data.length
  for t in range(before, len(ids) - 1):
    start = 0 if t < L else (t - L // 2) // (L // 2) * (L // 2)
    total += numpy_forward.logprobs(lm.model, ids[start:t + 2])[0, -1, ids[t + 1]]
  return total


def test_accuracy_is_that_computed_by_hand(lm, docs, results):
  """acc: of the likeliest choice; acc_norm: of the likeliest one per character."""
  hits, hits_per_character, margin = 0, 0, math.inf
  for doc in docs:
    start = len(doc['question'].encode())
    logprobs = np.array([by_hand(lm, f'{doc["question"]} {choice}', start) for choice in doc['choices']])
    per_character = logprobs / [len(choice) for choice in doc['choices']]
    hits += np.argmax(logprobs) == doc['answer']
    hits_per_character += np.argmax(per_character) == doc['answer']
    margin = min([margin, *np.diff(np.sort(logprobs)), *np.diff(np.sort(per_character))])
  assert margin > 1e-4  # no rounding decides
  found = results['results']['choices']
  assert (found['acc,none'], found['acc_norm,none']) == (hits / 12, hits_per_character / 12) and 0 < hits < 12


def test_bits_per_byte_are_those_computed_by_hand(lm, docs, results):
  nats = -sum(by_hand(lm, doc['question']) for doc in docs)
  size = sum(len(doc['question'].encode()) for doc in docs)
  found = results['results']['texts']
  assert found['bits_per_byte,none'] == pytest.approx(nats / math.log(2) / size, abs=1e-5)
  assert found['byte_perplexity,none'] == pytest.approx(math.exp(nats / size), rel=1e-5)


def test_generations_are_those_of_the_model(lm, docs, results):
  """Also of a question that is longer than a row, of which the end is continued."""
  samples = sorted(results['samples']['continued'], key=lambda sample: sample['doc_id'])
  found = [sample['resps'][0][0] for sample in samples]
  assert found[:11] == lm.generate([doc['question'] for doc in docs[:11]], max_tokens=8, stop=['e', '\n']).text
  end = lm.tokenizer.encode(docs[11]['question'])[-23:]
  assert found[11] == lm.generate([end], max_tokens=8, stop=['e', '\n']).text[0]
  assert results['results']['continued']['exact_match,none'] == sum(
      text == doc['continuation'] for text, doc in zip(found, docs)) / 12 >= 5 / 12


class Request:
  def __init__(self, *args):
    self.args = args


def test_a_continuation_is_greedy_iff_greedy_decoding_gives_it(lm):
  from mtp_jax.harness import Harness
  prompts = 'abcdefghijklmnopqrstuvwxyz'
  prompt, ids = next((prompt, ids) for prompt, ids in zip(prompts, lm.generate([*prompts], max_tokens=2, draft=0).ids)
                     if max(ids) < 128)  # which two bytes are characters
  generate_clearly(lm, prompt, max_tokens=2)
  right, wrong = bytes(ids).decode(), bytes([ids[0], (ids[1] + 1) % 128]).decode()
  model = Harness(lm)
  (a, greedy), (b, other), (nothing, empty) = model.loglikelihood(
      [Request(prompt, right), Request(prompt, wrong), Request(prompt, '')])
  assert (greedy, other) == (True, False) and a > b and (nothing, empty) == (0, True)
  assert a == pytest.approx(by_hand(lm, prompt + right, 1), abs=1e-5)
  assert model.loglikelihood_rolling([Request(''), Request('ab')])[0] == 0
  assert model.loglikelihood([]) == model.loglikelihood_rolling([]) == model.generate_until([]) == []


def test_samples_of_a_task_differ_and_come_again(lm):
  from mtp_jax.harness import Harness
  options = {'do_sample': True, 'temperature': 1.0, 'max_gen_toks': 6}
  requests = [Request('a', options), Request('a', options), Request('', options), Request('b', {'until': 'e'})]
  texts = Harness(lm, batch_size=1, seed=3).generate_until(requests)
  assert texts == Harness(lm, seed=3).generate_until(requests) and len({*texts[:2]}) == 2
  assert texts[0] == lm.generate('a', temperature=1.0, seed=[3], max_tokens=6).text[0]
  assert texts[2] == lm.generate(None, temperature=1.0, seed=[5], max_tokens=6).text[0]
  assert texts[3] == lm.generate('b', stop='e', max_tokens=30).text[0]


def test_what_a_task_may_not_ask_for_is_named(lm):
  from mtp_jax.harness import Harness
  with pytest.raises(BadInput, match='generation_kwargs: num_beams: not known here'):
    Harness(lm).generate_until([Request('a', {'num_beams': 3})])
  with pytest.raises(BadInput, match='batch_size=0'):
    Harness(lm, batch_size=0)


@pytest.mark.parametrize(
    'name', ['until', 'max_gen_toks', 'max_new_tokens', 'do_sample', 'temperature', 'top_k', 'top_p'])
@times(60)
@hypothesis.given(value=ANY)
def test_any_option_of_a_task_is_taken_or_refused(name, value):
  from mtp_jax.harness import _options
  allowed(lambda: hash(_options({name: value, 'until': value if name == 'until' else 'e'})))


@pytest.mark.parametrize('name', ['step', 'batch_size', 'seed', 'draft'])
@times(60)
@hypothesis.given(value=ANY)
def test_any_argument_of_the_model_is_taken_or_refused(lm, name, value):
  from mtp_jax.harness import Harness
  allowed(lambda: Harness(lm, **{name: value}))


@pytest.mark.slow
def test_the_command_line_of_lm_eval_knows_the_model(lm, tasks, results, tmp_path):
  workdir = lm.config.data.cache.replace('cache', 'run')
  command = [sys.executable, '-m', 'mtp_jax.harness', 'run', '--model', 'mtp_jax', '--model_args', f'workdir={workdir}',
             '--tasks', 'choices', '--include_path', str(tasks), '--output_path', str(tmp_path / 'out')]
  offline = {'HF_HOME': str(tmp_path / 'hf'), 'HF_HUB_OFFLINE': '1'}
  done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | offline)
  assert done.returncode == 0, done.stderr
  path, = (tmp_path / 'out').rglob('results_*.json')
  found, expected = json.loads(path.read_text())['results']['choices'], results['results']['choices']
  assert found['acc,none'] == expected['acc,none']
