"""The picture of what patches know of their place and their pixels, outliers against others (the paper's Fig. 5b)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from analysis.figures.style import BLUE, ORANGE, Drawn, legend, name_places, panels, render, shown, styled
from analysis.labels import unit

_GROUPS = (("normal patches", BLUE), ("outliers", ORANGE))
_TITLES = {
    "position/{}/top1": "position probe, top-1, %",
    "position/{}/distance": "position probe, distance, cells",
    "pixels/{}/l2": "pixel probe, L2 error",
}
PROBES = tuple(_TITLES)  # metrics under `locality/`, with the group of patches left open
_MOST_CELLS = 12
_WIDTH = 0.38  # of a bar; cells stand at distance 1


@dataclass(frozen=True)
class Probed:
    """Scores of one cell: those of its seeds by `PROBES`, of normal patches and of outliers; none where it has none."""

    label: str
    normal: Mapping[str, Sequence[float]]
    outlier: Mapping[str, Sequence[float]]


def local_information(cells: Sequence[Probed], x_label: str) -> Drawn:
    """Bars of position and pixel probes by cell, one panel a probe, with a dot for each seed."""
    drawn = cells[:_MOST_CELLS]
    probes = [probe for probe in PROBES if any(cell.normal.get(probe) or cell.outlier.get(probe) for cell in drawn)]
    width = max(1.9, 0.36 * len(drawn) + 0.3)
    with styled():
        figure, grid = panels(
            [_TITLES[probe] for probe in probes],
            x_label,
            "",
            size=(width, 1.6),
            legend=[name for name, _ in _GROUPS],
            shared_y=False,
            left=0.56,
        )
        for axes, probe in zip(grid, probes, strict=True):
            _draw_probe(axes, drawn, probe)
        name_places(grid[0], [cell.label for cell in drawn], width)
        legend(figure, grid)
        png_svg = render(figure)
    caption = (
        "One linear probe on all patches of the last layer, scored on outliers and on normal patches of test images; "
        "bars are means over finished seeds, dots are seeds. Top-1 and distance are of the patch's cell on the grid, "
        "the pixel probe predicts the patch's pixels (as the paper's Fig. 5b). Cells without outliers have no bar of "
        "them."
    )
    words = "; ".join(f"{cell.label}: {', '.join(_in_words(cell, probe) for probe in probes)}" for cell in drawn)
    return Drawn(
        "local_information",
        "Local information in patches",
        caption + shown(cells, "cells", _MOST_CELLS),
        f"Means of normal patches and of outliers. {words}.",
        *png_svg,
        "Where outliers are",
    )


def _draw_probe(axes: Axes, cells: Sequence[Probed], probe: str) -> None:
    scale = unit(f"locality/{probe}").scale
    for side, (name, colour) in zip((-0.5, 0.5), _GROUPS, strict=True):
        groups = [cell.normal if side < 0 else cell.outlier for cell in cells]
        own = [(place + side * _WIDTH, group[probe]) for place, group in enumerate(groups) if group.get(probe)]
        if not own:
            continue
        places, values = zip(*own, strict=True)
        axes.bar(places, [scale * _mean(of) for of in values], width=_WIDTH, color=colour, alpha=0.6, label=name)
        for place, of in own:
            at = np.linspace(-0.25, 0.25, len(of)) * _WIDTH if len(of) > 1 else np.zeros(1)
            axes.plot(place + at, [scale * value for value in of], ".", color="#000000", markersize=3)
    axes.set_xlim(-0.6, len(cells) - 0.4)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _in_words(cell: Probed, probe: str) -> str:
    kind = unit(f"locality/{probe}")
    texts = [kind.text(_mean(group[probe])) if group.get(probe) else "none" for group in (cell.normal, cell.outlier)]
    return f"{_TITLES[probe]} {texts[0]} and {texts[1]}"
