"""Commands that run something, or change what runs; what they need is imported when they do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli_options import (
    RUNS,
    AcceptDataChange,
    Address,
    InProcess,
    Overrides,
    Quiet,
    State,
    Storage,
    SweepFile,
    SystemMetrics,
    TrackingUri,
    TrialName,
    remote,
    say_where,
)


def sweep(
    context: typer.Context,
    file: SweepFile,
    set_: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Write to this name instead of the file's.")] = None,
    storage: Storage = RUNS,
    state: State = None,
    tracking_uri: TrackingUri = None,
    address: Address = None,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="Most trials at a time.")] = None,
    in_process: InProcess = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="One step of every cell, to see that it runs.")] = False,
    rerun: Annotated[bool, typer.Option("--rerun", help="Run finished trials again too.")] = False,
    accept_data_change: AcceptDataChange = False,
    system_metrics: SystemMetrics = False,
    quiet: Quiet = False,
) -> None:
    """Run what is missing of a sweep, then print its ablation table and where everything lies."""
    from orchestrator import driver

    asked = driver.Options(
        file=file,
        storage=storage,
        state=state or storage,
        remote=remote(context),
        tracking_uri=tracking_uri,
        overrides=tuple(set_ or ()),
        name=name,
        address=address,
        max_concurrent=max_concurrent,
        in_process=in_process,
        smoke=smoke,
        rerun=rerun,
        accept_data_change=accept_data_change,
        quiet=quiet,
        system_metrics=system_metrics,
    )
    raise typer.Exit(driver.sweep(asked))


def evaluate(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A timm name, a file of weights, a trial, or a backbone of your own as package.module:build."
        ),
    ],
    set_: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Write to this name instead of evaluate_MODEL.")] = None,
    storage: Storage = RUNS,
    state: State = None,
    tracking_uri: TrackingUri = None,
    address: Address = None,
    in_process: InProcess = False,
    rerun: Annotated[bool, typer.Option("--rerun", help="Measure again what was measured.")] = False,
    accept_data_change: AcceptDataChange = False,
    quiet: Quiet = False,
) -> None:
    """Statistics and probes of one set of weights, without training."""
    from orchestrator import driver
    from orchestrator import evaluate as command

    asked = driver.Options(
        file=Path(model),
        storage=storage,
        state=state or storage,
        remote=remote(context),
        tracking_uri=tracking_uri,
        overrides=tuple(set_ or ()),
        name=name,
        address=address,
        in_process=in_process,
        rerun=rerun,
        accept_data_change=accept_data_change,
        quiet=quiet,
    )
    raise typer.Exit(command.evaluate(model, asked))


def submit(
    file: SweepFile,
    storage: Annotated[
        str,
        typer.Option(
            envvar="ORCHESTRATE_STORAGE", help="Folder that all machines of the cluster share, or s3://BUCKET/PREFIX."
        ),
    ],
    set_: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Write to this name instead of the file's.")] = None,
    address: Annotated[
        str, typer.Option(metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's job server.")
    ] = "http://127.0.0.1:8265",
    state: Annotated[str, typer.Option(help="Local folder on the machine that runs the job.")] = "/tmp/orchestrate",
    tracking_uri: TrackingUri = None,
    env: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A variable to hand over; no secrets.")] = None,
    system_metrics: SystemMetrics = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not follow the job's log.")] = False,
) -> None:
    """Run a sweep as a job on a Ray cluster, from the working tree here, and follow its log."""
    from orchestrator import submit as command

    asked = command.Submission(
        file=file,
        storage=storage,
        address=address,
        state=state,
        tracking_uri=tracking_uri,
        overrides=tuple(set_ or ()),
        name=name,
        environment=tuple(env or ()),
        system_metrics=system_metrics,
        wait=not no_wait,
    )
    raise typer.Exit(command.submit(asked, lambda line: typer.echo(line, err=True)))


def set_(
    context: typer.Context,
    sweep: Annotated[str, typer.Argument(help="A running sweep's name.")],
    max_concurrent: Annotated[int, typer.Option(min=0, help="Most trials at a time; 0 starts no more for now.")],
    storage: Storage = RUNS,
    state: State = None,
) -> None:
    """Change how many trials of a running sweep run at a time; 0 is a pause: those that run go on, none begins."""
    from orchestrator import concurrency

    say_where(context, storage)
    concurrency.set_concurrency(sweep, max_concurrent, storage, state or storage)


def stop(
    context: typer.Context,
    trial: TrialName,
    storage: Storage = RUNS,
    state: State = None,
) -> None:
    """Ask a running trial to checkpoint and end as `stopped`."""
    from orchestrator import inspect

    say_where(context, storage)
    inspect.stop(trial, storage, state or storage)
