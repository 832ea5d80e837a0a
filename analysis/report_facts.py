"""What report.html says of how a sweep was run: status, settings, cost, provenance, and the paper's values; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

from analysis import reference
from analysis.cells import Cell, order
from analysis.collect import Frames, Mlflow
from analysis.group_tables import MeasuredTable
from analysis.labels import NONE, value_text
from analysis.report_grid import Column, Grid, Row, Value, clipped, short
from analysis.results import Results
from analysis.schemas import RUNS, STATUSES, canonical

_MOST_REFERENCES = 200  # of the paper's values beside ours
_LONGEST = 500  # letters of a setting
_KEY_SETTINGS = (
    *("method", "model.size", "model.patch_size", "model.image_size", "model.num_registers", "model.reg_init_std"),
    *("data.train", "data.name", "optim.steps", "optim.batch_size", "optim.lr", "precision", "model.weights"),
)
_PROVENANCE = ("git_commit", "device", "threads", "data_fingerprint", "versions")

Rows = Sequence[Mapping[str, Any]]


def statuses(runs: Rows) -> list[tuple[str, int]]:
    """How many trials have each status."""
    counts = Counter(run["status"] for run in runs)
    return [(status, counts[status]) for status in STATUSES]


def run_address(mlflow: Mlflow | None, run_id: str) -> str:
    """The page of a run in the MLflow UI, where the tracking store is a server that a browser can open; else ""."""
    base = server(mlflow)
    if not base or mlflow is None:
        return ""
    return f"{base}/#/experiments/{quote(mlflow.experiment_id, safe='')}/runs/{quote(run_id, safe='')}"


def server(mlflow: Mlflow | None) -> str:
    """The address of the MLflow server without query and fragment; "" for other stores and other schemes."""
    if mlflow is None:
        return ""
    try:
        parts = urlsplit(mlflow.tracking_uri)
        host = parts.hostname
    except ValueError:  # no address at all
        return ""
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc:
        return ""
    return f"{parts.scheme}://{quote(parts.netloc, safe=':[]')}{quote(parts.path.rstrip('/'), safe='/%')}"


def settings(frames: Frames, runs: Rows) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Settings that all trials share where they have an effect, and those that differ though they are no axis."""
    common: list[tuple[str, str]] = []
    differing: list[tuple[str, str]] = []
    known = [run for run in runs if run["status"] != "missing"]
    for name in frames.runs.column_names[len(RUNS) :]:
        values = {canonical(run[name]): run[name] for run in known if run[name] is not None}
        if len(values) <= 1 and known:
            value = next(iter(values.values()), None)
            common.append((name, "null" if value is None else clipped(value_text(value), _LONGEST)))
        elif len(values) > 1 and name not in (*frames.plan.axes, "seed"):
            differing.append((name, clipped(", ".join(value_text(value) for value in values.values()), _LONGEST)))
    return common, differing


def trained(runs: Rows) -> str:
    """What was trained on what, and for how long, in a line: "deit3 · nano · scenes · 450 steps · 2 seeds"."""
    known = dict(key_settings(runs))
    parts = [known[name] for name in ("method", "model.size", "model.weights") if name in known]
    parts += [known[name] for name in ("data.name", "data.train") if name in known][:1]
    parts += [f"{known['optim.steps']} steps"] if "optim.steps" in known else []
    seeds = len({run["seed"] for run in runs if run.get("seed") is not None})
    return " · ".join([*parts, f"{seeds} seed{'' if seeds == 1 else 's'}"] if seeds else parts)


def key_settings(runs: Rows) -> list[tuple[str, str]]:
    """The settings that a reader asks for first, each with all the values that trials have."""
    found = []
    for name in _KEY_SETTINGS:
        values = {canonical(run[name]): run[name] for run in runs if run.get(name) is not None}
        ordered = sorted(values.values(), key=order)
        if ordered:
            found.append((name, clipped(", ".join(value_text(value) for value in ordered), _LONGEST)))
        elif name == "model.reg_init_std":
            found.append((name, "no effect: no trial has registers"))
    return found


