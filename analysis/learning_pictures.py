"""What of the published metrics the pictures along training show: cells with the range of their finished seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.cells import Cell
from analysis.collect import Frames
from analysis.figures.learning import Curve, Track, learning_curves, training_curves
from analysis.figures.style import Drawn
from analysis.labels import axis_labels, cell_text
from analysis.layout import Layout
from analysis.norm_pictures import named_after

LOSS = "train/loss"
METHOD = "method"
_OF_TOKENS = ("tokens/last/outlier_fraction", "tokens/last/max_over_median")
_MOST_METRICS = 6
_WANTED = ("top1", "miou", "rmse", "corloc")  # how other metrics end that are drawn where they are not primary

Steps = NDArray[np.int64]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class _Metric:
    """A metric of all trials: finite values in the order of steps, by trial."""

    name: str
    by_trial: Mapping[str, tuple[Steps, Values]]


def draw(frames: Frames, layout: Layout, problems: list[str]) -> Iterator[Drawn]:
    """Learning curves of each series, then the training loss of all trials."""
    metrics = [found for name in _names(frames) if (found := _metric(frames, name)) is not None]
    finished = _finished(frames)
    for suffix, label, members in layout.first_series():
        tracks = {metric.name: list(_tracks(metric, members, layout, finished)) for metric in metrics}
        tracks = dict([(name, cells) for name, cells in tracks.items() if cells][:_MOST_METRICS])
        if tracks:
            yield named_after(learning_curves(tracks), suffix, label)
    loss = _metric(frames, LOSS, least=1)
    if loss is not None:
        yield training_curves(_by_panel(frames, layout, loss))
    else:
        problems.append("the training loss is not drawn: no trial has reported it")


def _names(frames: Frames) -> list[str]:
    """Metrics with a curve: primary ones (on validation images where tests are scored once), of tokens, then others."""
    there = sorted(set(pc.unique(frames.metrics["name"]).to_pylist()))
    twins = [f"val/{name.removeprefix('test/')}" if name.startswith("test/") else name for name in frames.plan.primary]
    others = [
        name
        for name in there
        if name.startswith("val/") and name.rsplit("/", 1)[-1] in _WANTED and not _is_variant(name)
    ]
    return [name for name in dict.fromkeys([*twins, *_OF_TOKENS, *others]) if name in there and name != LOSS]


def _is_variant(name: str) -> bool:
    """Whether a metric is the same probe with another setting: `val/knn/k10/top1`, `val/object_discovery/bias_…`."""
    return len(name.split("/")) > 3


def _metric(frames: Frames, name: str, least: int = 2) -> _Metric | None:
    """The curve of a metric in each trial; None where no trial has it at `least` steps."""
    rows = frames.metrics.filter(pc.and_(pc.equal(frames.metrics["name"], name), pc.is_finite(frames.metrics["value"])))
    trials = rows["trial_id"].combine_chunks().dictionary_encode()
    steps, values = (rows[column].to_numpy() for column in ("step", "value"))
    order = np.lexsort((steps, trials.indices.to_numpy()))
    counts = np.bincount(trials.indices.to_numpy(), minlength=1)
    if counts.max() < least:
        return None
    parts = np.split(order, np.cumsum(counts)[:-1])
    keys = trials.dictionary.to_pylist()
    return _Metric(name, {key: (steps[own], values[own]) for key, own in zip(keys, parts, strict=True)})


def _finished(frames: Frames) -> frozenset[str]:
    rows = frames.runs.select(["trial_id", "status"]).to_pylist()
    return frozenset(row["trial_id"] for row in rows if row["status"] == "finished")


def _tracks(metric: _Metric, members: Sequence[Cell], layout: Layout, finished: frozenset[str]) -> Iterator[Track]:
    for cell in members:
        own = [
            metric.by_trial[trial.trial_id]
            for trial in cell.trials
            if trial.trial_id in finished and trial.trial_id in metric.by_trial
        ]
        if own and (track := _track(layout.label(cell), own)) is not None:
            yield track


def _track(label: str, own: Sequence[tuple[Steps, Values]]) -> Track | None:
    """Mean and range at the steps that all trials of a cell have; None where these are not two."""
    common = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in own)))
    if len(common) < 2:
        return None
    values_SN = np.stack([values[np.isin(steps, common)] for steps, values in own])  # S seeds, N steps
    means, lows, highs = (reduce(values_SN, axis=0).tolist() for reduce in (np.mean, np.min, np.max))
    return Track(label, common, means, lows, highs, len(own))


def _by_panel(frames: Frames, layout: Layout, loss: _Metric) -> dict[str, list[Curve]]:
    """The training loss of all trials that are over, finished or not: by method where it is an axis, else by series."""
    axes, names = list(frames.plan.axes), axis_labels(list(frames.plan.axes))
    others = [name for name in axes if name != METHOD]
    curves: dict[str, list[Curve]] = {}
    for series, members in layout.series.items():
        for cell in members:
            panel, label = series, layout.label(cell)
            if METHOD in axes:
                panel, label = str(cell.values[METHOD]), cell_text(cell.values, others, names) if others else ""
            for trial in cell.trials:
                if trial.trial_id in loss.by_trial:
                    steps, values = loss.by_trial[trial.trial_id]
                    curves.setdefault(panel, []).append(Curve(label, steps.tolist(), values.tolist()))
    return curves
