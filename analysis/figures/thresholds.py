"""The picture of the fraction of patches above any threshold: whether a conclusion depends on its choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from analysis.figures.distributions import GROUP
from analysis.figures.style import COLOURS, MOST_PANELS, Drawn, legend, log_x, log_y, panels, render, shown, styled
from analysis.histograms import Floats


@dataclass(frozen=True)
class Shares:
    """The fraction of patches above each τ/median in one cell.

    Attributes:
        label: the cell.
        fractions: [n] for every seed.
        patches: how many a seed has.
        band: lower and upper bounds of the mean that hold for all τ together, [n] each; None with one seed.
        holds: first and last τ/median of the stretches over which the difference to the baseline keeps its sign.
    """

    label: str
    fractions: Sequence[Floats]
    patches: int
    band: tuple[Floats, Floats] | None = None
    holds: Sequence[tuple[float, float]] = ()


def above_every_threshold(
    series: Mapping[str, Sequence[Shares]], ratios: Floats, frozen: Mapping[str, float | None]
) -> Drawn:
    """The fraction of patches above τ/median for every τ, a line a cell with its band.

    Args:
        series: cells by series.
        ratios: τ/median, [n], rising.
        frozen: the threshold of each series' baseline, where there is one.
    """
    drawn = dict(list(series.items())[:MOST_PANELS])
    lowest = 0.5 / max(cell.patches for cells in drawn.values() for cell in cells)
    occupied = max(int((np.max(cell.fractions, axis=0) > 0).sum()) for cells in drawn.values() for cell in cells)
    end = min(max(occupied, 20), len(ratios) - 1)
    alone = len(drawn) == 1
    labels = list(dict.fromkeys(cell.label for cells in drawn.values() for cell in cells))[: len(COLOURS)]
    with styled():
        figure, grid = panels(
            list(drawn),
            "threshold τ / median norm of the trial's patches",
            "fraction of patches above τ",
            size=(4.6, 2.6) if alone else (2.35, 1.7),
            legend=[*labels, "frozen from the baseline"],
        )
        for axes, (name, cells) in zip(grid, drawn.items(), strict=True):
            for cell in (cell for cell in cells if cell.label in labels):
                _draw_shares(axes, cell, ratios, COLOURS[labels.index(cell.label)], lowest)
            _draw_stretches(axes, [(COLOURS[labels.index(c.label)], c.holds) for c in cells if c.label in labels])
            ratio = frozen.get(name)
            if ratio is not None:
                axes.axvline(ratio, linewidth=1, label="frozen from the baseline", color="#555555", linestyle="--")
        log_x(grid[0], 1.0, float(ratios[end]))
        log_y(grid[0], lowest, 1.0)
        legend(figure, grid)
        png_svg = render(figure)
    caption = (
        "Patches of the last layer on the probe images at the last step whose norm exceeds τ, for any τ as a multiple "
        "of the median of the trial's own patches. Lines are means over seeds; a line on the lower edge is zero. "
        "Bands are 95 % intervals that hold for all τ together. Bars at the top mark the thresholds over which the "
        "difference of a cell to its baseline is without zero, for all of them together: there the choice of a "
        "threshold does not decide the comparison."
    )
    at = [ratio for ratio in (1.5, 2.0, 3.0) if ratio <= ratios[end]]
    words = "; ".join(
        f"{name + ', ' if name else ''}{cell.label}: "
        + ", ".join(f"{100 * float(np.interp(r, ratios, np.mean(cell.fractions, axis=0))):.3g} %" for r in at)
        + (" (differs from the baseline for τ " + _stretches(cell.holds) + ")" if cell.holds else "")
        for name, cells in drawn.items()
        for cell in cells[: len(COLOURS)]
    )
    alternative = f"Fraction of patches above {', '.join(f'{r:g}' for r in at)} medians. {words}."
    return Drawn(
        "outliers_by_threshold",
        "Fraction of patches above any threshold",
        caption + shown(series, "series"),
        alternative,
        *png_svg,
        GROUP,
    )


def _draw_shares(axes: Axes, cell: Shares, ratios: Floats, colour: str, lowest: float) -> None:
    if cell.band is not None:
        low, high = (np.maximum(bound, lowest) for bound in cell.band)
        axes.fill_between(ratios, low, high, color=colour, alpha=0.18, linewidth=0)
    mean = np.maximum(np.mean(cell.fractions, axis=0), lowest)
    axes.plot(ratios, mean, color=colour, linewidth=1.5, label=cell.label)


def _draw_stretches(axes: Axes, cells: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> None:
    """A bar at the top for each cell with a stretch of thresholds, one under the other."""
    for row, (colour, stretches) in enumerate((colour, holds) for colour, holds in cells if holds):
        for stretch in stretches:
            y = 0.985 - 0.03 * row
            axes.plot(stretch, (y, y), transform=axes.get_xaxis_transform(), color=colour, linewidth=2.2, alpha=0.9)


def _stretches(holds: Sequence[tuple[float, float]]) -> str:
    return " and ".join(f"{first:.3g} to {last:.3g}" for first, last in holds)
