"""Drafters: what they draft against references, and that they change no token of the text."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import (
    LENGTHS_B,
    LIMITS_B,
    NEVER,
    PROMPTS_Bp,
    S,
    V,
    choices_MBS,
    clear_MBS,
    decode_passes,
    drafts_of,
    equal_where_settled,
    generate,
    half_trained_models,
    rows,
    sampler,
    settled_lengths,
    start,
    tallies,
)

from mtp_jax.decode.decoder import Decoder
from mtp_jax.decode.drafters import DraftModel, PromptLookup


@pytest.fixture(scope='module')
def trained(tiny, random_model):
  return half_trained_models(tiny, random_model)


@pytest.mark.parametrize('name', ['shared module', 'draft model', 'lookup'])
def test_drafters_beyond_the_trained_depth_change_no_token(trained, name):
  """A shared module applied six times but trained for three, another model, prompt lookup."""
  model = trained({'kind': 'sequential', 'share_modules': True})
  another = Decoder.of(trained({'kind': 'parallel'}), V)
  drafters = {'shared module': None, 'draft model': DraftModel(another, 6), 'lookup': PromptLookup(6)}
  drafter = drafters[name]
  plain = rows(generate(model, PROMPTS_Bp, draft=0))
  settled = settled_lengths(model, lambda m: rows(generate(m, PROMPTS_Bp, draft=0)))
  state = generate(model, PROMPTS_Bp, draft=6, drafter=drafter)
  assert equal_where_settled(rows(state), plain, settled)
  passes, _, accepted_Bk = tallies(state)
  assert passes.sum() < (LIMITS_B - LENGTHS_B).sum()
  accepted_depths = 3 if name == 'lookup' else 4
  assert accepted_Bk[:, :accepted_depths].any(0).all()
  adaptive = {'lengths': (0, 1, 3, 6), 'pass_costs': np.array([1, 1.6, 2, 3], np.float32)}
  state = generate(model, PROMPTS_Bp, draft=6, drafter=drafter, **adaptive)
  assert equal_where_settled(rows(state), plain, settled)
  sampled = {'temperature': 0.8, 'same_seed': True}
  with_drafts = generate(model, PROMPTS_Bp, draft=6, drafter=drafter, **sampled)
  one_by_one = lambda m: rows(generate(m, PROMPTS_Bp, draft=0, **sampled))
  assert equal_where_settled(rows(with_drafts), one_by_one(model), settled_lengths(model, one_by_one))


def test_a_draft_model_drafts_what_it_would_generate_itself(trained):
  """After every accepted length, and after no drafts: its cached drafts against its own uncached forward."""
  model, another = trained({'kind': 'parallel'}), trained({'kind': 'linear'})
  parts, state = start(model, PROMPTS_Bp, draft=3, drafter=DraftModel(Decoder.of(another, V), 3))
  drafts_Bk, accepted, clear = drafts_of(parts, 3), set(), []
  while not state.done_B.all():
    drafts, active = np.asarray(drafts_Bk(state)), np.flatnonzero(~state.done_B)
    tokens_BS, length_B = np.array(state.tokens_BS)[:, :S], np.asarray(state.length_B)
    for k in range(3):
      inside = active[length_B[active] + k < S]
      next_position = length_B[inside] + k
      choices, is_clear = (np.asarray(f(another, tokens_BS))[0, inside, next_position - 1]
                           for f in (choices_MBS, clear_MBS))
      assert np.all((drafts[inside, k] == choices) | ~is_clear)
      clear.extend(is_clear)
      tokens_BS[inside, next_position] = drafts[inside, k]
    state = decode_passes(*parts, state, NEVER, np.int32(1), lengths=(3 if length_B.sum() % 3 else 0,))
    accepted |= set((np.asarray(state.length_B) - length_B)[active].tolist())
  assert {1, 4} <= accepted and np.mean(clear) > 0.98


def test_lookup_is_the_longest_latest_repetition():
  """By a double loop over positions and lengths."""
  rng, k, B = np.random.default_rng(3), 5, 200
  tokens_BS = rng.integers(0, 3, (B, 30)).astype(np.int32)
  length_B = rng.integers(2, 25, B)
  drafts_Bk, _, _ = PromptLookup(k, 4).draft(
      None, (), jnp.asarray(tokens_BS), jnp.asarray(length_B)[:, None], k,
      sampler(B, allowed_V=np.ones(3, bool)))
  for row, n, drafts in zip(tokens_BS, length_B, np.asarray(drafts_Bk)):
    _, match = max((match_length(row, end, n - 1), end) for end in range(n - 1))
    text = row[:n].tolist()
    for _ in range(k):
      text.append(text[len(text) - (n - 1 - match)])
    assert drafts.tolist() == text[n:]


def match_length(row, end: int, last: int) -> int:
  """How many tokens up to `end` are those up to `last`, at most four."""
  return next((i for i in range(4) if end - i < 0 or row[end - i] != row[last - i]), 4)


def test_lengths_follow_what_is_accepted(trained):
  """A drafter that is always right is asked for all it has; one that never is, soon for the least."""
  model, pass_costs = trained({'kind': 'parallel'}), np.array([1.0, 1.3, 1.6], np.float32)
  right = DraftModel(Decoder.of(model, V), 3)
  wrong = DraftModel(Decoder.of(jax.tree.map(lambda x: -x, model), V), 3)

  def passes_by_length(drafter):
    state = generate(model, PROMPTS_Bp, draft=3, drafter=drafter, lengths=(1, 2, 3),
                     pass_costs=pass_costs)
    return max(tallies(state)[0].tolist(), key=sum)  # of the row that ends last

  counts = passes_by_length(right)
  assert counts[3] > 0.8 * sum(counts)
  counts = passes_by_length(wrong)
  assert counts[1] > 0.8 * sum(counts)
