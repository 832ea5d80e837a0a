"""Everything that the analysis knows of a sweep, computed once: frames, scores, tables, and the answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from analysis import tables
from analysis.answer import answer
from analysis.cells import Cell, cells, varying
from analysis.collect import Frames
from analysis.scores import Scores, last_scores


@dataclass(frozen=True)
class Results:
    """What `evaluate` found.

    Attributes:
        cells: in the order of the rows of `ablation`.
        varying: the axes in which cells differ; the others are settings.
        ablation: the table of design.md §8.
    """

    frames: Frames
    scores: Scores
    cells: tuple[Cell, ...]
    varying: tuple[str, ...]
    ablation: pa.Table

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of `ablation`, cell by cell with equally many metrics each."""
        rows: list[dict[str, Any]] = self.ablation.to_pylist()
        return rows

    @cached_property
    def answer(self) -> str:
        """One sentence that answers the sweep's question."""
        return answer(self.frames.plan, self.rows, self.varying)

    def tables(self) -> dict[str, pa.Table]:
        """All tables that are published, by name."""
        return {
            "runs": self.frames.runs,
            "metrics": self.frames.metrics,
            "token_norms": self.frames.token_norms,
            "token_statistics": self.frames.token_statistics,
            "ablation": self.ablation,
        }


def evaluate(frames: Frames) -> Results:
    """Scores and tables of what a sweep has published; pure."""
    scores = last_scores(frames)
    everything = cells(frames.plan)
    return Results(
        frames=frames,
        scores=scores,
        cells=everything,
        varying=tuple(varying(frames.plan.axes, everything)),
        ablation=tables.ablation(frames, scores=scores),
    )
