"""Compact tables with a row a cell: what was measured of tokens, a column a metric, and what cells cost; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.cells import Cell
from analysis.labels import NONE, axis_labels, done_text, metric_label, unit, value_text
from analysis.results import Results

_MOST_COLUMNS = 12

# Heading, and how the names of its metrics begin.
_GROUPS = (
    ("Where outliers are", ("tokens/location/", "neighbors/", "tokens/onset")),
    ("Attention and similarity", ("attention/last/", "similarity/last/")),
    ("Local information: what patches know of their position and pixels", ("locality/",)),
    ("Global information: what one token knows of the image", ("single_token/",)),
)
# Heading, how names begin, what stands between what was done and the metric after it, and what was done is called: here
# a row is a cell and what was done to it.
_DONE = (
    ("Position or content: where outliers recur", "recurrence/", "/", "how images are seen"),
    ("Interventions: change of metrics", "interventions/", "/change/", "what is done"),
    ("Test-time registers: change of metrics", "test_time_registers/", "/change/", "what is done"),
)
_FIRST = ("test", "tokens")  # of metrics after something was done, these come first

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class MeasuredTable:
    """One table as texts; `columns` are labels and names of metrics, `rows` have names and as many texts as columns."""

    title: str
    row_headings: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    left_out: int


def measured_tables(results: Results) -> list[MeasuredTable]:
    """The tables of all kinds of measurements that have a value in any cell."""
    varying = results.varying
    by_cell = [
        (cell, {metric: row for metric, row in rows.items() if row["mean"] is not None})
        for cell, rows in zip(results.cells, results.by_cell, strict=True)
    ]
    names = sorted({name for _, metrics in by_cell for name in metrics})
    tables = [_plain(title, [n for n in names if n.startswith(begins)], by_cell, varying) for title, begins in _GROUPS]
    tables += [_done(*group, names, by_cell, varying) for group in _DONE]
    return [table for table in tables if table.rows and table.columns]


def cost_table(everything: Sequence[Cell], runs: Rows, varying: Sequence[str]) -> MeasuredTable:
    """What the accepted results of each cell cost; a trial that recorded nothing counts as nothing, and is counted.

    Args:
        everything: the cells in their order.
        runs: of the table `runs`.
        varying: the axes in which cells differ.
    """
    by_id = {run["trial_id"]: run for run in runs}
    lines = []
    for cell in everything:
        own = [by_id[trial.trial_id] for trial in cell.trials]
        seconds = [run["seconds"] for run in own if run["seconds"] is not None]
        gpu_seconds = [run["gpu_seconds"] for run in own if run["gpu_seconds"] is not None]
        texts = (f"{len(seconds)} of {len(own)}", _hours(seconds), _hours(gpu_seconds))
        lines.append((_places(cell, varying), texts))
    names = axis_labels(everything[0].values) if everything else {}
    columns = (("trials with a recorded cost", "trials"), ("trial hours", "seconds"), ("GPU hours", "gpu_seconds"))
    return MeasuredTable("By cell", tuple(names[axis] for axis in varying), columns, tuple(lines), 0)


def _hours(seconds: Sequence[float]) -> str:
    return f"{sum(seconds) / 3600:.3g}" if seconds else NONE


Cells = Sequence[tuple[Cell, Mapping[str, Mapping[str, Any]]]]


def _plain(title: str, names: Sequence[str], by_cell: Cells, varying: Sequence[str]) -> MeasuredTable:
    shown = [name for name in names if not name.endswith("_std")]
    lines = [
        (_places(cell, varying), tuple(_text(metrics.get(name)) for name in shown[:_MOST_COLUMNS]))
        for cell, metrics in by_cell
        if any(name in metrics for name in shown)
    ]
    return _table(title, _headings(by_cell, varying), [(name, name) for name in shown], lines)


def _done(
    title: str, begins: str, between: str, heading: str, names: Sequence[str], by_cell: Cells, varying: Sequence[str]
) -> MeasuredTable:
    """`interventions/WHAT/change/METRIC` as a row for each WHAT and a column for each METRIC."""
    parts = [name.removeprefix(begins).rpartition(between) for name in names if name.startswith(begins)]
    done = list(dict.fromkeys(what for what, found, _ in parts if found))
    of = sorted({metric for _, found, metric in parts if found}, key=_rank)
    lines = [
        (
            (*_places(cell, varying), done_text(what)),
            tuple(_text(metrics.get(f"{begins}{what}{between}{metric}")) for metric in of[:_MOST_COLUMNS]),
        )
        for cell, metrics in by_cell
        for what in done
        if any(f"{begins}{what}{between}{metric}" in metrics for metric in of)
    ]
    columns = [(metric, f"{begins}…{between}{metric}") for metric in of]
    return _table(title, (*_headings(by_cell, varying), heading), columns, lines)


def _rank(metric: str) -> tuple[int, str]:
    first = metric.split("/")[0]
    return (_FIRST.index(first) if first in _FIRST else len(_FIRST)), metric


def _table(
    title: str,
    headings: Sequence[str],
    columns: Sequence[tuple[str, str]],
    lines: Sequence[tuple[tuple[str, ...], tuple[str, ...]]],
) -> MeasuredTable:
    labels = tuple((_label(metric, name), name) for metric, name in columns[:_MOST_COLUMNS])
    return MeasuredTable(title, tuple(headings), labels, tuple(lines), max(0, len(columns) - _MOST_COLUMNS))


def _label(metric: str, name: str) -> str:
    symbol = unit(name).symbol
    return f"{metric_label(metric)}, {symbol}" if symbol else metric_label(metric)


def _headings(by_cell: Cells, varying: Sequence[str]) -> tuple[str, ...]:
    names = axis_labels(by_cell[0][0].values) if by_cell else {}
    return tuple(names[axis] for axis in varying)


def _places(cell: Cell, varying: Sequence[str]) -> tuple[str, ...]:
    return tuple(value_text(cell.values[axis]) for axis in varying)


def _text(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return NONE
    kind = unit(row["metric"])
    return kind.text(row["mean"]) + ("" if row["std"] is None else f" ± {kind.text(row['std'], signed=False)}")
