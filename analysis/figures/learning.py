"""Pictures along training: metrics on validation images and of tokens, and the training loss, against steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from analysis.figures.style import (
    COLOURS,
    MARKERS,
    MOST_PANELS,
    Drawn,
    legend,
    panels,
    render,
    shown,
    steps_axis,
    styled,
)
from analysis.labels import Unit, metric_label, unit

_MARKED = 12  # a mean of no more steps has a marker at each


@dataclass(frozen=True)
class Curve:
    """A metric of one trial along its training: `label` says which cell of its panel it belongs to."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Track:
    """A metric of one cell along training: mean, lowest and highest of its finished seeds, [n] each."""

    label: str
    steps: Sequence[int]
    means: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]
    seeds: int


def learning_curves(tracks: Mapping[str, Sequence[Track]]) -> Drawn:
    """Metrics against steps, one panel a metric, a line a cell with the range of its seeds.

    Args:
        tracks: cells by metric; a metric has one cell at least.
    """
    drawn = dict(list(tracks.items())[:MOST_PANELS])
    labels = list(dict.fromkeys(track.label for cells in drawn.values() for track in cells))
    named = labels[: len(COLOURS)]
    with styled():
        figure, grid = panels(
            [_with_unit(metric) for metric in drawn],
            "step",
            "",
            size=(2.7, 1.7),
            legend=named,
            shared_y=False,
            most_columns=2 if len(drawn) in (2, 4) else 3,
            left=0.56,
        )
        for axes, (metric, cells) in zip(grid, drawn.items(), strict=True):
            for track in (track for track in cells if track.label in named):
                _draw_track(axes, track, unit(metric), named.index(track.label))
            if "fraction" in metric and all(min(track.lows) >= 0 for track in cells):
                axes.set_ylim(bottom=0)
        steps_axis(grid[0])
        legend(figure, grid)
        png_svg = render(figure)
    counts = sorted({track.seeds for cells in drawn.values() for track in cells})
    caption = (
        f"Lines are means over the finished seeds of a cell ({_number(counts)} each) at steps that all of them have; "
        "bands go from the lowest seed to the highest."
    )
    return Drawn(
        "learning_curves",
        "Learning curves",
        caption + shown(tracks, "metrics") + shown(labels, "cells", len(COLOURS)),
        "; ".join(_in_words(metric, cells, named) for metric, cells in drawn.items()) + ".",
        *png_svg,
    )


def _with_unit(metric: str) -> str:
    symbol = unit(metric).symbol
    return metric_label(metric) + (f", {symbol}" if symbol else "")


def _number(counts: Sequence[int]) -> str:
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _draw_track(axes: Axes, track: Track, kind: Unit, number: int) -> None:
    colour = COLOURS[number]
    low, high, mean = ([kind.scale * value for value in row] for row in (track.lows, track.highs, track.means))
    if track.seeds > 1:
        axes.fill_between(track.steps, low, high, color=colour, alpha=0.16, linewidth=0)
    marker = MARKERS[number] if len(mean) <= _MARKED else None
    axes.plot(track.steps, mean, color=colour, linewidth=1.4, marker=marker, markersize=4, label=track.label)


def _in_words(metric: str, cells: Sequence[Track], labels: Sequence[str]) -> str:
    kind = unit(metric)
    parts = [
        f"{track.label} from {kind.text(track.means[0])} to {kind.text(track.means[-1])}"
        for track in cells
        if track.label in labels
    ]
    return f"{_with_unit(metric)}, first and last mean: {', '.join(parts)}"


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
    every = list(dict.fromkeys(curve.label for curves in curves_by_panel.values() for curve in curves))
    caption = "Mean loss since the point before, one line a trial. Losses of different methods cannot be compared."
    ends = [f"{t or 'all'}: from {_mean_end(c, 0):.4g} to {_mean_end(c, -1):.4g}" for t, c in drawn_panels.items()]
    return Drawn(
        "train_loss",
        "Training loss",
        caption + shown(curves_by_panel, "panels") + shown(every, "cells", len(COLOURS)),
        f"Mean training loss over trials, first and last point. {'; '.join(ends)}.",
        *drawn,
    )


def _mean_end(curves: Sequence[Curve], end: int) -> float:
    return sum(curve.values[end] for curve in curves) / len(curves)
