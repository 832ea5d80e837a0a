"""Commands that bring results in and out; what they need is imported when they do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from orchestrator.cli_options import RUNS, State, Storage, TrialName, remote


def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A table: CSV, TSV, JSON lines or parquet.", metavar="FILE")],
    sweep: Annotated[
        str | None, typer.Option(metavar="NAME", help="Sweep to make or extend. [default: the file's name]")
    ] = None,
    baseline: Annotated[
        list[str] | None, typer.Option(metavar="AXIS=VALUE", help="Cell to compare with; may be repeated.")
    ] = None,
    primary: Annotated[
        list[str] | None, typer.Option(metavar="METRIC", help="Metric declared beforehand; may be repeated.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=METRIC", help="A metric in a column of another name.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="A column to leave out; may be repeated.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What the sweep asks.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take other values of known trials.")] = False,
    storage: Storage = RUNS,
    state: State = None,
) -> None:
    """Take finished results of other tools into a sweep's tables."""
    from orchestrator import import_results

    if remote(context) is not None:
        raise ValueError("import works on folders, not on object stores; give another --storage and --sweep")
    import_results.import_results(
        import_results.Request(
            file=file,
            storage=storage,
            state=state or storage,
            sweep=sweep,
            question=question,
            baseline=tuple(baseline or ()),
            primary=tuple(primary or ()),
            metrics=tuple(metric or ()),
            ignored=tuple(ignore or ()),
            replace=replace,
        )
    )


def export(
    context: typer.Context,
    trial: TrialName,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write. [default: with the trial]")] = None,
    weights: Annotated[
        Literal["evaluated", "raw", "ema", "teacher"], typer.Option(help="Which of the trial's weights.")
    ] = "evaluated",
    storage: Storage = RUNS,
    state: State = None,
) -> None:
    """Write a trial's newest weights as a folder that timm loads (safetensors)."""
    from orchestrator import export

    export.export(trial, to, weights, storage, state or storage, remote(context))
