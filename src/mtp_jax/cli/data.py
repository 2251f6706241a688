"""prepare, train-tokenizer, inspect-data: from text to token shards."""
import os
import sys

from mtp_jax import config as schema
from mtp_jax.cli.command import JSON, Command, _need, _need_at_least, _report
from mtp_jax.config import BadInput, Config

INPUT = (
    ('input', None, "files, directories or globs, with commas between; text, .jsonl, .parquet, also .gz and .zst; gs:// and s3:// too"),
    ('format', 'auto', 'auto goes by the end of a name; text (a document a file), jsonl or parquet'),
    ('field', 'text', 'of a JSON object, or the column of a Parquet file, that holds the text'),
    ('keep', '', 'bad records to keep as they are: invalid_utf8, lone_surrogate, nul, with commas between; others are skipped'),
    ('max_document_bytes', 64 * 2**20, 'longer documents are skipped, as bad ones'),
    ('bad_share', 0.05, 'share of the records that may be skipped; beyond it the command stops'))


def prepare(f) -> int:
  """Reads text, JSON lines or Parquet once and writes token shards: the same bytes however many workers, however often interrupted."""
  _need(f, 'input')
  _need(f, 'output')
  _need_at_least(f, workers=-1, shard_bytes=0)
  from mtp_jax import tokenizer
  from mtp_jax.data.files import files
  from mtp_jax.data.parts import Options
  from mtp_jax.data.prepare import prepare
  from mtp_jax.report.display import Meter, say
  within = [given for given in _inputs(f) if os.path.isdir(given) and os.path.realpath(f.output).startswith(os.path.realpath(given) + os.sep)]
  if within:
    raise BadInput(f'--output={f.output}: lies within the input {within[0]}, which would read it; choose another folder')
  options = Options(_reading(f), f.validation_share, f.shard_bytes, f.bad_share)
  tokens = tokenizer.load(f.tokenizer, '--tokenizer')
  workers = os.cpu_count() if f.workers < 0 else f.workers
  try:
    found = prepare(files(_inputs(f), '--input'), tokens, options, f.output, workers, '--input', say, Meter)
  except KeyboardInterrupt:
    print('mtp_jax: interrupted; run the same command, it goes on where it stopped', file=sys.stderr)
    return 130
  index, values = found.index, {'train': found.train.counts, 'validation': found.validation.counts}
  bad = [f'bad records: {kind} {n["skipped"]:,} skipped, {n["kept"]:,} kept' for kind, n in index['bad'].items()]
  _report(f, {'fingerprint': found.fingerprint, 'records': index['records'], 'bad': index['bad'], **values}, [
      *(f'{split}: {n["documents"]:,} documents, {n["tokens"]:,} tokens, {n["bytes"]:,} bytes, {n["shards"]} shards' for split, n in values.items()),
      *bad, *([f'they are listed in {found.folder.url}/bad_records.jsonl'] if bad else []), f'fingerprint {found.fingerprint}',
      f"train on it with: --config.data.sources=\"('{f.output}',)\"" + (
          '' if f.tokenizer == 'bytes' else f' --config.data.tokenizer={f.tokenizer} --config.model.vocab={tokens.size}')])
  return 0


def train_tokenizer(f) -> int:
  """Trains a SentencePiece model on a sample of what `prepare` would read; it gives every byte back, whatever the text."""
  _need(f, 'input')
  _need(f, 'output')
  _need_at_least(f, sample_bytes=1, vocab=260)
  if f.kind not in ('bpe', 'unigram'):
    raise BadInput(f'--kind={f.kind}: must be bpe or unigram')
  if os.path.exists(f.output) or not os.path.isdir(os.path.dirname(f.output) or '.'):
    raise BadInput(f'--output={f.output}: must be a new file, in a folder that is there')
  from mtp_jax.data.files import files
  from mtp_jax.data.train_tokenizer import train_tokenizer
  from mtp_jax.report.display import say
  inputs = files(_inputs(f), '--input')
  trained = train_tokenizer(inputs, _reading(f), f.vocab, '--input', f.kind, f.sample_bytes, f.bad_share, say)
  with open(f.output + '.unfinished', 'wb') as file:
    file.write(trained.model)
  os.replace(f.output + '.unfinished', f.output)
  size = trained.tokenizer.size
  values = {'vocab': size, 'bytes_per_token': trained.bytes_per_token, 'held_out_documents': trained.held_out_documents,
            'held_out_bytes': trained.held_out_bytes, 'bytes_per_second': trained.bytes_per_second,
            'digest': trained.tokenizer.digest}
  _report(f, values, [
      f'{f.output}: {size:,} ids; {trained.bytes_per_token:.3f} bytes per token on {trained.held_out_documents:,} '
      f'held-out documents ({trained.held_out_bytes / 1e6:,.1f} MB), {trained.bytes_per_second / 1e6:.1f} MB/s',
      f'use it with: --tokenizer={f.output}, and --config.data.tokenizer={f.output} --config.model.vocab={size}'])
  return 0


