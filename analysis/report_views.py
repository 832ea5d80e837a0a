"""What report.html shows of scores: the compact table, all statistics of each metric, warnings, trials; pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from analysis.answer import supported
from analysis.labels import NONE, REGISTERS, axis_labels, cell_name, flag_text, metric_label, unit
from analysis.report_facts import run_address
from analysis.report_grid import LONGEST, Column, Grid, Row, Value, clipped, digits, number, p_value, places, short
from analysis.results import Results
from analysis.terminal import QUIET_FLAGS, lost_texts, planned_trials

_LONGEST_NAME = 100  # letters of a cell's name in a sentence
_MOST_NAMED = 6  # cells named one by one in a warning
_PRIMARY = "corrected p"
_EXPLORATORY = "p, Benjamini–Hochberg"

Rows = Sequence[Mapping[str, Any]]


def heading(metric: str) -> str:
    """A metric and its unit."""
    label, symbol = clipped(metric_label(metric), LONGEST), unit(metric).symbol
    return f"{label}, {symbol}" if symbol else label


def names_of(results: Results) -> list[str]:
    """Each cell in words, in their order."""
    labels = axis_labels(results.frames.plan.axes)
    return [clipped(cell_name(cell.values, results.varying, labels), _LONGEST_NAME) for cell in results.cells]


def compact(results: Results, metrics: Sequence[str]) -> tuple[Grid, list[tuple[int, str]]]:
    """The table of the first screen: a row a cell, a column a metric; and its notes, each flag with its number."""
    axes = [*results.varying] or list(results.frames.plan.axes)[:1]
    labels, names = axis_labels(results.frames.plan.axes), names_of(results)
    numbers: dict[str, int] = {}
    rows = []
    for index, found in enumerate(results.by_cell):
        chosen = [found[metric] for metric in metrics]
        values = results.cells[index].values
        rows.append(
            Row(
                (
                    *places(values, axes),
                    _count(chosen, anchor(index), names[index]),
                    *(_compact(row, numbers) for row in chosen),
                )
            )
        )
    columns = (
        *(Column("registers" if axis == REGISTERS else labels[axis], title=axis) for axis in axes),
        Column("trials", title="finished trials with a score; they lead to the trials"),
        *(Column(heading(metric), title=metric) for metric in metrics),
    )
    caption = (
        "Primary metrics of each cell (setting)" if results.frames.plan.primary else "Metrics of each cell (setting)"
    )
    grid = Grid("summary", caption, columns, tuple(rows), heads=max(1, len(axes)), style="compact")
    return grid, [(note, flag_text(flag)) for flag, note in numbers.items()]


def _compact(row: Mapping[str, Any], numbers: dict[str, int]) -> Value:
    kind = unit(row["metric"])
    text = kind.text(row["mean"]) + ("" if row["std"] is None else f" ± {kind.text(row['std'], signed=False)}")
    if row["n"] == 0:
        text = ", ".join(lost_texts(row)) or NONE
    told = [flag for flag in row["flags"] if flag not in QUIET_FLAGS]
    notes = tuple((str(numbers.setdefault(flag, len(numbers) + 1)), flag_text(flag)) for flag in told)
    more: tuple[str, ...] = ("baseline",) if "baseline" in row["flags"] else ()
    if row["delta"] is not None:
        more = (kind.text(row["delta"], True), kind.interval(row["delta_low"], row["delta_high"]))
    style = ("claimed " if supported(row) else "") + ("lost" if row["n"] == 0 else "")
    return Value(text, digits(row["mean"]), more=more, notes=notes, style=style.strip())


def _count(chosen: Rows, target: str, name: str) -> Value:
    """Scores of planned trials as a link to them: "3", or "2/3" where some are missing."""
    planned = planned_trials(chosen[0]) if chosen else 0
    least = min((row["n"] for row in chosen), default=0)
    text = f"{least}" if least == planned else f"{least}/{planned}"
    return Value(
        text, str(least), href=f"#{target}", style="" if least == planned else "lost", name=f"{text} trials of {name}"
    )


def anchor(number: int) -> str:
    """The id of the place where a cell's trials stand."""
    return f"cell-{number + 1}"


