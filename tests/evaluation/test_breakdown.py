"""Groups of tokens: which group a token is in, and figures by group against the whole and a walk by hand."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import random_lm, random_state, write

import mtp_jax
from mtp_jax import tokenizer
from mtp_jax.config import BadInput, MeshConfig
from mtp_jax.evaluation import breakdown, held_out
from mtp_jax.evaluation.groups import KINDS, ByKind, ByPosition, kinds_of_bytes, kinds_of_tokens

LETTERS = dict(zip('isnklcpe', KINDS))  # c: punctuation, p: prose

SOURCE = '''\
def f(x):  # adds é
    """Doc
    string."""
\treturn x+1.5e3 if None is r'a\\' b' else __y2[0x1f]
'''
KINDS_OF_SOURCE = '''\
kkksncnccsspppppppppS
iiiippppppp
ppppppppppppppS
ikkkkkksnclllllskkskkkkskksllllllllskkkksnnnncllllcS
'''.replace('\n', '').lower()


def test_each_byte_of_python_source_is_of_the_kind_written_below_it():
  kinds = ''.join(next(letter for letter, kind in LETTERS.items() if kind == KINDS[i])
                  for i in kinds_of_bytes(SOURCE.encode()))
  assert kinds == KINDS_OF_SOURCE


def test_a_document_without_brackets_is_prose():
  text = b"It's what I'd not call source, and if it is in 2 lines\n  or more, then it is prose.\n"
  assert {KINDS[i] for i in kinds_of_bytes(text)} == {'prose'}
  assert kinds_of_bytes(b'').tolist() == []


def test_a_piece_is_of_the_kind_of_its_first_byte_that_is_no_space(sentencepiece_model):
  pieces = tokenizer.SentencePiece(sentencepiece_model)
  ids = pieces.encode(SOURCE)
  kinds, start, several = kinds_of_bytes(SOURCE.encode()), 0, 0
  for i, kind in zip(ids.tolist(), kinds_of_tokens(ids, pieces)):
    text = pieces.decode([i])
    lead = len(text) - len(text.lstrip())
    assert kind == kinds[start + (lead if lead < len(text) else 0)]
    several += len(set(kinds[start:start + len(text)].tolist())) > 1
    start += len(text)
  assert several > 2  # such as ' return'
  assert kinds_of_tokens(ids[:0], pieces).tolist() == []


@pytest.fixture(scope='module')
def lm(tmp_path_factory):
  """Rows of 32 tokens; documents of Python source, most of them longer than a row."""
  folder = tmp_path_factory.mktemp('breakdown')
  (folder / 'documents').mkdir()
  for i in range(12):
    (folder / 'documents' / f'{i}.py').write_text(f'def f{i}(x):  # {"é" * i}\n  return [x, {i}]\n' * (i // 4 + 1))
  return random_lm(folder, model={'layers': 4, 'futures': 3}, data={'length': 32})


def test_the_kind_of_a_token_does_not_depend_on_where_its_row_begins(lm):
  """Against the kinds of whole documents, each after bos and before eos."""
  rows, stream = lm.corpus.held_out(3), lm.corpus.validation[0]
  end = KINDS.index('end of document')
  expected = np.concatenate([[end, *kinds_of_tokens(stream.document(i), lm.tokenizer), end]
                             for i in range(stream.documents)])
  groups_BT = ByKind(rows, lm.tokenizer).groups_BT(range(len(rows)), None)
  assert groups_BT[:, :32].ravel()[:len(expected)].tolist() == expected.tolist()
  assert (groups_BT[:, :32].ravel()[len(expected):] == -1).all() and {*expected} > {0, 1, 2}


def test_positions_are_grouped_by_powers_of_two(lm):
  grouping = ByPosition(lm.corpus.held_out(3), lm.tokenizer)
  positions = np.arange(35)
  groups = grouping.groups_BT(None, {'positions': positions[None]})[0]
  assert grouping.names == ('1', '2-3', '4-7', '8-15', '16-31', '32-63') and groups[0] == -1
  for position, group in zip(positions[1:], groups[1:]):
    first, _, last = grouping.names[group].partition('-')
    assert int(first) <= position <= int(last or first)


@pytest.mark.parametrize('rows', [None, 3])
def test_groups_add_up_to_the_whole(lm, rows):
  whole = lm.evaluate(rows=rows, by=['kind', 'position'])
  for name in ('by_kind', 'by_position'):
    groups = whole[name].values()
    assert sum(group['tokens'] for group in groups) == whole['count'][0]
    nats = sum(group['tokens'] * group['nats'][0] for group in groups)
    assert nats == pytest.approx(whole['nats_sum'][0], rel=1e-6)
    for way in ('acceptance_greedy', 'acceptance_sampled'):
      every = np.array([group[way] for group in groups])
      assert (np.nanmin(every, 0) <= whole[way]).all() and (whole[way] <= np.nanmax(every, 0)).all()
  assert {'indentation', 'name', 'keyword', 'literal', 'punctuation', 'prose'} <= {*whole['by_kind']}


@pytest.mark.parametrize('mesh', [{'data': 2, 'context': 2}, {'fsdp': 2, 'tensor': 2}], ids=str)
def test_groups_on_a_mesh_are_those_on_one_device(lm, tmp_path, mesh):
  config = dataclasses.replace(lm.config, mesh=MeshConfig(**mesh))
  write(tmp_path / 'run', config, random_state(config, seed=5))
  one, several = lm.evaluate(by=['kind', 'position']), mtp_jax.load(tmp_path / 'run').evaluate(by=['kind', 'position'])
  for name in ('by_kind', 'by_position'):
    assert one[name].keys() == several[name].keys()
    for group, figures in one[name].items():
      for key in ('tokens', 'nats', 'acceptance_sampled'):  # greedy choices may be near ties
        np.testing.assert_allclose(several[name][group][key], figures[key], rtol=1e-5)


def test_counts_of_groups_are_those_of_a_walk_over_every_document(lm, packed):
  """Greedily; groups are random, and the last one is of padding."""
  c, allowed_V = lm.config.model, np.ones(lm.config.model.vocab, bool)
  batch, rng, groups = packed(c, 6, 24), np.random.default_rng(0), 4
  groups_BT = rng.integers(-1, groups, batch['tokens'].shape)
  with jax.set_mesh(lm.mesh):
    values = jax.device_get(breakdown._read_batch(lm.config, lm.model, batch, allowed_V))
  sums = breakdown._sums(values, groups_BT, groups)
  logp_MBL, counted_MBL, drafts = values
  agree_lkB = drafts['greedy'][1] > 0  # where drafts are offered they are accepted iff argmaxes agree
  offered, accepted = np.zeros((2, 2, groups + 1))
  for b in range(6):
    for t in range(24):
      if drafts['greedy'][0][t, 0, b]:  # a pass starts here and has a first draft
        for k in (1, 2):
          if not drafts['greedy'][0][t, k - 1, b]:
            break
          group = groups_BT[b, t + 1 + k]
          offered[k - 1, group] += 1
          if not agree_lkB[t, k - 1, b]:
            break
          accepted[k - 1, group] += 1
  assert sums['offered_greedy'].tolist() == offered[:, :-1].tolist() and offered[1].sum() > 3
  assert sums['accepted_greedy'].tolist() == accepted[:, :-1].tolist()
  for m in range(3):
    for group in range(groups):
      chosen = counted_MBL[m] & (groups_BT[:, 1 + m:25 + m] == group)
      assert sums['count'][m, group] == chosen.sum()
      assert sums['nats'][m, group] == pytest.approx(-logp_MBL[m][chosen].sum(), rel=1e-5)


def test_positions_sum_up_to_the_counts_of_the_evaluation(lm, packed, assert_close):
  c, allowed_V = lm.config.model, np.ones(lm.config.model.vocab, bool)
  batch = packed(c, 6, 24)
  with jax.set_mesh(lm.mesh):
    logp_MBL, counted_MBL, by_position = jax.device_get(breakdown._read_batch(lm.config, lm.model, batch, allowed_V))
    sums, _, drafts = jax.device_get(held_out.evaluate_batch(lm.config, lm.model, batch, jnp.ones(c.vocab, jnp.int32),
                                                              allowed_V))
  assert_close(np.where(counted_MBL, -logp_MBL, 0).sum((1, 2)), sums.nats_M)
  for way in ('greedy', 'sampled'):
    whole = getattr(drafts, way)
    assert_close([x.sum((0, 2)) for x in by_position[way]], [whole.offered_k, whole.accepted_k])


def test_an_unknown_grouping_is_bad_input(lm):
  with pytest.raises(BadInput, match="by='kinds': no such grouping; did you mean 'kind'"):
    lm.evaluate(by='kinds')