def inspect_data(f) -> int:
  """What a prepared set holds, and rows of it as the model sees them: documents, inputs, the target of each future."""
  _need(f, 'data')
  _need_at_least(f, length=1, futures=1, rows=0, positions=1)
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  from mtp_jax.data.folder import Folder
  from mtp_jax.data.prepared_set import open_set
  try:
    config = Config(data=schema.DataConfig(sources=(f.data,), length=f.length, packing=f.packing, boundary=f.boundary)).data
  except BadInput as error:
    raise BadInput(str(error).replace('config.data.', '--')) from error
  source = open_set(Folder(f.data, '--data'), config.cache)
  wrong = source.verify() if f.verify else []
  from mtp_jax.data.corpus import Corpus, tokenizer_of
  from mtp_jax.evaluation import inspection
  from mtp_jax.report.display import say
  tokens = tokenizer_of(source)
  found = inspection.summary(source) | ({'damaged': wrong} if f.verify else {})
  if f.plot:
    inspection.plot(found, f.plot)
  lines = [f'fingerprint {source.fingerprint}; {found["records"]:,} records'
           + ''.join(f'; {kind}: {n["skipped"]:,} skipped, {n["kept"]:,} kept' for kind, n in found['bad'].items())]
  for split in ('train', 'validation'):
    n = found[split]
    lines += ['', f'{split}: {n["documents"]:,} documents, {n["tokens"]:,} tokens, {n["bytes"]:,} bytes, {n["bytes_per_token"]:.3f} bytes per token, '
              f'{n["shards"]} shards', *inspection.bars(n['lengths'])]
  if f.rows and not wrong:
    rows = Corpus(config, tokens, (source,)).rows(f.futures, say)
    lines += ['', *inspection.shown(rows, tokens, f.futures, f.rows, f.positions, sys.stdout.isatty())]
  if f.verify:
    lines += wrong or ['every byte of every shard is what was written']
  _report(f, found, lines)
  return 1 if wrong else 0


def _inputs(f) -> tuple[str, ...]:
  given = tuple(f.input.split(','))
  if not all(given):
    raise BadInput(f'--input={f.input}: holds an empty name; write files, directories or globs with commas between')
  return given


def _reading(f):
  from mtp_jax.data.records import Reading
  return Reading(f.format, f.field, tuple(kind for kind in f.keep.split(',') if kind), f.max_document_bytes)


COMMANDS = {
    'prepare': Command(prepare, 'text to token shards, once', (
        *INPUT,
        ('tokenizer', 'bytes', 'bytes, or the path of a SentencePiece model file'),
        ('output', None, 'folder of the set, empty or of this very set'),
        ('validation_share', 0.01, 'share of the documents held out, chosen by a hash of their names'),
        ('workers', -1, 'processes; -1 is one a core, 0 works in the process at hand'),
        ('shard_bytes', 0, 'of input in a shard; 0: a 64th of all, within 4 and 256 MiB'), JSON),
        "prepare --input='corpus/*.jsonl.gz' --output=data/corpus"),
    'train-tokenizer': Command(train_tokenizer, 'a SentencePiece model for such text', (
        *INPUT,
        ('output', None, 'the model file'),
        ('vocab', 32_000, 'ids, bos, eos, pad and 256 bytes included'),
        ('kind', 'bpe', 'bpe or unigram'),
        ('sample_bytes', 100_000_000, 'of text to train on, from all over the inputs'), JSON),
        "train-tokenizer --input='corpus/*.jsonl.gz' --output=corpus.model --vocab=32000"),
    'inspect-data': Command(inspect_data, 'what a prepared set holds and shows a model', (
        ('data', None, 'folder that prepare wrote'),
        ('length', 256, 'L, as config.data.length'),
        ('futures', 4, 'M, as config.model.futures'),
        ('packing', 'stream', 'stream or best_fit'),
        ('boundary', 'within', 'within or across'),
        ('rows', 2, 'rows shown, at even distances'),
        ('positions', 24, 'positions shown of each, around the first document boundary'),
        ('verify', False, 'read every byte and compare digests; exit code 1 if one differs'),
        ('plot', '', 'a PNG of the lengths of documents'), JSON),
        'inspect-data --data=data/corpus'),
}
