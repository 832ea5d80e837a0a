"""Pictures of scores: a metric against an axis, and the training loss against steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from analysis.figures.style import (
    COLOURS,
    MARKERS,
    MOST_PANELS,
    Drawn,
    legend,
    name_places,
    panels,
    render,
    sentence,
    shown,
    steps_axis,
    styled,
)
from analysis.labels import Unit, metric_label, unit, value_text


@dataclass(frozen=True)
class Point:
    """One seed's score of a metric at one place of the x axis, in one series."""

    series: str
    x: Any
    seed: int
    value: float


@dataclass(frozen=True)
class Curve:
    """A metric of one trial along its training: `label` says which cell of its panel it belongs to."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]


def against_axis(name: str, metric: str, points: Sequence[Point], xs: Sequence[Any], x_label: str) -> Drawn:
    """A metric against an axis: the seeds as small points joined where they are paired, their mean as a line.

    Axis values stand at equal distances, as register counts double. Used for the outlier fraction and for top-1.
    """
    kind = unit(metric)
    series = list(dict.fromkeys(point.series for point in points))
    y_label = metric_label(metric) + (f", {kind.symbol}" if kind.symbol else "")
    with styled():
        named = series[: len(COLOURS)] if len(series) > 1 else []
        figure, (axes,) = panels([""], x_label, y_label, size=(4.6, 2.9), legend=named)
        for index, label in enumerate(series[: len(COLOURS)]):
            _draw_series(axes, [p for p in points if p.series == label], xs, kind, index, len(series))
        name_places(axes, [value_text(x) for x in xs], 4.6)
        axes.set_xlim(-0.4, len(xs) - 0.6)
        if min(point.value for point in points) >= 0 and metric.rsplit("/", 1)[-1].startswith("outlier"):
            axes.set_ylim(bottom=0)
        if named:
            legend(figure, [axes])
        drawn = render(figure)
    caption = "Small points are seeds, joined by seed; large points are means."
    return Drawn(
        name,
        f"{sentence(metric_label(metric))} against {x_label}",
        caption + shown(series, "series", len(COLOURS)),
        _in_words(points, series, xs, kind),
        *drawn,
    )


def training_curves(curves_by_panel: Mapping[str, Sequence[Curve]]) -> Drawn:
    """The training loss against steps, one panel a series, since losses of different methods have their own scales."""
    drawn_panels = dict(list(curves_by_panel.items())[:MOST_PANELS])
    labels = list(dict.fromkeys(curve.label for curves in drawn_panels.values() for curve in curves))[: len(COLOURS)]
    alone = len(drawn_panels) == 1
    with styled():
        figure, grid = panels(
            list(drawn_panels),
            "step",
            "training loss",
            size=(4.6, 2.6) if alone else (2.2, 1.6),
            legend=labels if len(labels) > 1 else (),
            shared_y=False,
        )
        for axes, curves in zip(grid, drawn_panels.values(), strict=True):
            steps_axis(axes)
            for curve in (c for c in curves if c.label in labels):
                colour = COLOURS[labels.index(curve.label)]
                axes.plot(curve.steps, curve.values, color=colour, linewidth=0.9, alpha=0.8, label=curve.label or None)
        if len(labels) > 1:
            legend(figure, grid)
        drawn = render(figure)
    caption = "Mean loss since the point before, one line a trial. Losses of different methods cannot be compared."
    ends = [f"{t or 'all'}: from {_mean_end(c, 0):.4g} to {_mean_end(c, -1):.4g}" for t, c in drawn_panels.items()]
    return Drawn(
        "train_loss",
        "Training loss",
        caption + shown(curves_by_panel, "panels"),
        f"Mean training loss over trials, first and last point. {'; '.join(ends)}.",
        *drawn,
    )


def _mean_end(curves: Sequence[Curve], end: int) -> float:
    return sum(curve.values[end] for curve in curves) / len(curves)


def _draw_series(axes: Axes, points: Sequence[Point], xs: Sequence[Any], kind: Unit, index: int, count: int) -> None:
    """One series: seeds thin and pale, the mean thick; several series stand a little apart."""
    colour, marker = COLOURS[index], MARKERS[index]
    shift = 0.0 if count == 1 else 0.24 * (index / (min(count, len(COLOURS)) - 1) - 0.5)
    place = {repr(x): position + shift for position, x in enumerate(xs)}
    for seed in sorted({point.seed for point in points}):
        own = sorted((place[repr(p.x)], p.value * kind.scale) for p in points if p.seed == seed)
        axes.plot(
            *zip(*own, strict=True), color=colour, linewidth=0.7, alpha=0.45, marker=marker, markersize=3, clip_on=False
        )
    means = []
    for x in xs:
        values = [point.value for point in points if repr(point.x) == repr(x)]
        if values:
            means.append((place[repr(x)], kind.scale * sum(values) / len(values)))
    label = points[0].series or "mean"
    places, heights = zip(*means, strict=True)
    axes.plot(
        places,
        heights,
        label=label,
        zorder=3,
        clip_on=False,  # a mean of 0 lies on the axis
        color=colour,
        linewidth=1.8,
        marker=marker,
        markersize=7,
        markeredgecolor="white",
    )


def _in_words(points: Sequence[Point], series: Sequence[str], xs: Sequence[Any], kind: Unit) -> str:
    sentences = []
    for label in series[: len(COLOURS)]:
        parts = []
        for x in xs:
            values = [p.value for p in points if p.series == label and repr(p.x) == repr(x)]
            if values:
                parts.append(
                    f"{value_text(x)}: {kind.text(sum(values) / len(values))}{kind.symbol and ' ' + kind.symbol}"
                )
        sentences.append((f"{label}: " if label else "Means. ") + "; ".join(parts))
    return ". ".join(sentences) + "."
