"""Which formats can hold a model, and why the others cannot."""
import dataclasses

from mtp_jax.config import BadInput, ModelConfig, nearest
from mtp_jax.formats.deepseek import DEEPSEEK_V3, GLM4_MOE
from mtp_jax.formats.format import Format
from mtp_jax.formats.llama import LLAMA, QWEN2, QWEN3
from mtp_jax.formats.mellum import MELLUM
from mtp_jax.formats.meta import META
from mtp_jax.formats.mimo import MIMO

FORMATS: dict[str, Format] = {'llama': LLAMA, 'qwen2': QWEN2, 'qwen3': QWEN3, 'mimo': MIMO,
                              'mellum': MELLUM,
                              'deepseek_v3': DEEPSEEK_V3, 'glm4_moe': GLM4_MOE, 'meta': META}


def foldable(c: ModelConfig) -> bool:
  """Whether the final norm can be folded into the unembedding: one module, which reads the state
  before that norm.

  With scale 1 in its place the state after it is the state before it over its root mean square, and
  the module's own norm makes the same of both.
  """
  return c.kind == 'sequential' and c.hidden_input == 'pre_norm' and c.futures == 2


def folded(c: ModelConfig) -> ModelConfig:
  """The config of the model with its final norm folded: the unembedding is then no embedding any
  more.
  """
  return dataclasses.replace(c, hidden_input='post_norm', tie_embeddings=False)


def problems(name: str, c: ModelConfig) -> list[str]:
  """Why a format cannot hold a model, in words; [] if it can."""
  found = list(FORMATS[name].problems(c))
  pre_norm = c.kind == 'sequential' and c.futures > 1 and c.hidden_input == 'pre_norm'
  if FORMATS[name].norm_read == 'post_norm' and pre_norm and not foldable(c):
    found.append('its modules read the state before the final norm (hidden_input pre_norm); that norm can be folded '
                 f'for two futures, not for {c.futures}')
  return found


def fitting(c: ModelConfig) -> list[str]:
  """Names of the formats that can hold a model."""
  return [name for name in FORMATS if not problems(name, c)]


def format_of(name: str, where: str = '--format') -> Format:
  """The format of a name. Raises BadInput if there is none."""
  if name not in FORMATS:
    raise BadInput(f'{where}={name}: no such format; {nearest(name, FORMATS)}')
  return FORMATS[name]


def check(name: str, c: ModelConfig, where: str = '--format') -> Format:
  """The format of a name. Raises BadInput if there is none, or if it cannot hold the model; tells
  which can.
  """
  chosen, found = format_of(name, where), problems(name, c)
  if found:
    others = ', '.join(fitting(c)) or 'none'
    raise BadInput(f'{where}={name}: cannot hold this model: {"; ".join(found)}; formats that can: {others}')
  return chosen
