"""Tables of layers that fit the terminal: what does not fit beside the figures is said under them, once for each text."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich is imported when a table is drawn
    from rich.console import RenderableType
    from rich.text import Text

WIDTH = 110  # of what is printed to a file or a pipe
GAP = 2
NARROWEST_NOTE = 30  # a narrower column of sentences is hard to read


@dataclass(frozen=True)
class Column:
    """A column of short cells.

    Attributes:
        heading: over the column.
        right: align figures on the right.
        leaves: where the table is too wide, the column with the lowest number is left out first; 0 stays always.
    """

    heading: str
    right: bool = False
    leaves: int = 0


def terminal_width() -> int:
    """Columns of the terminal (of $COLUMNS where that is set); 110 where the output goes to a file or a pipe."""
    return shutil.get_terminal_size((WIDTH, 0)).columns


def table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str | Text]],
    notes: Sequence[str] = (),
    *,
    width: int,
    title: str | None = None,
    note_heading: str = "note",
) -> RenderableType:
    """A table of at most `width` columns in which no cell is cut.

    Notes are a last column where there is room for them; else they follow below, each with the rows that it is about. Then
    columns leave as `Column.leaves` has it. Only a first column too wide by itself is folded.

    Args:
        columns: headings; the first one holds the rows' names. A column without any figure is left out.
        rows: a cell a column.
        notes: a sentence a row, "" for none; () where no row has any.
        width: of the terminal.
        title: over the table.
        note_heading: over the column of notes.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    cells = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    widths = [
        max([cell_len(column.heading), *(row[place].cell_len for row in cells)]) for place, column in enumerate(columns)
    ]
    shown = [
        place for place in range(len(columns)) if place == 0 or not cells or any(row[place].plain for row in cells)
    ]

    def room() -> int:
        return width - sum(widths[place] + GAP for place in shown)

    longest = max(map(cell_len, notes), default=0)
    beside = longest > 0 and room() >= min(longest, NARROWEST_NOTE)
    leaving = sorted((place for place in shown if columns[place].leaves), key=lambda place: columns[place].leaves)
    while room() + GAP < 0 and leaving:
        shown.remove(leaving.pop(0))

    drawn = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False,
        padding=(0, 1, 0, 0), show_edge=False,
    )  # fmt: skip
    for place in shown:
        column = columns[place]
        drawn.add_column(
            column.heading, justify="right" if column.right else "left", no_wrap=place != shown[0], overflow="fold"
        )
    if beside:
        drawn.add_column(note_heading, overflow="fold")
    for row, note in zip(cells, notes or [""] * len(cells), strict=True):
        drawn.add_row(*(row[place] for place in shown), *([Text(note)] if beside else []))
    if beside or not longest:
        return drawn
    below: dict[str, list[str]] = {}
    for row, note in zip(cells, notes, strict=True):
        if note:
            below.setdefault(note, []).append(row[0].plain)
    return Group(drawn, "", *(Text(f"{', '.join(dict.fromkeys(names))}: {note}") for note, names in below.items()))


def said_once(texts: Sequence[str]) -> str:
    """The text that all rows with a text share, "" if they differ or only one has any."""
    given = [text for text in texts if text]
    return given[0] if len(given) > 1 and len(set(given)) == 1 else ""


def as_text(*parts: RenderableType, width: int | None = None, color: bool = False) -> str:
    """What rich draws, as text of at most `width` columns (None: the terminal's), with ANSI colours if asked for."""
    from rich.console import Console

    file = io.StringIO()
    width = terminal_width() if width is None else width
    # A program that reads the text wants no colours, whatever $FORCE_COLOR says.
    console = Console(
        width=width, file=file, force_terminal=color, color_system="standard" if color else None, highlight=False
    )
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).rstrip("\n")
