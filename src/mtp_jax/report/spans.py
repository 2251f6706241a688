"""Text in coloured pieces as HTML, for the report and for notebooks.

Ground and ink of every piece are set, so that it is as readable on a dark page as on a light one.
"""
import codecs
import html
from collections.abc import Iterable, Sequence

INK, GREY, PAPER = '#1f2328', '#57606a', '#ffffff'


def characters(tokens: Sequence[bytes]) -> list[tuple[str, range]]:
  """The text in pieces that no character is cut by, each with the numbers of its tokens.

  A token that ends inside a character is in one piece with those that complete it. What is not
  UTF-8 becomes U+FFFD. A token without text, such as an end of document, gives no piece of its own.
  """
  decoder, pieces = codecs.getincrementaldecoder('utf-8')(errors='replace'), []
  text, first = '', 0
  for i, token in enumerate(tokens):
    text += decoder.decode(token)
    if not decoder.getstate()[0]:
      pieces.append((text, range(first, i + 1)))
      text, first = '', i + 1
  pieces.append((text + decoder.decode(b'', final=True), range(first, len(tokens))))
  return [(text, numbers) for text, numbers in pieces if text]


def span(text: str, colour: str, hint: str, style: str = '') -> str:
  """A piece of text on a colour; the hint is shown under the mouse, and a line's end as a mark."""
  visible = html.escape(text).replace('\n', f'<span style="color:{GREY}">⏎</span>\n')
  return f'<span style="{style}background:{colour};color:{INK}" title="{html.escape(hint)}">{visible}</span>'


def block(spans: Iterable[str]) -> str:
  """Pieces as one text, on white."""
  style = (f'white-space:pre-wrap;overflow-wrap:anywhere;background:{PAPER};color:{INK};padding:.6em .8em;'
           'border:1px solid #8b949e;border-radius:6px;line-height:1.5;font-family:monospace')
  return f'<pre style="{style}">{"".join(spans)}</pre>'


def legend(keys: Iterable[tuple[str, str]]) -> str:
  """A legend of (colour, meaning)."""
  swatch = 'display:inline-block;width:.9em;height:.9em;vertical-align:-.1em;border:1px solid'
  parts = ''.join(f'<span style="margin-right:1.2em;white-space:nowrap"><span style="{swatch} {GREY};'
                  f'background:{colour}"></span> {html.escape(meaning)}</span>' for colour, meaning in keys)
  return f'<div style="margin:.4em 0">{parts}</div>'
