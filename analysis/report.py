"""report.html: one self-contained page with a sweep's question, answer, table, pictures, cost and provenance."""

from __future__ import annotations

import base64
import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from analysis import reference
from analysis.answer import supported
from analysis.cells import Cell
from analysis.collect import Frames
from analysis.discovery import is_curve
from analysis.figures.style import Drawn
from analysis.group_tables import cost_table, measured_tables
from analysis.labels import NONE, Unit, axis_labels, cell_text, flag_text, metric_label, unit, value_text
from analysis.results import Results
from analysis.schemas import RUNS, STATUSES, canonical
from analysis.scores import Scores
from analysis.terminal import shown_metrics

_MOST_ROWS = 2_000  # of exploratory metrics; all of them stand in tables/ablation.parquet
_MOST_REFERENCES = 200  # of the paper's values beside ours
_KINDS = ("test", "tokens", None, "val", "train")  # the order of exploratory metrics; None are all others
_PX_PER_DOT = 0.72  # pictures have 160 dots per inch
_BROAD = 660  # px from which on a picture stands alone in its row
_MOST_NAMED = 6  # cells named one by one in a warning
_KEY_SETTINGS = (
    *("method", "model.size", "model.patch_size", "model.image_size", "model.num_registers", "model.reg_init_std"),
    *("data.train", "data.name", "optim.steps", "optim.batch_size", "optim.lr", "precision"),
)
_PROVENANCE = ("git_commit", "device", "threads", "data_fingerprint", "versions")


def render(results: Results, drawn: Sequence[Drawn], problems: Sequence[str]) -> str:
    """The page as HTML; everything that comes from outside is escaped, and nothing is fetched from a network.

    Args:
        problems: what could not be read or drawn, one text each.
    """
    frames, scores, rows = results.frames, results.scores, results.rows
    everything, varying = results.cells, results.varying
    runs = frames.runs.to_pylist()
    metrics = shown_metrics(frames.plan, rows)
    views = _row_views(rows, everything, varying)
    main = [(metric, _heading(metric), [view for view in views if view["metric"] == metric]) for metric in metrics]
    # Points of curves are drawn, and would crowd out the rest; they stand in tables/ablation.parquet too.
    rest = (view for view in views if view["metric"] not in metrics and not is_curve(view["metric"]))
    others = sorted(rest, key=lambda view: _rank(view["metric"]))
    common, differing = _settings(frames, runs)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        plan=frames.plan,
        answer=results.answer,
        statuses=_statuses(runs),
        total=len(runs),
        axes=[axis_labels(frames.plan.axes)[axis] for axis in varying],
        baseline=", ".join(f"{axis} = {value_text(value)}" for axis, value in (frames.plan.baseline or {}).items()),
        methods=sorted({row["interval_method"] for row in rows if not row["interval_method"].startswith("none")}),
        main=main,
        others=others[:_MOST_ROWS],
        others_left_out=max(0, len(others) - _MOST_ROWS),
        groups=_grouped(drawn),
        measured=measured_tables(rows, everything, varying),
        warnings=_warnings(main),
        problems=problems,
        key_settings=_key_settings(runs),
        common=common,
        differing=differing,
        cost=_cost(runs),
        cost_of_cells=cost_table(everything, runs, varying),
        provenance=_provenance(runs),
        mlflow=frames.mlflow,
        reference=_reference(rows, everything, runs),
        cells=_cell_views(everything, runs, scores, metrics, varying),
        score_headings=[_heading(metric) for metric in metrics],
    )


def _rank(metric: str) -> tuple[int, str]:
    """Sorts exploratory metrics by what a reader asks for first; a stable sort keeps the order of cells."""
    kind = metric.split("/")[0]
    return _KINDS.index(kind if kind in _KINDS else None), metric


