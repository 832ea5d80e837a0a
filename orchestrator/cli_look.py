"""Commands that look at sweeps, trials and data without running anything; what they need is imported when they do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

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
    storage: Storage = RUNS,
    state: State = None,
) -> None:
    """Write tables, figures and report of finished or running sweeps."""
    from orchestrator import inspect

    for name in sweeps:
        fetch(context, name, storage)
    inspect.report(sweeps, storage)


def ui(
    state: State = None,
    storage: Storage = RUNS,
    tracking_uri: TrackingUri = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open MLflow's user interface on this store, on 127.0.0.1."""
    from orchestrator import tracking

    folder = state or storage
    uri = tracking_uri or tracking.default_tracking_uri(folder)
    command, environment = tracking.ui_command(uri, port)
    try:
        tracking.prepare_store(uri, folder)
    except tracking.Unavailable as error:
        raise ValueError(f"the tracking store cannot be opened: {error}") from error
    typer.echo(f"MLflow at http://127.0.0.1:{port} (Ctrl-C ends it)", err=True)
    os.execve(command[0], command, {**os.environ, **environment})


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
