"""The table token_statistics: numbers of a layer, head or kind of token at a step, and its file."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trainers.files import write_whole

SCHEMA = pa.schema(
    [
        ("trial_id", pa.string()),
        ("step", pa.int64()),
        ("weights", pa.string()),
        ("name", pa.string()),
        ("layer", pa.int64()),
        ("head", pa.int64()),
        ("token", pa.string()),
        ("value", pa.float64()),
    ]
)


@dataclass(frozen=True)
class StatisticRow:
    """One number; `layer`, `head` and `token` are None where they make no sense."""

    trial_id: str
    step: int
    weights: str  # "raw", "ema" or "teacher"
    name: str
    layer: int | None
    head: int | None
    token: str | None
    value: float


def to_table(rows: Iterable[StatisticRow]) -> pa.Table:
    """Rows as a table sorted by all columns but the value; null stands first.

    Raises:
        ValueError: two rows differ in their value alone.
    """
    rows = list(rows)
    keyed = {_key(row): row for row in rows}
    if len(keyed) < len(rows):
        twice = [key for key, count in Counter(map(_key, rows)).items() if count > 1]
        raise ValueError(f"two rows of token_statistics have the same keys: {twice[0]}")
    ordered = [astuple(keyed[key]) for key in sorted(keyed)]
    columns = list(zip(*ordered, strict=True)) if ordered else [()] * len(SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _key(row: StatisticRow) -> tuple[object, ...]:
    layer, head = (-1 if index is None else index for index in (row.layer, row.head))
    return (row.trial_id, row.step, row.weights, row.name, layer, head, row.token or "")


def from_table(table: pa.Table) -> list[StatisticRow]:
    """The rows of a table, the inverse of `to_table`."""
    return [_row(record) for record in table.to_pylist()]


def _row(record: Mapping[str, object]) -> StatisticRow:
    return StatisticRow(**{field.name: record[field.name] for field in fields(StatisticRow)})  # type: ignore[arg-type]


def write(rows: Iterable[StatisticRow], path: Path) -> None:
    """Publish rows as a parquet file at `path`, by rename; the same rows give the same bytes."""
    buffer = io.BytesIO()
    pq.write_table(to_table(rows), buffer, compression="snappy")  # zstd takes twice as long to read
    write_whole(path, buffer.getbuffer())


def read(path: Path) -> list[StatisticRow]:
    """The rows of a file that `write` published."""
    return from_table(pq.read_table(path, schema=SCHEMA, partitioning=None))
