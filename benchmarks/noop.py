"""A trial that imports what every trial imports and does nothing: `Job.train` of the turn-around benchmark."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.attempt import Job, Outcome, Report
from orchestrator.layout import TrialLayout


def run(job: Job, layout: TrialLayout, number: int, report: Report, should_stop: Callable[[], str | None]) -> Outcome:
    """Report one number and end."""
    import timm  # noqa: F401
    import torch  # noqa: F401

    report(1, {"x": 1.0})
    return Outcome("finished", steps=1)
