"""Commands that look at sweeps, trials and data without running anything; what they need is imported when they do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from orchestrator.cli_options import (
    RUNS,
    AsJson,
    OneOrAll,
    Overrides,
    State,
    Storage,
    SweepFile,
    TrackingUri,
    TrialName,
    fetch,
    say_where,
)

FAULTY = 1


def plan(
    context: typer.Context,
    file: SweepFile,
    set_: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name instead of the file's.")] = None,
    storage: Storage = RUNS,
    state: State = None,
    json_: AsJson = False,
    diff: Annotated[bool, typer.Option("--diff", help="List new trials, and what changed since the last run.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run a few dry steps of each shape here, and keep their time and memory.")
    ] = False,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Trials at a time. [default: as many as this machine holds]")
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=0.1, metavar="GB", help="Of one GPU. [default: of the one that was measured]")
    ] = None,
) -> None:
    """Show the trials of a sweep, what exists already, what it takes and can show; starts nothing but dry steps."""
    from orchestrator import show_plan

    say_where(context, storage)
    show_plan.plan(
        show_plan.Asked(
            file=file,
            storage=storage,
            state=state or storage,
            overrides=tuple(set_ or ()),
            name=name,
            as_json=json_,
            difference=diff,
            measure=measure,
            max_concurrent=max_concurrent,
            gpu_memory=gpu_memory,
        )
    )


def status(
    context: typer.Context,
    sweep: OneOrAll = None,
    storage: Storage = RUNS,
    state: State = None,
    failures: Annotated[
        bool, typer.Option("--failures", help="Show tracebacks of failed trials and the end of their logs.")
    ] = False,
    json_: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every two seconds, until Ctrl-C.")] = False,
) -> None:
    """Show who runs a sweep, how far its trials are, and what they have spent."""
    from orchestrator import status as command

    say_where(context, storage)
    command.status(command.Asked(sweep, storage, state or storage, failures, json_, watch))


def logs(
    context: typer.Context,
    trial: TrialName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on while the trial runs.")] = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="Of this attempt only.")] = None,
    storage: Storage = RUNS,
    state: State = None,
) -> None:
    """Print the log of a trial, attempt by attempt and rank by rank."""
    from orchestrator import inspect

    say_where(context, storage)
    inspect.logs(trial, storage, state or storage, attempt=attempt, follow=follow)


def report(
    context: typer.Context,
    sweeps: Annotated[list[str], typer.Argument(help="Names of sweeps.", metavar="SWEEP...")],
    rows: Annotated[
        list[str] | None, typer.Option(metavar="AXIS", help="Axis in the rows; may be repeated. [default: the others]")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS", help="Axis in the columns; may be repeated. [default: registers]"),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC", help="A table of this; may be repeated. [default: primary ones]"),
    ] = None,
    show: Annotated[
        Literal["both", "spread", "difference"] | None,
        typer.Option(help="In each place: mean ± std, difference to the baseline with its interval, or both."),
    ] = None,
    format_: Annotated[
        Literal["terminal", "markdown", "latex", "csv"] | None,
        typer.Option("--format", help="Of the table. [default: by the ending of --output]"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the table to this .md, .tex, .csv or .parquet file.")
    ] = None,
    storage: Storage = RUNS,
    state: State = None,
) -> None:
    """Write tables, figures and report of finished or running sweeps; with options for a table, print that alone."""
    from orchestrator import inspect

    for name in sweeps:
        fetch(context, name, storage)
    asked = (rows, columns, metric, show, format_, output)
    pivots = inspect.Pivots(
        form=format_,
        rows=tuple(rows) if rows else None,
        columns=tuple(columns) if columns else None,
        metrics=tuple(metric) if metric else None,
        show=show or "both",
        output=output,
    )
    inspect.report(sweeps, storage, pivots if any(option is not None for option in asked) else None)


def compare(
    context: typer.Context,
    a: Annotated[str, typer.Argument(help="Name of a sweep, or its folder.", metavar="A")],
    b: Annotated[str, typer.Argument(help="Name of another sweep, or its folder.", metavar="B")],
    metric: Annotated[
        list[str] | None, typer.Option(metavar="METRIC", help="Show this; may be repeated. [default: primary ones]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write to this .md, .csv, .parquet or .json file.")
    ] = None,
    storage: Storage = RUNS,
    state: State = None,
    json_: AsJson = False,
) -> None:
    """Show what changed between two sweeps, cell by cell: settings, code, data, and numbers with their intervals."""
    from orchestrator import inspect

    for name in (a, b):
        if not inspect.is_folder(name):
            fetch(context, name, storage)
    inspect.compare((a, b), storage, as_json=json_, metrics=metric or (), output=output)


def ui(
    sweep: Annotated[str | None, typer.Argument(help="A sweep's name; all sweeps without.")] = None,
    state: State = None,
    storage: Storage = RUNS,
    tracking_uri: TrackingUri = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port on 127.0.0.1. [default: 5000, or the next that is free]")
    ] = None,
) -> None:
    """Open MLflow's user interface on this store, on 127.0.0.1, and print where it compares the runs of a sweep."""
    from orchestrator import ui as command

    asked = command.Asked(sweep, storage, state or storage, tracking_uri, port)
    command.ui(asked, typer.echo)


def list_(json_: Annotated[bool, typer.Option("--json", help="Print JSON, with layouts.")] = False) -> None:
    """Show the data sets of the catalog: what they provide, their licence, how to get them."""
    from orchestrator import data

    data.list_data(as_json=json_)


def check(
    name: Annotated[
        str, typer.Argument(help="A data set of the catalog, image_folder/NAME, or your own as package.module:build.")
    ],
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of its files.")] = None,
    size: Annotated[
        int | None, typer.Option(min=8, max=2048, help="Side of decoded images in px. [default: as for training]")
    ] = None,
    storage: Storage = RUNS,
    state: State = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON, with all faults.")] = False,
) -> None:
    """Open every image of a data set, count, name what is wrong (exit 1), and print the fingerprint."""
    from orchestrator import data

    if not data.check(name, root, size, (state or storage) / "cache", as_json=json_):
        raise typer.Exit(FAULTY)


def schema(
    output: Annotated[Path | None, typer.Argument(help="File to write; standard output without.")] = None,
) -> None:
    """Write the JSON Schema of sweep files, by which editors complete and check them."""
    import json

    from orchestrator.schema import sweep_schema

    text = json.dumps(sweep_schema(), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text)
