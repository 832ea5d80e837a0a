"""Pictures of scores: a metric against an axis, and several metrics side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from analysis.figures.style import (
    COLOURS,
    MARKERS,
    Drawn,
    legend,
    name_places,
    panels,
    render,
    sentence,
    shown,
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


def against_axis(name: str, metric: str, points: Sequence[Point], xs: Sequence[Any], x_label: str) -> Drawn:
    """A metric against an axis: the seeds as small points joined where they are paired, their mean as a line.

    Axis values stand at equal distances, as register counts double. Used for the outlier fraction and for top-1.
    """
    kind = unit(metric)
    series = list(dict.fromkeys(point.series for point in points))
    with styled():
        named = series[: len(COLOURS)] if len(series) > 1 else []
        figure, (axes,) = panels([""], x_label, _with_unit(metric), size=(4.6, 2.9), legend=named)
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


def downstream(by_metric: Mapping[str, Sequence[Point]], xs: Sequence[Any], x_label: str) -> Drawn:
    """Several metrics against the number of registers, one panel a metric (the paper's Fig. 8)."""
    every = list(dict.fromkeys(point.series for points in by_metric.values() for point in points))
    series = every[: len(COLOURS)]
    named = series if len(series) > 1 else []
    with styled():
        figure, grid = panels(
            [_with_unit(metric) for metric in by_metric],
            x_label,
            "",
            size=(2.7, 1.8),
            legend=named,
            shared_y=False,
            left=0.56,
        )
        for axes, (metric, points) in zip(grid, by_metric.items(), strict=True):
            for index, label in enumerate(series):
                if own := [point for point in points if point.series == label]:
                    _draw_series(axes, own, xs, unit(metric), index, len(series))
        name_places(grid[0], [value_text(x) for x in xs], 2.7)
        grid[0].set_xlim(-0.4, len(xs) - 0.6)
        if named:
            legend(figure, grid)
        png_svg = render(figure)
    caption = (
        "Scores on test images; small points are seeds, joined by seed, large points are means (as the paper's Fig. 8)."
    )
    words = " ".join(
        f"{sentence(_with_unit(metric))}. {_in_words(points, series, xs, unit(metric))}"
        for metric, points in by_metric.items()
    )
    title = f"Downstream scores against {x_label}"
    return Drawn("downstream", title, caption + shown(every, "series", len(COLOURS)), words, *png_svg)


def _with_unit(metric: str) -> str:
    symbol = unit(metric).symbol
    return metric_label(metric) + (f", {symbol}" if symbol else "")


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
