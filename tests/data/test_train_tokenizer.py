"""A sample is from all over the inputs; a trained tokenizer is measured on held-out documents."""
import gzip

from mtp_jax.data.files import files
from mtp_jax.data.records import Reading
from mtp_jax.data.train_tokenizer import sample


def test_a_sample_is_from_all_over_the_inputs(corpus):
  inputs = files((str(corpus[0]),), '')
  whole = [found.text for found in sample(inputs, Reading(), 10**9, '')]
  some = [found.text for found in sample(inputs, Reading(), 5000, '')]
  assert sorted(whole) == corpus[1] and some == whole[:len(some)] and 5000 <= sum(map(len, some)) < 5400


def test_a_sample_takes_no_more_of_a_file_than_its_share(tmp_path):
  for i in range(4):
    (tmp_path / f'{i}.jsonl.gz').write_bytes(gzip.compress(b''.join(b'{"text": "%d%s"}\n' % (i, b'x' * 1000) for _ in range(200))))
  some = [found.text[:1] for found in sample(files((str(tmp_path),), ''), Reading(), 300_000, '')]
  assert [some.count(b'%d' % i) for i in range(4)] == [75, 75, 75, 75]
