"""Small experiments that several tests share: a config, a state, a checkpoint."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import tokenizer
from mtp_jax.checkpoint import store
from mtp_jax.config import Config, DataConfig, MeshConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from mtp_jax.data.files import files
from mtp_jax.data.parts import Options
from mtp_jax.data.prepare import prepare
from mtp_jax.data.prepared_set import Prepared
from mtp_jax.data.shards import Stream
from mtp_jax.lm import load
from mtp_jax.mesh import make_mesh
from mtp_jax.model.model import conventions
from mtp_jax.objective import Read, future_states
from mtp_jax.train import step as training

FAMILIES = {
    'parallel': {'kind': 'parallel'},
    'linear': {'kind': 'linear'},
    'causal': {'kind': 'causal'},
    'anticausal': {'kind': 'anticausal'},
    'post_norm': {'kind': 'sequential'},
    'pre_norm': {'kind': 'sequential', 'hidden_input': 'pre_norm'},
    'shared': {'kind': 'sequential', 'share_modules': True},
    'trunk': {'kind': 'sequential', 'module_input': 'trunk'},
    'experts': {'kind': 'sequential', 'experts': 12, 'experts_per_token': 3, 'expert_width': 10,
                'shared_experts': 2},
}

# fields of ModelConfig, for four heads
LATENT = {'attention': 'latent', 'kv_heads': 4, 'kv_rank': 40, 'query_rank': 56, 'rope_width': 6}

# what a run of `experiment` trains: changes of its sections
RUNS = {
    'parallel': {},
    'sequential': {'model': {'kind': 'sequential', 'layers': 4, 'futures': 3}},
    # from the fourth of six steps on: future 1 begins, future 2 ends
    'staged parallel': {'model': {'layers': 5, 'futures': 3},
                        'objective': {'weights': ('1 linear 0:1 0', '0 step 0.5 1',
                                                  '0.5 step 0.5 0')}},
    'staged sequential': {'model': {'kind': 'sequential', 'layers': 4, 'futures': 3},
                          'objective': {'weights': ('1 linear 0:1 0', '0 step 0.5 1',
                                                    '0.5 step 0.5 0')}},
    # a microbatch of two, from the fourth step on both
    'warmed up': {'train': {'batch_share': '0.5 step 0.5 1'}},
}


def experiment(folder, **sections) -> Config:
  """A tiny config, with a dozen documents in `folder`. A section is a dict of changes."""
  documents = folder / 'documents'
  if not documents.exists():
    documents.mkdir(parents=True)
    for i in range(12):
      (documents / f'{i}.txt').write_text(''.join(f'{i * j} é {"ab" * (j % 3)}\n'
                                                  for j in range(40)))
  tiny = {
      'model': ModelConfig(width=16, layers=3, heads=2, kv_heads=2, head_width=8, feed_forward=24,
                           futures=2),
      'objective': ObjectiveConfig(weights=(1.0, 0.5), chunk=8),
      'data': DataConfig(paths=(str(documents),), length=16, validation_share=0.3,
                         cache=str(folder / 'cache')),
      'optimizer': OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
      'train': TrainConfig(steps=6, batch=8, accumulate=2, log_every=1, evaluate_every=2,
                           evaluate_rows=16, checkpoint_every=3, trackers=()),
      'mesh': MeshConfig(),
  }
  return Config(**{name: dataclasses.replace(section, **sections.get(name, {}))
                   for name, section in tiny.items()})


def random_state(config: Config, mesh=None, seed: int = 0) -> training.State:
  """Every leaf random, drawn in NumPy: the same on any mesh, and nothing is compiled."""
  mesh, rng = mesh or make_mesh(config.mesh), np.random.default_rng(seed)

  def fill(x):
    return rng.integers(0, 100, x.shape) if x.dtype == np.int32 else 0.3 * rng.standard_normal(x.shape)

  with jax.set_mesh(mesh):
    return jax.tree.map(lambda x: jax.device_put(fill(x).astype(x.dtype), x.sharding),
                        training.abstract(config, mesh))


def nudged(model, seed: int):
  """The model with every parameter off by one part in 100,000, some ten times what float32 rounds.

  What a model and its nudged copies generate alike depends on no near tie, so that two programs,
  which XLA fuses as it likes on each processor, generate it alike too.
  """
  rng = np.random.default_rng(seed)

  def nudge(x):
    x_nudged = np.float32(x * (1 + 1e-5 * rng.standard_normal(x.shape)))
    return jax.device_put(x_nudged, x.sharding if x.committed else None)

  return jax.tree.map(nudge, model)


def least_margin(model, batch) -> float:
  """By how much the target's logit and the best other one differ at least.

  If it is large, no rounding changes which predictions are correct, and counts of them are exact.
  """
  model, read = jax.tree.map(jnp.asarray, jax.device_get(model)), Read.of(batch, model.config.futures)
  logits_MBLV = np.float64(jax.jit(future_states)(model, read)) @ np.float64(model.readout().table()).T
  is_target_MBLV = np.arange(logits_MBLV.shape[-1]) == np.asarray(read.targets_MBL)[..., None]
  others_MBL = np.where(is_target_MBLV, -np.inf, logits_MBLV).max(-1)
  lead_MBL = np.where(is_target_MBLV, logits_MBLV, -np.inf).max(-1) - others_MBL
  return np.abs(lead_MBL)[np.asarray(read.counted_MBL)].min()


def is_clear(lm, prompts, **options) -> bool:
  """Whether two nudged LanguageModels generate the same ids with the same accepted drafts."""
  models = [lm.model, nudged(lm.model, 1), nudged(lm.model, 2)]
  generations = [dataclasses.replace(lm, model=model).generate(prompts, **options) for model in models]
  first, *others = [(generation.ids, generation.accepted) for generation in generations]
  return all(other == first for other in others)


def generate_clearly(lm, prompts, **options):
  """What a LanguageModel generates, after a check that no near tie decides it."""
  assert is_clear(lm, prompts, **options), 'a near tie: choose another prompt, seed or model'
  return lm.generate(prompts, **options)


def write(workdir, config: Config, state: training.State, step: int = 3,
          identity: dict | None = None, writer=None, **changes) -> None:
  """A checkpoint as `fit` writes it."""
  record = {'step': step, 'config': config.to_dict(), 'conventions': conventions(config.model),
            'tokenizer': tokenizer.load('bytes').digest,
            'identity': identity or {}, 'data': {'global_next_index': 0}} | changes
  ours = writer or store.Writer(workdir, 3)
  ours.save(step, state.model, state.without_model(), record)
  if not writer:
    ours.close()


def random_lm(folder, seed: int = 5, **sections):
  """The `LanguageModel` of random parameters of a tiny config, from a checkpoint in folder / 'run'."""
  config = experiment(folder, **sections)
  write(folder / 'run', config, random_state(config, seed=seed))
  return load(folder / 'run')


def write_config_file(path, config: Config) -> None:
  """A config file whose get_config returns this config."""
  path.write_text('from mtp_jax.config import Config\n\ndef get_config():\n'
                  f'  return Config.from_dict({config.to_dict()!r}).to_config_dict()\n')


def same_bits(a, b) -> bool:
  """Names, types, shapes and bytes of every leaf."""
  bits = lambda tree: {jax.tree_util.keystr(path): (x.dtype, x.shape, np.asarray(x).tobytes())
                       for path, x in jax.tree_util.tree_leaves_with_path(tree)}
  return bits(a) == bits(b)


def prepare_bytes(folder, output, workers: int = 0, **options) -> Prepared:
  """Prepares a folder with the byte tokenizer, in small parts, whatever is wrong with its records."""
  options = Options(**{'validation_share': 0.2, 'shard_bytes': 3000, 'bad_share': 1} | options)
  return prepare(files((str(folder),), '--input'), tokenizer.load('bytes'), options, output,
                 workers, '--input')


def texts(stream: Stream) -> list[bytes]:
  """The documents of a stream of bytes."""
  return [tokenizer.load('bytes').decode(stream.document(i)) for i in range(stream.documents)]


def all_texts(prepared: Prepared) -> list[bytes]:
  return sorted(texts(prepared.train) + texts(prepared.validation))


# all else in the log is a function of config and documents
SPEEDS = {'tokens_per_second', 'mfu', 'data_wait', 'eta_seconds'}


def log_of(workdir) -> list[dict]:
  records = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{key: value for key, value in record.items() if key not in SPEEDS} for record in records]
