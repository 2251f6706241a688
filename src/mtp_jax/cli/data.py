"""prepare, train-tokenizer, inspect-data: from text to token shards."""
import collections
import os
import sys

from mtp_jax.cli.command import JSON, Command, need, need_at_least, print_result
from mtp_jax.config import BadInput, Config, DataConfig

INPUT = (
    ('input', None,
     'files, directories or globs, separated by commas; text, JSON lines, Parquet, also compressed; '
     'gs:// and s3:// too'),
    ('format', 'auto', 'text (one document per file), jsonl, parquet, or auto: by content and name'),
    ('field', 'text',
     'key of the JSON objects, or column of the Parquet files, that holds the text'),
    ('separator', '',
     "what stands between the documents of a text file, such as '<|endoftext|>'; none: a file is one"),
    ('keep', '',
     'bad records to keep as they are, separated by commas: invalid_utf8, lone_surrogate, nul; '
     'others are skipped'),
    ('max_document_bytes', 64 * 2**20, 'longer documents are bad records'),
    ('bad_share', 0.05, 'fraction of the records that may be skipped; above it the command stops'))


def prepare(flags) -> int:
  """Reads text, JSON lines or Parquet once and writes token shards.

  The shards hold the same bytes whatever the number of workers and however often the command was
  interrupted.
  """
  need(flags, 'input')
  need(flags, 'output')
  need_at_least(flags, workers=-1, shard_bytes=0)
  from mtp_jax import tokenizer
  from mtp_jax.data.files import files
  from mtp_jax.data.parts import Options
  from mtp_jax.data.prepare import prepare
  from mtp_jax.report.display import Meter, print_stderr
  _check_outside_inputs(flags)
  options = Options(_reading(flags), flags.validation_share, flags.shard_bytes, flags.bad_share)
  tokens = tokenizer.load(flags.tokenizer, '--tokenizer')
  workers = os.cpu_count() if flags.workers < 0 else flags.workers
  try:
    validation = files(_names(flags, 'validation'), '--validation') if flags.validation else ()
    prepared = prepare(files(_names(flags, 'input'), '--input'), tokens, options, flags.output, workers,
                       '--input', print_stderr, Meter, validation=validation)
  except KeyboardInterrupt:
    print('mtp_jax: interrupted; run the same command to continue', file=sys.stderr)
    return 130
  bad = prepared.index['bad']
  splits = {'train': prepared.train.counts, 'validation': prepared.validation.counts}
  lines = [_read_as(prepared)]
  lines += [f'{split}: {_counts(n)}, {n["shards"]} shards' for split, n in splits.items()]
  lines += [f'bad records: {kind} {n["skipped"]:,} skipped, {n["kept"]:,} kept'
            for kind, n in bad.items()]
  if bad:
    lines.append(f'they are listed in {prepared.folder.url}/bad_records.jsonl')
  lines.append(f'fingerprint {prepared.fingerprint}')
  train_on_it = f"train on it with: --config.data.sources=\"('{flags.output}',)\""
  if flags.tokenizer != 'bytes':
    train_on_it += f' --config.data.tokenizer={flags.tokenizer} --config.model.vocab={tokens.size}'
  values = {'fingerprint': prepared.fingerprint, 'records': prepared.index['records'], 'bad': bad, **splits,
            'kinds': dict(collections.Counter(file['kind'] for file in prepared.index['inputs']))}
  print_result(flags, values, [*lines, train_on_it])
  return 0


