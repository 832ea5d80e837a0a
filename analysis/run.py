"""From a sweep's folder to its tables, figures, report and terminal table: the one entry of the analysis."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from analysis.results import Results
    from analysis.up_to_date import Made

_TABLE, _FIGURE, _READABLE, _REPORT = "tables/", "figures/", "readable/", "report"  # what a file is to an analysis


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
    published files give the same bytes; where files, plan and code are those of the last call, nothing is made again.

    Raises:
        ValueError: `folder` is not a sweep's folder.
    """
    from analysis import up_to_date

    now = up_to_date.fingerprint(folder)
    made = up_to_date.current(folder, "analysis", now)
    if made is None:
        made = _make(folder)
        up_to_date.mark(folder, "analysis", now, made)
    return _analysis(folder, made)


def tables(folder: Path) -> dict[str, Path]:
    """Writes `folder`/tables/*.parquet alone, where they are not up to date; their paths by name.

    Raises:
        ValueError: `folder` is not a sweep's folder.
    """
    from analysis import up_to_date

    now = up_to_date.fingerprint(folder)
    made = up_to_date.current(folder, "tables", now)
    if made is None:
        made = up_to_date.Made(_write_tables(folder)[1], {})
        up_to_date.mark(folder, "tables", now, made)
    return dict(made.files)


def _make(folder: Path) -> Made:
    """Tables, figures, report, and what is said of them."""
    from analysis import report
    from analysis.note import note
    from analysis.pictures import draw
    from analysis.publish import publish_bytes
    from analysis.readable import write_readable
    from analysis.up_to_date import Made

    results, written = _write_tables(folder)
    pictures = draw(results)
    problems = (*results.frames.problems, *results.image_problems, *pictures.problems)
    page = report.render(results, pictures.drawn, problems)
    figures = _publish_figures(folder / "figures", {d.name: (d.png, d.svg) for d in pictures.drawn})
    files = {
        **{f"{_TABLE}{name}": path for name, path in written.items()},
        **{f"{_FIGURE}{path.name}": path for path in figures},
        **{f"{_READABLE}{path.relative_to(folder)}": path for path in write_readable(folder / "tables", results)},
        _REPORT: publish_bytes(folder / "report.html", page.encode("utf-8")),
    }
    said = {
        "answer": results.answer,
        "note": note(results.frames.plan, results.rows, results.varying, results.answer),
        "problems": list(problems),
    }
    return Made(files, said)


def _write_tables(folder: Path) -> tuple[Results, dict[str, Path]]:
    """Large tables are compressed on one core while statistics are computed on another."""
    from analysis.collect import collect
    from analysis.publish import write_tables
    from analysis.results import evaluate

    results = evaluate(collect(folder))
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write_tables, folder / "tables", results.collected())
        computed = results.computed()
        written = writing.result()
    return results, written | write_tables(folder / "tables", computed)


def _analysis(folder: Path, made: Made) -> Analysis:
    import pyarrow.parquet as pq

    from analysis import terminal
    from analysis.cells import cells, varying
    from analysis.collect import read_plan

    plan = read_plan(folder)
    named = {
        kind: {name.removeprefix(kind): path for name, path in made.files.items() if name.startswith(kind)}
        for kind in (_TABLE, _FIGURE, _READABLE)
    }
    rows = pq.ParquetFile(named[_TABLE]["ablation"]).read().to_pylist()
    return Analysis(
        answer=made.said["answer"],
        terminal=terminal.ablation_table(plan, rows, varying(plan.axes, cells(plan))),
        tables=named[_TABLE],
        figures=tuple(named[_FIGURE].values()),
        report=made.files[_REPORT],
        problems=tuple(made.said["problems"]),
        note=made.said["note"],
        readable=tuple(named[_READABLE].values()),
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
