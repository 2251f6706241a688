"""Names of fields as people mistype them: one line that names the one they meant, before JAX starts."""
import json
import subprocess
import sys

MEANT = {  # typed: what the line must suggest
    'model.layer': 'layers', 'model.n_layers': 'layers', 'model.num_layers': 'layers', 'model.with': 'width',
    'model.vocab_size': 'vocab', 'model.num_heads': 'heads', 'model.kvheads': 'kv_heads', 'model.kv_head': 'kv_heads',
    'model.head_dim': 'head_width', 'model.feedforward': 'feed_forward', 'model.num_futures': 'futures',
    'model.qk_nrom': 'qk_norm', 'model.ropebase': 'rope_base', 'model.tie_embedding': 'tie_embeddings',
    'model.expert': 'experts', 'objective.weigths': 'weights', 'objective.zloss': 'z_loss',
    'optimizer.learning_rat': 'learning_rate', 'optimizer.weightdecay': 'weight_decay', 'optimizer.eps': 'epsilon',
    'optimizer.warmup': 'warmup_steps', 'optimizer.clipping': 'clip', 'train.step': 'steps', 'train.stesp': 'steps',
    'train.Seed': 'seed', 'train.log_evry': 'log_every', 'train.eval_every': 'evaluate_every',
    'train.acumulate': 'accumulate', 'train.checkpoints_keep': 'checkpoints_kept', 'train.tracker': 'trackers',
    'data.tokeniser': 'tokenizer', 'data.path': 'paths', 'data.lenght': 'length', 'data.pack': 'packing',
    'mesh.fdsp': 'fsdp', 'mesh.contxt': 'context', 'trian.steps': 'train', 'mdoel.layers': 'model',
    # in another section, or in none
    'model.batch': 'train.batch', 'model.learning_rate': 'optimizer.learning_rate', 'optimizer.steps': 'train.steps',
    'train.lenght': 'data.length', 'steps': 'train.steps', 'stesp': 'train.steps', 'layers': 'model.layers'}


def test_a_mistyped_field_is_one_line_that_names_the_one_that_was_meant_before_jax(place):
  """One fresh interpreter for all."""
  program = ('import json, os, sys\nfrom mtp_jax.cli.main import main\nos.chdir(sys.argv[2])\n'
             'for name in json.loads(sys.argv[1]):\n'
             '  assert main(["train", "--config=tiny.py", "--workdir=new", f"--config.{name}=1"]) == 2\n'
             'assert "jax" not in sys.modules\n')
  done = subprocess.run([sys.executable, '-c', program, json.dumps(list(MEANT)), str(place)], capture_output=True,
                        text=True)
  assert done.returncode == 0, done.stderr
  for line, (typed, meant) in zip(done.stderr.splitlines(), MEANT.items(), strict=True):
    assert line.startswith(f'mtp_jax: config.{typed}: no such ') and line.endswith(f"; did you mean '{meant}'?"), line