def cost(runs: Rows) -> list[tuple[str, str]]:
    """What the sweep's accepted results cost; a trial that recorded nothing counts as nothing, and is counted."""
    ran = [run for run in runs if run["seconds"] is not None]
    core_hours = [run["seconds"] * run["threads"] / 3600 for run in ran if run["threads"] is not None]
    gpu_hours = [run["gpu_seconds"] / 3600 for run in ran if run["gpu_seconds"] is not None]
    rates = sorted(run["images_per_second"] for run in ran if run["images_per_second"] is not None)
    rows = [("trials with a recorded cost", f"{len(ran)} of {len(runs)}")]
    if ran:
        rows.append(("trial hours (sum over trials)", f"{sum(run['seconds'] for run in ran) / 3600:.3g}"))
    if core_hours:
        rows.append(("CPU core hours (hours × threads)", f"{sum(core_hours):.3g}"))
    if gpu_hours:
        rows.append(("GPU hours", f"{sum(gpu_hours):.3g}"))
    if rates:
        middle = rates[len(rates) // 2] if len(rates) % 2 else sum(rates[len(rates) // 2 - 1 :][:2]) / 2
        rows.append(
            ("training images/s of a trial, median (range)", f"{middle:.4g} ({rates[0]:.4g} to {rates[-1]:.4g})")
        )
    return rows


def provenance(runs: Rows, mlflow: Mlflow | None) -> list[tuple[str, str]]:
    """Each kind of provenance with its distinct values and how many trials have each; and where runs are tracked."""
    ran = [run for run in runs if run["status"] != "missing"]
    found = []
    for column in _PROVENANCE:
        counts = Counter("not recorded" if run[column] is None else str(run[column]) for run in ran)
        texts = [
            f"{clipped(value, _LONGEST)} ({count} trial{'' if count == 1 else 's'})"
            for value, count in sorted(counts.items())
        ]
        found.append((column.replace("_", " "), "; ".join(texts) or NONE))
    if mlflow is not None:
        found.append(("MLflow", f"{mlflow.tracking_uri}, experiment {mlflow.experiment_id}"))
    return found


def measured(name: str, table: MeasuredTable) -> Grid:
    """A compact table of measurements."""
    columns = (
        *(Column(heading, text=True) for heading in table.row_headings),
        *(Column(label, title=metric) for label, metric in table.columns),
    )
    rows = tuple(
        Row((*map(short, names), *(Value(text, "" if text == NONE else None) for text in texts)))
        for names, texts in table.rows
    )
    return Grid(name, table.title, columns, rows, heads=max(1, len(table.row_headings)))


def references(results: Results, runs: Rows) -> Grid:
    """The paper's values beside ours; what weights turned out to be is known of each cell alone."""
    by_id = {run["trial_id"]: run for run in runs}
    with_settings: list[dict[str, Any]] = []
    for cell, own in zip(results.cells, results.by_cell, strict=True):
        shared = _shared(cell, by_id)
        with_settings += ({**shared, **row} for row in own.values())
    rows = tuple(
        Row(
            (
                Value(known.what),
                Value(known.paper_model),
                Value(f"{known.paper:.4g}"),
                short(known.our_model),
                Value(f"{known.ours:.4g}"),
                short(known.metric, style="code"),
            )
        )
        for known in reference.comparisons(with_settings)[:_MOST_REFERENCES]
    )
    columns = (
        Column("metric of the paper", text=True),
        Column("model of the paper", text=True),
        Column("paper: reference, not reproduced"),
        Column("our model", text=True),
        Column("ours"),
        Column("our metric", text=True),
    )
    return Grid("reference-table", "The paper's values beside ours: reference, not reproduced", columns, rows)


def _shared(cell: Cell, by_id: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What is the same and not null in all trials of a cell that have begun."""
    begun = [run for trial in cell.trials if (run := by_id[trial.trial_id])["status"] != "missing"]
    return {
        name: value
        for name, value in (begun[0] if begun else {}).items()
        if value is not None and all(run[name] == value for run in begun)
    }
