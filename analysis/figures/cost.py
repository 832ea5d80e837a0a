"""Pictures of cost: quality against FLOPs and hours with the Pareto front, and what each register costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.figures.style import (
    COLOURS,
    MARKERS,
    MOST_PANELS,
    Drawn,
    brief,
    legend,
    log_x,
    panels,
    render,
    sentence,
    shown,
    styled,
)
from analysis.labels import Unit, metric_label, unit

GROUP = "Cost"
_FRONT = "Pareto front"
_MOST_NAMED = 12  # points of a panel that have their names beside them
_LONGEST = 14  # letters of such a name
_CORNERS = ((1, 1), (-1, -1), (1, -1), (-1, 1))
_WIDE = 20.0  # ratio of costs from which on their axis is logarithmic


@dataclass(frozen=True)
class CostPoint:
    """One cell: cost and score over its finished seeds.

    Attributes:
        series, label: the cell's series, and what tells it apart within.
        cost, score: lowest seed, mean and highest seed, in the panel's unit and as the metric is recorded.
        best: whether it lies on the Pareto front: no other cell is as good for as little and better in one of both.
    """

    series: str
    label: str
    cost: tuple[float, float, float]
    score: tuple[float, float, float]
    best: bool


@dataclass(frozen=True)
class CostPanel:
    """Cells by one kind of cost, in words with its unit."""

    x_label: str
    points: Sequence[CostPoint]


@dataclass(frozen=True)
class Price:
    """What registers add to one kind of model, as shares of what it costs without; 0.02 is 2 %.

    Attributes:
        label: the model.
        counts: numbers of registers, [n], the first is 0.
        parameters, forward: of the backbone's parameters, and of the FLOPs of one image's forward pass, [n], by closed
            formula; empty where the shape of the model is not known.
        planned: number of registers to the share of the FLOPs of training one image, from the sweep's plan.
    """

    label: str
    counts: Sequence[int]
    parameters: Sequence[float]
    forward: Sequence[float]
    planned: Mapping[int, float]


def cost_against_quality(name: str, metric: str, compared: Sequence[CostPanel], names: str) -> Drawn:
    """A metric against what it cost, one panel a kind of cost and one point a cell, with the Pareto front.

    Args:
        names: what the labels of points are, in words; "" where points have none.
    """
    kind = unit(metric)
    every = list(dict.fromkeys(point.series for panel in compared for point in panel.points))
    series = every[: len(COLOURS)]
    named = series if len(series) > 1 else []
    label = metric_label(metric) + (f", {kind.symbol}" if kind.symbol else "")
    with styled():
        figure, grid = panels(
            [""] * len(compared),
            [panel.x_label for panel in compared],
            label,
            size=(3.1, 2.2),
            legend=[*named, _FRONT],
            shared_x=False,
        )
        for axes, panel in zip(grid, compared, strict=True):
            _draw_front(axes, panel.points, kind)
            for number, one in enumerate(series):
                _draw_cells(axes, [point for point in panel.points if point.series == one], kind, number, bool(named))
            _cost_axis(axes, panel.points)
            axes.margins(y=0.14)
            axes.autoscale_view(scalex=False)
        for axes, panel in zip(grid, compared, strict=True):  # the y axis is shared
            _name_cells(axes, [point for point in panel.points if point.series in series], kind, figure.dpi)
        legend(figure, grid)
        png_svg = render(figure)
    caption = (
        "One point a cell: means over its finished seeds, with bars from the lowest to the highest of them. The dashed "
        "line joins the filled points, cells that no other one beats in both, by their means alone: whether they "
        "differ is what intervals say."
    ) + (f" Beside points stands their {names}." if names and any(_is_named(p.points) for p in compared) else "")
    words = " ".join(_in_words(panel, kind) for panel in compared)
    title = f"{sentence(metric_label(metric))} against cost"
    return Drawn(name, title, caption + shown(every, "series", len(COLOURS)), words, *png_svg, GROUP)


def _draw_front(axes: Axes, points: Sequence[CostPoint], kind: Unit) -> None:
    front = sorted((point.cost[1], kind.scale * point.score[1]) for point in points if point.best)
    if front:
        axes.plot(*zip(*front, strict=True), color="#777777", linewidth=1.1, linestyle="--", label=_FRONT, zorder=1)


def _draw_cells(axes: Axes, points: Sequence[CostPoint], kind: Unit, number: int, named: bool) -> None:
    colour, marker = COLOURS[number], MARKERS[number]
    if named and points:
        axes.plot([], [], label=points[0].series, linestyle="none", color=colour, marker=marker, markersize=6)
    for point in points:
        low, mean, high = point.cost
        worst, score, best = (kind.scale * value for value in point.score)
        axes.plot((low, high), (score, score), color=colour, linewidth=0.9, alpha=0.6)
        axes.plot((mean, mean), (worst, best), color=colour, linewidth=0.9, alpha=0.6)
        axes.plot(
            [mean],
            [score],
            linestyle="none",
            color=colour,
            marker=marker,
            markersize=6,
            markerfacecolor=colour if point.best else "white",
            zorder=3,
        )


def _name_cells(axes: Axes, points: Sequence[CostPoint], kind: Unit, dpi: float) -> None:
    """Names at that corner of each point which is farthest from other points and names, once the axes are fixed."""
    if not _is_named(points):
        return
    dots = axes.transData.transform([(point.cost[1], kind.scale * point.score[1]) for point in points])
    dots = dots * 72 / dpi  # in points, as letters are measured
    taken: list[tuple[float, float]] = []
    for point, (x, y) in zip(points, dots.tolist(), strict=True):
        text = brief(point.label, _LONGEST)
        half = 2.5 * len(text) + 4
        others = [(float(u), float(v)) for u, v in dots.tolist() if (u, v) != (x, y)] + taken
        free = {(a, b): _nearest((x + a * half, y + b * 8), others) for a, b in _CORNERS}
        corner = max(_CORNERS, key=free.__getitem__)
        taken.append((x + corner[0] * half, y + corner[1] * 8))
        axes.annotate(
            text,
            (point.cost[1], kind.scale * point.score[1]),
            xytext=(4 * corner[0], 4 * corner[1]),
            textcoords="offset points",
            ha="left" if corner[0] > 0 else "right",
            va="bottom" if corner[1] > 0 else "top",
            fontsize=8,
        )


def _nearest(place: tuple[float, float], others: Sequence[tuple[float, float]]) -> float:
    """The distance to the nearest of `others`; 0 where there are none."""
    return min((math.dist(place, other) for other in others), default=0.0)


def _is_named(points: Sequence[CostPoint]) -> bool:
    return 1 < len(points) <= _MOST_NAMED


def _cost_axis(axes: Axes, points: Sequence[CostPoint]) -> None:
    low, high = min(point.cost[0] for point in points), max(point.cost[2] for point in points)
    if low > 0 and high / low > _WIDE:
        log_x(axes, low / 1.3, 1.6 * high)
    else:
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_xlim(low - room, high + room)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.get_major_formatter().set_useOffset(False)  # type: ignore[attr-defined]


def _in_words(panel: CostPanel, kind: Unit) -> str:
    ordered = sorted(panel.points, key=lambda point: (point.cost[1], point.score[1]))[: 2 * _MOST_NAMED]
    parts = [
        f"{', '.join(filter(None, (point.series, point.label)))}: {kind.text(point.score[1])} for {point.cost[1]:.4g}"
        + (" (on the Pareto front)" if point.best else "")
        for point in ordered
    ]
    return f"{sentence(panel.x_label)}. {'; '.join(parts)}."


def price_of_registers(prices: Sequence[Price]) -> Drawn:
    """What each number of registers adds to parameters and to FLOPs (the paper's Fig. 12), one line a model."""
    drawn = prices[: len(COLOURS)]
    kinds = {
        "parameters": any(price.parameters for price in drawn),
        "FLOPs of a forward pass": any(price.forward for price in drawn),
        "FLOPs of training, as planned": any(price.planned for price in drawn),
    }
    titles = [title for title, there in kinds.items() if there][:MOST_PANELS]
    with styled():
        figure, grid = panels(
            titles,
            "number of registers",
            "added by registers, %",
            size=(2.4, 1.8),
            legend=[price.label for price in drawn],
            shared_y=False,
        )
        for axes, title in zip(grid, titles, strict=True):
            for number, price in enumerate(drawn):
                _draw_price(axes, price, _column(price, title), number)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        legend(figure, grid)
        png_svg = render(figure)
    caption = (
        "What registers add to a model without any. Parameters and forward pass are those of the backbone and one "
        "image, by closed formula (two FLOPs a multiply-add; norms and activations not counted), as in the paper's "
        "Fig. 12; training is what the sweep's plan estimates for one image of the data, all crops and heads of the "
        "method included: where small crops are trained on, a register is dearer."
    )
    words = " ".join(_price_in_words(price) for price in drawn)
    return Drawn(
        "price_of_registers",
        "Price of registers",
        caption + shown(prices, "models", len(COLOURS)),
        words,
        *png_svg,
        GROUP,
    )


def _column(price: Price, title: str) -> list[tuple[int, float]]:
    """Numbers of registers and shares of one panel."""
    if title == "parameters":
        return list(zip(price.counts, price.parameters, strict=False))
    if title.startswith("FLOPs of a forward"):
        return list(zip(price.counts, price.forward, strict=False))
    return sorted(price.planned.items())


def _draw_price(axes: Axes, price: Price, column: Sequence[tuple[int, float]], number: int) -> None:
    if column:
        counts, shares = zip(*column, strict=True)
        axes.plot(
            counts,
            [100 * share for share in shares],
            color=COLOURS[number],
            marker=MARKERS[number],
            markersize=4,
            linewidth=1.3,
            label=price.label,
        )


def _price_in_words(price: Price) -> str:
    parts = []
    for what, column in (
        ("parameters", zip(price.counts, price.parameters, strict=False)),
        ("forward pass", zip(price.counts, price.forward, strict=False)),
        ("training", sorted(price.planned.items())),
    ):
        texts = [f"{count}: {100 * share:.3g} %" for count, share in column if count and math.isfinite(share)]
        if texts:
            parts.append(f"{what} {', '.join(texts)}")
    return f"{price.label}, more than without registers: {'; '.join(parts)}."
