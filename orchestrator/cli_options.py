"""What commands share: where trials lie, which files and settings are meant, and remote storage behind a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

_URI = "orchestrate.remote"  # in a command's context: the URI of its storage
RUNS = Path("runs")


class Command(TyperCommand):
    """A command that says of a wrong value what was given and what is allowed, as of one in a file."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """As typer's.

        Raises:
            ValueError: the value of an option or argument is not allowed.
        """
        try:
            return super().make_context(*args, **extra)
        except typer.BadParameter as error:
            from pydantic import ValidationError

            if error.param is None or not isinstance(error.__cause__, ValidationError):
                raise
            raise ValueError(_refused(error.param, error.__cause__.errors()[0]["input"])) from error


def _refused(param: Any, given: object) -> str:
    """The sentence about a value that the option or argument `param` does not allow."""
    from pydantic import Field
    from pydantic.fields import FieldInfo

    from trainers.explain import allowed_values, did_you_mean

    name = max(param.opts, key=len)
    choices = param.type_descriptor.choices
    if choices:
        names = [str(choice) for choice in choices]
        return f"{name} is {given}; allowed: {', '.join(names)}{did_you_mean(str(given), names)}"
    limits = Field(ge=param.min, le=param.max)
    info = FieldInfo.from_annotated_attribute(param.type_descriptor.annotation, limits)
    return f"{name} is {given}; allowed: {allowed_values(info)}"


def _folder_of(context: typer.Context, given: Any) -> Path:
    """The folder that `--storage` names: this machine's copy, which lies in the state folder, where it is a URI."""
    if "://" not in str(given):
        return Path(given)
    from orchestrator.remote import checked

    context.meta[_URI] = checked(str(given))
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
SystemMetrics = Annotated[
    bool, typer.Option("--system-metrics", help="Track the use of processor, memory and GPU in MLflow too.")
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


def say_where(context: typer.Context, storage: Path) -> None:
    """Say on stderr that a command which asks no store is about to show this machine's copy, `storage`, of one."""
    uri = remote(context)
    if uri is not None:
        from orchestrator.tracking_records import redact

        message = f"this is this machine's copy, {storage}, of {redact(uri)}; `sweep` and `report` bring what it lacks"
        typer.echo(message, err=True)


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
