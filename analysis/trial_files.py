"""Reads what one trial has published: its result, its settings and its tables; what is broken is a said problem."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.frames import IMPORTED, PlannedTrial, flatten, short
from analysis.schemas import METRICS, RUNS, STATUSES, TOKEN_NORMS, TOKEN_STATISTICS, canonical


@dataclass(frozen=True)
class PublishedTable:
    """A table that a trial publishes: its columns, those by which it is sorted, whether every finished trial has it."""

    name: str
    schema: pa.Schema
    keys: tuple[str, ...]
    expected: bool = True

    @property
    def file(self) -> str:
        return f"{self.name}.parquet"

    @cached_property
    def body(self) -> pa.Schema:
        """The columns but for the trial's id, which is that of the folder whatever a file says."""
        return self.schema.remove(self.schema.get_field_index("trial_id"))


TABLES = (
    PublishedTable("metrics", METRICS, ("step", "name")),
    PublishedTable("token_norms", TOKEN_NORMS, ("step", "layer", "token", "source", "weights")),
    PublishedTable(  # trials of older versions have none
        "token_statistics", TOKEN_STATISTICS, ("step", "weights", "name", "layer", "head", "token"), expected=False
    ),
)
FILES = ("result.json", "config.json", *(table.file for table in TABLES))  # all that is read of a trial

Stamps = tuple[int, ...]  # of a trial's FILES, four numbers each


@dataclass(frozen=True)
class Record:
    """What the files of a trial say.

    Attributes:
        row: the columns of RUNS but for `sweep` and `mlflow_run_id`; of status "missing", with nulls, where there is no
            readable result.
        settings: flat; None where config.json is missing or broken, so that only the plan knows some.
        tables: by name, with the columns `PublishedTable.body`, rows as they were published.
        lasting: whether reading the same files again must give the same: a file that could not be opened may be
            readable the next time.
    """

    row: Mapping[str, Any]
    settings: Mapping[str, Any] | None
    tables: Mapping[str, pa.Table]
    problems: tuple[str, ...]
    lasting: bool = True


