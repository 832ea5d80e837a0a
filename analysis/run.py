"""From a sweep's folder to its tables, figures, report and terminal table: the one entry of the analysis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Analysis:
    """What the analysis of a sweep made and where it lies."""

    answer: str
    terminal: Table
    tables: dict[str, Path]  # runs, metrics, token_norms, token_statistics, ablation
    figures: tuple[Path, ...]
    report: Path
    problems: tuple[str, ...]
    note: str  # question, answer and primary metrics as Markdown
    readable: tuple[Path, ...]  # tables/ablation.csv and tables/pivots/*


def analyse(folder: Path) -> Analysis:
    """Writes `folder`/tables/*, figures/* and report.html from what the sweep in `folder` has published.

    It may be called while the sweep runs or before any trial has finished: then there are fewer numbers. The same
    published files give the same bytes.

    Raises:
        ValueError: `folder` is not a sweep's folder.
    """
    from analysis import report, terminal
    from analysis.collect import collect
    from analysis.note import note
    from analysis.pictures import draw
    from analysis.publish import publish_bytes, write_tables
    from analysis.readable import write_readable
    from analysis.results import evaluate

    frames = collect(folder)
    results = evaluate(frames)
    written = write_tables(folder / "tables", results.tables())
    pictures = draw(results)
    problems = (*frames.problems, *results.image_problems, *pictures.problems)
    figures = _publish_figures(folder / "figures", {d.name: (d.png, d.svg) for d in pictures.drawn})
    page = report.render(results, pictures.drawn, problems)
    return Analysis(
        answer=results.answer,
        terminal=terminal.ablation_table(frames.plan, results.rows, results.varying),
        tables=written,
        figures=figures,
        report=publish_bytes(folder / "report.html", page.encode("utf-8")),
        problems=problems,
        note=note(frames.plan, results.rows, results.varying, results.answer),
        readable=write_readable(folder / "tables", results),
    )


def _publish_figures(folder: Path, drawn: dict[str, tuple[bytes, bytes]]) -> tuple[Path, ...]:
    """Publishes NAME.png and NAME.svg; pictures of an earlier analysis that are no longer drawn are removed."""
    from analysis.publish import publish_bytes

    kept = [folder / f"{name}.{kind}" for name in drawn for kind in ("png", "svg")]
    for path in kept:
        png, svg = drawn[path.stem]
        publish_bytes(path, png if path.suffix == ".png" else svg)
    if folder.is_dir():
        for stale in {*folder.glob("*.png"), *folder.glob("*.svg")} - set(kept):
            stale.unlink()
    return tuple(kept)
