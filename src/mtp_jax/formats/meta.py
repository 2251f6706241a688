"""meta: parallel heads, in the tensors of facebook/multi-token-prediction (arXiv:2404.19737).

    consolidated.safetensors, params.json
    layers.0 ... layers.{n_layers - n_future - 1}   the trunk
    layers.{n_layers - n_future}                    the head of future 0
    extra_heads.{m - 1}                             the head of future m

All heads read the trunk's state, and share `norm` and `output`. Rotary pairs are side by side.
"""
from collections.abc import Mapping

from mtp_jax.config import BadInput, ModelConfig
from mtp_jax.formats.blocks import no_parts, widths_agree
from mtp_jax.formats.format import Format
from mtp_jax.formats.tensors import Row, Tensor, tensors

BLOCK = (
    Row('attention_norm.weight', {'attention_norm_D': 'D'}),
    Row('attention.wq.weight', {'attention.wq_DHK': 'H~K D'}),
    Row('attention.wk.weight', {'attention.wk_DGK': 'G~K D'}),
    Row('attention.wv.weight', {'attention.wv_DGK': 'GK D'}),
    Row('attention.wo.weight', {'attention.wo_HKD': 'D HK'}),
    Row('ffn_norm.weight', {'feed_forward_norm_D': 'D'}),
    Row('feed_forward.w1.weight', {'feed_forward.gate_DF': 'F D'}),
    Row('feed_forward.w2.weight', {'feed_forward.down_FD': 'D F'}),
    Row('feed_forward.w3.weight', {'feed_forward.up_DF': 'F D'}))
ENDS = (
    Row('tok_embeddings.weight', {'embed_VD': 'V D'}),
    Row('norm.weight', {'final_norm_D': 'D'}),
    Row('output.weight', {'unembed_VD': 'V D'}))

SERVING = """\
No server drafts with such heads. The reference code reads consolidated.pth:

    torch.save(safetensors.torch.load_file('{folder}/consolidated.safetensors'), 'consolidated.pth')

Future 0 alone is a plain Llama: export it with --format=llama.
"""


def problems(c: ModelConfig) -> list[str]:
  found = no_parts(c, 'logit_cap', 'qk_norm', 'qkv_bias', 'experts', 'latent', 'tie_embeddings')
  if c.futures > 1 and c.kind != 'parallel':
    found.append(f'its futures are no parallel heads (kind {c.kind})')
  return found + widths_agree(c)


def all_tensors(c: ModelConfig) -> list[Tensor]:
  found = tensors(ENDS)
  for i in range(c.trunk_layers):
    found += tensors(BLOCK, f'layers.{i}.', 'trunk.', (i,))
  for m in range(c.own_heads):
    name = f'extra_heads.{m - 1}.' if m else f'layers.{c.trunk_layers}.'
    found += tensors(BLOCK, name, 'futures.', (m,))
  return found


def entries(c: ModelConfig) -> dict:
  return {'dim': c.width, 'n_layers': c.trunk_layers + c.own_heads, 'n_heads': c.heads,
          'n_kv_heads': c.kv_heads,
          'vocab_size': c.vocab, 'hidden_dim': c.feed_forward, 'norm_eps': c.norm_epsilon,
          'rope_theta': c.rope_base,
          'n_future': c.futures}


def fields(params: Mapping) -> dict:
  for key in ('dim', 'n_layers', 'n_heads', 'vocab_size', 'hidden_dim'):
    if type(params.get(key)) is not int:
      raise BadInput(f'{key}={params.get(key)!r}: must be a whole number')
  heads = params['n_heads']
  return {'width': params['dim'], 'layers': params['n_layers'], 'heads': heads,
          'kv_heads': params.get('n_kv_heads') or heads, 'head_width': params['dim'] // heads,
          'vocab': params['vocab_size'], 'feed_forward': params['hidden_dim'],
          'norm_epsilon': float(params.get('norm_eps', 1e-5)),
          'rope_base': float(params.get('rope_theta', 10_000.0)),
          'kind': 'parallel', 'placement': 'matched', 'futures': params.get('n_future', 1)}


META = Format('a dense trunk and parallel heads', problems, all_tensors, entries, fields, SERVING,
              stem='consolidated',
              settings='params.json')
