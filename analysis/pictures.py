"""Which pictures a sweep's report has: scores, training, norms, and what lies over the images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from analysis import discovery_pictures, map_pictures, norm_pictures
from analysis.collect import Frames
from analysis.figures import metrics
from analysis.figures.metrics import Curve, Point
from analysis.figures.style import Drawn
from analysis.labels import axis_labels, cell_text
from analysis.layout import Layout, arrange
from analysis.scores import Scores

OUTLIERS = "tokens/last/outlier_fraction"
LOSS = "train/loss"
METHOD = "method"
_MOST_METRICS = 6


@dataclass(frozen=True)
class Pictures:
    """What could be drawn, and why the rest could not."""

    drawn: tuple[Drawn, ...]
    problems: tuple[str, ...]


def draw(frames: Frames, scores: Scores) -> Pictures:
    """All pictures that the published files allow; the reasons for those that are missing are said as problems."""
    layout = arrange(frames)
    problems: list[str] = []
    drawn = [
        *_of_scores(frames, scores, layout, problems),
        *discovery_pictures.draw(frames, layout, scores),
        *norm_pictures.draw(frames, layout, scores, problems),
        *map_pictures.draw(frames, layout, problems),
    ]
    return Pictures(tuple(drawn), tuple(problems))


def _of_scores(frames: Frames, scores: Scores, layout: Layout, problems: list[str]) -> Iterator[Drawn]:
    for name, metric in _metrics(frames, scores, problems):
        points = [
            Point(label, cell.values[layout.axis] if layout.axis else "all", trial.seed, score.value)
            for label, members in layout.series.items()
            for cell in members
            for trial in cell.trials
            if (score := scores[metric].get(trial.trial_id)) is not None and np.isfinite(score.value)
        ]
        if points:
            yield metrics.against_axis(name, metric, points, layout.xs, layout.x_label)
    if curves := _curves(frames, layout):
        yield metrics.training_curves(curves)
    else:
        problems.append("the training loss is not drawn: no trial has reported it")


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


def _curves(frames: Frames, layout: Layout) -> dict[str, list[Curve]]:
    """The training loss of all trials that are over, finished or not: by method where it is an axis, else by series."""
    losses = frames.metrics.filter(pc.field("name") == LOSS)
    points: dict[str, list[tuple[int, float]]] = {}
    for row in losses.to_pylist():
        if np.isfinite(row["value"]):
            points.setdefault(row["trial_id"], []).append((row["step"], row["value"]))
    axes, names = list(frames.plan.axes), axis_labels(list(frames.plan.axes))
    others = [name for name in axes if name != METHOD]
    curves: dict[str, list[Curve]] = {}
    for series, members in layout.series.items():
        for cell in members:
            panel, label = series, layout.label(cell)
            if METHOD in axes:
                panel, label = str(cell.values[METHOD]), cell_text(cell.values, others, names) if others else ""
            for trial in cell.trials:
                if trial.trial_id in points:
                    steps, values = zip(*sorted(points[trial.trial_id]), strict=True)
                    curves.setdefault(panel, []).append(Curve(label, steps, values))
    return curves