def train_tokenizer(flags) -> int:
  """Trains a SentencePiece model on a sample of what `prepare` would read.

  It can represent any text: decoding an encoded text gives the same bytes.
  """
  need(flags, 'input')
  need(flags, 'output')
  need_at_least(flags, sample_bytes=1, vocab=260)
  if flags.kind not in ('bpe', 'unigram'):
    raise BadInput(f'--kind={flags.kind}: must be bpe or unigram')
  if os.path.exists(flags.output) or not os.path.isdir(os.path.dirname(flags.output) or '.'):
    raise BadInput(f'--output={flags.output}: must be a new file in an existing folder')
  from mtp_jax.data.files import files
  from mtp_jax.data.train_tokenizer import train_tokenizer
  from mtp_jax.report.display import print_stderr
  inputs = files(_names(flags, 'input'), '--input')
  trained = train_tokenizer(inputs, _reading(flags), flags.vocab, '--input', flags.kind,
                            flags.sample_bytes,
                            flags.bad_share, print_stderr)
  with open(flags.output + '.unfinished', 'wb') as file:
    file.write(trained.model)
  os.replace(flags.output + '.unfinished', flags.output)
  size = trained.tokenizer.size
  values = {'vocab': size, 'bytes_per_token': trained.bytes_per_token,
            'held_out_documents': trained.held_out_documents,
            'held_out_bytes': trained.held_out_bytes,
            'bytes_per_second': trained.bytes_per_second, 'digest': trained.tokenizer.digest}
  print_result(flags, values, [
      f'{flags.output}: {size:,} ids; {trained.bytes_per_token:.3f} bytes per token on '
      f'{trained.held_out_documents:,} held-out documents ({trained.held_out_bytes / 1e6:,.1f} '
      f'MB), {trained.bytes_per_second / 1e6:.1f} MB/s',
      f'use it with: --tokenizer={flags.output}, and '
      f'--config.data.tokenizer={flags.output} --config.model.vocab={size}'])
  return 0


def inspect_data(flags) -> int:
  """What a prepared set holds, and rows of it as the model reads them, with all targets."""
  if bool(flags.data) == bool(flags.dataset):
    raise BadInput('inspect-data: give either --data, a folder that prepare wrote, or --dataset')
  need_at_least(flags, length=1, futures=1, rows=0, positions=1)
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  from mtp_jax.data.folder import Folder
  from mtp_jax.data.prepared_set import open_set
  try:
    section = DataConfig(sources=(flags.data,) if flags.data else (), dataset=flags.dataset, length=flags.length,
                         packing=flags.packing, boundary=flags.boundary)
    config = Config(data=section).data
  except BadInput as error:
    raise BadInput(str(error).replace('config.data.', '--')) from error
  from mtp_jax.report.display import print_stderr
  if flags.data:
    prepared = open_set(Folder(flags.data, '--data'), config.cache)
  else:
    from mtp_jax import tokenizer as tokenizers
    from mtp_jax.data.dataset import dataset_once
    prepared = dataset_once(config, tokenizers.load(flags.tokenizer, '--tokenizer'), print_stderr)
  damaged = prepared.verify() if flags.verify else []
  from mtp_jax.data.corpus import Corpus, tokenizer_of
  from mtp_jax.evaluation import inspect_data as inspection
  tokenizer, values = tokenizer_of(prepared), inspection.summary(prepared)
  if flags.plot:
    inspection.plot(values, flags.plot)
  bad = ''.join(f'; {kind}: {n["skipped"]:,} skipped, {n["kept"]:,} kept'
                for kind, n in values['bad'].items())
  lines = [f'fingerprint {prepared.fingerprint}; {values["records"]:,} records{bad}', _read_as(prepared)]
  for split in ('train', 'validation'):
    n = values[split]
    density = f'{n["bytes_per_token"]:.3f} bytes per token'
    lines += ['', f'{split}: {_counts(n)}, {density}, {n["shards"]} shards', *inspection.bars(n['lengths'])]
  if flags.rows and not damaged:
    rows = Corpus(config, tokenizer, (prepared,)).rows(flags.futures, print_stderr)
    lines += ['',
              *inspection.shown(rows, tokenizer, flags.futures, flags.rows, flags.positions,
                                sys.stdout.isatty())]
  if flags.verify:
    values['damaged'] = damaged
    lines += damaged or ['every byte of every shard is what was written']
  print_result(flags, values, lines)
  return 1 if damaged else 0


