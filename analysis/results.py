"""Everything that the analysis knows of a sweep, computed once: frames, scores, tables, and the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from analysis import tables
from analysis.aggregates import aggregates
from analysis.answer import Answer, answer
from analysis.cells import Cell, cells, varying
from analysis.collect import Frames
from analysis.elimination import elimination
from analysis.norms import PATCH, EvaluatedNorms, patches
from analysis.per_image import ImageFiles
from analysis.scores import Scores, last_scores
from analysis.threshold_bands import CellBands, bands, thresholds_table
from analysis.trends import trends


@dataclass(frozen=True)
class Results:
    """What `evaluate` found.

    Attributes:
        cells: in the order of the rows of `ablation`.
        varying: the axes in which cells differ; the others are settings.
        ablation: the table of design.md §8.
        trends, elimination, aggregates: tables with the schemas of their names.
        bands: the fraction of patches above every threshold, by key of the cell.
        image_problems: per-image results that could not be read, as sentences.
    """

    frames: Frames
    scores: Scores
    cells: tuple[Cell, ...]
    varying: tuple[str, ...]
    ablation: pa.Table
    trends: pa.Table
    elimination: pa.Table
    aggregates: pa.Table
    bands: Mapping[str, CellBands]
    image_problems: tuple[str, ...]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of `ablation`, cell by cell with equally many metrics each."""
        rows: list[dict[str, Any]] = self.ablation.to_pylist()
        return rows

    @cached_property
    def said(self) -> Answer:
        """The answer to the sweep's question: a verdict in plain words, and its numbers."""
        return answer(self.frames.plan, self.rows, self.varying, self.trends.to_pylist(), self.elimination.to_pylist())

    @property
    def answer(self) -> str:
        """The whole answer as one paragraph."""
        return self.said.text

    def tables(self) -> dict[str, pa.Table]:
        """All tables that are published, by name."""
        return {
            "runs": self.frames.runs,
            "metrics": self.frames.metrics,
            "token_norms": self.frames.token_norms,
            "token_statistics": self.frames.token_statistics,
            "ablation": self.ablation,
            "trends": self.trends,
            "elimination": self.elimination,
            "thresholds": thresholds_table(self.frames.plan, self.bands),
            "aggregates": self.aggregates,
        }


def evaluate(frames: Frames) -> Results:
    """Scores and tables of what a sweep has published; of its folder, per-image results alone are read here."""
    scores = last_scores(frames)
    everything = cells(frames.plan)
    norms = patches(EvaluatedNorms(frames).last_layer(PATCH))
    images = ImageFiles(frames, norms)
    eliminated = elimination(frames.plan, scores, images.outliers)
    return Results(
        frames=frames,
        scores=scores,
        cells=everything,
        varying=tuple(varying(frames.plan.axes, everything)),
        ablation=tables.ablation(frames, scores, images.of),
        trends=trends(frames.plan, scores),
        elimination=eliminated,
        aggregates=aggregates(frames.plan, scores),
        bands=bands(frames.plan, norms),
        image_problems=tuple(images.problems),
    )
