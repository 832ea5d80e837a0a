"""The one kind of table that report.html has: columns, and rows of texts with what they are sorted by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from analysis.labels import NONE, unit, value_text

LONGEST = 120  # letters of a text in a table; a longer one is shortened and keeps its whole in the title


@dataclass(frozen=True)
class Column:
    """A column; `title` says more than the label. Texts are aligned left and may break, numbers are not."""

    label: str
    text: bool = False
    title: str = ""


@dataclass(frozen=True)
class Value:
    """What stands in a place of a table.

    Attributes:
        text: what is read; empty places have NONE.
        sort: what the column is sorted by where the text does not do: a number's digits, or "" for null, which is last.
        more: what stands after the text, or below it where a screen is narrow.
        href: where the text leads to; only addresses that the report made itself.
        notes: short words with their meaning.
        style: classes of report.css.
        name: of the link, for those who hear it without its row.
    """

    text: str
    sort: str | None = None
    more: tuple[str, ...] = ()
    href: str = ""
    notes: tuple[tuple[str, str], ...] = ()
    style: str = ""
    name: str = ""
    title: str = ""


@dataclass(frozen=True)
class Row:
    """A row; `anchor` is the id that links lead to, `group` is shared by the rows of one cell."""

    values: tuple[Value, ...]
    anchor: str = ""
    group: str = ""


@dataclass(frozen=True)
class Grid:
    """A table. The first `heads` places of each row name it; `name` is its id on the page."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    heads: int = 1
    style: str = ""


@dataclass
class Names:
    """Gives every table of a page an id of its own."""

    used: dict[str, int] = field(default_factory=dict)

    def new(self, name: str) -> str:
        self.used[name] = self.used.get(name, 0) + 1
        return name if self.used[name] == 1 else f"{name}-{self.used[name]}"


def number(metric: str, value: float | None, signed: bool | None = None, style: str = "") -> Value:
    """A value of a metric in its unit."""
    return Value(unit(metric).text(value, signed), digits(value), style=style)


def digits(value: float | None) -> str:
    """What a number is sorted by: "" where it is null or not finite."""
    return "" if value is None or not math.isfinite(value) else repr(value)


def p_value(value: float | None) -> Value:
    """A p-value; below 0.001 it is not told apart."""
    if value is None:
        return Value(NONE, "")
    return Value("< 0.001" if value < 0.001 else f"{value:.3f}", repr(value))


def places(values: Mapping[str, Any], axes: Iterable[str]) -> tuple[Value, ...]:
    """Where a cell stands on `axes`."""
    return tuple(place(values[axis]) for axis in axes)


def place(value: Any) -> Value:
    """A value of an axis; numbers are sorted as such."""
    return short(value_text(value), "" if value is None else str(value))


def short(text: str, sort: str | None = None, style: str = "") -> Value:
    """A text from outside, with its middle left out where it is very long."""
    if len(text) <= LONGEST:
        return Value(text, sort, style=style)
    return Value(
        clipped(text, LONGEST), sort if sort is None else sort[:LONGEST], style=style, title=clipped(text, 2000)
    )


def clipped(text: str, most: int) -> str:
    """`text` with its middle left out where it is longer than `most`, as names of one kind differ at their ends."""
    end = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - end]}…{text[-end:]}"


def pairs(name: str, caption: str, rows: Sequence[tuple[str, str]]) -> Grid:
    """Names and their texts."""
    columns = (Column("what", text=True), Column("value", text=True))
    lines = tuple(Row((short(what), Value(clipped(text, 500), style="wrap"))) for what, text in rows)
    return Grid(name, caption, columns, lines)
