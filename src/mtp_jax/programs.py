"""Compiled programs kept on disk, so that a second start does not compile what the first one did.

JAX's persistent compilation cache, in config.data.cache/programs, a folder for each kind of
processor: XLA compiles for the very processor, and a home directory may serve several. Processes
may share it: it is locked while one reads or writes. The least recently used programs beyond
`BYTES` are deleted; the folder may be deleted at any time.
"""
import hashlib
import os
import pathlib
import platform

import jax

from mtp_jax.config import BadInput, Config, local_path

BYTES = 4 * 2**30
LEAST_SECONDS = 0.2  # of compilation, for a program to be kept


def keep_programs(config: Config) -> None:
  """From now on finds programs in the folder of config.data.cache, and keeps new ones there.

  Without effect if config.train.programs_kept is False, if JAX has a folder already, such as by
  JAX_COMPILATION_CACHE_DIR, or if the folder cannot be written.
  """
  if not config.train.programs_kept or jax.config.jax_compilation_cache_dir:
    return
  try:
    folder = local_path(config.data.cache, 'config.data.cache') / 'programs' / _processor()
    folder.mkdir(parents=True, exist_ok=True)
  except (OSError, BadInput):
    return
  if not os.access(folder, os.W_OK):
    return
  jax.config.update('jax_compilation_cache_max_size', BYTES)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', LEAST_SECONDS)
  jax.config.update('jax_compilation_cache_dir', str(folder))


def _processor() -> str:
  """Of this machine: what decides which instructions XLA uses, as 12 hexadecimal digits."""
  described, cpuinfo = platform.machine(), pathlib.Path('/proc/cpuinfo')
  if cpuinfo.exists():
    lines = cpuinfo.read_text(errors='replace').splitlines()
    described += ''.join(sorted({line for line in lines if line.split(':')[0].strip() in (
        'model name', 'flags', 'Features', 'CPU part')}))
  return hashlib.sha256(described.encode()).hexdigest()[:12]
