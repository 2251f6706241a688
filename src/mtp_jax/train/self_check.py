"""A self-check: a step is run twice from the same state and batch, and the results are compared, bit by bit.

On a machine that errs, or with a program that is not deterministic, they differ.
"""
import jax

from mtp_jax.checkpoint.fingerprint import fingerprints
from mtp_jax.checkpoint.store import as_dict, by_path
from mtp_jax.config import Config
from mtp_jax.train import processes
from mtp_jax.train.guards import Limits
from mtp_jax.train.step import State, compiled_step


class NotReproducible(RuntimeError):
  """A step gave two results."""


def twice(number: int, config: Config, state: State, batch, byte_length_V, fraction: float,
          limits: Limits) -> tuple[State, dict]:
  """`compiled_step`, run twice; its first result. Every process must call it.

  It holds two states at a time, and waits for the devices.

  Args:
    number: of the step, from 1.

  Raises:
    NotReproducible: on all processes, where the results of one differ.
  """
  copied = jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), state)  # the step donates its state
  first = compiled_step(config, state, batch, byte_length_V, fraction, limits)
  wanted = digest(*first)
  found = digest(*compiled_step(config, copied, batch, byte_length_V, fraction, limits))
  if processes.total(found != wanted, config.train.hang_seconds):
    here = f' ({wanted[:12]} and {found[:12]})' if found != wanted else ', on another process of this job'
    raise NotReproducible(
        f'step {number}: run twice from the same state and batch, it gave two results{here}: the machine does not '
        'compute the same each time; run the same command on another machine, which resumes from the newest '
        'checkpoint; on a GPU set XLA_FLAGS=--xla_gpu_deterministic_ops=true first; config.train.self_check_every=0 '
        'turns this check off')
  return first


def digest(state: State, metrics: dict) -> str:
  """Fingerprint of what a step gave, of each device's copy where copies differ. Waits for the devices."""
  return ' '.join(dict.fromkeys(fingerprints(by_path(as_dict({'state': state, 'metrics': metrics})))))
