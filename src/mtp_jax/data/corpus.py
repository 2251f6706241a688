"""What a config trains on: its sources, found complete and of one tokenizer, and how they make rows.

`identity` tells all that fixes the batches of a run, so that a resumed run can say what changed.
"""
import dataclasses
from collections.abc import Callable

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


@dataclasses.dataclass(frozen=True)
class Corpus:
  """One prepared set for each of config.sources, or that of config.paths."""
  config: DataConfig
  tokenizer: Tokenizer
  sources: tuple[Prepared, ...]

  @property
  def identity(self) -> dict:
    """What a checkpoint keeps of the data, as JSON does: two runs of the same identity see the same batches, from (seed, step) alone."""
    c = self.config
    told = lambda source: {'fingerprint': source.fingerprint, 'tokenizer': source.index['identity']['tokenizer'], 'files': len(source.index['inputs']),
                           'documents': source.train.documents, 'tokens': source.train.tokens, 'held_out_documents': source.validation.documents}
    return {'sources': [told(source) for source in self.sources], 'weights': list(c.weights), 'length': c.length, 'packing': c.packing,
            'boundary': c.boundary, 'seed': c.seed}

  @property
  def weights(self) -> tuple[float, ...]:
    """Of the sources; by default each in proportion to its tokens."""
    return self.config.weights or tuple(float(source.train.tokens) for source in self.sources)

  def rows(self, futures: int, note: Callable[[str], None] = quiet) -> SourceRows:
    """Training rows, packed as the config says; prepares best-fit packing where it has not been."""
    c = self.config
    packings = [pack(source.train, c.length, c.cache, source.fingerprint) if c.packing == 'best_fit' else Consecutive(source.train, c.length)
                for source in self.sources]
    if c.packing == 'best_fit':
      note('best_fit: ' + ', '.join(f'{len(packing):,} rows, {packing.padding:.2%} padding' for packing in packings))
    return SourceRows([self._rows(source.train, packing, futures, note) for source, packing in zip(self.sources, packings)])

  def held_out(self, futures: int, note: Callable[[str], None] = quiet) -> SourceRows:
    """Rows of the held-out documents, one after the other whatever the packing, so that packings can be compared."""
    streams = [source.validation for source in self.sources]
    return SourceRows([self._rows(stream, Consecutive(stream, self.config.length), futures, note) for stream in streams])

  def _rows(self, stream: Stream, packing, futures: int, note) -> Rows:
    c, t = self.config, self.tokenizer
    return Rows(stream, packing, c.length, futures, t.bos, t.pad, c.boundary == 'across', c.on_damage == 'quarantine', note)

  def batches(self, rows: SourceRows, batch: int, process_index: int = 0, process_count: int = 1, **more) -> Batches:
    return Batches(rows, self.weights, batch, self.config.seed, process_index, process_count, **more)


def open_corpus(config: DataConfig, tokenizer: Tokenizer, note: Callable[[str], None] = quiet, progress=NoMeter) -> Corpus:
  """Opens the sources, or prepares config.paths, or finds that done in config.cache.

  Args:
    note, progress: as in data/progress.py; of what is prepared, and of shards that are quarantined.

  Raises:
    BadInput: a source is no prepared set, is damaged, or was prepared with another tokenizer.
  """
  if not config.sources:
    source = prepare_once(config.paths, tokenizer, config.validation_share, config.cache, 'config.data.paths', note, progress)
    return Corpus(config, tokenizer, (source,))
  missing = note if config.on_damage == 'quarantine' else None
  sources = tuple(open_set(Folder(source, 'config.data.sources'), config.cache, missing) for source in config.sources)
  for source in sources:
    if source.index['identity']['tokenizer'] != tokenizer.digest:
      theirs = source.index['tokenizer'] if source.index['tokenizer'] == 'bytes' else source.folder.path(source.index['tokenizer'])
      raise BadInput(f'config.data.sources: {source.folder.url!r} was prepared with another tokenizer than config.data.tokenizer={config.tokenizer!r}; '
                     f'set config.data.tokenizer={theirs!r}')
  return Corpus(config, tokenizer, sources)


def tokenizer_of(source: Prepared) -> Tokenizer:
  """The tokenizer that a set was prepared with."""
  name = source.index['tokenizer']
  tokenizer = tokenizers.load('bytes') if name == 'bytes' else tokenizers.SentencePiece(source.folder.read(name))
  if tokenizer.digest != source.index['identity']['tokenizer']:
    raise Damaged(f'{source.folder.url}/{name}: is not the tokenizer of this set; restore the file')
  return tokenizer


def difference(mine: dict, theirs: dict) -> list[str]:
  """What differs between two identities, a phrase each."""
  found = []
  for key in mine:
    if key != 'sources' and mine[key] != theirs.get(key):
      found.append(f'{key} {theirs.get(key)} -> {mine[key]}')
  if len(mine['sources']) != len(theirs['sources']):
    return [f'{len(theirs["sources"])} -> {len(mine["sources"])} sources', *found]
  for i, (here, there) in enumerate(zip(mine['sources'], theirs['sources'])):
    if here['fingerprint'] != there['fingerprint']:
      changed = [f'{key} {there[key]:,} -> {here[key]:,}' for key in ('files', 'documents', 'tokens', 'held_out_documents') if here[key] != there[key]]
      if here['tokenizer'] != there['tokenizer']:
        changed.append('its tokenizer')
      found.append(f'source {i}: ' + (', '.join(changed) or 'as many documents and tokens, but other ones, or other options'))
  return found
