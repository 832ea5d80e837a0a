"""The picture of how alike patches were to their neighbours when they entered (the paper's Fig. 5a)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from analysis.figures.style import BLUE, MOST_PANELS, ORANGE, Drawn, legend, panels, render, shown, styled

_BINS = 50  # at the most, over the range of all cells


@dataclass(frozen=True)
class Similarities:
    """Counts of the mean cosine of a patch to its neighbours, [n] in bins between `edges` [n + 1], of one cell."""

    label: str
    edges: NDArray[Any]
    outlier: NDArray[Any]
    normal: NDArray[Any]


def neighbor_similarity(cells: Sequence[Similarities]) -> Drawn:
    """Densities of similarity, of outliers and of normal patches, one panel a cell."""
    drawn = cells[:MOST_PANELS]
    low, high = _range(drawn)
    with styled():
        figure, grid = panels(
            [cell.label for cell in drawn],
            "cosine similarity to the 4 neighbours, mean",
            "density",
            legend=["normal patches", "outliers"],
        )
        for axes, cell in zip(grid, drawn, strict=True):
            for name, counts, colour in (("normal patches", cell.normal, BLUE), ("outliers", cell.outlier, ORANGE)):
                edges, density = _density(cell.edges, counts)
                if density is not None:
                    axes.stairs(density, edges, fill=True, color=colour, alpha=0.45, label=name)
                    axes.stairs(density, edges, color=colour, linewidth=1.1)
        grid[0].set_xlim(low, high)
        grid[0].set_ylim(bottom=0)
        for axis in (grid[0].xaxis, grid[0].yaxis):
            axis.set_major_locator(MaxNLocator(5))
        legend(figure, grid)
        png_svg = render(figure)
    caption = (
        "Cosine similarity of a patch to its 4 neighbours where it enters the model, before the position embedding, "
        "mean over the neighbours; outliers of the last step against all other patches of the probe images, all "
        "finished seeds together. Each density has area 1, however few outliers there are."
    )
    words = "; ".join(
        f"{cell.label}: {int(cell.normal.sum())} normal patches, mean {_mean(cell.edges, cell.normal)}, "
        f"{int(cell.outlier.sum())} outliers, mean {_mean(cell.edges, cell.outlier)}"
        for cell in drawn
    )
    return Drawn(
        "neighbor_similarity",
        "Similarity of patches to their neighbours",
        caption + shown(cells, "cells"),
        f"Similarity to neighbours. {words}.",
        *png_svg,
        "Where outliers are",
    )


def _density(edges: NDArray[Any], counts: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Density in bins of four neighbouring ones, None where nothing was counted."""
    width = max(1, len(counts) // _BINS)
    whole = len(counts) // width * width
    coarse, joined = edges[: whole + 1 : width], counts[:whole].reshape(-1, width).sum(axis=1)
    return coarse, joined / (joined.sum() * np.diff(coarse)) if joined.sum() else None


def _range(cells: Sequence[Similarities]) -> tuple[float, float]:
    """The similarities that occur, with a little room."""
    occupied = [
        cell.edges[np.append(False, total) | np.append(total, False)]
        for cell in cells
        if (total := (cell.outlier + cell.normal) > 0).any()
    ]
    if not occupied:
        return -1.0, 1.0
    low, high = min(float(edges.min()) for edges in occupied), max(float(edges.max()) for edges in occupied)
    return low - 0.04, min(high + 0.04, 1.02)


def _mean(edges: NDArray[Any], counts: NDArray[Any]) -> str:
    return f"{float((edges[:-1] + edges[1:]) / 2 @ counts / counts.sum()):.3f}" if counts.sum() else "none"
