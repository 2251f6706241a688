"""What a format is: the table of its tensors, the entries of its config.json, and which models it
can hold.
"""
import dataclasses
from collections.abc import Callable, Mapping

from mtp_jax.config import ModelConfig
from mtp_jax.formats.tensors import Tensor


@dataclasses.dataclass(frozen=True)
class Format:
  """A format of weights; both directions follow from it.

  Attributes:
    holds: what it holds of a model, in one line.
    problems: of a config, why the format cannot hold its model; [] if it can.
    tensors: of a config, all tensors of the folder.
    entries: of a config, what config.json says of the model.
    fields: of a config.json, the fields of `ModelConfig`; raises BadInput, without the name of the
      file.
    serving: lines of the model card: how to run it.
    sidecar: of a config, the tensors of the folder mtp/ inside, which servers do not read.
    norm_read: what its readers give a module: the trunk's state after the final norm ('post_norm'),
      some that and some the one before it ('either'), or none ('').
    stem: begins the names of its files of tensors.
    settings: the file of `entries`.
  """
  holds: str
  problems: Callable[[ModelConfig], list[str]]
  tensors: Callable[[ModelConfig], list[Tensor]]
  entries: Callable[[ModelConfig], dict]
  fields: Callable[[Mapping], dict]
  serving: str
  sidecar: Callable[[ModelConfig], list[Tensor]] = lambda c: []
  norm_read: str = ''
  stem: str = 'model'
  settings: str = 'config.json'
