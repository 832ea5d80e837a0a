"""What of scores and of the ablation table the pictures of scores show: metrics along the axis, and differences."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from analysis.answer import supported
from analysis.cells import Cell
from analysis.collect import Frames
from analysis.figures import intervals, metrics
from analysis.figures.intervals import Interval
from analysis.figures.locality import PROBES, Probed, local_information
from analysis.figures.metrics import Point
from analysis.figures.style import Drawn
from analysis.labels import REGISTERS
from analysis.layout import Layout
from analysis.norm_pictures import named_after
from analysis.results import Results
from analysis.scores import Scores

OUTLIERS = "tokens/last/outlier_fraction"
_MOST_METRICS = 6
# The paper's Fig. 8: the first of each kind that there is.
_DOWNSTREAM = (
    ("test/linear/top1", "test/knn/top1", "test/zero_shot/top1"),
    ("test/segmentation/miou",),
    ("test/depth/rmse",),
)


def draw(results: Results, layout: Layout, problems: list[str]) -> Iterator[Drawn]:
    """A picture a metric, those of the paper's Fig. 8 side by side, and differences to the baseline."""
    frames, scores = results.frames, results.scores
    if (compared := _differences(results, layout)) is not None:
        yield compared
    for name, metric in _metrics(frames, scores, problems):
        if points := _points(layout, scores, metric):
            yield metrics.against_axis(name, metric, points, layout.xs, layout.x_label)
    kinds = [next((name for name in names if name in scores), None) for names in _DOWNSTREAM]
    together = {name: points for name in kinds if name is not None and (points := _points(layout, scores, name))}
    if layout.axis == REGISTERS and len(together) > 1:
        yield metrics.downstream(together, layout.xs, layout.x_label)
    yield from _local_information(layout, scores)


def _points(layout: Layout, scores: Scores, metric: str) -> list[Point]:
    return [
        Point(label, cell.values[layout.axis] if layout.axis else "all", trial.seed, score.value)
        for label, members in layout.series.items()
        for cell in members
        for trial in cell.trials
        if (score := scores[metric].get(trial.trial_id)) is not None and np.isfinite(score.value)
    ]


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
            chosen[file_name(metric)] = metric
    yield from list(chosen.items())[:_MOST_METRICS]


def file_name(metric: str) -> str:
    """A stem of a file's name from a metric's."""
    return re.sub(r"[^A-Za-z0-9]+", "_", metric).strip("_")


def _differences(results: Results, layout: Layout) -> Drawn | None:
    """Differences of primary metrics, cells in the order of the layout; None where no cell has one."""
    by_key = dict(zip((cell.key for cell in results.cells), results.by_cell, strict=True))
    labels = {
        cell.key: f"{series}, {layout.label(cell)}" if series else layout.label(cell)
        for series, members in layout.series.items()
        for cell in members
    }
    found: dict[str, list[Interval]] = {}
    methods: set[str] = set()
    for metric in results.frames.plan.primary:
        for key, label in labels.items():
            row = by_key[key][metric]
            if row["delta"] is not None:
                ends = row["delta_low"], row["delta_high"]
                found.setdefault(metric, []).append(Interval(label, row["delta"], *ends, supported(row)))
                methods |= {row["interval_method"]} if ends[0] is not None else set()
    return intervals.differences(found, sorted(methods)) if found else None


def _local_information(layout: Layout, scores: Scores) -> Iterator[Drawn]:
    """What patches know of their place and pixels, of each series that was probed."""
    for suffix, series, members in layout.first_series():
        cells = [
            Probed(layout.short(cell), _probed(cell, scores, "normal"), _probed(cell, scores, "outlier"))
            for cell in members
        ]
        if found := [cell for cell in cells if cell.normal or cell.outlier]:
            yield named_after(local_information(found, layout.x_label), suffix, series)


def _probed(cell: Cell, scores: Scores, group: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for probe in PROBES:
        by_trial = scores.get(f"locality/{probe.format(group)}", {})
        own = [by_trial[trial.trial_id].value for trial in cell.trials if trial.trial_id in by_trial]
        if finite := [value for value in own if np.isfinite(value)]:
            found[probe] = finite
    return found
