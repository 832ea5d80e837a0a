"""The command `sweep`: its file is read, its folders are made, its hold is taken, and then it runs."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence

from orchestrator import remote_sweep, spec, system_metrics
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.plan import PlannedTrial, build_plan
from orchestrator.progress import Screen
from orchestrator.remote import Remote
from orchestrator.remote_sweep import Keeper
from orchestrator.remote_trial import Mirror
from orchestrator.run_options import Interrupted, Options, Stop, signals
from orchestrator.search_plan import expected
from orchestrator.sweep_run import SweepRun
from orchestrator.tracking_records import check_tracking_uri
from trainers.catalog import is_dotted_path
from trainers.dotted import load

__all__ = ["Options", "run_sweep", "smoke_overrides", "sweep"]


def sweep(options: Options) -> int:
    """Run what is missing of the sweep and bring tables, figures, report and MLflow up to date; the exit code.

    Raises:
        SpecError: the sweep file is wrong.
        SweepHeld: another process runs this sweep.
        ValueError: data, cluster or tracking URI cannot be used.
    """
    known = options.state if options.remote is None else None  # sweeps to learn from may lie in remote storage alone
    return run_sweep(spec.read_sweep(options.file, smoke_overrides(options), options.name, known), options)


def run_sweep(asked: spec.Sweep, options: Options) -> int:
    """`sweep` for one that has been read already.

    Raises:
        As `sweep` does.
    """
    check_tracking_uri(options.tracking_uri or "sqlite:///")
    if options.system_metrics:
        system_metrics.check_available()
    plan = build_plan(asked)
    if options.address is None:
        _check_own_parts(expected(plan))
    layout = SweepLayout(options.storage.resolve(), options.state.resolve(), asked.name)
    for folder in (layout.root, layout.ledger.parent):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"the folder {folder} cannot be made ({error.strerror}); give another --storage"
            ) from error
    stop = Stop()
    mirror = None if options.remote is None else Mirror(Remote(options.remote), layout.storage)
    if mirror is not None:
        remote_sweep.restore(mirror, layout)
    try:
        with (
            signals(stop),
            Ledger.open(layout.ledger) as ledger,
            contextlib.nullcontext() if mirror is None else Keeper(mirror, layout, taken_over=_leave) as keeper,
            Screen(asked.name, quiet=options.quiet) as screen,
        ):
            return SweepRun(options, asked, plan, layout, ledger, screen, stop, keeper).execute()
    except Interrupted as interrupted:
        if not options.quiet:
            print("interrupted; the same command goes on")
        return 128 + interrupted.number


def smoke_overrides(options: Options) -> list[str]:
    """The overrides of the command line, with those of --smoke, which make every trial one step long."""
    one_step = ["optim.steps=1", "optim.warmup_steps=0", "evaluation.points=1", "seeds=[0]"]
    # Which make no sense of one step.
    whole = ["search=null", "scheduler=null", "budget=null", "match=null", "score=null"]
    short = [*one_step, *whole] if options.smoke else []
    return [*options.overrides, *short]


def _check_own_parts(trials: Sequence[PlannedTrial]) -> None:
    """Import what users named by dotted path, so that a typing error is found before any trial begins.

    Raises:
        ValueError: there is no such module or attribute.
    """
    named: set[str] = set()
    for trial in trials:
        config = trial.config
        named |= {config.method, config.data.train, config.model.factory or ""}
        named |= {*config.evaluation.probes, *config.tokens.measurements}
    for path in sorted(filter(is_dotted_path, named)):
        load(path)


def _leave() -> None:
    """End this run in order, as `kill` would: another machine has its sweep."""
    os.kill(os.getpid(), signal.SIGTERM)
