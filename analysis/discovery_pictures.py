"""What of the curves of object discovery the pictures show: a panel for each comparison, a line for each cell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from analysis.cells import Cell, cells, varying
from analysis.collect import Frames
from analysis.discovery import comparisons, families
from analysis.figures.discovery import Line, Panel, corloc_by_bias
from analysis.figures.style import Drawn
from analysis.labels import axis_labels, cell_text
from analysis.layout import Layout
from analysis.scores import Score, Scores

Curve = Mapping[float, Mapping[str, Score]]


def draw(frames: Frames, layout: Layout, scores: Scores) -> Iterator[Drawn]:
    """A picture for each data set whose test images have a curve; none where no trial looks for objects."""
    compared = comparisons(frames, scores)
    for family, curve in families(scores).items():
        split, _, data = family.split("/")[:3]
        if split != "test":
            continue
        found = [
            Panel(_title(frames, comparison.cells), lines, comparison.bias)
            for comparison in compared
            if (lines := list(_lines(comparison.cells, layout, curve)))
        ]
        if found:
            title = "CorLoc against the bias" + (f": {data}" if data else "")
            yield corloc_by_bias("corloc_by_bias" + (f"_{data}" if data else ""), title, found)


def _title(frames: Frames, members: tuple[Cell, ...]) -> str:
    """Values of the axes in which comparisons differ, as far as the cells of this one share them."""
    apart = varying(frames.plan.axes, cells(frames.plan))
    return _words(members[0], [axis for axis in apart if axis not in varying(apart, members)])


def _lines(members: tuple[Cell, ...], layout: Layout, curve: Curve) -> Iterator[Line]:
    """A line for each cell, by its place on the layout's axis where nothing else tells the cells apart."""
    apart = varying(members[0].values, members)
    for cell in members:
        label = layout.label(cell) if apart == [layout.axis] else _words(cell, apart)
        if (line := _line(label, cell, curve)) is not None:
            yield line


def _words(cell: Cell, axes: list[str]) -> str:
    return cell_text(cell.values, axes, axis_labels(cell.values)) if axes else ""


def _line(label: str, cell: Cell, curve: Curve) -> Line | None:
    """The cell's finished seeds at every bias at which any has a value."""
    points: list[tuple[float, list[float]]] = []
    for bias, by_trial in curve.items():
        values = [by_trial[trial.trial_id].value for trial in cell.trials if trial.trial_id in by_trial]
        if finite := [value for value in values if np.isfinite(value)]:
            points.append((bias, finite))
    return Line(label, [bias for bias, _ in points], [values for _, values in points]) if points else None
