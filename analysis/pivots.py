"""Pivots for reading: one metric of a sweep over rows and columns that are axes, and which cells stand out; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from analysis.answer import supported
from analysis.cells import Cell, compared_with
from analysis.directions import direction
from analysis.discovery import is_curve
from analysis.labels import REGISTERS, axis_labels, cell_text, flag_text, metric_label, unit
from analysis.layout import place
from analysis.results import Results
from analysis.schemas import ABLATION, canonical, setting_column
from analysis.statistics import CONFIDENCE, PAIRED_BONFERRONI, POOLED_DUNNETT
from analysis.terminal import QUIET_FLAGS, lost_texts, planned_trials

Show = Literal["both", "spread", "difference"]

_MOST_NAMED = 12  # metrics that an error names

Key = tuple[Any, ...]  # values of several axes, in their order


@dataclass(frozen=True)
class Entry:
    """A cell of the sweep in a pivot.

    Attributes:
        row: of the ablation table.
        best: whether it is the best of the cells with the same baseline, which its interval supports to be better.
    """

    row: Mapping[str, Any]
    best: bool


@dataclass(frozen=True)
class Pivot:
    """One metric over rows × columns.

    Attributes:
        rows: axes whose values stand in the rows; with `columns` all in which cells differ.
        row_keys: the values of `rows` in each row, as they are shown.
        entries: by number of row and of column; where the sweep has no such cell, there is none.
        settings: axes with one value, which is that of all cells.
    """

    sweep: str
    metric: str
    primary: bool
    baseline: Mapping[str, Any] | None
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_keys: tuple[Key, ...]
    column_keys: tuple[Key, ...]
    entries: Mapping[tuple[int, int], Entry]
    settings: Mapping[str, Any]

    @property
    def caption(self) -> str:
        """What the numbers are, with their unit."""
        symbol = unit(self.metric).symbol
        label = metric_label(self.metric)
        return f"{label[:1].upper()}{label[1:]}{', ' + symbol if symbol else ''}"


def pivot(
    results: Results, metric: str, rows: Sequence[str] | None = None, columns: Sequence[str] | None = None
) -> Pivot:
    """The pivot of `metric`. By default registers stand in the columns and all other axes in the rows.

    Args:
        metric: its name, as in the ablation table.
        rows: axes, by dotted name or its last part; where only `columns` are given, all others.
        columns: as `rows`; where only `rows` are given, all others.

    Raises:
        ValueError: there is no such metric or axis, or an axis in which cells differ stands nowhere or twice.
    """
    chosen = [row for row in results.rows if row["metric"] == metric]
    if not chosen:
        raise ValueError(_no_metric(results, metric))
    in_rows, in_columns = _sides(results, rows, columns)
    row_keys = _keys(results.cells, in_rows)
    column_keys = _keys(results.cells, in_columns)
    best = _best(results, chosen)
    entries = {}
    row_of, column_of = _places(row_keys), _places(column_keys)
    for cell, row in zip(results.cells, chosen, strict=True):
        at = row_of[canonical(_key(cell, in_rows))], column_of[canonical(_key(cell, in_columns))]
        entries[at] = Entry(row, cell.key in best)
    axes = results.frames.plan.axes
    return Pivot(
        sweep=results.frames.plan.sweep,
        metric=metric,
        primary=metric in results.frames.plan.primary,
        baseline=results.frames.plan.baseline,
        rows=in_rows,
        columns=in_columns,
        row_keys=tuple(row_keys),
        column_keys=tuple(column_keys),
        entries=entries,
        settings={
            axis: results.cells[0].values[axis]
            for axis in axes
            if results.cells and axis not in (*results.varying, *in_rows, *in_columns)
        },
    )


def tidy(pivot: Pivot) -> pa.Table:
    """The numbers behind a pivot, a row a cell in the order of reading: sweep, axes, schemas.ABLATION, best."""
    ordered = [pivot.entries[at] for at in sorted(pivot.entries)]
    axes = [name for name in (ordered[0].row if ordered else ()) if name not in ABLATION.names]
    columns = {"sweep": pa.array([pivot.sweep] * len(ordered), pa.string())}
    columns |= {axis: setting_column([entry.row[axis] for entry in ordered]) for axis in axes}
    for field in ABLATION:
        columns[field.name] = pa.array([entry.row[field.name] for entry in ordered], type=field.type)
    return pa.table(columns | {"best": pa.array([entry.best for entry in ordered], pa.bool_())})


def entry_lines(
    entry: Entry, show: Show = "both", usual: int | None = None, noted: Mapping[str, int] | None = None
) -> tuple[str, ...]:
    """What a cell says, in one or two lines: mean ± std, and the difference with its interval.

    Lost trials are said in words; how many scores there are only where it is not all of the `usual` number of seeds;
    the numbers of its flags among those `noted` stand in brackets.
    """
    row, kind = entry.row, unit(entry.row["metric"])
    lost = lost_texts(row)
    if not row["n"]:
        return (", ".join(lost) or "not planned",)
    few = [f"n = {row['n']}"] if lost or row["n"] != usual else []
    marks = [f"({noted[flag]})" for flag in row["flags"] if noted and flag in noted]
    aside = "".join(f" {text}" for text in ([f"({', '.join([*few, *lost])})"] if few or lost else []) + marks)
    spread = "" if row["std"] is None else f" ± {kind.text(row['std'], signed=False)}"
    mean = f"{kind.text(row['mean'])}{spread}{aside}"
    if row["delta"] is None:
        difference = "baseline" if "baseline" in row["flags"] else ""
    else:
        difference = f"{kind.text(row['delta'], True)} {kind.interval(row['delta_low'], row['delta_high'])}".rstrip()
    alone = f"{difference}{aside}" if difference else mean
    lines = {"both": (mean, difference), "spread": (mean,), "difference": (alone,)}[show]
    return tuple(line for line in lines if line)


def usual_seeds(pivot: Pivot) -> int | None:
    """How many seeds most cells have; None where there is no cell."""
    planned = [planned_trials(entry.row) for entry in pivot.entries.values()]
    return max(sorted(set(planned)), key=planned.count, default=None)


def notes(pivot: Pivot) -> dict[str, int]:
    """The flags that mark some cells but not all, numbered in the order of reading."""
    found = dict.fromkeys(
        flag for at in sorted(pivot.entries) for flag in pivot.entries[at].row["flags"] if flag not in QUIET_FLAGS
    )
    return {flag: number for number, flag in enumerate((flag for flag in found if flag not in _of_all(pivot)), 1)}


def _of_all(pivot: Pivot) -> set[str]:
    """The flags of all cells, without those of which the entries speak."""
    each = [set(entry.row["flags"]) for entry in pivot.entries.values()]
    return set.intersection(*each) - set(QUIET_FLAGS) if each else set()


def legend(pivot: Pivot, show: Show = "both") -> str:
    """What a reader must know of the entries, in sentences."""
    usual = usual_seeds(pivot)
    names = axis_labels(dict.fromkeys([*pivot.settings, *pivot.rows, *pivot.columns, *(pivot.baseline or {})]))
    parts = []
    if pivot.settings:
        parts.append(f"All cells: {cell_text(pivot.settings, pivot.settings, names)}.")
    if show != "difference" or pivot.baseline is None:
        seeds = "" if usual is None else f" over {usual} seed{'s' * (usual != 1)} unless n is given"
        parts.append(f"Mean ± standard deviation{seeds}.")
    flags = [f"All cells: {flag_text(flag)}." for flag in sorted(_of_all(pivot))]
    flags += [f"({number}) {flag_text(flag)}." for flag, number in notes(pivot).items()]
    if pivot.baseline is None:
        return " ".join([*parts, "No baseline is declared, so there are no differences.", *flags])
    against = cell_text(pivot.baseline, pivot.baseline, names)
    if show != "spread":
        family = "" if pivot.primary else ", exploratory"
        interval = f"{'simultaneous ' if _simultaneous(pivot) else ''}{CONFIDENCE * 100:g} % interval"
        parts.append(f"Δ: difference to {against}, paired by seed, with its {interval}{family}.")
    return " ".join([*parts, _about_bold(pivot, against), *flags])


def _simultaneous(pivot: Pivot) -> bool:
    """Whether all intervals hold together with those of the other cells that have the same baseline."""
    rows = [entry.row for entry in pivot.entries.values() if entry.row["delta_low"] is not None]
    return bool(rows) and all(row["interval_method"] in (POOLED_DUNNETT, PAIRED_BONFERRONI) for row in rows)


def _about_bold(pivot: Pivot, against: str) -> str:
    if not pivot.primary:
        return "Nothing is in bold, as this metric was not declared primary."
    if direction(pivot.metric) is None:
        return "Nothing is in bold, as no direction of this metric is better."
    if not any(entry.best for entry in pivot.entries.values()):
        return f"Nothing is in bold, as no cell is supported to be better than {against}."
    better = f"where its interval and corrected p support it to be better than {against}"
    return f"Bold: the best of the cells with the same baseline, {better}."


def _no_metric(results: Results, metric: str) -> str:
    known = list(dict.fromkeys(row["metric"] for row in results.rows if not is_curve(row["metric"])))
    known.sort(key=lambda name: (name not in results.frames.plan.primary, not name.startswith("test/"), name))
    more = f" and {len(known) - _MOST_NAMED} more (tables/ablation.csv)" if len(known) > _MOST_NAMED else ""
    listed = f"{', '.join(known[:_MOST_NAMED])}{more}" if known else "none yet"
    return f"{results.frames.plan.sweep} has no metric {metric!r}; allowed: {listed}"


def _sides(
    results: Results, rows: Sequence[str] | None, columns: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes of rows and of columns. Raises ValueError, as `pivot`."""
    axes = list(results.frames.plan.axes)
    given_rows = None if rows is None else [_axis(name, axes) for name in rows]
    given_columns = None if columns is None else [_axis(name, axes) for name in columns]
    given = [*(given_rows or ()), *(given_columns or ())]
    if twice := sorted({axis for axis in given if given.count(axis) > 1}):
        raise ValueError(f"{', '.join(twice)} can stand only once, in the rows or in the columns")
    rest = [axis for axis in (results.varying or axes[:1]) if axis not in given]
    if given_rows is not None and given_columns is not None:
        if left := [axis for axis in rest if axis in results.varying]:
            raise ValueError(f"cells differ in {', '.join(left)} too: name it in the rows or in the columns")
        return tuple(given_rows), tuple(given_columns)
    if given_rows is not None:
        return tuple(given_rows), tuple(rest)
    if given_columns is not None:
        return tuple(rest), tuple(given_columns)
    across = REGISTERS if REGISTERS in rest else next(iter(rest), None)
    return tuple(axis for axis in rest if axis != across), () if across is None else (across,)


