"""Pictures of how patch norms develop: quantiles along layers and along training (the paper's Fig. 4a and 4b)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.figures.style import (
    BLUE,
    GREEN,
    MOST_PANELS,
    ORANGE,
    Drawn,
    legend,
    log_y,
    panels,
    render,
    shown,
    steps_axis,
    styled,
)

GROUP = "Norms of tokens"


@dataclass(frozen=True)
class Band:
    """Norms of patch tokens of one cell along an axis, quantiles averaged over its seeds.

    Attributes:
        label: the cell.
        places: layers or steps, [n]; a quantile is NaN where it is missing.
        quantiles: "median", "p90", "p99" and "max", each [n].
        cls: median norm of the class token, [n].
        registers: median norm averaged over registers, [n].
        onsets: steps at which outliers have set in, one for each seed that has one.
    """

    label: str
    places: Sequence[int]
    quantiles: Mapping[str, Sequence[float]]
    cls: Sequence[float] | None = None
    registers: Sequence[float] | None = None
    onsets: Sequence[float] = ()


def norms_by_layer(bands: Sequence[Band]) -> Drawn:
    """Distribution of patch norms by layer, one panel a cell, on one logarithmic scale (the paper's Fig. 4a)."""
    caption = (
        "Norms of patch tokens on the probe images at the last step, by layer and before the final norm. Quantiles are "
        "averaged over seeds, the maximum is the highest of all seeds. The scale is logarithmic and shared."
    )
    words = f"Patch norms at the last layer. {_ends(bands)}."
    png_svg = _draw(bands, "layer (0 is what enters the first block)", steps=False)
    title = "Norm distribution along layers"
    return Drawn("norms_by_layer", title, caption + shown(bands, "cells"), words, *png_svg, GROUP)


def norms_by_step(bands: Sequence[Band]) -> Drawn:
    """Distribution of the last layer's patch norms along training, one panel a cell (the paper's Fig. 4b)."""
    caption = (
        "Norms of patch tokens of the last layer on the probe images, evaluated weights, along training. Quantiles are "
        "averaged over seeds, the maximum is the highest of all seeds. Vertical lines are the steps at which more than "
        "0.5 % of patches have become outliers (rule 3) for three evaluations, one line a seed that has such a step."
    )
    onsets = [
        f"{band.label}: outliers set in at step {', '.join(f'{onset:g}' for onset in band.onsets)}"
        for band in bands[:MOST_PANELS]
        if band.onsets
    ]
    words = f"Patch norms at the last step. {'; '.join([_ends(bands), *onsets])}."
    png_svg = _draw(bands, "step", steps=True)
    title = "Norm distribution along training"
    return Drawn("norms_by_step", title, caption + shown(bands, "cells"), words, *png_svg, GROUP)


def _ends(bands: Sequence[Band]) -> str:
    return "; ".join(
        f"{b.label}: median {b.quantiles['median'][-1]:.4g}, maximum {b.quantiles['max'][-1]:.4g}"
        for b in bands[:MOST_PANELS]
    )


def _draw(bands: Sequence[Band], x_label: str, steps: bool) -> tuple[bytes, bytes]:
    drawn = bands[:MOST_PANELS]
    numbers = [
        number
        for band in drawn
        for column in (*band.quantiles.values(), band.cls or (), band.registers or ())
        for number in column
        if math.isfinite(number) and number > 0
    ]
    with styled():
        figure, grid = panels([band.label for band in drawn], x_label, "L2 norm of a token", legend=_labels(drawn))
        for axes, band in zip(grid, drawn, strict=True):
            _draw_band(axes, band)
        if numbers:
            log_y(grid[0], 0.9 * min(numbers), 1.1 * max(numbers))
        if steps:
            steps_axis(grid[0])
        else:
            grid[0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        legend(figure, grid)
        return render(figure)


def _labels(bands: Sequence[Band]) -> list[str]:
    there = {
        "class token": any(band.cls is not None for band in bands),
        "registers": any(band.registers is not None for band in bands),
        "onset of outliers": any(band.onsets for band in bands),
    }
    return [
        "50–90 %",
        "90–99 %",
        "median patch",
        "maximum patch",
        *(label for label, is_there in there.items() if is_there),
    ]


def _draw_band(axes: Axes, band: Band) -> None:
    quantiles, places = band.quantiles, band.places
    axes.fill_between(places, quantiles["median"], quantiles["p90"], color=BLUE, alpha=0.45, lw=0, label="50–90 %")
    axes.fill_between(places, quantiles["p90"], quantiles["p99"], color=BLUE, alpha=0.2, lw=0, label="90–99 %")
    axes.plot(places, quantiles["median"], color=BLUE, linewidth=1.6, label="median patch")
    axes.plot(places, quantiles["max"], color=ORANGE, linewidth=1.3, linestyle="--", label="maximum patch")
    if band.cls is not None:
        axes.plot(places, band.cls, color="#000000", linewidth=1, linestyle=":", label="class token")
    if band.registers is not None:
        axes.plot(places, band.registers, color=GREEN, linewidth=1.2, linestyle="-.", label="registers")
    for onset in band.onsets:
        axes.axvline(onset, color="#555555", linewidth=0.9, label="onset of outliers")
