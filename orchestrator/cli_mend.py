"""Commands that check, mend and clean what sweeps left; what they need is imported when they do."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from orchestrator.cli_options import RUNS, AsJson, OneOrAll, State, Storage, TrackingUri, remote


def doctor(
    context: typer.Context,
    sweep: OneOrAll = None,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended.")] = False,
    json_: AsJson = False,
    storage: Storage = RUNS,
    state: State = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Check ledger, trial folders, checkpoints, MLflow, processes, versions and disk (exit 1: something is wrong)."""
    from orchestrator import doctor as command

    asked = command.Options(
        sweep=sweep,
        storage=storage,
        state=state or storage,
        remote=remote(context),
        tracking_uri=tracking_uri,
        fix=fix,
        as_json=json_,
    )
    raise typer.Exit(command.doctor(asked))


def clean(
    context: typer.Context,
    sweep: OneOrAll = None,
    keep: Annotated[
        Literal["none", "last", "kept"],
        typer.Option(help="Checkpoints that stay: none, those of execution.keep_steps (kept), or also the last one."),
    ] = "last",
    older_than: Annotated[
        float | None, typer.Option(min=0, metavar="DAYS", help="Only of trials that ended so long ago.")
    ] = None,
    status: Annotated[
        list[str] | None,
        typer.Option(
            "--status", metavar="STATUS", help="Of trials with this status; may be repeated. [default: but failed]"
        ),
    ] = None,
    orphans: Annotated[
        bool, typer.Option("--orphans", help="Also trial folders that the ledger does not know.")
    ] = False,
    cache: Annotated[bool, typer.Option("--cache", help="Also decoded data that no trial needs any more.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be freed.")] = False,
    storage: Storage = RUNS,
    state: State = None,
) -> None:
    """Free checkpoints and what attempts left of trials that are over; records and running sweeps are not touched."""
    from orchestrator import clean as command

    if remote(context) is not None:
        raise ValueError(
            "clean works on folders, not on object stores; give the store a rule of its own for checkpoints"
        )
    command.clean(
        command.Options(
            sweep=sweep,
            storage=storage,
            state=state or storage,
            keep=keep,
            older_than_days=older_than,
            statuses=tuple(status or command.DEFAULT_STATUSES),
            orphans=orphans,
            cache=cache,
            dry_run=dry_run,
        )
    )
