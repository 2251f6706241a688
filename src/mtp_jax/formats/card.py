"""The model card of an export: README.md, with counts, data, conventions and how to serve it."""
import pathlib

import jax

from mtp_jax.config import Config
from mtp_jax.formats.format import Format
from mtp_jax.model import costs
from mtp_jax.model.model import Model, conventions

FOLDED = ("The final norm is folded: its scale is a factor of the unembedding and a divisor of the module's last "
          'norm, so that the module reads the same from readers that give it the state before that norm and after it.')
NOTES = {
    'mimo': {'post_norm': 'The module was trained on the state after the final norm, which SGLang gives it. vLLM gives '
                          'it the one before: its drafts are then accepted less often; the text is the same.',
             'pre_norm': 'The module was trained on the state before the final norm, which vLLM gives it. SGLang gives '
                         'it the one after: its drafts are then accepted less often; the text is the same.'},
}


def text(config: Config, record: dict, name: str, chosen: Format, folder: pathlib.Path, dtype: str,
         is_folded: bool) -> str:
  """The card, in Markdown."""
  c = config.model
  counts = costs.parameters(jax.eval_shape(lambda: Model(c, jax.random.key(0))))
  lines = ['---', 'library_name: transformers', 'pipeline_tag: text-generation',
           'tags: [mtp_jax, multi-token-prediction]', '---', '', f'# {folder.name}', '',
           f'A decoder of {counts["total"]:,} parameters that predicts {c.futures} tokens at once ({c.kind}), '
           f'pretrained with mtp_jax, step {record["step"]:,}, in the format `{name}`: {chosen.holds}. Tensors are '
           f'{dtype}.', '', '## Serving', '', _serving(c, chosen, folder.name)]
  if is_folded:
    lines += [FOLDED, '']
  elif c.futures > 1 and c.kind == 'sequential' and name in NOTES:
    lines += [NOTES[name][c.hidden_input], '']
  lines += ['Greedy text is that of `python -m mtp_jax generate` in float32, since generation_config.json suppresses '
            'the ids that stand for no text. A text begins with bos.', '', '## Parameters', '',
            '| part | parameters |', '|---|---|',
            *(f'| {part} | {count:,} |' for part, count in counts.items()), '',
            '## Data', '', *_data(config, record), '', '## Conventions', '',
            *(f'- {key}: {value}' for key, value in conventions(c).items()), '']
  return '\n'.join(lines)


def _serving(c, chosen: Format, folder: str) -> str:
  layers = '|'.join(str(c.trunk_layers + k) for k in range(c.own_heads))
  architecture = chosen.entries(c).get('architectures', [''])[0]
  return chosen.serving.format(folder=folder, layers=layers, architecture=architecture)


def _data(config: Config, record: dict) -> list[str]:
  """What it was trained on, as the checkpoint knows it."""
  identity, data = record.get('identity', {}), config.data
  lines = [f'Rows of {data.length:,} tokens, {record["step"] * config.train.batch * data.length:,} tokens at most by '
           'step x batch x length.', '']
  sources = identity.get('sources', [])
  lines += [f'- fingerprint {source["fingerprint"][:16]}: {source["documents"]:,} documents, {source["tokens"]:,} '
            f'tokens, {source["held_out_documents"]:,} documents held out' for source in sources]
  lines += [] if sources else ['- The checkpoint does not tell.']
  return [*lines,
          f'- tokenizer: {"SentencePiece" if data.tokenizer != "bytes" else "bytes"}, digest '
                  f'{record["tokenizer"][:16]}']
