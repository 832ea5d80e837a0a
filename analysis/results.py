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
from analysis.norms import PATCH, EvaluatedNorms, TokenNorms, patches
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
        norms: the patches of finished trials in the last layer, by trial.
        images: their results image by image.
    """

    frames: Frames
    scores: Scores
    cells: tuple[Cell, ...]
    varying: tuple[str, ...]
    norms: Mapping[str, TokenNorms]
    images: ImageFiles

    @cached_property
    def ablation(self) -> pa.Table:
        """The table `ablation`."""
        return tables.ablation(self.frames, self.scores, self.images.of)

    @cached_property
    def trends(self) -> pa.Table:
        """The table `trends`."""
        return trends(self.frames.plan, self.scores)

    @cached_property
    def elimination(self) -> pa.Table:
        """The table `elimination`."""
        return elimination(self.frames.plan, self.scores, self.images.outliers)

    @cached_property
    def aggregates(self) -> pa.Table:
        """The table `aggregates`."""
        return aggregates(self.frames.plan, self.scores)

    @cached_property
    def bands(self) -> Mapping[str, CellBands]:
        """The fraction of patches above every threshold, by key of the cell."""
        return bands(self.frames.plan, self.norms)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of `ablation`, cell by cell with equally many metrics each."""
        rows: list[dict[str, Any]] = self.ablation.to_pylist()
        return rows

    @cached_property
    def by_cell(self) -> list[dict[str, dict[str, Any]]]:
        """The rows of `ablation` by metric, for each of `cells`."""
        each = len(self.rows) // max(1, len(self.cells))
        own = (self.rows[number * each : (number + 1) * each] for number in range(len(self.cells)))
        return [{row["metric"]: row for row in rows} for rows in own]

    @cached_property
    def said(self) -> Answer:
        """The answer to the sweep's question: a verdict in plain words, and its numbers."""
        return answer(self.frames.plan, self.rows, self.varying, self.trends.to_pylist(), self.elimination.to_pylist())

    @property
    def image_problems(self) -> tuple[str, ...]:
        """Per-image results that could not be read, as sentences."""
        _ = self.ablation, self.elimination  # these read them
        return tuple(self.images.problems)

    @property
    def answer(self) -> str:
        """The whole answer as one paragraph."""
        return self.said.text

    def collected(self) -> dict[str, pa.Table]:
        """The published tables of what trials recorded, by name."""
        return {
            "runs": self.frames.runs,
            "metrics": self.frames.metrics,
            "token_norms": self.frames.token_norms,
            "token_statistics": self.frames.token_statistics,
        }

    def computed(self) -> dict[str, pa.Table]:
        """The published tables of what follows from it, by name."""
        return {
            "ablation": self.ablation,
            "trends": self.trends,
            "elimination": self.elimination,
            "thresholds": thresholds_table(self.frames.plan, self.bands),
            "aggregates": self.aggregates,
        }

    def tables(self) -> dict[str, pa.Table]:
        """All tables that are published, by name."""
        return {**self.collected(), **self.computed()}


def evaluate(frames: Frames) -> Results:
    """Scores of what a sweep has published; tables are computed, and per-image results read, when asked for."""
    everything = cells(frames.plan)
    norms = patches(EvaluatedNorms(frames).last_layer(PATCH))
    return Results(
        frames=frames,
        scores=last_scores(frames),
        cells=everything,
        varying=tuple(varying(frames.plan.axes, everything)),
        norms=norms,
        images=ImageFiles(frames, norms),
    )
