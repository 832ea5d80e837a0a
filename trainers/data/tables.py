"""Tables of paths and captions: CSV, TSV and parquet, row by row."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

TABLES = (".csv", ".tsv", ".parquet")
PATHS = ("path", "filepath", "image")
CAPTIONS = ("caption", "title", "text")
_LONGEST_FIELD = 2**24  # characters


def rows(file: Path) -> Iterator[tuple[str, bytes | str | None]]:
    """Path and caption of each row; captions as bytes where they may be no UTF-8.

    Raises:
        ValueError: it is no such table, or the columns are missing; one line that says which are allowed.
    """
    try:
        yield from _parquet(file) if file.suffix == ".parquet" else _separated(file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error


def _columns(file: Path, names: Sequence[str]) -> tuple[int, int]:
    """Where path and caption are, by the first of their names that the table has."""
    lower = [name.strip().lower() for name in names]
    places = []
    for what, allowed in (("paths", PATHS), ("captions", CAPTIONS)):
        place = next((lower.index(name) for name in allowed if name in lower), None)
        if place is None:
            shown = ", ".join(names)[:200]
            raise ValueError(f"{file} has no column of {what}; allowed: {', '.join(allowed)}; there are: {shown}")
        places.append(place)
    return places[0], places[1]


def _separated(file: Path) -> Iterator[tuple[str, bytes | str | None]]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
            table = csv.reader(opened, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
            path, caption = _columns(file, next(table, []))
            for row in table:
                if row:
                    text = row[caption] if caption < len(row) else None
                    yield (
                        row[path] if path < len(row) else "",
                        None if text is None else text.encode("utf-8", "surrogateescape"),
                    )
    except csv.Error as error:
        raise ValueError(f"{file} is no table: line {table.line_num}: {error}") from error
    finally:
        csv.field_size_limit(before)


def _parquet(file: Path) -> Iterator[tuple[str, bytes | str | None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            chosen = [names[place] for place in _columns(file, names)]
            for batch in table.iter_batches(columns=chosen):
                # As bytes: parquet does not check that its texts are UTF-8.
                path, caption = (batch.column(name).cast(pa.binary()).to_pylist() for name in chosen)
                for one, text in zip(path, caption, strict=True):
                    yield (one or b"").decode("utf-8", "surrogateescape"), text
    except pa.ArrowException as error:
        raise ValueError(f"{file} is no table of texts: {' '.join(str(error).split())[:200]}") from error