def _axis(name: str, axes: Sequence[str]) -> str:
    """The axis that is meant by its dotted name or the last part of it. Raises ValueError where none is."""
    meant = [axis for axis in axes if name in (axis, axis_labels(axes)[axis])]
    if not meant:
        raise ValueError(f"{name!r} is not an axis; allowed: {', '.join(axes) or 'none, as the sweep has no axes'}")
    return meant[0]


def _key(cell: Cell, axes: Sequence[str]) -> Key:
    return tuple(cell.values[axis] for axis in axes)


def _keys(everything: Sequence[Cell], axes: Sequence[str]) -> list[Key]:
    """The different values of `axes` together, in the order of reading."""
    found = {canonical(key): key for key in (_key(cell, axes) for cell in everything)}
    return sorted(found.values(), key=lambda key: [place(axis, value) for axis, value in zip(axes, key, strict=True)])


def _places(keys: Sequence[Key]) -> dict[str, int]:
    return {canonical(key): number for number, key in enumerate(keys)}


def _best(results: Results, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Keys of the cells with the best mean of all with the same baseline, itself included, that are supported.

    Args:
        rows: of one metric, in the order of the cells.
    """
    way = direction(rows[0]["metric"])
    if way is None:
        return set()
    by_key = {cell.key: row for cell, row in zip(results.cells, rows, strict=True)}
    groups: dict[str, list[str]] = {}
    baselines = compared_with(results.cells, results.frames.plan.baseline)
    for cell in results.cells:
        baseline = baselines[cell.key]
        if baseline is not None:
            groups.setdefault(baseline.key, [baseline.key]).append(cell.key)
    best = set()
    for keys in groups.values():
        means = {key: way * by_key[key]["mean"] for key in keys if by_key[key]["mean"] is not None}
        for key, mean in means.items():
            if mean == max(means.values()) and supported(by_key[key]) and way * by_key[key]["delta"] > 0:
                best.add(key)
    return best
