"""What a config trains on: its prepared sets, opened and of one tokenizer, and the rows made of them.

`Corpus.identity` holds all that the batches of a run depend on, so that a resumed run can report what has changed.
"""
import dataclasses

from mtp_jax import tokenizer as tokenizers
from mtp_jax.config import BadInput, DataConfig
from mtp_jax.data.folder import Damaged, Folder
from mtp_jax.data.packing import Consecutive, pack
from mtp_jax.data.prepare import prepare_once
from mtp_jax.data.prepared_set import Prepared, open_set
from mtp_jax.data.progress import NoMeter, quiet
from mtp_jax.data.rows import Batches, Rows, SourceRows
from mtp_jax.data.shards import Stream
from mtp_jax.tokenizer import Tokenizer

COUNTS = ('files', 'documents', 'tokens', 'held_out_documents')


@dataclasses.dataclass(frozen=True)
class Corpus:
  """One prepared set for each of config.sources, or that of config.paths."""
  config: DataConfig
  tokenizer: Tokenizer
  sources: tuple[Prepared, ...]

  @property
  def identity(self) -> dict:
    """What a checkpoint keeps of the data, as JSON: runs of equal identity get the same batches, from (seed, step) alone."""
    c = self.config
    return {'sources': [_source_identity(source) for source in self.sources], 'weights': list(c.weights), 'length': c.length,
            'packing': c.packing, 'boundary': c.boundary, 'seed': c.seed}

  @property
  def weights(self) -> tuple[float, ...]:
    """Of the sources; by default proportional to their tokens."""
    return self.config.weights or tuple(float(source.train.tokens) for source in self.sources)

  def rows(self, futures: int, note=quiet) -> SourceRows:
    """Training rows, packed as the config says; makes the best-fit packing if it is not in config.cache.

    Args:
      futures: M.
      note: see data/progress.py.
    """
    c = self.config
    if c.packing == 'best_fit':
      packings = [pack(source.train, c.length, c.cache, source.fingerprint) for source in self.sources]
      note('best_fit: ' + ', '.join(f'{len(packing):,} rows, {packing.padding:.2%} padding' for packing in packings))
    else:
      packings = [Consecutive(source.train, c.length) for source in self.sources]
    return SourceRows([self._rows(source.train, packing, futures, note) for source, packing in zip(self.sources, packings)])

  def held_out(self, futures: int, note=quiet) -> SourceRows:
    """Rows of the held-out documents, always packed consecutively, so that runs of both packings can be compared."""
    streams = [source.validation for source in self.sources]
    return SourceRows([self._rows(stream, Consecutive(stream, self.config.length), futures, note) for stream in streams])

  def _rows(self, stream: Stream, packing, futures: int, note) -> Rows:
    c, t = self.config, self.tokenizer
    return Rows(stream, packing, c.length, futures, t.bos, t.pad, across=c.boundary == 'across',
                quarantine=c.on_damage == 'quarantine', note=note)

  def batches(self, rows: SourceRows, batch: int, process_index: int = 0, process_count: int = 1, **options) -> Batches:
    return Batches(rows, self.weights, batch, self.config.seed, process_index, process_count, **options)


def _source_identity(source: Prepared) -> dict:
  return {'fingerprint': source.fingerprint, 'tokenizer': source.index['identity']['tokenizer'],
          'files': len(source.index['inputs']), 'documents': source.train.documents, 'tokens': source.train.tokens,
          'held_out_documents': source.validation.documents}


def open_corpus(config: DataConfig, tokenizer: Tokenizer, note=quiet, progress=NoMeter) -> Corpus:
  """Opens config.sources; or config.paths, prepared in config.cache unless that was done before.

  Args:
    note, progress: see data/progress.py; they report the preparation, and shards that are quarantined.

  Raises:
    BadInput: a source is not a prepared set, is damaged, or was prepared with another tokenizer.
  """
  if not config.sources:
    source = prepare_once(config.paths, tokenizer, config.validation_share, config.cache, 'config.data.paths', note, progress)
    return Corpus(config, tokenizer, (source,))
  quarantine = note if config.on_damage == 'quarantine' else None
  sources = tuple(open_set(Folder(url, 'config.data.sources'), config.cache, quarantine) for url in config.sources)
  for source in sources:
    if source.index['identity']['tokenizer'] != tokenizer.digest:
      name = source.index['tokenizer']
      fitting = name if name == 'bytes' else source.folder.path(name)
      raise BadInput(f'config.data.sources: {source.folder.url!r} was prepared with another tokenizer than '
                     f'config.data.tokenizer={config.tokenizer!r}; set config.data.tokenizer={fitting!r}')
  return Corpus(config, tokenizer, sources)


def tokenizer_of(source: Prepared) -> Tokenizer:
  """The tokenizer that a set was prepared with.

  Raises:
    Damaged: its model file is not the one of the set.
  """
  name = source.index['tokenizer']
  tokenizer = tokenizers.load('bytes') if name == 'bytes' else tokenizers.SentencePiece(source.folder.read(name))
  if tokenizer.digest != source.index['identity']['tokenizer']:
    raise Damaged(f'{source.folder.url}/{name}: is not the tokenizer of this set; restore the file')
  return tokenizer


def difference(new: dict, old: dict) -> list[str]:
  """What differs between two identities, a phrase each, such as 'length 32 -> 16'."""
  changes = [f'{key} {old.get(key)} -> {value}' for key, value in new.items()
             if key != 'sources' and value != old.get(key)]
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
