"""What a config trains on: its prepared sets, opened and of one tokenizer, and the rows made of
them.

`Corpus.identity` holds all that the batches of a run depend on, so that a resumed run can report
what has changed.
"""
import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from mtp_jax import tokenizer as tokenizers
from mtp_jax.checkpoint.record import TOKENIZER, check_tokenizer
from mtp_jax.config import BadInput, Config, DataConfig
from mtp_jax.config.errors import in_words
from mtp_jax.data.dataset import dataset_once
from mtp_jax.data.files import without_file_scheme
from mtp_jax.data.folder import Damaged, Folder
from mtp_jax.data.packing import Consecutive, pack
from mtp_jax.data.prepare import prepare_once
from mtp_jax.data.prepared_set import INDEX, Prepared, open_set
from mtp_jax.data.progress import NoMeter, quiet
from mtp_jax.data.rows import Batches, Mixture, Rows, SourceRows
from mtp_jax.data.shards import Stream
from mtp_jax.tokenizer import Tokenizer

ORDER = 2  # version of the order of rows; checkpoints that name none have the first
COUNTS = ('files', 'documents', 'tokens', 'held_out_documents')


@dataclasses.dataclass(frozen=True)
class Corpus:
  """One prepared set for each of config.sources and for config.dataset, or that of config.paths.

  validation_sets: those of config.validation, beside sources.
  """
  config: DataConfig
  tokenizer: Tokenizer
  sources: tuple[Prepared, ...]
  validation_sets: tuple[Prepared, ...] = ()

  @property
  def validation(self) -> tuple[Stream, ...]:
    """What is held out: all of the validation sets, or else the held-out documents of each source."""
    if self.validation_sets:
      return tuple(stream for s in self.validation_sets for stream in (s.train, s.validation) if stream.tokens)
    return tuple(source.validation for source in self.sources)

  @property
  def identity(self) -> dict:
    """What a checkpoint keeps of the data, as JSON: runs of equal identity get the same batches."""
    c = self.config
    sources = [_source_identity(source) for source in self.sources]
    return {'sources': sources, 'validation': [s.fingerprint[:16] for s in self.validation_sets],
            'weights': list(c.weights), 'length': c.length, 'packing': c.packing,
            'boundary': c.boundary, 'seed': c.seed, 'order': ORDER}

  @property
  def weights(self) -> tuple[float, ...]:
    """Of the sources; by default proportional to their tokens."""
    return self.config.weights or tuple(float(source.train.tokens) for source in self.sources)

  def rows(self, futures: int, note=quiet) -> SourceRows:
    """Training rows, packed as the config says; makes the best-fit packing if it is not in
    config.cache.

    Args:
      futures: M.
      note: see data/progress.py.
    """
    c, streams = self.config, [source.train for source in self.sources]
    if c.packing == 'best_fit':
      packings = [pack(s.train, c.length, c.cache, s.fingerprint) for s in self.sources]
      sizes = [f'{len(packing):,} rows, {packing.padding:.2%} padding' for packing in packings]
      note('best_fit: ' + ', '.join(sizes))
    else:
      packings = [Consecutive(stream, c.length) for stream in streams]
    return self._source_rows([s.fingerprint[:16] for s in self.sources], streams, packings, futures, note)

  def held_out(self, futures: int, note=quiet) -> SourceRows:
    """Rows of the held-out documents, packed consecutively, so that both packings are compared alike."""
    packings = [Consecutive(stream, self.config.length) for stream in self.validation]
    return self._source_rows([''] * len(packings), self.validation, packings, futures, note)

  def beginnings(self, n: int, length: int) -> list[np.ndarray]:
    """The first `length` ids of the first n held-out documents that have at least twice as many.

    Raises:
      BadInput: there are fewer such documents.
    """
    found = []
    for stream in self.validation:
      for i in range(stream.documents):
        document = stream.document(i)
        if len(document) >= 2 * length:
          found.append(document[:length])
        if len(found) == n:
          return found
    raise BadInput(f'config.data: only {len(found)} held-out documents have {2 * length} tokens '
                   f'or more, but {n} prompts are wanted')

  def sides(self) -> str:
    """The documents and tokens to train on, and those held out, as a line.

    Raises:
      BadInput: one side has less than a row.
    """
    L, counts = self.config.length, []
    for side, streams in (('train', [source.train for source in self.sources]), ('held out', self.validation)):
      tokens, documents = sum(s.tokens for s in streams), sum(s.documents for s in streams)
      counts.append(f'{side}: {documents:,} documents, {tokens:,} tokens')
      if tokens < L:
        fix = 'give more text' if side == 'train' else ('give more text, raise config.data.validation_share, or name '
                                                        'a set of your own: config.data.validation')
        raise BadInput(f'config.data: {"; ".join(counts)}: less than a row of config.data.length={L} tokens; {fix}')
    return '; '.join(counts)

  def _source_rows(self, names: list[str], streams: Sequence[Stream], packings: list, futures: int,
                   note) -> SourceRows:
    c, t = self.config, self.tokenizer
    across, quarantine = c.boundary == 'across', c.on_damage == 'quarantine'
    return SourceRows([
        Rows(stream, packing, c.length, futures, t.bos, t.pad, across, quarantine, note, name)
        for name, stream, packing in zip(names, streams, packings, strict=True)])

  def batches(self, rows: SourceRows, batch: int, process_index: int = 0, process_count: int = 1,
              **options) -> Batches:
    """The batches of some of its rows; options as of `Batches`."""
    seed = self.config.seed
    return Batches(rows, self.weights, batch, seed, process_index, process_count, **options)

  def left_out(self, rows: int) -> list[str]:
    """The sources of which no row is among the first so many of all, a line each."""
    shares = [weight / sum(self.weights) for weight in self.weights]
    return [f'config.data.weights: source {s}, {source.folder.url}, has a share of {shares[s]:.2g}: '
            f'none of the {rows:,} rows of this run comes from it'
            for s, (source, n) in enumerate(zip(self.sources, Mixture(self.weights).counts(rows))) if not n]


