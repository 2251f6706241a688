"""What several tests of data share."""
import gzip
import json
import random

import pytest


@pytest.fixture
def corpus(tmp_path):
  """200 documents in JSON lines, plain and compressed, and in text files; every one another."""
  folder, rng = tmp_path / 'corpus', random.Random(0)
  folder.mkdir()
  documents = [f'{i} '.encode() + bytes(rng.choices(range(32, 127), k=rng.choice([0, 5, 300]))) for i in range(200)]
  line = lambda text: json.dumps({'text': text.decode()}).encode() + b'\n'
  (folder / 'a.jsonl').write_bytes(b''.join(map(line, documents[:120])))
  (folder / 'b.jsonl.gz').write_bytes(gzip.compress(b''.join(map(line, documents[120:180]))))
  for i, text in enumerate(documents[180:]):
    (folder / f'{i}.txt').write_bytes(text)
  return folder, sorted(documents)
