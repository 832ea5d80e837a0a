"""Which pictures a sweep's report has, and what of the frames each shows."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analysis import figures
from analysis.cells import Cell, cells, order, varying
from analysis.collect import Frames
from analysis.labels import REGISTERS, axis_labels, cell_text
from analysis.schemas import canonical
from analysis.tables import Scores

OUTLIERS = "tokens/last/outlier_fraction"
LOSS = "train/loss"
METHOD = "method"
_MOST_METRICS = 6
_MOST_SERIES = 4  # layer and map pictures: one for each series
_WEIGHTS = ("teacher", "raw", "ema")  # the first of these that a trial has is what its recipe evaluates


@dataclass(frozen=True)
class Pictures:
    """What could be drawn, and why the rest could not."""

    drawn: tuple[figures.Drawn, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class _Layout:
    """Cells arranged along the x axis (`None` where the sweep has no axis) and in series of everything else."""

    axis: str | None
    x_label: str
    xs: tuple[Any, ...]
    series: Mapping[str, tuple[Cell, ...]]  # label to cells, along x


def draw(frames: Frames, scores: Scores) -> Pictures:
    """All pictures that the published files allow; the reasons for those that are missing are said as problems."""
    layout = _layout(frames)
    problems: list[str] = []
    drawn: list[figures.Drawn] = []
    for name, metric in _metrics(frames, scores, problems):
        points = [
            figures.Point(label, cell.values[layout.axis] if layout.axis else "all", trial.seed, score.value)
            for label, members in layout.series.items()
            for cell in members
            for trial in cell.trials
            if (score := scores[metric].get(trial.trial_id)) is not None and np.isfinite(score.value)
        ]
        if points:
            drawn.append(figures.against_axis(name, metric, points, layout.xs, layout.x_label))
    if curves := _curves(frames, layout):
        drawn.append(figures.training_curves(curves))
    else:
        problems.append("the training loss is not drawn: no trial has reported it")
    bands = _bands(frames, layout)
    maps = _maps(frames, layout, problems)
    for number, label in enumerate(list(layout.series)[:_MOST_SERIES]):
        suffix = f"_{number + 1}" if number else ""
        if bands.get(label):
            drawn.append(_named(figures.norms_by_layer(bands[label]), suffix, label))
        if maps.get(label):
            layer, entries = maps[label]
            drawn.append(_named(figures.norm_map(entries, layer), suffix, label))
    if not any(bands.values()):
        problems.append("norms along layers are not drawn: no finished trial has token norms of the probe images")
    if not maps:
        problems.append("norm maps are not drawn: no finished trial has a norm map")
    return Pictures(tuple(drawn), tuple(problems))


def _named(drawn: figures.Drawn, suffix: str, series: str) -> figures.Drawn:
    title = f"{drawn.title}: {series}" if series else drawn.title
    values = {**vars(drawn), "name": drawn.name + suffix, "title": title}
    return figures.Drawn(**values)


def _layout(frames: Frames) -> _Layout:
    everything = cells(frames.plan)
    axes = list(frames.plan.axes)
    apart = varying(axes, everything) or axes[:1]
    axis = REGISTERS if REGISTERS in apart else next(iter(apart), None)
    names = axis_labels(axes)
    others = [name for name in apart if name != axis]
    series: dict[str, list[Cell]] = {}
    for cell in everything:
        label = cell_text(cell.values, others, names) if others else ""
        series.setdefault(label, []).append(cell)
    xs = {canonical(cell.values[axis]): cell.values[axis] for cell in everything} if axis else {"all": "all"}
    x_label = "number of registers" if axis == REGISTERS else names.get(axis or "", "")
    grouped = {label: tuple(members) for label, members in series.items()}
    return _Layout(axis, x_label, tuple(sorted(xs.values(), key=order)), grouped)


def _metrics(frames: Frames, scores: Scores, problems: list[str]) -> Iterator[tuple[str, str]]:
    """Names of files and the metrics that they show: outlier fraction, top-1, then what else is primary."""
    chosen: dict[str, str] = {}
    if OUTLIERS in scores:
        chosen["outlier_fraction"] = OUTLIERS
    else:
        problems.append("the outlier fraction is not drawn: no finished trial has it")
    wanted = (*frames.plan.primary, "test/linear/top1", *sorted(scores, key=lambda name: (name[:5] != "test/", name)))
    top1 = next((name for name in wanted if name.endswith("/top1") and name in scores), None)
    if top1 is not None:
        chosen["top1"] = top1
    else:
        problems.append("top-1 is not drawn: no finished trial has it")
    for metric in frames.plan.primary:
        if metric in scores and metric not in chosen.values():
            chosen[re.sub(r"[^A-Za-z0-9]+", "_", metric).strip("_")] = metric
    yield from list(chosen.items())[:_MOST_METRICS]


def _curves(frames: Frames, layout: _Layout) -> dict[str, list[figures.Curve]]:
    """The training loss of all trials that are over, finished or not: by method where it is an axis, else by series."""
    losses = frames.metrics.filter(pc.field("name") == LOSS)
    points: dict[str, list[tuple[int, float]]] = {}
    for row in losses.to_pylist():
        if np.isfinite(row["value"]):
            points.setdefault(row["trial_id"], []).append((row["step"], row["value"]))
    axes, names = list(frames.plan.axes), axis_labels(list(frames.plan.axes))
    others = [name for name in axes if name != METHOD]
    curves: dict[str, list[figures.Curve]] = {}
    for series, members in layout.series.items():
        for cell in members:
            panel, label = series, _panel(cell, layout.axis)
            if METHOD in axes:
                panel, label = str(cell.values[METHOD]), cell_text(cell.values, others, names) if others else ""
            for trial in cell.trials:
                if trial.trial_id in points:
                    steps, values = zip(*sorted(points[trial.trial_id]), strict=True)
                    curves.setdefault(panel, []).append(figures.Curve(label, steps, values))
    return curves


def _panel(cell: Cell, axis: str | None) -> str:
    if axis is None:
        return "all"
    value = cell.values[axis]
    if axis == REGISTERS:
        return f"{value} register{'' if value == 1 else 's'}"
    return cell_text(cell.values, [axis], axis_labels(cell.values))


def _bands(frames: Frames, layout: _Layout) -> dict[str, list[figures.LayerBand]]:
    statuses = frames.runs["status"].to_pylist()
    ids = frames.runs["trial_id"].to_pylist()
    finished = {trial_id for trial_id, status in zip(ids, statuses, strict=True) if status == "finished"}
    shown = [cell for label in list(layout.series)[:_MOST_SERIES] for cell in layout.series[label]]
    wanted = [trial.trial_id for cell in shown for trial in cell.trials if trial.trial_id in finished]
    norms = frames.token_norms.drop_columns(["histogram"])
    norms = norms.filter(pc.equal(norms["source"], "probe"))
    norms = norms.filter(pc.is_in(norms["trial_id"], value_set=pa.array(wanted, pa.string())))
    by_trial: dict[str, list[dict[str, Any]]] = {}
    for row in norms.to_pylist():
        by_trial.setdefault(row["trial_id"], []).append(row)
    last = {trial_id: _last_rows(rows) for trial_id, rows in by_trial.items()}
    found: dict[str, list[figures.LayerBand]] = {}
    for label, members in layout.series.items():
        for cell in members:
            trials = [last[trial.trial_id] for trial in cell.trials if trial.trial_id in last]
            band = _band(_panel(cell, layout.axis), trials)
            if band is not None:
                found.setdefault(label, []).append(band)
    return found


def _last_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a trial's last step, of the weights that its recipe evaluates."""
    step = max(row["step"] for row in rows)
    kinds = {row["weights"] for row in rows if row["step"] == step}
    weights = next((kind for kind in _WEIGHTS if kind in kinds), None)
    return [row for row in rows if row["step"] == step and (weights is None or row["weights"] == weights)]


