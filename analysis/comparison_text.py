"""A comparison of two sweeps in words: one sentence, tables for reading, Markdown, and JSON; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from analysis import text_tables
from analysis.answer import LEVEL, supported
from analysis.changes import Change
from analysis.compare import COMPARISON, SAME_TRIALS, WELCH_T, Comparison
from analysis.discovery import is_curve
from analysis.labels import axis_labels, cell_text, flag_text, metric_label, unit, value_text
from analysis.statistics import NO_PAIR, ONE_SEED, PAIRED_T
from analysis.text_tables import TextCell, TextTable

_MOST_METRICS = 4  # that are shown where none is declared primary
_COMMIT = 12  # letters of a commit's hash
_MOST_CELLS = 3  # that are named one by one
_METHODS = {PAIRED_T: "paired by seed", WELCH_T: "Welch", SAME_TRIALS: "same trials", ONE_SEED: "one seed"}
_METHODS[NO_PAIR] = "no score in both"
_FLAGS = {
    "other_seeds": "the sweeps planned other seeds, so nothing pairs",
    "other_draws": "equal seeds draw other weights or data in the two sweeps, so nothing pairs",
    "no_variance": "all differences are equal, so there is no p-value",
}


def shown_metrics(comparison: Comparison) -> list[str]:
    """The metrics that are shown by default: those declared primary, else the first test metrics."""
    names = list(dict.fromkeys(row["metric"] for row in comparison.rows if not is_curve(row["metric"])))
    primary = [row["metric"] for row in comparison.rows if row["primary"]]
    tests = [name for name in names if name.startswith("test/")]
    return list(dict.fromkeys(primary)) or (tests or names)[:_MOST_METRICS]


def answer(comparison: Comparison) -> str:
    """What changed between A and B, in a sentence; a difference is claimed as `analysis.answer.supported` allows."""
    a, b = comparison.a, comparison.b
    tested = [row for row in comparison.rows if row["primary"]]
    compared = [row for row in tested if row["delta"] is not None]
    where = f"{len(comparison.matched.both)} cell{'s' * (len(comparison.matched.both) != 1)} in both"
    if not tested:
        return f"{a} and {b} have {where}, and neither declares a primary metric: every difference is exploratory."
    if not compared:
        return f"{a} and {b} have {where}; no primary metric has a score on both sides yet."
    if all(row["interval_method"] == SAME_TRIALS for row in compared):
        if any(row["n_a"] != row["n_same"] or row["n_b"] != row["n_same"] for row in compared):
            return f"{a} and {b} have {where}, which share trials: differences come from the others, and have no test."
        return f"{a} and {b} have {where}, of the same trials: their numbers are equal by construction."
    claimed = [row for row in compared if supported(row)]
    if not claimed:
        return f"{a} and {b} have {where}; no difference of a primary metric between them is supported."
    said = []
    for metric in dict.fromkeys(row["metric"] for row in claimed):
        for rises, word in ((True, "higher"), (False, "lower")):
            rows = [row for row in claimed if row["metric"] == metric and (row["delta"] > 0) == rises]
            if rows:
                said.append(f"{metric_label(metric)} is {word} in {b} {_where(comparison, rows)}")
    rest = len(compared) - len(claimed)
    more = f"; {rest} other difference{'s' * (rest > 1)} cannot be told from none" if rest else ""
    return f"{a} and {b} have {where}: {', and '.join(said)}{more}."


def _where(comparison: Comparison, rows: Sequence[Mapping[str, Any]]) -> str:
    if len(rows) > _MOST_CELLS:
        return f"in {len(rows)} cells"
    axes = comparison.matched.axes
    names = axis_labels(axes)
    kind = unit(rows[0]["metric"])
    said = []
    for row in rows:
        by = f"{kind.text(abs(row['delta']), False)}{kind.of_difference}"
        bounds = kind.interval(row["delta_low"], row["delta_high"])
        said.append(f"by {by} {bounds} in ({cell_text(row, axes, names)})")
    return " and ".join(said)


def number_tables(comparison: Comparison, metrics: Sequence[str] | None = None) -> list[TextTable]:
    """A table for each metric: cells in the rows; n, mean ± std of both, and B − A with its interval and method.

    Raises:
        ValueError: not both sweeps have the metric.
    """
    known = {row["metric"] for row in comparison.rows}
    chosen = shown_metrics(comparison) if metrics is None else list(metrics)
    if wrong := [metric for metric in chosen if metric not in known]:
        allowed = ", ".join(sorted(name for name in known if not is_curve(name)))
        raise ValueError(f"{comparison.a} and {comparison.b} do not both have {', '.join(wrong)}; allowed: {allowed}")
    return [_number_table(comparison, metric) for metric in chosen]


def _number_table(comparison: Comparison, metric: str) -> TextTable:
    axes = comparison.matched.axes
    rows = [row for row in comparison.rows if row["metric"] == metric]
    symbol = unit(metric).symbol
    names = axis_labels(axes)
    label = metric_label(metric)
    flags = {flag: number for number, flag in enumerate(dict.fromkeys(f for row in rows for f in row["flags"]), 1)}
    what = f"{label[:1].upper()}{label[1:]}{', ' + symbol if symbol else ''}"
    return TextTable(
        caption=f"{what}: A = {comparison.a}, B = {comparison.b}",
        notes=_notes(rows, flags),
        headings=tuple(names[axis] for axis in axes) or ("cell",),
        spanner="",
        columns=("n A", "n B", "A", "B", "B − A [95 %]", "p", "how"),
        rows=tuple(
            (tuple(value_text(row[axis]) for axis in axes) or ("the only cell",), _cells(row, flags)) for row in rows
        ),
        label=f"tab:{comparison.a}-{comparison.b}-{metric}",
    )


def _cells(row: Mapping[str, Any], flags: Mapping[str, int]) -> tuple[TextCell, ...]:
    kind = unit(row["metric"])
    means = [
        kind.text(row[f"mean_{side}"])
        + ("" if row[f"std_{side}"] is None else f" ± {kind.text(row[f'std_{side}'], False)}")
        for side in ("a", "b")
    ]
    difference = f"{kind.text(row['delta'], True)} {kind.interval(row['delta_low'], row['delta_high'])}".rstrip()
    p_value = row["p_adjusted"]
    marks = "".join(f" ({flags[flag]})" for flag in row["flags"])
    method = _METHODS.get(row["interval_method"], row["interval_method"])
    if row["interval_method"] == SAME_TRIALS:
        method = f"{row['n_same']} same trial{'s' * (row['n_same'] != 1)}"
    texts = (str(row["n_a"]), str(row["n_b"]), *means, difference, "–" if p_value is None else f"{p_value:.2g}")
    bold = row["delta"] is not None and supported(row)
    return (
        *(TextCell((text,), bold and number == 4) for number, text in enumerate(texts)),
        TextCell((method + marks,)),
    )


def _notes(rows: Sequence[Mapping[str, Any]], flags: Mapping[str, int]) -> str:
    primary = any(row["primary"] for row in rows)
    family = (
        "Holm's over all cells and primary metrics" if primary else "Benjamini and Hochberg's of exploratory metrics"
    )
    said = [f"Mean ± standard deviation. Each interval holds by itself; p is {family}."]
    said.append(f"Bold: p below {LEVEL} and an interval without 0.")
    if any(row["interval_method"] == SAME_TRIALS for row in rows):
        said.append("Same trials: one sweep adopted them from the other, so their cell has no test.")
    return " ".join([*said, *(f"({number}) {_FLAGS.get(flag) or flag_text(flag)}." for flag, number in flags.items())])


def change_table(comparison: Comparison) -> TextTable:
    """What differs besides the numbers, a row a setting or provenance; and the cells that only one sweep has."""
    rows = [
        ((change.name, _cells_of(comparison, change)), (_values(change.name, change.a), _values(change.name, change.b)))
        for change in comparison.changes
    ]
    return TextTable(
        caption=f"What changed: A = {comparison.a}, B = {comparison.b}",
        notes=" ".join(_only(comparison)) + ("" if rows else " No setting, commit, package, data or device differs."),
        headings=("what", "in"),
        spanner="",
        columns=("A", "B"),
        rows=tuple(rows),
    )


def _values(name: str, values: Sequence[str]) -> TextCell:
    shown = [value[:_COMMIT] if name == "git_commit" else value for value in values]
    return TextCell((", ".join("–" if value == "null" else value for value in shown),))


def _cells_of(comparison: Comparison, change: Change) -> str:
    if change.everywhere:
        return "all cells"
    if len(change.cells) > _MOST_CELLS:
        return f"{len(change.cells)} cells"
    axes = comparison.matched.axes
    names = axis_labels(axes)
    return "; ".join(cell_text(comparison.matched.both[number][0], axes, names) for number in change.cells)


def _only(comparison: Comparison) -> list[str]:
    """Sentences about what only one of the sweeps has."""
    matched = comparison.matched
    said = []
    for name, cells, constant, metrics in (
        (comparison.a, matched.only_a, matched.constant_a, comparison.metrics_a),
        (comparison.b, matched.only_b, matched.constant_b, comparison.metrics_b),
    ):
        for axis, value in constant.items():
            said.append(f"Only {name} has the axis {axis}, with one value: {value_text(value)}.")
        if cells:
            names = axis_labels(cells[0].values)
            texts = [f"({cell_text(cell.values, cell.values, names)})" for cell in cells[:_MOST_CELLS]]
            more = f" and {len(cells) - _MOST_CELLS} more" if len(cells) > _MOST_CELLS else ""
            said.append(f"Only in {name}: {', '.join(texts)}{more}.")
        if names_ := [metric for metric in metrics if not is_curve(metric)]:
            more = f" and {len(names_) - _MOST_CELLS} more" if len(names_) > _MOST_CELLS else ""
            said.append(f"Metrics only in {name}: {', '.join(names_[:_MOST_CELLS])}{more}.")
    return said


def markdown(comparison: Comparison, metrics: Sequence[str] | None = None) -> str:
    """The whole comparison: sentence, what changed, numbers."""
    tables = [change_table(comparison), *number_tables(comparison, metrics)]
    return "\n".join([f"{text_tables.escaped_markdown(answer(comparison))}\n", *map(text_tables.markdown, tables)])


def document(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison as JSON values; null is what does not exist."""
    matched = comparison.matched
    return {
        "a": comparison.a,
        "b": comparison.b,
        "answer": answer(comparison),
        "axes": list(matched.axes),
        "constant_a": dict(matched.constant_a),
        "constant_b": dict(matched.constant_b),
        "only_a": [dict(cell.values) for cell in matched.only_a],
        "only_b": [dict(cell.values) for cell in matched.only_b],
        "metrics_a": list(comparison.metrics_a),
        "metrics_b": list(comparison.metrics_b),
        "changes": [
            {
                "kind": change.kind,
                "name": change.name,
                "a": list(change.a),
                "b": list(change.b),
                "cells": [matched.both[number][0] for number in change.cells],
                "everywhere": change.everywhere,
            }
            for change in comparison.changes
        ],
        "rows": [
            {
                "cell": {axis: row[axis] for axis in matched.axes},
                **{name: row[name] for name in COMPARISON.names},
            }
            for row in comparison.rows
        ],
    }