def stamps(folder: str, names: Sequence[str] = FILES) -> Stamps:
    """What tells whether a file in `folder` has changed: inode, size, times of content and of inode; zeros: not there.

    Files are published by rename, so that new content has a new inode.
    """
    found: list[int] = []
    for name in names:
        try:
            stat = os.stat(f"{folder}/{name}")  # noqa: PTH116 # of ten thousand folders: a Path costs more than the call
            found += (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        except OSError:
            found += (0, 0, 0, 0)
    return tuple(found)


def read_trial(folder: str, trial: PlannedTrial) -> Record:
    """What the trial in `folder` has published.

    `trial` says what is known of its settings where config.json does not.
    """
    reader = _Reader(folder, trial.trial_id)
    row = reader.result()
    settings = reader.settings(row["status"])
    tables = {}
    if row["status"] != "missing":  # else nothing of it has been accepted yet
        known = {**trial.cell, "seed": trial.seed} if settings is None else settings
        ours = known.get("command") is None and not known.get(IMPORTED)
        for table in TABLES:
            expected = table.expected and row["status"] == "finished" and (ours or table.name == "metrics")
            found = reader.table(table, expected)
            if found is not None:
                tables[table.name] = found
    return Record(row, settings, tables, tuple(reader.problems), reader.lasting)


class _Reader:
    """The files of one trial, and what is wrong with those that were read."""

    def __init__(self, folder: str, trial_id: str) -> None:
        self._folder, self._trial_id = folder, trial_id
        self.problems: list[str] = []
        self.lasting = True

    def result(self) -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(RUNS.names) | {"trial_id": self._trial_id, "status": "missing"}
        try:
            content = self._content("result.json")
            if content is None:
                return row
            raw = _object(content)
            if raw.get("status") not in STATUSES:
                raise ValueError(f"its status is {raw.get('status')!r}; allowed: {', '.join(STATUSES)}")
        except (OSError, ValueError, RecursionError) as error:
            return row | {"error": self._unreadable("result.json", error)}
        for field in RUNS:
            if field.name not in raw or field.name in ("trial_id", "sweep", "mlflow_run_id"):
                continue
            try:
                row[field.name] = result_value(field, raw[field.name])
            except (TypeError, ValueError, OverflowError, KeyError, pa.ArrowException) as error:
                self._say(f"{field.name} in result.json is unreadable: {short(error)}")
        return row

    def settings(self, status: str) -> dict[str, Any] | None:
        try:
            content = self._content("config.json")
            if content is not None:
                return flatten(_object(content))
        except (OSError, ValueError, RecursionError) as error:
            self._unreadable("config.json", error)
            return None
        if status != "missing":
            self._say("config.json is missing")
        return None

    def table(self, table: PublishedTable, expected: bool) -> pa.Table | None:
        try:
            content = self._content(table.file)
            if content is not None:
                source = pq.ParquetFile(pa.BufferReader(content), pre_buffer=False)
                return _body(source.read(use_threads=False), table)
        except (OSError, pa.ArrowException, ValueError) as error:
            self._unreadable(table.file, error)
            return None
        if expected:
            self._say(f"it has finished, but {table.file} is missing")
        return None

    def _content(self, name: str) -> bytes | None:
        """The bytes of a file; None where there is none. Raises OSError."""
        try:
            with open(f"{self._folder}/{name}", "rb") as file:  # noqa: PTH123 # as in `stamps`
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            self.lasting = False
            raise

    def _unreadable(self, name: str, error: BaseException) -> str:
        text = f"{name} is unreadable: {short(error)}"
        self._say(text)
        return _printable(text)

    def _say(self, text: str) -> None:
        self.problems.append(_printable(f"trial {self._trial_id}: {text}"))


def result_value(field: pa.Field, value: Any) -> Any:
    """`value` of a result as its column of RUNS wants it. Raises TypeError, ValueError or an error of pyarrow."""
    if value is None:
        return None
    if field.name == "started":
        moment = datetime.fromisoformat(value)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    if field.name == "versions":
        value = canonical(dict(value))
    elif field.name == "error":
        value = f"{value['type']}: {value['message']}" if isinstance(value, dict) else str(value)
    return pa.scalar(value, type=field.type).as_py()


def _object(content: bytes) -> dict[str, Any]:
    """The JSON object in `content`. Raises ValueError."""
    value = json.loads(content.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    if b"\\ud" in content.lower():  # half of a surrogate pair, which no column of text can hold
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _body(raw: pa.Table, table: PublishedTable) -> pa.Table:
    """`raw` with the columns and types of the table but for the id. Raises ValueError or an error of pyarrow."""
    if raw.schema.equals(table.schema):
        return raw.drop_columns(["trial_id"])
    if raw.schema.equals(table.body):
        return raw
    found = set(raw.column_names)
    columns = []
    for field in table.body:
        if field.name in found:
            column = raw[field.name]
            columns.append(column if column.type.equals(field.type) else column.cast(field.type))
        elif field.name in table.keys:
            raise ValueError(f"it has no column {field.name}")
        else:
            columns.append(pa.nulls(raw.num_rows, field.type))
    return pa.table(columns, schema=table.body)


def sort(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Trials' tables one after the other, trials in rising order, each sorted by `keys`, null first; equal keys stay in
    their order.
    """
    if _is_sorted(table, keys):  # as published, which is cheaper to see than to sort again
        return table
    order = [(key, "ascending", "at_start") for key in ("trial_id", *keys)]
    return table.take(pc.sort_indices(table, sort_keys=order))


def _is_sorted(table: pa.Table, keys: Sequence[str]) -> bool:
    """Whether each row's keys are not below those of the row before it, where both are of one trial."""
    rising = pa.scalar(True)  # of equal keys
    for key in reversed(keys):
        column = table[key].combine_chunks()
        if column.null_count:
            column = column.fill_null("" if pa.types.is_string(column.type) else -1)
        before, after = column[:-1], column[1:]
        rising = pc.or_(pc.less(before, after), pc.and_(pc.equal(before, after), rising))
    trials = table["trial_id"].combine_chunks()
    other = pc.not_equal(trials[:-1], trials[1:])
    return bool(pc.all(pc.or_(other, rising), skip_nulls=False).as_py())
