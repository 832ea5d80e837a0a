"""What commands share: where trials lie, which files and settings are meant, and remote storage behind a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_URI = "orchestrate.remote"  # in a command's context: the URI of its storage
RUNS = Path("runs")


def _folder_of(context: typer.Context, given: Any) -> Path:
    """The folder that `--storage` names: this machine's copy, which lies in the state folder, where it is a URI."""
    if "://" not in str(given):
        return Path(given)
    context.meta[_URI] = str(given)
    return Path(context.params.get("state") or RUNS)


Storage = Annotated[
    Path,
    typer.Option(
        parser=str,
        metavar="DIR|URI",
        callback=_folder_of,
        envvar="ORCHESTRATE_STORAGE",
        help="Folder, or s3://BUCKET/PREFIX and the like, of trials, tables and reports.",
        show_default=True,
    ),
]
State = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,  # known before storage is
        envvar="ORCHESTRATE_STATE",
        help="Local folder of ledger, MLflow store and cache. [default: storage, runs where that is remote]",
    ),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(envvar="ORCHESTRATE_TRACKING_URI", help="MLflow server or database. [default: STATE/mlflow.db]"),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting; may be repeated.")
]
Address = Annotated[str | None, typer.Option(metavar="RAY", help="A running Ray cluster, such as auto.")]
InProcess = Annotated[bool, typer.Option("--in-process", help="Run trials here, one by one, without Ray.")]
AcceptDataChange = Annotated[
    bool, typer.Option("--accept-data-change", help="Go on although the data under a name changed.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OneOrAll = Annotated[str | None, typer.Argument(help="A sweep's name; all sweeps without.")]
SweepFile = Annotated[Path, typer.Argument(help="A sweep file (YAML).", metavar="FILE")]

TrialName = Annotated[
    str,
    typer.Argument(help="A trial's id, the beginning of it, or its name; SWEEP/TRIAL where two sweeps have it."),
]


def remote(context: typer.Context) -> str | None:
    """The URI of the running command's storage, or None where that is a folder."""
    uri: str | None = context.meta.get(_URI)
    return uri


def fetch(context: typer.Context, sweep: str, storage: Path) -> None:
    """Bring what this machine's copy of remote storage lacks of a sweep."""
    uri = remote(context)
    if uri is None:
        return
    from orchestrator import remote_sweep
    from orchestrator.layout import SweepLayout
    from orchestrator.remote import Remote
    from orchestrator.remote_trial import Mirror

    layout = SweepLayout(storage.resolve(), storage.resolve(), sweep)
    remote_sweep.fetch(Mirror(Remote(uri), layout.storage), layout)
