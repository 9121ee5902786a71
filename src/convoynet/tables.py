"""Tables that keep their numbers, however narrow the terminal is.

Text is folded first; what is still too wide becomes several tables, one below the other, each with the first column.
Here, since the exporter and the server share it and neither imports the other.
"""

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_GAPS = (2, 1)
_LEAST_TEXT = 12
"""Characters that a column of text keeps where others need room."""


@dataclass(frozen=True)
class Column:
    """A column: numbers, which stand at the right and stay whole, or text, which may be folded."""

    title: str
    text: bool = False
    style: str = ""


def show(console: "Console", columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print the rows below the columns' titles; where nobody watches a terminal, as wide as they are."""
    from rich.table import Table
    from rich.text import Text

    cells = [max((_width(row[index]) for row in rows), default=0) for index in range(len(columns))]
    if not console.is_terminal:
        full = [max(size, _width(column.title)) for size, column in zip(cells, columns, strict=True)]
        console.width = max(console.width, sum(full) + _GAPS[0] * len(full))
    # Titles on one line if that fits, else broken between their words.
    for title, gap in itertools.product((_width, _word), _GAPS):
        most = [max(size, title(column.title)) for size, column in zip(cells, columns, strict=True)]
        groups = _groups(columns, most, console.width, gap)
        if len(groups) == 1:
            break
    for number, group in enumerate(groups):
        if number:
            console.print()
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, gap, 0, 0))
        for index, size in _sizes(group, columns, most, console.width, gap).items():
            column = columns[index]
            table.add_column(
                column.title,
                justify="left" if column.text else "right",
                style=column.style,
                width=size,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(Text(row[index]) for index in group))
        console.print(table)


def fitted(text: str, width: int, indent: int) -> str:
    """The lines, those that are longer than a terminal is wide broken between words: a terminal breaks numbers."""
    lines = []
    for line in text.splitlines():
        broken = textwrap.wrap(
            line,
            max(width, 2 * indent),
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += broken if len(line) > width else [line]
    return "\n".join(lines)


def _least(column: Column, most: int) -> int:
    return min(most, max(_LEAST_TEXT, _word(column.title))) if column.text else most


def _groups(columns: Sequence[Column], most: Sequence[int], width: int, gap: int) -> list[list[int]]:
    """The columns of each table: as many as fit, always the first and another one."""
    least = [_least(column, size) for column, size in zip(columns, most, strict=True)]
    groups, used = [[0]], least[0]
    for index in range(1, len(columns)):
        used += gap + least[index]
        if used > width and len(groups[-1]) > 1:
            groups.append([0])
            used = least[0] + gap + least[index]
        groups[-1].append(index)
    return groups


def _sizes(
    group: Sequence[int], columns: Sequence[Column], most: Sequence[int], width: int, gap: int
) -> dict[int, int]:
    """The width of each column: columns of text share what the numbers leave."""
    sizes = {index: _least(columns[index], most[index]) for index in group}
    room = width - sum(sizes.values()) - gap * (len(group) - 1)
    for index in group:
        more = min(max(room, 0), most[index] - sizes[index])
        sizes[index] += more
        room -= more
    return sizes


def _width(text: str) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, text.split("\n")), default=0)


def _word(title: str) -> int:
    """Titles are broken between their words."""
    return max(map(_width, title.split()), default=0)
