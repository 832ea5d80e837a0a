"""From a planned trial, what the ledger knows of it and what it gets of the cluster to its job; pure."""

from __future__ import annotations

from orchestrator.attempt import PROGRAM, TRAIN, Job
from orchestrator.layout import SweepLayout
from orchestrator.ledger import TrialRow
from orchestrator.plan import PlannedTrial
from orchestrator.run_request import Request


def job_of(
    trial: PlannedTrial,
    row: TrialRow,
    layout: SweepLayout,
    request: Request,
    *,
    train: str = TRAIN,
    remote: str | None = None,
    system_metrics: bool = False,
) -> Job:
    """The job of a trial's next attempts; `train` is what runs it unless it is a program of somebody else's."""
    return Job(
        trial_id=trial.trial_id,
        name=trial.name,
        config=trial.config.model_dump(mode="json"),
        folder=str(layout.trial(trial.trial_id).root),
        cache=str(layout.cache),
        threads=max(1, int(request.cpus / request.ranks)),
        attempts=row.attempts,
        last_step=row.last_step or 0,
        stalled=row.stalled,
        gpus=request.gpus / request.ranks,
        ranks=request.ranks,
        remote=remote,
        system_metrics=system_metrics,
        train=PROGRAM if trial.config.command is not None else train,
    )