def _read_as(prepared) -> str:
  from mtp_jax.data.kinds import read_as
  return read_as({file['name']: file['kind'] for file in prepared.index['inputs']})


def _counts(n: dict) -> str:
  return f'{n["documents"]:,} documents, {n["tokens"]:,} tokens, {n["bytes"]:,} bytes'


def _names(flags, flag: str) -> tuple[str, ...]:
  given = getattr(flags, flag)
  names = tuple(given.split(','))
  if not all(names):
    raise BadInput(f'--{flag}={given}: holds an empty name; write files, directories or '
                   'globs, separated by commas')
  return names


def _check_outside_inputs(flags) -> None:
  """Raises BadInput if the output is within an input, which would then be read as well."""
  from mtp_jax.data.files import without_file_scheme
  output = os.path.realpath(without_file_scheme(flags.output))
  validation = _names(flags, 'validation') if flags.validation else ()
  for given in (*_names(flags, 'input'), *validation):
    name = os.path.expanduser(without_file_scheme(given))
    if os.path.isdir(name) and output.startswith(os.path.realpath(name) + os.sep):
      raise BadInput(f'--output={flags.output}: is within the input {name} and would be read; '
                     'choose another folder')


def _reading(flags):
  """How inputs are read, as `mtp_jax.data.records.Reading`."""
  from mtp_jax.data.records import Reading
  kept = tuple(kind for kind in flags.keep.split(',') if kind)
  return Reading(flags.format, flags.field, flags.separator, kept, flags.max_document_bytes)


COMMANDS = {
    'prepare': Command(
        prepare, 'text to token shards, once',
        (*INPUT,
         ('tokenizer', 'bytes', 'bytes, or the path of a SentencePiece model file'),
         ('output', None,
          'folder of the prepared set; empty, or of an interrupted run of the same command'),
         ('validation_share', 0.01,
          'fraction held out: of the documents, by a hash of their content; of few long ones the end'),
         ('validation', '', 'files, directories or globs to hold out instead of a share of the input'),
         ('workers', -1, 'processes; -1: one per core, 0: only this process'),
         ('shard_bytes', 0, 'bytes of input per shard; 0: 1/64 of all, between 4 and 256 MiB'),
         JSON),
        "prepare --input='corpus/*.jsonl.gz' --output=data/corpus"),
    'train-tokenizer': Command(
        train_tokenizer, 'a SentencePiece model for your text',
        (*INPUT,
         ('output', None, 'the model file'),
         ('vocab', 32_000, 'number of ids, including bos, eos, pad and 256 bytes'),
         ('kind', 'bpe', 'bpe or unigram'),
         ('sample_bytes', 100_000_000, 'bytes of text to train on, sampled from all inputs'),
         JSON),
        "train-tokenizer --input='corpus/*.jsonl.gz' --output=corpus.model --vocab=32000"),
    'inspect-data': Command(
        inspect_data, 'what a prepared set holds and shows a model',
        (('data', '', 'folder that prepare wrote'),
         ('dataset', '', 'instead of it, as config.data.dataset: package.module:function'),
         ('tokenizer', 'bytes', 'of --dataset: bytes, or the path of a SentencePiece model file'),
         ('length', 256, 'L, as config.data.length'),
         ('futures', 4, 'M, as config.model.futures'),
         ('packing', 'stream', 'stream or best_fit'),
         ('boundary', 'within', 'within or across'),
         ('rows', 2, 'rows to show, evenly spaced'),
         ('positions', 24, 'positions to show of each row, around its first document boundary'),
         ('verify', False, 'read every byte and compare digests; exit code 1 if one differs'),
         ('plot', '', 'a PNG of the lengths of documents'),
         JSON),
        'inspect-data --data=data/corpus'),
}
