"""The picture of object discovery: CorLoc against the bias that is added to all products of features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from analysis.figures.style import (
    COLOURS,
    MARKERS,
    MOST_PANELS,
    Drawn,
    legend,
    panels,
    render,
    shown,
    styled,
)
from analysis.labels import MINUS, unit

COMMON_LABEL = "common bias"
_LINEAR = 10.0  # biases beyond are shown on a scale that is logarithmic from 1 on


@dataclass(frozen=True)
class Line:
    """CorLoc of one cell: of each bias, in rising order, the values of its seeds."""

    label: str
    biases: Sequence[float]
    values: Sequence[Sequence[float]]

    def means(self) -> list[float]:
        """Of each bias over seeds."""
        return [sum(values) / len(values) for values in self.values]


@dataclass(frozen=True)
class Panel:
    """Cells that are compared, and the bias that they share, if any."""

    title: str
    lines: Sequence[Line]
    common: float | None


def corloc_by_bias(name: str, title: str, compared: Sequence[Panel]) -> Drawn:
    """A line for each cell, the mean of its seeds, and a band from the lowest to the highest of them."""
    drawn = compared[:MOST_PANELS]
    kind = unit("test/object_discovery/corloc")
    labels = list(dict.fromkeys(line.label for panel in drawn for line in panel.lines))[: len(COLOURS)]
    common = [COMMON_LABEL] if any(panel.common is not None for panel in drawn) else []
    with styled():
        figure, grid = panels(
            [panel.title for panel in drawn], "bias", f"CorLoc, {kind.symbol}", legend=[*labels, *common]
        )
        for axes, panel in zip(grid, drawn, strict=True):
            for line in (line for line in panel.lines if line.label in labels):
                number = labels.index(line.label)
                colour, label = COLOURS[number], line.label or None
                low, high = ([kind.scale * end(values) for values in line.values] for end in (min, max))
                axes.fill_between(line.biases, low, high, color=colour, alpha=0.2, lw=0)
                means = [kind.scale * mean for mean in line.means()]
                axes.plot(
                    line.biases, means, color=colour, label=label, linewidth=1.5, marker=MARKERS[number], markersize=4
                )
            if panel.common is not None:
                axes.axvline(panel.common, color="#555555", linewidth=0.9, linestyle="--", label=COMMON_LABEL)
        widest = max(abs(bias) for panel in drawn for line in panel.lines for bias in line.biases)
        if widest > _LINEAR:
            _powers_of_ten(grid[0], widest)
        grid[0].set_ylim(bottom=0)
        legend(figure, grid)
        png_svg = render(figure)
    caption = (
        "Share of images whose predicted box overlaps a true one by half or more, against the bias added to the "
        "products of patches' features. Lines are means over finished seeds, bands go from the lowest to the highest. "
        "The common bias is that of the best mean over all of them on the images on which trials choose their own."
    )
    return Drawn(
        name,
        title,
        caption + shown(compared, "comparisons") + shown(labels, "lines", len(COLOURS)),
        "; ".join(_in_words(panel) for panel in drawn) + ".",
        *png_svg,
        "Object discovery",
    )


def _powers_of_ten(axes: Axes, widest: float) -> None:
    """An x axis that is linear between −1 and 1, logarithmic beyond, with ticks at 0 and a few powers of ten."""
    axes.set_xscale("symlog", linthresh=1.0)
    decades = math.floor(math.log10(widest))
    powers = [10.0**decade for decade in range(decades, 0, -math.ceil(decades / 3))]
    ticks = [*(-power for power in powers), 0.0, *powers]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{tick:g}".replace("-", MINUS) for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())


def _in_words(panel: Panel) -> str:
    """The best bias of each line, and the common one."""
    kind = unit("test/object_discovery/corloc")
    parts = []
    for line in panel.lines:
        best, bias = max(zip(line.means(), line.biases, strict=True), key=lambda pair: (pair[0], -abs(pair[1])))
        parts.append(f"{line.label or 'all'}: best {kind.text(best)} {kind.symbol} at a bias of {bias:g}")
    shared = "no common bias" if panel.common is None else f"common bias {panel.common:g}"
    return f"{panel.title}: {', '.join([*parts, shared])}" if panel.title else ", ".join([*parts, shared])
