"""The picture of differences to the baseline with their intervals: a forest plot, one panel a metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator

from analysis.figures.style import (
    BLUE,
    MOST_PANELS,
    SMALL,
    Drawn,
    brief,
    legend,
    panels,
    render,
    shown,
    styled,
)
from analysis.labels import Unit, method_text, metric_label, unit

_MOST_CELLS = 24
_LONGEST = 40  # letters of a cell's name
_CLAIMED, _OTHER, _ALONE = "supported", "not supported", "no interval"


@dataclass(frozen=True)
class Interval:
    """The mean difference of a cell to its baseline; `low` and `high` are None where there is no interval.

    `supported` says whether the difference may be claimed: of a primary metric, with a corrected p-value below 0.05
    and an interval without zero.
    """

    label: str
    delta: float
    low: float | None
    high: float | None
    supported: bool


def differences(by_metric: Mapping[str, Sequence[Interval]], methods: Sequence[str]) -> Drawn:
    """Differences to the baseline with 95 % intervals, one panel a metric, cells from top to bottom.

    Args:
        by_metric: cells that have a difference, by metric; one at least in each.
        methods: how the intervals were computed, as `interval_method` names it.
    """
    drawn = dict(list(by_metric.items())[:MOST_PANELS])
    labels = list(dict.fromkeys(cell.label for cells in drawn.values() for cell in cells))
    named = labels[:_MOST_CELLS]
    texts = [brief(label, _LONGEST) for label in named]
    kinds = [name for name in (_CLAIMED, _OTHER, _ALONE) if any(_kind(c) == name for cs in drawn.values() for c in cs)]
    with styled():
        figure, grid = panels(
            [metric_label(metric) for metric in drawn],
            [_x_label(metric) for metric in drawn],
            "",
            size=(2.5, max(0.7, 0.2 * len(named) + 0.2)),
            legend=kinds,
            shared_x=False,
            left=0.25 + SMALL * max(map(len, texts)),
        )
        for axes, (metric, cells) in zip(grid, drawn.items(), strict=True):
            _draw_cells(axes, [cell for cell in cells if cell.label in named], named, unit(metric))
        grid[0].yaxis.set_major_locator(FixedLocator(range(len(named))))
        grid[0].yaxis.set_major_formatter(FixedFormatter(texts))
        grid[0].set_ylim(len(named) - 0.4, -0.6)
        legend(figure, grid)
        png_svg = render(figure)
    caption = (
        "Mean difference of each cell to its baseline, paired by seed, with its 95 % interval; the line is no "
        f"difference. {_methods(methods)} Filled points are differences of primary metrics that the data support: the "
        "corrected p-value is below 0.05 and the interval is without zero. A point without a bar has no interval."
    )
    return Drawn(
        "differences",
        "Differences to the baseline",
        caption + shown(by_metric, "metrics") + shown(labels, "cells", _MOST_CELLS),
        " ".join(_in_words(metric, cells, named) for metric, cells in drawn.items()),
        *png_svg,
    )


def _x_label(metric: str) -> str:
    return f"difference,{unit(metric).of_difference}" if unit(metric).of_difference else "difference"


def _methods(methods: Sequence[str]) -> str:
    return f"Intervals: {'; '.join(map(method_text, methods))}." if methods else "There are no intervals."


def _kind(cell: Interval) -> str:
    return _ALONE if cell.low is None or cell.high is None else _CLAIMED if cell.supported else _OTHER


def _draw_cells(axes: Axes, cells: Sequence[Interval], names: Sequence[str], kind: Unit) -> None:
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.axvline(0.0, color="#555555", linewidth=0.9)
    for cell in cells:
        place, name = names.index(cell.label), _kind(cell)
        if cell.low is not None and cell.high is not None:
            ends = (kind.scale * cell.low, kind.scale * cell.high)
            axes.plot(ends, (place, place), color=BLUE, linewidth=2.2 if cell.supported else 1.2, zorder=2)
        axes.plot(
            [kind.scale * cell.delta],
            [place],
            label=name,
            linestyle="none",
            marker="x" if name == _ALONE else "o",
            markersize=6,
            color=BLUE,
            markerfacecolor=BLUE if cell.supported else "white",
            zorder=3,
        )
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params(axis="y", labelsize=8)


def _in_words(metric: str, cells: Sequence[Interval], names: Sequence[str]) -> str:
    kind = unit(metric)
    parts = [
        " ".join(filter(None, (f"{cell.label} {kind.text(cell.delta, True)}", kind.interval(cell.low, cell.high))))
        for cell in cells
        if cell.label in names
    ]
    return f"{metric_label(metric)}, difference{kind.of_difference and ' in' + kind.of_difference}: {'; '.join(parts)}."
