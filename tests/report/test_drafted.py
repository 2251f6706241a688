"""A text in the colours of its drafts: whole characters, every token once, readable on any ground."""
import html
import re

from colours import contrast
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_jax.report.drafted import COLOURS, GREY, INK, characters, legend_html, text_html

# 'naïve', cut inside its ï, and an end of document
CUT = [b'na', '\u00ef'.encode()[:1], '\u00ef'.encode()[1:], b've', b'']


def test_a_character_of_several_tokens_is_one_piece():
  assert characters(CUT, [0, 1, 2, 3, 0]) == [('na', (0,)), ('\u00ef', (1, 2)), ('ve', (3,))]


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(st.text(max_size=30), st.data())
def test_pieces_join_to_the_text_and_hold_every_token_once(text, data):
  bytes_ = text.encode()
  cuts = sorted(data.draw(st.sets(st.integers(0, len(bytes_)))))
  tokens = [bytes_[a:b] for a, b in zip([0, *cuts], [*cuts, len(bytes_)])]
  pieces = characters(tokens, range(len(tokens)))
  assert ''.join(piece for piece, _ in pieces) == text
  held = [depth for _, depths in pieces for depth in depths]
  assert held == sorted(held) and {i for i, token in enumerate(tokens) if token} <= set(held)


def test_bytes_that_are_no_text_are_shown_as_such():
  assert ''.join(text for text, _ in characters([b'a', b'\xff', b'b', b'\xc3'], [0] * 4)) == 'a\ufffdb\ufffd'


def test_what_is_generated_is_escaped_and_line_ends_are_seen():
  shown = text_html('<b>', [b'<i>', b'&\n'], [0, 1])
  assert '&lt;b&gt;' in shown and '&lt;i&gt;' in shown and '<i>' not in shown
  assert html.unescape(re.sub('<[^>]*>', '', shown)) == '<b><i>&\u23ce\n'


def test_the_legend_counts_the_tokens_of_each_depth():
  text = re.sub('<[^>]*>', '', legend_html([0, 0, 2], 4))
  assert re.findall(r': (\d)', text) == ['2', '0', '1', '0'] and 'future 3' in text
  assert 'future 9' in legend_html([9], 4)


def test_the_text_is_readable_on_every_colour():
  assert min(contrast(INK, colour) for colour in COLOURS) > 7
  assert min(contrast(GREY, colour) for colour in COLOURS) > 3  # of the mark of a line's end