def _source_identity(source: Prepared) -> dict:
  train, validation, index = source.train, source.validation, source.index
  return {'fingerprint': source.fingerprint, 'tokenizer': index['identity']['tokenizer'],
          'files': len(index['inputs']), 'documents': train.documents, 'tokens': train.tokens,
          'held_out_documents': validation.documents}


def open_corpus(config: DataConfig, tokenizer: Tokenizer, note=quiet, progress=NoMeter,
                waiting=contextlib.nullcontext) -> Corpus:
  """Opens config.sources and config.dataset; or config.paths. Paths and dataset are prepared in
  config.cache unless that was done before.

  Args:
    note, progress, waiting: see data/progress.py; for the preparation and quarantined shards.

  Raises:
    BadInput: a source is not a prepared set, is damaged, or was prepared with another tokenizer.
  """
  if not (config.sources or config.dataset):
    source = prepare_once(config.paths, tokenizer, config.validation_share, config.cache, 'config.data.paths',
                          note, progress, config.validation)
    return Corpus(config, tokenizer, (source,))
  damaged = note if config.on_damage == 'quarantine' else None
  datasets = (dataset_once(config, tokenizer, note, damaged, waiting),) if config.dataset else ()
  return Corpus(config, tokenizer, _open_sets(config, tokenizer, 'sources', note) + datasets,
                _open_sets(config, tokenizer, 'validation', note))


def _open_sets(config: DataConfig, tokenizer: Tokenizer, field: str, note) -> tuple[Prepared, ...]:
  """The prepared sets that config.sources or config.validation names."""
  quarantine = note if config.on_damage == 'quarantine' else None
  folders = [Folder(url, f'config.data.{field}') for url in getattr(config, field)]
  sources = tuple(open_set(folder, config.cache, quarantine) for folder in folders)
  for source in sources:
    if source.index['identity']['tokenizer'] != tokenizer.digest:
      name = source.index['tokenizer']
      fitting = name if name == 'bytes' else f'{source.folder.url}/{name}'
      raise BadInput(f'config.data.{field}: {source.folder.url!r} was prepared with another tokenizer than '
                     f'config.data.tokenizer={config.tokenizer!r}; set config.data.tokenizer={fitting!r}')
  return sources


