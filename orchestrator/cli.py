"""The command line: arguments in, one function per command, errors as one clear message; imports nothing heavy."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

app = typer.Typer(
    name="orchestrate",
    help="Ablations of Vision Transformers with register tokens: one YAML file, one command, tables you can trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

data = typer.Typer(help="Data sets: the catalog, and checks of files.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data")

FAULTY = 1
WRONG_INPUT = 2
INTERRUPTED = 130

_REMOTE = "orchestrate.remote"  # in a command's context: the URI of its storage
RUNS = Path("runs")


def _folder_of(context: typer.Context, given: Any) -> Path:
    """The folder that `--storage` names: this machine's copy, which lies in the state folder, where it is a URI."""
    if "://" not in str(given):
        return Path(given)
    context.meta[_REMOTE] = str(given)
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
SweepFile = Annotated[Path, typer.Argument(help="A sweep file (YAML).", metavar="FILE")]

_USER_SETTINGS = ("storage", "state", "tracking_uri")


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of our own errors.")] = False,
) -> None:
    """Ablations of Vision Transformers with register tokens."""
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


@app.command()
def sweep(
    context: typer.Context,
    file: SweepFile,
    set_: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Write to this name instead of the file's.")] = None,
    storage: Storage = RUNS,
    state: State = None,
    tracking_uri: TrackingUri = None,
    address: Annotated[str | None, typer.Option(metavar="RAY", help="A running Ray cluster, such as auto.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="Most trials at a time.")] = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="Run trials here, one by one, without Ray.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="One step of every cell, to see that it runs.")] = False,
    rerun: Annotated[bool, typer.Option("--rerun", help="Run finished trials again too.")] = False,
    accept_data_change: Annotated[
        bool, typer.Option("--accept-data-change", help="Go on although the data under a name changed.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Run what is missing of a sweep, then print its ablation table and where everything lies."""
    from orchestrator import driver

    asked = driver.Options(
        file=file,
        storage=storage,
        state=state or storage,
        remote=_remote(context),
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
    )
    raise typer.Exit(driver.sweep(asked))


@app.command()
def plan(
    file: SweepFile,
    set_: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name instead of the file's.")] = None,
    storage: Storage = RUNS,
    state: State = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
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


@app.command()
def status(
    sweep: Annotated[str | None, typer.Argument(help="A sweep's name; all sweeps without.")] = None,
    storage: Storage = RUNS,
    state: State = None,
    failures: Annotated[bool, typer.Option("--failures", help="Show tracebacks of failed trials.")] = False,
) -> None:
    """Show the states of a sweep's trials."""
    from orchestrator import inspect

    inspect.status(sweep, storage, state or storage, failures=failures)


@app.command()
def logs(
    trial: Annotated[
        str,
        typer.Argument(help="A trial's id, the beginning of it, or its name; SWEEP/TRIAL where two sweeps have it."),
    ],
    storage: Storage = RUNS,
    state: State = None,
) -> None:
    """Print the log of a trial, attempt by attempt."""
    from orchestrator import inspect

    inspect.logs(trial, storage, state or storage)


@app.command()
def stop(
    trial: Annotated[
        str,
        typer.Argument(help="A trial's id, the beginning of it, or its name; SWEEP/TRIAL where two sweeps have it."),
    ],
    storage: Storage = RUNS,
    state: State = None,
) -> None:
    """Ask a running trial to checkpoint and end as `stopped`."""
    from orchestrator import inspect

    inspect.stop(trial, storage, state or storage)


@app.command("set")
def set_(
    sweep: Annotated[str, typer.Argument(help="A running sweep's name.")],
    max_concurrent: Annotated[int, typer.Option(min=0, help="Most trials at a time; 0 starts no more for now.")],
    storage: Storage = RUNS,
    state: State = None,
) -> None:
    """Change how many trials of a running sweep run at a time."""
    from orchestrator import concurrency

    concurrency.set_concurrency(sweep, max_concurrent, storage, state or storage)


@app.command()
def export(
    trial: Annotated[
        str,
        typer.Argument(help="A trial's id, the beginning of it, or its name; SWEEP/TRIAL where two sweeps have it."),
    ],
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write. [default: with the trial]")] = None,
    weights: Annotated[
        Literal["evaluated", "raw", "ema", "teacher"], typer.Option(help="Which of the trial's weights.")
    ] = "evaluated",
    storage: Storage = RUNS,
    state: State = None,
) -> None:
    """Write a trial's newest weights as a folder that timm loads (safetensors)."""
    from orchestrator import export

    export.export(trial, to, weights, storage, state or storage)


@app.command()
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
    address: Annotated[str | None, typer.Option(metavar="RAY", help="A running Ray cluster, such as auto.")] = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="Run here, without Ray.")] = False,
    rerun: Annotated[bool, typer.Option("--rerun", help="Measure again what was measured.")] = False,
    accept_data_change: Annotated[
        bool, typer.Option("--accept-data-change", help="Go on although the data under a name changed.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Statistics and probes of one set of weights, without training."""
    from orchestrator import driver
    from orchestrator import evaluate as command

    asked = driver.Options(
        file=Path(model),
        storage=storage,
        state=state or storage,
        remote=_remote(context),
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


@app.command()
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
        wait=not no_wait,
    )
    raise typer.Exit(command.submit(asked, lambda line: typer.echo(line, err=True)))


@app.command()
def report(
    context: typer.Context,
    sweeps: Annotated[list[str], typer.Argument(help="Names of sweeps.", metavar="SWEEP...")],
    storage: Storage = RUNS,
    state: State = None,
) -> None:
    """Write tables, figures and report of finished or running sweeps."""
    from orchestrator import inspect

    for name in sweeps:
        _fetch(context, name, storage)
    inspect.report(sweeps, storage)


@app.command("import")
def import_(
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


@app.command()
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


@data.command("list")
def list_(json_: Annotated[bool, typer.Option("--json", help="Print JSON, with layouts.")] = False) -> None:
    """Show the data sets of the catalog: what they provide, their licence, how to get them."""
    from orchestrator import data

    data.list_data(as_json=json_)


@data.command("check")
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


@app.command()
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


def _remote(context: typer.Context) -> str | None:
    """The URI of the running command's storage, or None where that is a folder."""
    uri: str | None = context.meta.get(_REMOTE)
    return uri


def _fetch(context: typer.Context, sweep: str, storage: Path) -> None:
    """Bring what this machine's copy of remote storage lacks of a sweep."""
    uri = _remote(context)
    if uri is None:
        return
    from orchestrator import remote_sweep
    from orchestrator.layout import SweepLayout
    from orchestrator.remote import Remote
    from orchestrator.remote_trial import Mirror

    layout = SweepLayout(storage.resolve(), storage.resolve(), sweep)
    layout.root.mkdir(parents=True, exist_ok=True)
    remote_sweep.fetch(Mirror(Remote(uri), layout.storage), layout)


def main() -> Any:
    """Entry point: a user's error is one message and exit code 2, without a traceback unless --debug is given."""
    try:
        _read_user_settings()
        return app()
    except KeyboardInterrupt:  # before or after training; during it, signals are the driver's
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, OSError, RuntimeError) as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, RuntimeError) and not _is_ours(error):
            raise
        typer.echo(f"error: {error}" if len(str(error).splitlines()) == 1 else str(error), err=True)
        raise SystemExit(WRONG_INPUT) from None


def _read_user_settings() -> None:
    """Defaults of storage, state and tracking URI from the user's configuration file; the environment wins.

    The file is $ORCHESTRATE_CONFIG or ~/.config/orchestrate/config.yaml, a mapping with those three names.

    Raises:
        ValueError: it is not such a mapping.
    """
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    path = Path(os.environ.get("ORCHESTRATE_CONFIG") or Path(home) / "orchestrate" / "config.yaml")
    if not path.is_file():
        return
    from orchestrator import yaml_file

    try:
        settings = yaml_file.read(path).root.plain()
    except yaml_file.YamlError as error:
        raise ValueError(f"{path}: {error.finding.message}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: allowed is a mapping with {', '.join(_USER_SETTINGS)}")
    for name, value in settings.items():
        if name not in _USER_SETTINGS or not isinstance(value, str):
            raise ValueError(f"{path}: {name} is not allowed; allowed: {', '.join(_USER_SETTINGS)}, each a text")
        os.environ.setdefault(f"ORCHESTRATE_{name.upper()}", value)


def _is_ours(error: BaseException) -> bool:
    """Whether the error is one that our code raises on purpose, as the ledger's."""
    return type(error).__module__.startswith(("orchestrator.", "trainers.", "analysis."))
