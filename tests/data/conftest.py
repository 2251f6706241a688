"""What several tests of data share."""
import gzip
import json
import random

import pytest


@pytest.fixture
def corpus(tmp_path):
  """A folder, and its 200 different documents: JSON lines, plain and compressed, and text files."""
  folder, rng = tmp_path / 'corpus', random.Random(0)
  folder.mkdir()
  documents = []
  for i in range(200):
    size = rng.choice([0, 5, 300])
    documents.append(f'{i} '.encode() + bytes(rng.choices(range(32, 127), k=size)))
  lines = [json.dumps({'text': text.decode()}).encode() + b'\n' for text in documents]
  (folder / 'a.jsonl').write_bytes(b''.join(lines[:120]))
  (folder / 'b.jsonl.gz').write_bytes(gzip.compress(b''.join(lines[120:180]), mtime=0))
  for i, text in enumerate(documents[180:]):
    (folder / f'{i}.txt').write_bytes(text)
  return folder, sorted(documents)
