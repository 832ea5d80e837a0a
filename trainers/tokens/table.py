"""The table token_norms: its schema, rows as a table, and the file token_norms.parquet."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainers.files import write_whole
from trainers.tokens.norms import NormRow, NormStatistics

KEYS = ("trial_id", "step", "layer", "token", "source", "weights")

HISTOGRAM = pa.list_(pa.struct([("bin", pa.int32()), ("count", pa.int64())]))
SCHEMA = pa.schema(
    [
        ("trial_id", pa.string()),
        ("step", pa.int64()),
        ("layer", pa.int64()),
        ("token", pa.string()),
        ("source", pa.string()),
        ("weights", pa.string()),
        ("count", pa.int64()),
        ("mean", pa.float64()),
        ("median", pa.float64()),
        ("p90", pa.float64()),
        ("p98", pa.float64()),
        ("p99", pa.float64()),
        ("p999", pa.float64()),
        ("max", pa.float64()),
        ("max_over_median", pa.float64()),
        ("kurtosis", pa.float64()),
        ("kurtosis_log", pa.float64()),
        ("outlier_fraction", pa.float64()),
        ("outlier_fraction_150", pa.float64()),
        ("otsu_threshold", pa.float64()),
        ("histogram", HISTOGRAM),
    ]
)


def to_table(rows: Iterable[NormRow]) -> pa.Table:
    """Rows as a table sorted by its keys (text as text: register_10 stands before register_2).

    Raises:
        ValueError: two rows have the same keys.
    """
    ordered = sorted(rows, key=_key)
    for first, second in pairwise(ordered):
        if _key(first) == _key(second):
            raise ValueError(f"two rows of token_norms have the same keys: {_key(first)}")
    columns = {key: [getattr(row, key) for row in ordered] for key in KEYS}
    statistics = [row.statistics for row in ordered]
    columns |= {f.name: [getattr(s, f.name) for s in statistics] for f in fields(NormStatistics)}
    columns["histogram"] = _histograms([s.histogram for s in statistics])
    return pa.table(columns, schema=SCHEMA)


def _key(row: NormRow) -> tuple[str, int, int, str, str, str]:
    return (row.trial_id, row.step, row.layer, row.token, row.source, row.weights)


def _histograms(histograms: Sequence[tuple[tuple[int, int], ...]]) -> pa.Array:
    offsets = np.cumsum([0, *map(len, histograms)], dtype=np.int32)
    pairs = np.array([pair for histogram in histograms for pair in histogram], dtype=np.int64).reshape(-1, 2)
    entries = pa.StructArray.from_arrays(
        [pa.array(pairs[:, 0], pa.int32()), pa.array(pairs[:, 1], pa.int64())], fields=list(HISTOGRAM.value_type)
    )
    return pa.ListArray.from_arrays(pa.array(offsets), entries, type=HISTOGRAM)


def from_table(table: pa.Table) -> list[NormRow]:
    """The rows of a table, the inverse of `to_table`."""
    return [_row(record) for record in table.to_pylist()]


def _row(record: dict[str, object]) -> NormRow:
    entries = record["histogram"]
    assert isinstance(entries, list)
    histogram = tuple((entry["bin"], entry["count"]) for entry in entries)
    numbers = {f.name: record[f.name] for f in fields(NormStatistics) if f.name != "histogram"}
    statistics = NormStatistics(**numbers, histogram=histogram)  # type: ignore[arg-type] # as SCHEMA has them
    return NormRow(**{key: record[key] for key in KEYS}, statistics=statistics)  # type: ignore[arg-type]


def write(rows: Iterable[NormRow], path: Path) -> None:
    """Publish rows as a parquet file at `path`, by rename; the same rows give the same bytes."""
    buffer = io.BytesIO()
    pq.write_table(to_table(rows), buffer, compression="snappy")  # zstd takes twice as long to read
    write_whole(path, buffer.getbuffer())


def read(path: Path) -> list[NormRow]:
    """The rows of a file that `write` published, for a resumed trial to go on from."""
    return from_table(pq.read_table(path, schema=SCHEMA, partitioning=None))
