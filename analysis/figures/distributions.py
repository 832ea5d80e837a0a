"""Pictures of norms at the end of trials: histograms, cells side by side, and kinds of token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator

from analysis.figures.style import (
    BLUE,
    GREEN,
    MOST_PANELS,
    ORANGE,
    PURPLE,
    Drawn,
    legend,
    log_x,
    log_y,
    name_places,
    panels,
    render,
    shown,
    styled,
)
from analysis.histograms import Floats, Histogram

GROUP = "Norms of tokens"
_COARSE = 16  # bins of the grid in a bar: 7.5 % of a norm
_FINE = 8  # in the outline of a distribution: 3.7 %
_LINES: dict[str, tuple[str, str]] = {  # a threshold's name in `Norms.thresholds`: its colour and dashes
    "frozen from the baseline": (GREEN, "-"),
    "rule 3": (ORANGE, "--"),
    "Otsu": (PURPLE, "-."),
    "fixed 150": ("#000000", ":"),
}


@dataclass(frozen=True)
class Norms:
    """Norms of the last layer of one cell, over all of its seeds together.

    Attributes:
        label: the cell.
        histogram: of one kind of token.
        peaks: the largest norm of every seed.
        thresholds: norms above which a token is an outlier, by the rule's name; those that exist.
    """

    label: str
    histogram: Histogram
    peaks: Sequence[float] = ()
    thresholds: Mapping[str, float] = field(default_factory=dict)


def norm_histogram(cells: Sequence[Norms]) -> Drawn:
    """Histogram of patch norms with a logarithmic count and the thresholds (the paper's Fig. 3), one panel a cell."""
    drawn = cells[:MOST_PANELS]
    with styled():
        names = [name for name in _LINES if any(name in cell.thresholds for cell in drawn)]
        figure, grid = panels(
            [cell.label for cell in drawn],
            "L2 norm of a patch token",
            "number of patches",
            legend=["patches", *names],
        )
        bars = [cell.histogram.coarse(_COARSE) for cell in drawn]
        low, high = min(edges[0] for edges, _ in bars), max(edges[-1] for edges, _ in bars)
        # Dashed ones last: where two are equal, both are seen.
        lines = [[(name, cell.thresholds[name]) for name in names if name in cell.thresholds] for cell in drawn]
        high = max([high, *(norm for found in lines for name, norm in found if name != "fixed 150")])
        for axes, (edges, counts), found in zip(grid, bars, lines, strict=True):
            axes.stairs(counts, edges, fill=True, baseline=0.5, color=BLUE, alpha=0.75, label="patches")
            for name, norm in found:
                if low < norm <= high:
                    axes.axvline(norm, linewidth=1.3, label=name, color=_LINES[name][0], linestyle=_LINES[name][1])
        log_x(grid[0], 0.95 * low, 1.05 * high)
        log_y(grid[0], 0.5, 1.5 * max(counts.max() for _, counts in bars))
        legend(figure, grid)
        png_svg = render(figure)
    caption = (
        "Patch norms of the last layer on the probe images at the last step, all seeds together. Lines are thresholds "
        "above which a rule calls a patch an outlier: rule 3 of this cell's own bulk, the paper's 150 where it is on "
        "the scale, Otsu's where there are two clear modes (mean of seeds), and the baseline's at the same multiple of "
        "the median."
    )
    words = "; ".join(f"{cell.label}: {_thresholds(cell)}" for cell in drawn)
    title = "Histogram of patch norms"
    alternative = f"Thresholds and the fraction of patches above. {words}."
    return Drawn("norm_histogram", title, caption + shown(cells, "cells"), alternative, *png_svg, GROUP)


def _thresholds(cell: Norms) -> str:
    distribution = cell.histogram.distribution()
    parts = [
        f"{name} {norm:.4g} ({100 * float(distribution.fraction_above(norm)):.2f} %)"
        for name, norm in cell.thresholds.items()
    ]
    return ", ".join(parts) or "no threshold"


def norms_by_cell(name: str, groups: Mapping[str, Sequence[Norms]], x_label: str, paper: str) -> Drawn:
    """Distributions of patch norms side by side, one panel a series (the paper's Fig. 7 or 4c, which `paper` says)."""
    drawn = dict(list(groups.items())[:MOST_PANELS])
    most = max(len(cells) for cells in drawn.values())
    everything = [cell for cells in drawn.values() for cell in cells]
    tallest = max(int(cell.histogram.counts.max()) for cell in everything)
    ends = [edge for cell in everything for edge in cell.histogram.coarse(_FINE)[0][[0, -1]]]
    alone = len(drawn) == 1
    size = (max(2.6, min(5.5, 0.62 * most)) if alone else max(2.2, min(4.2, 0.42 * most)), 2.6 if alone else 1.7)
    with styled():
        figure, grid = panels(
            list(drawn),
            x_label,
            "L2 norm of a patch token",
            size=size,
            legend=["patches", "median", "maximum of a seed"],
            most_columns=3 if most < 6 else 2,
        )
        for axes, cells in zip(grid, drawn.values(), strict=True):
            for place, cell in enumerate(cells):
                _draw_outline(axes, place, cell, tallest)
            name_places(axes, [cell.label for cell in cells], axes.get_position().width * figure.get_size_inches()[0])
            axes.set_xlim(-0.6, most - 0.4)
        log_y(grid[0], 0.93 * min(ends), 1.07 * max(ends))
        legend(figure, grid)
        png_svg = render(figure)
    caption = (
        "Norms of all patches of the last layer on the probe images at the last step, all seeds together. The width "
        f"of a shape grows with the logarithm of the number of patches, so that single ones show{paper}. The scale of "
        "norms is logarithmic and shared."
    )
    words = ". ".join(
        (f"{title}: " if title else "")
        + "; ".join(
            f"{cell.label}: median {cell.histogram.distribution().median():.4g}, highest {cell.histogram.maximum:.4g}"
            for cell in cells
        )
        for title, cells in drawn.items()
    )
    return Drawn(
        name,
        f"Patch norms by {x_label}",
        caption + shown(groups, "series"),
        f"Norms of patches. {words}.",
        *png_svg,
        GROUP,
    )


def _draw_outline(axes: Axes, place: int, cell: Norms, tallest: int) -> None:
    edges, counts = cell.histogram.coarse(_FINE)
    width = 0.42 * np.log1p(counts) / np.log1p(tallest * _FINE)
    y = np.repeat(edges, 2)[1:-1]
    x = np.repeat(np.minimum(width, 0.45), 2)
    axes.fill_betweenx(y, place - x, place + x, color=BLUE, alpha=0.55, linewidth=0, label="patches")
    median = cell.histogram.distribution().median()
    axes.plot([place - 0.3, place + 0.3], [median, median], color="#000000", linewidth=1.4, label="median")
    peaks = list(cell.peaks)
    axes.plot([place] * len(peaks), peaks, "_", color=ORANGE, markersize=9, label="maximum of a seed")


def norms_by_kind(cells: Mapping[str, Sequence[Norms]]) -> Drawn:
    """Norms of the class token, each register and the patches, one panel a cell (the paper's Fig. 15).

    Args:
        cells: kinds of token by cell; their labels are "class", "0", "1" … of registers, and "patch".
    """
    drawn = dict(list(cells.items())[:MOST_PANELS])
    levels = (0.01, 0.25, 0.5, 0.75, 0.99)
    quantiles = {
        label: np.array([kind.histogram.distribution().quantiles(levels) for kind in kinds])
        for label, kinds in drawn.items()
    }
    highest = max(kind.histogram.maximum for kinds in drawn.values() for kind in kinds if kind.label == "patch")
    with styled():
        figure, grid = panels(
            list(drawn),
            "kind of token (numbers are registers)",
            "L2 norm of a token",
            legend=["middle 98 %", "middle half", "median", "maximum"],
            shared_x=False,
        )
        for axes, (label, kinds) in zip(grid, drawn.items(), strict=True):
            _draw_kinds(axes, kinds, quantiles[label])
        numbers = np.concatenate([rows.ravel() for rows in quantiles.values()])
        log_y(grid[0], 0.85 * float(numbers.min()), 1.15 * max(float(numbers.max()), highest))
        legend(figure, grid)
        png_svg = render(figure)
    caption = (
        "Norms by kind of token in the last layer, on the probe images at the last step, all seeds together: median, "
        "the middle half and the middle 98 % over images (of patches: over all patches), and the largest norm."
    )
    words = ". ".join(
        f"{label}: medians "
        + ", ".join(f"{kind.label} {rows[2]:.4g}" for kind, rows in zip(kinds, quantiles[label], strict=True))
        for label, kinds in drawn.items()
    )
    return Drawn(
        "norms_by_kind",
        "Norms by kind of token",
        caption + shown(cells, "cells"),
        f"Norms of tokens in the last layer. {words}.",
        *png_svg,
        GROUP,
    )


def _draw_kinds(axes: Axes, kinds: Sequence[Norms], quantiles: Floats) -> None:
    places = np.arange(len(kinds))
    colours = ["#000000" if kind.label == "class" else BLUE if kind.label == "patch" else GREEN for kind in kinds]
    axes.vlines(places, quantiles[:, 0], quantiles[:, 4], color=colours, linewidth=1.2, label="middle 98 %")
    axes.vlines(places, quantiles[:, 1], quantiles[:, 3], color=colours, linewidth=4.5, alpha=0.6, label="middle half")
    axes.scatter(places, quantiles[:, 2], c=colours, s=16, zorder=3, label="median")
    axes.plot(places, [kind.histogram.maximum for kind in kinds], "_", color=ORANGE, markersize=7, label="maximum")
    many = len(kinds) > 8  # then every fourth register has its number, not the first, which is beside the class token
    named = [i for i, kind in enumerate(kinds) if not many or i in (0, len(kinds) - 1) or (i > 1 and i % 4 == 1)]
    axes.set_xlim(-0.6, len(kinds) - 0.4)
    axes.xaxis.set_major_locator(FixedLocator(named))
    axes.xaxis.set_major_formatter(FixedFormatter([kinds[i].label for i in named]))