def _grouped(drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """Pictures under their headings: those of the first series and of all, then those of each other series."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for one in drawn:
        groups.setdefault(one.group, {}).setdefault(one.series, []).append(_picture(one))
    return [
        {"title": title, "pictures": series.pop("", []), "series": list(series.items())}
        for title, series in groups.items()
    ]


def _picture(drawn: Drawn) -> dict[str, Any]:
    """A picture with its bytes in the address, and the size in px at which its letters are as large as the page's."""
    width, height = struct.unpack(">II", drawn.png[16:24])  # of the PNG's header
    return {
        **vars(drawn),
        "uri": f"data:image/png;base64,{base64.b64encode(drawn.png).decode('ascii')}",
        "width": round(width * _PX_PER_DOT),
        "height": round(height * _PX_PER_DOT),
        "broad": width * _PX_PER_DOT > _BROAD,
    }


def _statuses(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    counts = Counter(run["status"] for run in runs)
    return [(status, counts[status]) for status in STATUSES]


def _heading(metric: str) -> str:
    symbol = unit(metric).symbol
    return f"{metric_label(metric)}, {symbol}" if symbol else metric_label(metric)


def _row_views(
    rows: Sequence[Mapping[str, Any]], everything: Sequence[Cell], varying: Sequence[str]
) -> list[dict[str, Any]]:
    """Views of all rows, which come cell by cell with equally many metrics each."""
    each = len(rows) // max(1, len(everything))
    names = axis_labels(everything[0].values) if everything else {}
    views = []
    for index, row in enumerate(rows):
        values = everything[index // each].values
        views.append(_row_view(row, values, varying, cell_text(values, varying, names), _anchor(index // each)))
    return views


def _anchor(number: int) -> str:
    return f"cell-{number + 1}"


def _row_view(
    row: Mapping[str, Any], values: Mapping[str, Any], varying: Sequence[str], title: str, anchor: str
) -> dict[str, Any]:
    """What the page shows of one row of the ablation table: texts, and numbers to sort by."""
    kind = unit(row["metric"])
    lost = [f"{row[f'n_{status}']} {status}" for status in STATUSES if row.get(f"n_{status}")]
    return {
        "axes": [(value_text(values[axis]), "" if values[axis] is None else str(values[axis])) for axis in varying],
        "metric": row["metric"],
        "label": _heading(row["metric"]),
        "n": row["n"],
        "lost": ", ".join(lost),
        "mean": _shown(kind, row["mean"]),
        "std": _shown(kind, row["std"], signed=False),
        "baseline_mean": _shown(kind, row["baseline_mean"]),
        "delta": _shown(kind, row["delta"], signed=True),
        "interval": kind.interval(row["delta_low"], row["delta_high"]) or row["interval_method"].removeprefix("none: "),
        "n_paired": row["n_paired"],
        "p_value": _p(row["p_value"]),
        "p_adjusted": _p(row["p_adjusted"]),
        "supported": supported(row),
        "flags": [(flag, flag_text(flag)) for flag in row["flags"]],
        "cell": title,
        "anchor": anchor,
    }


def _shown(kind: Unit, value: float | None, signed: bool | None = None) -> tuple[str, str]:
    """Text of a number and the number to sort by, empty for null."""
    missing = value is None or not math.isfinite(value)
    return kind.text(value, signed), "" if missing else repr(value)


def _p(value: float | None) -> tuple[str, str]:
    if value is None:
        return NONE, ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}", repr(value)


def _warnings(main: Sequence[tuple[str, str, Sequence[Mapping[str, Any]]]]) -> list[tuple[str, str, list[str]]]:
    """Each flag that is a warning, its meaning, and where it stands: cells, by metric where metrics differ."""
    found: dict[str, dict[str, list[str]]] = {}
    for metric, _, views in main:
        for view in views:
            for flag, _ in view["flags"]:
                if flag != "baseline":
                    found.setdefault(flag, {}).setdefault(metric, []).append(view["cell"])
    warnings = []
    for flag, by_metric in sorted(found.items()):
        places = {metric: _listed(names) for metric, names in by_metric.items()}
        alike = len(places) == len(main) and len(set(places.values())) == 1
        said = [next(iter(places.values()))] if alike else [f"{metric_label(m)}: {p}" for m, p in places.items()]
        warnings.append((flag, flag_text(flag), said))
    return warnings


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= _MOST_NAMED else f"{len(names)} cells"


def _settings(frames: Frames, runs: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Settings that all trials share where they have an effect, and those that differ though they are no axis."""
    common: dict[str, Any] = {}
    differing: list[tuple[str, str]] = []
    known = [run for run in runs if run["status"] != "missing"]
    for name in frames.runs.column_names[len(RUNS) :]:
        values = {canonical(run[name]): run[name] for run in known if run[name] is not None}
        if len(values) <= 1 and known:
            common[name] = next(iter(values.values()), None)
        elif len(values) > 1 and name not in (*frames.plan.axes, "seed"):
            differing.append((name, ", ".join(value_text(value) for value in values.values())))
    return common, differing


def _key_settings(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The settings that a reader asks for first, each with all the values that trials have."""
    found = []
    for name in _KEY_SETTINGS:
        values = {canonical(run[name]): run[name] for run in runs if run.get(name) is not None}
        ordered = sorted(values.values(), key=lambda value: (isinstance(value, str), value))
        if ordered:
            found.append((name, ", ".join(value_text(value) for value in ordered)))
        elif name == "model.reg_init_std":
            found.append((name, "no effect: no trial has registers"))
    return found


def _cost(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
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


def _provenance(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, int]]]]:
    """Each kind of provenance with its distinct values and how many trials have each."""
    ran = [run for run in runs if run["status"] != "missing"]
    found = []
    for column in _PROVENANCE:
        counts = Counter("not recorded" if run[column] is None else str(run[column]) for run in ran)
        found.append((column.replace("_", " "), sorted(counts.items())))
    return found


def _reference(
    rows: Sequence[Mapping[str, Any]], everything: Sequence[Cell], runs: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """The paper's values beside ours; what weights turned out to be is known of each cell alone."""
    each = len(rows) // max(1, len(everything))
    by_id = {run["trial_id"]: run for run in runs}
    with_settings: list[dict[str, Any]] = []
    for number, cell in enumerate(everything):
        shared = _shared([by_id[trial.trial_id] for trial in cell.trials])
        with_settings += ({**shared, **row} for row in rows[number * each : (number + 1) * each])
    return [
        {**vars(known), "paper": f"{known.paper:.4g}", "ours": f"{known.ours:.4g}"}
        for known in reference.comparisons(with_settings)[:_MOST_REFERENCES]
    ]


def _shared(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is the same and not null in all trials that have begun."""
    begun = [run for run in runs if run["status"] != "missing"]
    return {
        name: value
        for name, value in (begun[0] if begun else {}).items()
        if value is not None and all(run[name] == value for run in begun)
    }


def _cell_views(
    everything: Sequence[Cell],
    runs: Sequence[Mapping[str, Any]],
    scores: Scores,
    metrics: Sequence[str],
    varying: Sequence[str],
) -> list[dict[str, Any]]:
    """Each cell with its trials and their own scores: the way from a number of the table to its runs."""
    by_id = {run["trial_id"]: run for run in runs}
    names = axis_labels(everything[0].values) if everything else {}
    views = []
    for number, cell in enumerate(everything):
        trials = []
        for trial in cell.trials:
            own = [scores.get(metric, {}).get(trial.trial_id) for metric in metrics]
            texts = [
                unit(metric).text(score.value if score else None) for metric, score in zip(metrics, own, strict=True)
            ]
            trials.append({"name": trial.name, "seed": trial.seed, "run": by_id[trial.trial_id], "scores": texts})
        title = cell_text(cell.values, varying, names)
        views.append({"anchor": _anchor(number), "title": title, "trials": trials})
    return views
