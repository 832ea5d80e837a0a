"""token_norms.parquet: schema, order, nulls, equal bytes, round trip."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainers.tokens import norms, table


def _rows(step: int = 3) -> list[norms.NormRow]:
    values = np.random.default_rng(step).normal(20, 1.5, (3, 6, 1 + 2 + 9)).astype(np.float32)
    values[0, :, :3] = 1.0
    return norms.probe_rows(values, 2, trial_id="t", step=step, weights="raw")


def test_schema_order_and_nulls() -> None:
    made = table.to_table(reversed([*_rows(3), *_rows(1)]))
    assert made.schema == table.SCHEMA
    assert made.column_names[:8] == ["trial_id", "step", "layer", "token", "source", "weights", "count", "mean"]
    keys = list(zip(*(made[key].to_pylist() for key in table.KEYS), strict=True))
    assert keys == sorted(keys) and len(set(keys)) == 24
    assert made["kurtosis"][0].as_py() is None  # equal norms; never 0 or NaN
    assert made["histogram"].type == pa.list_(pa.struct([("bin", pa.int32()), ("count", pa.int64())]))
    first = made.slice(0, 1).to_pylist()[0]
    assert (first["token"], first["histogram"]) == ("cls", [{"bin": 1537, "count": 6}])  # 1.0 starts decade 3


def test_round_trip_and_equal_bytes(tmp_path: Path) -> None:
    rows = [*_rows(1), *_rows(2)]
    table.write(rows, tmp_path / "a.parquet")
    table.write(rows[::-1], tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert table.read(tmp_path / "a.parquet") == sorted(rows, key=lambda r: (r.step, r.layer, r.token))
    assert pq.read_schema(tmp_path / "a.parquet").equals(table.SCHEMA)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]  # nothing hidden remains


def test_no_rows_make_an_empty_table() -> None:
    assert table.to_table([]).equals(table.SCHEMA.empty_table())


def test_empty_statistics_are_null() -> None:
    row = dataclasses.replace(_rows()[0], statistics=norms.NormStatistics(count=0))
    record = table.to_table([row]).to_pylist()[0]
    assert record["count"] == 0 and record["histogram"] == []
    assert all(
        record[f.name] is None for f in dataclasses.fields(norms.NormStatistics) if f.name not in ("count", "histogram")
    )


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "token_norms.parquet"
    table.write(_rows(1), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="same keys"):
        table.write([*_rows(1), *_rows(1)], path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["token_norms.parquet"]