def statistics(
    results: Results, name: str, caption: str, chosen: Iterable[tuple[int, str]], primary: bool, several: bool = False
) -> Grid:
    """All statistics of some rows of the ablation table.

    Args:
        name, caption: of the table.
        chosen: cells by their number, and metrics.
        primary: whether the metrics were declared primary, which decides how their p-values are corrected.
        several: whether there are several metrics, which are then named in each row.
    """
    found, names = results.by_cell, names_of(results)
    labels = axis_labels(results.frames.plan.axes)
    rows = []
    for index, metric in chosen:
        row, values = found[index][metric], results.cells[index].values
        own = places(values, results.varying) or (Value("the only cell"),)
        metric_place = (Value(heading(metric), title=metric),) if several else ()
        rows.append(Row((*metric_place, *own, *_numbers(row), _trials(index, names[index]))))
    first = (Column("metric", text=True),) if several else ()
    axes = [Column(labels[axis], title=axis) for axis in results.varying] or [Column("cell")]
    middle = ("n", "mean", "std", "Δ", "95 % interval", "pairs", "p", _PRIMARY if primary else _EXPLORATORY)
    columns = (*first, *axes, *map(Column, middle), Column("flags", text=True), Column("from", text=True))
    return Grid(name, caption, columns, tuple(rows), heads=len(first) + len(axes))


def _numbers(row: Mapping[str, Any]) -> tuple[Value, ...]:
    kind, metric = unit(row["metric"]), row["metric"]
    lost = ", ".join(lost_texts(row))
    interval = kind.interval(row["delta_low"], row["delta_high"]) or row["interval_method"].removeprefix("none: ")
    return (
        Value(f"{row['n']}", str(row["n"]), more=(lost,) if lost else (), style="lost" if lost else ""),
        number(metric, row["mean"]),
        number(metric, row["std"], signed=False),
        number(metric, row["delta"], signed=True, style="claimed" if supported(row) else ""),
        Value(interval, digits(row["delta_low"])),
        Value(str(row["n_paired"]), str(row["n_paired"])),
        p_value(row["p_value"]),
        p_value(row["p_adjusted"]),
        Value("", "" if not row["flags"] else ", ".join(row["flags"]), notes=_meanings(row["flags"]), style="flags"),
    )


def _trials(index: int, name: str) -> Value:
    return Value("trials", href=f"#{anchor(index)}", name=f"trials of {name}")


def _meanings(flags: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return tuple((flag, flag_text(flag)) for flag in flags)


def warnings(results: Results, metrics: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """Each flag that is a warning, its meaning, and where it stands: cells, by metric where metrics differ."""
    names = names_of(results)
    found: dict[str, dict[str, list[str]]] = {}
    for metric in metrics:
        for index, rows in enumerate(results.by_cell):
            for flag in rows[metric]["flags"]:
                if flag != "baseline":
                    found.setdefault(flag, {}).setdefault(metric, []).append(names[index])
    said = []
    for flag, by_metric in sorted(found.items()):
        where = {metric: _listed(cells) for metric, cells in by_metric.items()}
        alike = len(where) == len(metrics) and len(set(where.values())) == 1
        texts = [next(iter(where.values()))] if alike else [f"{heading(m)}: {cells}" for m, cells in where.items()]
        said.append((flag, flag_text(flag), texts))
    return said


def _listed(names: Sequence[str]) -> str:
    return "; ".join(names) if len(names) <= _MOST_NAMED else f"{len(names)} cells"


def trials(results: Results, metrics: Sequence[str]) -> Grid:
    """Each trial with its own scores and runs: the way back from a number."""
    runs = {run["trial_id"]: run for run in results.frames.runs.to_pylist()}
    names, mlflow = names_of(results), results.frames.mlflow
    rows = []
    for index, cell in enumerate(results.cells):
        for position, trial in enumerate(cell.trials):
            run = runs[trial.trial_id]
            error = "" if run["error"] is None else f": {clipped(run['error'], 300)}"
            own = [results.scores.get(metric, {}).get(trial.trial_id) for metric in metrics]
            seconds = NONE if run["seconds"] is None else f"{run['seconds']:.1f}"
            attempts = NONE if run["attempts"] is None else str(run["attempts"])
            values = (
                short(names[index]),
                Value(str(trial.seed), str(trial.seed)),
                short(trial.name, style="wrap"),
                Value(f"{run['status']}{error}", run["status"], style="lost wrap" if error else ""),
                *(number(m, score.value if score else None) for m, score in zip(metrics, own, strict=True)),
                Value(seconds, digits(run["seconds"])),
                Value(attempts, "" if attempts == NONE else attempts),
                short(trial.trial_id, style="code"),
                _run(mlflow, run["mlflow_run_id"]),
            )
            rows.append(Row(values, anchor="" if position else anchor(index), group=anchor(index)))
    first = (Column("cell", text=True), Column("seed"), Column("trial", text=True), Column("status", text=True))
    last = (Column("seconds"), Column("attempts"), Column("trial id", text=True), Column("MLflow run", text=True))
    columns = (*first, *(Column(heading(metric), title=metric) for metric in metrics), *last)
    return Grid("trials-table", "Trials behind each number", columns, tuple(rows), style="trials")


def _run(mlflow: Any, run_id: str | None) -> Value:
    if run_id is None:
        return Value(NONE, "")
    return Value(clipped(run_id, 80), href=run_address(mlflow, run_id), style="code", name=f"MLflow run {run_id}")
