"""Reads a table of results of another tool: CSV, JSON lines or parquet, one row a trial or one row a value."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.draft import is_execution_setting
from orchestrator.problems import Problem, SpecError
from orchestrator.sweep import is_metric
from trainers.config import is_setting
from trainers.explain import Fault, shown
from trainers.settings import check

STATUSES = ("finished", "diverged", "pruned", "stopped", "failed")
FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")

_MISSING = frozenset({"", "null", "none", "na", "n/a"})  # an empty cell, and how tools write one; "nan" is a value
_WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]*)")  # 007 is a text
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]+")
_REMEDY = ", by which its cell would be known; give one, or leave the row or, by --ignore, the column out"
_LONG = ("metric", "name")  # a column that names the metric of `value`
_MOST_STEP = 2**63 - 1
_MOST_PROBLEMS = 50

Row = tuple[int, Mapping[str, Any]]  # line, or number of the row in parquet; values by column


@dataclass
class Result:
    """What a table says of one trial: its cell by dotted name, its seed, and values by step and metric."""

    line: int
    cell: dict[str, Any]
    seed: int
    status: str = "finished"
    points: dict[tuple[int, str], float] = field(default_factory=dict)
    has_steps: bool = False


def read(path: Path, metrics: Mapping[str, str], ignored: Collection[str]) -> list[Result]:
    """The trials of the table in `path`, in its order.

    A column with / in its name is a metric, and so are those of `metrics` (column to metric); `ignored` ones are left
    out; `seed`, `step` and `status` are what they are called; with `metric` (or `name`) and `value` each row is one
    value; every other column is an axis: a setting by its dotted name, or else program.COLUMN.

    Raises:
        SpecError: everything that is wrong, with file and line.
        ValueError: the file cannot be read.
    """
    columns, rows = _rows(path)
    return _Table(path, columns, list(rows), metrics, ignored).results()


def _rows(path: Path) -> tuple[list[str], Iterator[Row]]:
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: the type {path.suffix or 'without a suffix'} is not known; {', '.join(FORMATS)} are")
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    try:
        if path.suffix == ".parquet":
            return _parquet(path)
        if path.suffix in (".csv", ".tsv"):
            return _csv(path)
        return _json_lines(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is no UTF-8 text, as a table must be{_encoding(path)} ({error})") from error


def _encoding(path: Path) -> str:
    """What a text that is no UTF-8 most likely is, and what is to be done."""
    like = "UTF-16" if b"\0" in path.read_bytes()[:1000] else "Latin-1 or Windows-1252"
    return f"; save it as UTF-8: it looks like {like}, which iconv or an editor converts"


def _text(path: Path) -> str:
    """The content of a text. Raises UnicodeDecodeError where it is no UTF-8; a zero byte is UTF-16 without a mark."""
    content = path.read_bytes()
    if (zero := content.find(b"\0")) >= 0:
        raise UnicodeDecodeError("utf-8", content, zero, zero + 1, "a zero byte")
    return content.decode("utf-8-sig")


def _parquet(path: Path) -> tuple[list[str], Iterator[Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
    except pa.ArrowException as error:
        raise ValueError(f"{path}: it is no readable parquet file ({error})") from error
    return table.column_names, enumerate(table.to_pylist(), 1)


def _csv(path: Path) -> tuple[list[str], Iterator[Row]]:
    text = io.StringIO(_text(path), newline="")
    reader = csv.reader(text, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    rows: list[Row] = []
    problems: list[Problem] = []
    try:
        columns = [name.strip() for name in next(reader, [])]
        _check_separator(path, columns)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(columns):
                message = f"the row has {len(cells)} values; the head has {len(columns)} columns"
                problems.append(Problem(str(path), reader.line_num, message))
            rows.append((reader.line_num, dict(zip(columns, cells, strict=False))))
    except csv.Error as error:
        problems.append(Problem(str(path), reader.line_num, f"it is no CSV: {error}"))
    if problems:
        raise SpecError(problems[:_MOST_PROBLEMS])
    return columns, iter(rows)


def _check_separator(path: Path, columns: Sequence[str]) -> None:
    """A head of one column that has another separator in it was not meant so, since a table needs two columns.

    Raises:
        SpecError: it is such a head.
    """
    wanted = "tabs" if path.suffix == ".tsv" else "commas"
    for separator, name in {";": "semicolons", "\t": "tabs", ",": "commas", "|": "bars"}.items():
        if len(columns) == 1 and separator in columns[0] and name != wanted:
            message = f"the head is one column, {shown(columns[0])}; it looks separated by {name}, not by {wanted}"
            advice = "save it with commas as .csv, or with tabs as .tsv"
            raise SpecError([Problem(str(path), 1, f"{message}; {advice}")])


def _json_lines(path: Path) -> tuple[list[str], Iterator[Row]]:
    rows: list[Row] = []
    problems: list[Problem] = []
    for number, text in enumerate(_text(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append((number, row))
        else:
            problems.append(Problem(str(path), number, f"{shown(text)} is no JSON object"))
    if problems:
        raise SpecError(problems[:_MOST_PROBLEMS])
    return list(dict.fromkeys(name for _, row in rows for name in row)), iter(rows)


class _Table:
    """A table that is being understood, and the problems found so far."""

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        rows: Sequence[Row],
        metrics: Mapping[str, str],
        ignored: Collection[str],
    ) -> None:
        self._file, self._rows, self._problems = str(path), rows, list[Problem]()
        self._texts = path.suffix in (".csv", ".tsv")  # where everything is text
        self._long = next((c for c in _LONG if c in columns and "value" in columns and c not in metrics), None)
        self._check_columns(columns, metrics, ignored)
        roles = {"seed", "step", "status", *ignored, *((self._long, "value") if self._long else ())}
        self._metrics = {c: metrics.get(c, c) for c in columns if c not in roles and (c in metrics or "/" in c)}
        self._axes = {c: _axis(c) for c in columns if c not in roles and c not in self._metrics}

    def _check_columns(self, columns: Sequence[str], metrics: Mapping[str, str], ignored: Collection[str]) -> None:
        for name in columns:
            if columns.count(name) > 1:
                self._report(1, f"the column {shown(name)} is there twice")
        for name in (*metrics, *ignored):
            if name not in columns:
                self._report(1, f"there is no column {shown(name)}; it has {', '.join(columns)}")

    def _report(self, line: int, message: str) -> None:
        self._problems.append(Problem(self._file, line, message))

    def results(self) -> list[Result]:
        """Every trial with all its rows.

        Raises:
            SpecError: something is wrong.
        """
        self._check_names()
        values = {column: self._typed(column, name) for column, name in self._axes.items()}
        found: dict[str, Result] = {}
        first: dict[tuple[str, int, str], int] = {}
        for index, (line, row) in enumerate(self._rows):
            cell = {name: values[column][index] for column, name in self._axes.items()}
            seed = self._whole(line, row, "seed", 2**32 - 1) or 0
            key = json.dumps([cell, seed], sort_keys=True, default=str)
            result = found.setdefault(key, Result(line, cell, seed, self._status(line, row)))
            self._add(result, key, line, row, first)
        if not self._rows and not self._problems:
            self._report(1, "there are no rows")
        if self._problems:
            raise SpecError(self._problems[:_MOST_PROBLEMS])
        return list(found.values())

    def _check_names(self) -> None:
        names = list(self._axes.values())
        if not names:
            self._report(1, "no column is an axis, by which cells are told apart")
        for column, name in self._axes.items():
            if names.count(name) > 1:
                self._report(1, f"the column {shown(column)} would be the axis {name}, and so would another")
            elif is_execution_setting(name):
                self._report(1, f"{name} is not an axis: execution changes nothing that a trial computes; ignore it")
        if self._long is None and not self._metrics:
            advice = "such as test/top1; one of another name is given as COLUMN=test/top1"
            self._report(1, f"no column is a metric, which has a name with /, {advice}")
        for column, name in self._metrics.items():
            if not is_metric(name):
                self._report(1, _no_metric(column))

    def _typed(self, column: str, name: str) -> list[Any]:
        """The values of an axis: as the setting has them, or of one kind in the whole column."""
        raw = [row.get(column) for _, row in self._rows]
        values = [_scalar(value) if self._texts else value for value in raw]
        if self._texts and name.startswith("program."):
            values = _of_one_kind(values, raw)
        checked = []
        for (line, _), value, text in zip(self._rows, values, raw, strict=True):
            if value is None and not self._may_lack(name, text):
                self._report(line, f"the column {shown(column)} has no value{_REMEDY}")
            checked.append(None if value is None else self._checked(line, name, value, text))
        return checked

    def _may_lack(self, name: str, given: Any) -> bool:
        """Whether null is a value of the setting. A free column takes any, but one that is said: not an empty cell."""
        if name.startswith("program."):
            return not isinstance(given, str) or bool(given.strip())
        return not check(name, None)[1]

    def _checked(self, line: int, name: str, value: Any, raw: Any) -> Any:
        whole = int(value) if isinstance(value, float) and value.is_integer() else value  # 4.0 beside empty cells
        said: list[Fault] = []
        for candidate in (value, whole, raw):
            held, faults = check(name, candidate)
            if not faults:
                return list(held) if isinstance(held, tuple) else held
            said += faults
        self._report(line, said[0].message)
        return None

    def _whole(self, line: int, row: Mapping[str, Any], column: str, most: int) -> int | None:
        value = _scalar(row.get(column)) if self._texts else row.get(column)
        if value is None:
            return None
        whole = int(value) if isinstance(value, float) and value.is_integer() else value
        if type(whole) is not int or not 0 <= whole <= most:
            self._report(line, f"{column} is {shown(value)}; allowed: a whole number from 0")
            return None
        return whole

    def _status(self, line: int, row: Mapping[str, Any]) -> str:
        status = row.get("status")
        if status is None or (isinstance(status, str) and status.strip().lower() in _MISSING):
            return "finished"
        if status not in STATUSES:
            self._report(line, f"status is {shown(status)}; allowed: {', '.join(STATUSES)}")
        return str(status)

    def _add(
        self, result: Result, key: str, line: int, row: Mapping[str, Any], first: dict[tuple[str, int, str], int]
    ) -> None:
        """Put the values of a row to its trial; each step and metric comes once."""
        if (status := self._status(line, row)) != result.status:
            self._report(line, f"status is {status}, and that of line {result.line}, the same trial, {result.status}")
        step = self._whole(line, row, "step", _MOST_STEP)
        result.has_steps |= step is not None
        for metric, value in self._values(line, row):
            place = (key, step or 0, metric)
            if first.setdefault(place, line) != line:
                more = "" if step is not None else "; give different trials different seeds, or a column step"
                self._report(line, f"{metric} is given twice, first on line {first[place]}{more}")
            elif (number := self._number(line, metric, value)) is not None:
                result.points[step or 0, metric] = number

    def _values(self, line: int, row: Mapping[str, Any]) -> list[tuple[str, Any]]:
        if self._long is not None:
            name = row.get(self._long)
            if not is_metric(name):
                self._report(line, _no_metric(name))
                return []
            return [(str(name), row.get("value"))]
        return [(name, row.get(column)) for column, name in self._metrics.items()]

    def _number(self, line: int, metric: str, value: Any) -> float | None:
        """A value of a metric; None where it is missing."""
        number = _scalar(value) if self._texts else value
        if number is None:
            return None
        if isinstance(number, bool) or not isinstance(number, int | float):
            self._report(line, f"{metric} is {shown(value)}; allowed: a number, or nothing")
            return None
        try:
            return float(number)
        except OverflowError:
            self._report(line, f"{metric} is larger than any number that can be kept")
            return None


def _axis(column: str) -> str:
    """The dotted name that a column's setting has."""
    if is_setting(column):
        return column
    name = _NOT_IN_NAMES.sub("_", column).strip(".-_") or "column"
    return f"program.{name if name[0].isalpha() else f'_{name}'}"


def _no_metric(name: object) -> str:
    return f"{shown(name)} is no name of a metric; allowed: small letters, digits and _ with / between, as in val/top1"


def _scalar(text: Any) -> Any:
    """A cell of a text table as a value; None where it is missing."""
    if not isinstance(text, str) or text.strip().lower() in _MISSING:
        return None
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) and not re.match(r"[+-]?0[0-9]", text) else text


def _of_one_kind(values: Sequence[Any], raw: Sequence[Any]) -> list[Any]:
    """The values of a free column: numbers or true and false where all are, else texts."""
    kinds = {type(value) for value in values if value is not None}
    if kinds in ({int, float}, {float}) and all(value is None or math.isfinite(value) for value in values):
        return [None if value is None else float(value) for value in values]
    if len(kinds) <= 1 and kinds != {float}:
        return list(values)
    return [None if value is None else str(text).strip() for value, text in zip(values, raw, strict=True)]
