"""The command line: which commands there are, the user's settings, errors as one clear message; nothing heavy."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator import cli_look, cli_mend, cli_run, cli_store
from orchestrator.cli_options import Command

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

WRONG_INPUT = 2
INTERRUPTED = 130

_USER_SETTINGS = ("storage", "state", "tracking_uri")

# In the order of the help: command, function.
COMMANDS: dict[str, Callable[..., None]] = {
    "sweep": cli_run.sweep,
    "plan": cli_look.plan,
    "status": cli_look.status,
    "logs": cli_look.logs,
    "stop": cli_run.stop,
    "set": cli_run.set_,
    "report": cli_look.report,
    "compare": cli_look.compare,
    "evaluate": cli_run.evaluate,
    "export": cli_store.export,
    "import": cli_store.import_,
    "submit": cli_run.submit,
    "ui": cli_look.ui,
    "doctor": cli_mend.doctor,
    "clean": cli_mend.clean,
    "schema": cli_look.schema,
}
for _name, _function in COMMANDS.items():
    app.command(_name, cls=Command)(_function)
data.command("list", cls=Command)(cli_look.list_)
data.command("check", cls=Command)(cli_look.check)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of our own errors.")] = False,
) -> None:
    """Ablations of Vision Transformers with register tokens."""
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


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


if __name__ == "__main__":
    sys.exit(main())
