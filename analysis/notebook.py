"""What displays itself in a notebook: tables for reading, figures, and comparisons of two sweeps."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa

from analysis import comparison_text, comparisons, readable, text_tables
from analysis.compare import Comparison
from analysis.pivots import Pivot, Show
from analysis.publish import publish_bytes

if TYPE_CHECKING:
    from analysis.figures.style import Drawn


def to_pandas(table: pa.Table) -> pd.DataFrame:
    """`table` with pyarrow's types: null stays null, and whole numbers stay whole beside it."""
    frame: pd.DataFrame = table.to_pandas(types_mapper=pd.ArrowDtype)
    return frame


@dataclass(frozen=True)
class Table:
    """Pivots of one or several metrics, below each other."""

    pivots: tuple[Pivot, ...]
    show: Show = "both"

    def to_markdown(self) -> str:
        """GitHub's Markdown."""
        return readable.text(self.pivots, "markdown", self.show)

    def to_latex(self) -> str:
        """`table` environments that need booktabs alone."""
        return readable.text(self.pivots, "latex", self.show)

    def to_csv(self) -> str:
        """The numbers in full precision, a row a cell and metric."""
        return readable.text(self.pivots, "csv", self.show)

    def to_frame(self) -> pd.DataFrame:
        """The same numbers as `to_csv`."""
        return to_pandas(readable.numbers(self.pivots))

    def save(self, path: str | Path) -> Path:
        """Writes `path` by its ending: .md, .tex, .csv or .parquet.

        Raises:
            ValueError: it is none of these.
        """
        place = Path(path)
        return readable.write(place, self.pivots, readable.form_of(None, place), self.show)

    def __str__(self) -> str:
        return readable.text(self.pivots, "terminal", self.show)

    def _repr_html_(self) -> str:
        return "".join(text_tables.html_table(text_tables.of_pivot(one, self.show)) for one in self.pivots)


@dataclass(frozen=True)
class Picture:
    """A figure of a sweep."""

    drawn: Drawn

    @property
    def title(self) -> str:
        """Its heading."""
        return self.drawn.title

    @property
    def caption(self) -> str:
        """What it shows, and of which trials."""
        return self.drawn.caption

    @property
    def png(self) -> bytes:
        """As a bitmap of 160 dots per inch."""
        return self.drawn.png

    @property
    def svg(self) -> bytes:
        """As vectors, with text as text."""
        return self.drawn.svg

    def save(self, path: str | Path) -> Path:
        """Writes `path` by its ending: .png or .svg.

        Raises:
            ValueError: it is neither.
        """
        place = Path(path)
        kinds = {".png": self.png, ".svg": self.svg}
        if place.suffix not in kinds:
            raise ValueError(f"{place} has no ending of a figure; allowed: {', '.join(kinds)}")
        return publish_bytes(place, kinds[place.suffix])

    def __repr__(self) -> str:
        return f"<Picture {self.drawn.name}: {self.title}>"

    def _repr_png_(self) -> bytes:
        return self.png

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, object]:
        """The bitmap, with the text for those who cannot see it."""
        return {"image/png": self.png, "text/plain": f"{self.title}\n{self.drawn.alternative}"}


@dataclass(frozen=True)
class Changes:
    """Sweep B against sweep A."""

    comparison: Comparison

    @property
    def answer(self) -> str:
        """What changed in the primary metrics, in a sentence."""
        return comparison_text.answer(self.comparison)

    @property
    def frame(self) -> pd.DataFrame:
        """A row a cell in both and metric: n, mean and std of A and B, B − A with interval and p, how, flags."""
        return to_pandas(self.comparison.table)

    @property
    def changes(self) -> pd.DataFrame:
        """A row a setting or provenance that differs: kind, name, a, b, number of cells, whether everywhere."""
        rows = [
            (change.kind, change.name, ", ".join(change.a), ", ".join(change.b), len(change.cells), change.everywhere)
            for change in self.comparison.changes
        ]
        return pd.DataFrame(rows, columns=["kind", "name", "a", "b", "cells", "everywhere"])

    def to_markdown(self) -> str:
        """The whole comparison, with the numbers of primary metrics."""
        return comparison_text.markdown(self.comparison)

    def save(self, path: str | Path) -> Path:
        """Writes `path` by its ending: .md, .csv, .json or .parquet.

        Raises:
            ValueError: it is none of these.
        """
        return comparisons.write(Path(path), self.comparison)

    def __str__(self) -> str:
        return comparisons.terminal_text(self.comparison)

    def _repr_html_(self) -> str:
        tables = [comparison_text.change_table(self.comparison), *comparison_text.number_tables(self.comparison)]
        return f"<p>{html.escape(self.answer)}</p>{''.join(map(text_tables.html_table, tables))}"
