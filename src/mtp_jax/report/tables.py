"""Tables with coloured columns, rendered by rich to lines of text."""
import dataclasses
import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of a table; `colour` is one of rich's names, '' for none."""
  name: str
  right: bool = False
  colour: str = ''


def render(title: str, columns: Sequence[Column], sections: Iterable[Iterable[Sequence[str]]],
           width: int,
           colour: bool) -> list[str]:
  """Lines of a table whose rows stand in sections, with a rule between two sections.

  Args:
    sections: rows of cells, one cell per column.
    width: of a line, in characters, at most.
    colour: whether the lines carry the terminal's colour codes.
  """
  table = Table(title=title, title_justify='left')
  for column in columns:
    table.add_column(column.name, justify='right' if column.right else 'left', style=column.colour)
  for rows in sections:
    for cells in rows:
      table.add_row(*cells)
    table.add_section()
  text = io.StringIO()
  Console(file=text, force_terminal=colour, width=width, highlight=False, markup=False).print(table)
  return text.getvalue().splitlines()
