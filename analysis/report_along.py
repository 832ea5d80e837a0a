"""What report.html shows along axes: trends, the elimination of outliers, interquartile means; pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from analysis.labels import NONE, axis_labels, flag_text, metric_label, unit, value_text
from analysis.report_grid import Column, Grid, Names, Row, Value, digits, number, p_value, places
from analysis.results import Results

_Place = Callable[[Mapping[str, Any]], Value]


def along(results: Results, names: Names, metrics: Sequence[str]) -> list[tuple[str, str, Grid]]:
    """Tables with their headings and what is to be known of them, where they have rows.

    Args:
        metrics: those that the page shows in full, whose trends and interquartile means are shown: all primary ones,
            or others where none is declared.
    """
    primary = bool(results.frames.plan.primary)
    trends = [row for row in _rows(results.trends) if row["metric"] in metrics and row["page_p"] is not None]
    eliminated = [row for row in _rows(results.elimination) if row["n"]]
    means = [row for row in _rows(results.aggregates) if row["metric"] in metrics and row["iqm"] is not None]
    found = [
        ("Trends along ordered axes", _TRENDS + _CORRECTED[primary], trends, _trend_columns(results, primary)),
        ("Elimination of outliers", _ELIMINATION, eliminated, _elimination_columns()),
        ("Interquartile means", "Means over seeds without the lowest and the highest quarter.", means, _mean_columns()),
    ]
    return [
        (title, said, _grid(names.new("along"), title, rows, columns, results.varying))
        for title, said, rows, columns in found
        if rows
    ]


_TRENDS = (
    "Page's test asks whether a metric goes one way along all values of an axis; the quadratic in log2(1 + value) has "
    "a slope at its middle and a curvature, each a change per doubling. "
)
_CORRECTED = {
    True: "p-values are corrected by Holm over all trends of primary metrics.",
    False: "No metric was declared primary: p-values are Benjamini and Hochberg's over the trends of all metrics.",
}
_ELIMINATION = (
    "Whether a cell has no outliers, as a statement of equivalence: the one-sided 95 % upper bound of its mean "
    "fraction, over further seeds and over further images, lies below the declared limit."
)


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _grid(
    name: str,
    caption: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[tuple[Column, _Place]],
    varying: Sequence[str],
) -> Grid:
    """Metric and place among the axes, then `columns`, each with what stands in it."""
    labels = axis_labels(varying)
    axes = [axis for axis in varying if any(row[axis] is not None for row in rows)]
    first = (Column("metric", text=True), *(Column(labels[axis], title=axis) for axis in axes))
    return Grid(
        name,
        caption,
        (*first, *(column for column, _ in columns)),
        tuple(Row((_metric(row), *places(row, axes), *(place(row) for _, place in columns))) for row in rows),
        heads=len(first),
    )


def _trend_columns(results: Results, primary: bool) -> list[tuple[Column, _Place]]:
    labels = axis_labels(results.frames.plan.axes)
    by = "Holm" if primary else "Benjamini–Hochberg"
    return [
        (Column("along", text=True), lambda row: Value(labels[row["axis"]], title=row["axis"])),
        (Column("values"), _count("n_levels")),
        (Column("seeds"), _count("n_seeds")),
        (Column("direction", text=True), lambda row: Value(row["direction"] or NONE)),
        (Column("Page's L"), lambda row: Value(f"{row['page_l']:.4g}", digits(row["page_l"]))),
        (Column("p"), lambda row: p_value(row["page_p"])),
        (Column(f"p, {by}"), lambda row: p_value(row["page_p_adjusted"])),
        (Column("slope [95 %]"), _bounded("slope")),
        (Column("curvature [95 %]"), _bounded("curvature")),
        (Column(f"p of curvature, {by}"), lambda row: p_value(row["curvature_p_adjusted"])),
        (Column("optimum [95 %]"), _optimum),
        (Column("flags", text=True), _flags),
    ]


def _elimination_columns() -> list[tuple[Column, _Place]]:
    return [
        (Column("seeds"), _count("n")),
        (Column("images"), _count("n_images")),
        *((Column(label), _of_metric(name)) for label, name in _BOUNDS),
        (Column("below"), lambda row: Value(NONE if row["below"] is None else "yes" if row["below"] else "no")),
        (Column("smallest number of registers"), lambda row: Value("yes" if row["smallest"] else "no")),
        (Column("method", text=True), lambda row: Value(row["method"] or NONE)),
        (Column("flags", text=True), _flags),
    ]


_BOUNDS = (
    ("mean", "mean"),
    ("bound over seeds", "upper_seeds"),
    ("bound over images", "upper_images"),
    ("larger bound", "upper"),
    ("limit", "limit"),
)


def _mean_columns() -> list[tuple[Column, _Place]]:
    return [
        (Column("n"), _count("n")),
        (Column("interquartile mean"), _of_metric("iqm")),
        (Column("pairs"), _count("n_paired")),
        (Column("interquartile mean of differences"), _of_metric("iqm_delta", signed=True)),
        (Column("flags", text=True), _flags),
    ]


def _metric(row: Mapping[str, Any]) -> Value:
    symbol = unit(row["metric"]).symbol
    return Value(metric_label(row["metric"]) + (f", {symbol}" if symbol else ""), title=row["metric"])


def _count(name: str) -> _Place:
    return lambda row: Value(NONE, "") if row[name] is None else Value(value_text(row[name]), str(row[name]))


def _of_metric(name: str, signed: bool | None = None) -> _Place:
    return lambda row: number(row["metric"], row[name], signed)


def _bounded(name: str) -> _Place:
    """A number of a metric's unit with its interval."""

    def place(row: Mapping[str, Any]) -> Value:
        kind = unit(row["metric"])
        interval = kind.interval(row[f"{name}_low"], row[f"{name}_high"])
        return Value(kind.text(row[name], True), digits(row[name]), more=(interval,))

    return place


def _optimum(row: Mapping[str, Any]) -> Value:
    """Where the quadratic is highest or lowest, a value of the axis."""
    if row["optimum"] is None:
        return Value(NONE, "")
    low, high = row["optimum_low"], row["optimum_high"]
    interval = "" if low is None or high is None else f"[{low:.3g}, {high:.3g}]"
    return Value(f"{row['extremum']} at {row['optimum']:.3g}", digits(row["optimum"]), more=(interval,))


def _flags(row: Mapping[str, Any]) -> Value:
    notes = tuple((flag, _MEANINGS.get(flag) or flag_text(flag)) for flag in row["flags"])
    return Value("", ", ".join(row["flags"]), notes=notes, style="flags")


# Of flags of these tables alone, or that mean something else here than in the ablation table.
_MEANINGS = {
    "fewer_than_3_levels": "fewer than three values of the axis have scores",
    "fewer_than_4_seeds": "a quarter of fewer than four seeds is none",
    "first_seeds": "seeds that were added by the variance of the first ones are left out",
    "incomplete_seeds": "seeds without a score at every value of the axis are left out",
    "missing_level": "values of the axis without any score are left out",
    "no_complete_seed": "no seed has a score at every value of the axis",
    "no_images": "how many images there were is not known",
    "no_logarithm": "the axis has a value of -1 or less",
    "no_variance": "all seeds are equal, so they say nothing of further seeds",
    "normal_approximation": "the p-value is by the normal approximation",
    "one_seed": "one seed says nothing of further seeds",
    "probe_images": "the bound over images is of the images that set the threshold",
}