def _band(label: str, trials: Sequence[Sequence[Mapping[str, Any]]]) -> figures.LayerBand | None:
    """One cell's band from the last rows of its trials; None where none has patch norms."""
    patches = [row for rows in trials for row in rows if row["token"] == "patch"]
    layers = sorted({row["layer"] for row in patches})
    if not layers:
        return None
    quantiles = {name: _by_layer(patches, name, layers, np.mean) for name in ("median", "p90", "p99")}
    quantiles["max"] = _by_layer(patches, "max", layers, np.max)
    cls = [row for rows in trials for row in rows if row["token"] == "cls"]
    registers = [row for rows in trials for row in rows if row["token"].startswith("register_")]
    return figures.LayerBand(
        label=label,
        layers=layers,
        quantiles=quantiles,
        cls=_by_layer(cls, "median", layers, np.mean) if cls else None,
        registers=_by_layer(registers, "median", layers, np.mean) if registers else None,
    )


def _by_layer(rows: Sequence[Mapping[str, Any]], name: str, layers: Sequence[int], reduce: Any) -> list[float]:
    """`reduce` of a column over all rows of each layer; NaN, which leaves a gap, where a layer has none."""
    values = {layer: [row[name] for row in rows if row["layer"] == layer and row[name] is not None] for layer in layers}
    return [float(reduce(found)) if found else float("nan") for found in values.values()]


def _maps(frames: Frames, layout: _Layout, problems: list[str]) -> dict[str, tuple[int, list[figures.NormMap]]]:
    """Norm maps by series, one for each cell; maps of other images than the first one's are left out and said."""
    statuses = dict(zip(frames.runs["trial_id"].to_pylist(), frames.runs["status"].to_pylist(), strict=True))
    found: dict[str, tuple[int, list[figures.NormMap]]] = {}
    for label in list(layout.series)[:_MOST_SERIES]:
        for cell in layout.series[label]:
            for trial in cell.trials:
                path = frames.folder / "trials" / trial.trial_id / "norm_map.npz"
                if statuses[trial.trial_id] != "finished" or not path.exists():
                    continue
                loaded = _load_map(path, _panel(cell, layout.axis), problems)
                if loaded is None:
                    continue
                layer, entry = loaded
                first = found.setdefault(label, (layer, []))[1]
                if first and not np.array_equal(first[0].images, entry.images):
                    problems.append(f"trial {trial.trial_id}: its norm map is of other images and is not shown")
                    continue
                first.append(entry)
                break
    return found


def _load_map(path: Path, label: str, problems: list[str]) -> tuple[int, figures.NormMap] | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            images, norms, layer = stored["images"], stored["norms"], int(stored["layer"])
        if images.ndim != 4 or norms.ndim != 3 or not 0 < len(images) == len(norms) or not np.isfinite(norms).all():
            raise ValueError(f"images have shape {images.shape}, norms {norms.shape}, or a norm is not finite")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, EOFError) as error:
        problems.append(f"trial {path.parent.name}: norm_map.npz is unreadable: {error}")
        return None
    return layer, figures.NormMap(label, images, norms)