def other_documents(config: DataConfig, data: Sequence[str | pathlib.Path]) -> DataConfig:
  """The config with other documents: prepared sets if one of them is such, else text.

  Raises:
    BadInput: a name is empty.
  """
  names = tuple(map(str, data))
  if not all(names):
    raise BadInput(f'data={data!r}: holds an empty name; give prepared sets, or text files and folders')
  if not any(INDEX in Folder(name, 'data').sizes() for name in names):
    return dataclasses.replace(config, paths=names, sources=(), dataset='', validation=(), weights=())
  weights = config.weights if len(names) == len(config.sources) else ()
  return dataclasses.replace(config, sources=names, paths=(), dataset='', validation=(), weights=weights)


def load_tokenizer(name: str, where: str = 'config.data.tokenizer') -> Tokenizer:
  """The tokenizer of a name: 'bytes', or the path or address of a SentencePiece model file.

  Raises:
    BadInput: as `tokenizer.load`.
  """
  name = without_file_scheme(name)
  if '://' not in name:
    return tokenizers.load(name, where)
  folder, _, file = name.rpartition('/')
  try:
    return tokenizers.SentencePiece(Folder(folder, where).read(file))
  except (OSError, BadInput) as error:
    raise BadInput(f'{where}={name!r}: {in_words(error)}') from error


def tokenizer_of_run(workdir, record: dict, given, flag: str) -> Tokenizer:
  """The tokenizer that a checkpoint was trained with.

  Args:
    given: a file; None: the copy in the workdir, or the file that the config names.
    flag: what gave it, for messages.

  Raises:
    BadInput: as `tokenizer.load`, or it is another one.
  """
  where, name = flag, given
  if given is None:
    where, name = 'config.data.tokenizer', Config.from_dict(record['config']).data.tokenizer
    if name != 'bytes' and (workdir / TOKENIZER).exists():
      name = workdir / TOKENIZER
  tokens = load_tokenizer(str(name), where)
  check_tokenizer(f'{where}={name}', tokens.digest, record, f'give the original file as {flag}')
  return tokens


def tokenizer_of(source: Prepared) -> Tokenizer:
  """The tokenizer that a set was prepared with.

  Raises:
    Damaged: its model file is not the one of the set.
  """
  name = source.index['tokenizer']
  if name == 'bytes':
    tokenizer = tokenizers.Bytes()
  else:
    tokenizer = tokenizers.SentencePiece(source.folder.read(name))
  if tokenizer.digest != source.index['identity']['tokenizer']:
    raise Damaged(f'{source.folder.url}/{name}: is not the tokenizer of this set; restore the file')
  return tokenizer


def difference(new: dict, old: dict) -> list[str]:
  """What differs between two identities, a phrase each, such as 'length 32 -> 16'; nothing from that of an import."""
  if 'imported' in old:  # weights of another framework: nothing was read yet
    return []
  old = {'order': 1, 'validation': []} | old
  changes = [f'{key} {old.get(key)} -> {value}' for key, value in new.items()
             if key != 'sources' and value != old.get(key)]
  if not _is_known(old.get('sources')):
    return ['the sources are not known', *changes]
  if len(new['sources']) != len(old['sources']):
    return [f'{len(old["sources"])} -> {len(new["sources"])} sources', *changes]
  for i, (ours, theirs) in enumerate(zip(new['sources'], old['sources'])):
    if ours['fingerprint'] != theirs['fingerprint']:
      counts = [f'{key} {theirs[key]:,} -> {ours[key]:,}' for key in COUNTS if ours[key] != theirs[key]]
      if ours['tokenizer'] != theirs['tokenizer']:
        counts.append('its tokenizer')
      same_counts = 'the same numbers of documents and tokens, but different ones, or different options'
      changes.append(f'source {i}: ' + (', '.join(counts) or same_counts))
  return changes


def _is_known(sources) -> bool:
  """Whether these are the sources of an identity, as `difference` compares them."""
  return isinstance(sources, list) and all(
      isinstance(source, dict) and {'fingerprint', 'tokenizer'} <= source.keys()
      and all(isinstance(source.get(key), int) for key in COUNTS) for source in sources)
