"""A sample of documents from all over the inputs."""
from collections.abc import Iterator

from mtp_jax.data.files import File, name_hash
from mtp_jax.data.parts import Options, cut
from mtp_jax.data.records import Document, Fault, Reader, Reading


def sample(inputs: list[File], reading: Reading, size: int, where: str) -> Iterator[Document | Fault]:
  """Documents, and faults, from all over the inputs, `size` bytes in all, or less: the beginnings of files, and of plain JSON lines those of
  stretches of 1 MiB, in the order of their hashes."""
  pieces = [piece for part in cut(inputs, Options(reading, shard_bytes=2**20)) for piece in part]
  each = max(2**16, size // len(pieces))
  for piece in sorted(pieces, key=lambda piece: name_hash(f'{piece.file.name}@{piece.start}')):
    left = min(each, size)
    for found in Reader(piece, reading, where):
      yield found
      if isinstance(found, Document):
        left, size = left - len(found.text), size - len(found.text)
      if left <= 0:
        break
    if size <= 0:
      return
