"""Tables in words for the terminal: pivots, and what two sweeps have in common."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.text_tables import TextCell, TextTable

_WIDE = 240  # columns of a file that a terminal table goes to


def terminal_table(table: TextTable) -> Table:
    """`table` with its notes below; texts from outside are no markup."""
    spanner = f"{table.spanner} =\n" if table.spanner else ""
    shown = Table(
        title=Text(table.caption),
        title_justify="left",
        header_style="bold",
        caption=Text(table.notes),
        caption_justify="left",
    )
    for heading in table.headings:
        shown.add_column(Text(heading), justify="left")
    for column in table.columns:
        shown.add_column(Text(f"{spanner}{column}"), justify="right")
    for names, cells in table.rows:
        shown.add_row(*(Text(name) for name in names), *(_entry(cell) for cell in cells))
    return shown


def rendered(tables: Sequence[Table]) -> str:
    """Tables as text, as wide as the terminal and in colour where standard output is one, else as they need."""
    stream = io.StringIO()
    real = Console().is_terminal
    width = shutil.get_terminal_size().columns if real else _WIDE
    console = Console(file=stream, width=width, force_terminal=real)
    for table in tables:
        console.print(table)
    return stream.getvalue()


def _entry(cell: TextCell) -> Text:
    """The first line as it is, the others dim; all bold where the cell is."""
    first, *others = cell.lines or ("",)
    text = Text(first, style="bold" if cell.bold else "")
    for line in others:
        text.append(f"\n{line}", style="bold" if cell.bold else "dim")
    return text
