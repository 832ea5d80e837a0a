"""Trials that do nothing, or only wait: what `Job.train` names in benchmarks of the orchestrator itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.attempt import Job, Outcome, Report
from orchestrator.layout import TrialLayout

WAIT_SECONDS = 20.0
MARK = "BENCHMARK_BEGAN"  # of the environment: the file that `mark` makes


def run(job: Job, layout: TrialLayout, number: int, report: Report, should_stop: Callable[[], str | None]) -> Outcome:
    """Import what every trial imports, report one number and end."""
    import timm  # noqa: F401
    import torch  # noqa: F401

    report(1, {"x": 1.0})
    return Outcome("finished", steps=1)


def nothing(
    job: Job, layout: TrialLayout, number: int, report: Report, should_stop: Callable[[], str | None]
) -> Outcome:
    """Report one number and end, without torch: what is left is the orchestrator."""
    report(1, {"x": 1.0})
    return Outcome("finished", steps=1)


def wait(job: Job, layout: TrialLayout, number: int, report: Report, should_stop: Callable[[], str | None]) -> Outcome:
    """Wait for 20 s on the monotonic clock, then report one number."""
    time.sleep(WAIT_SECONDS)
    report(1, {"x": 1.0})
    return Outcome("finished", steps=1)


def mark(job: Job, layout: TrialLayout, number: int, report: Report, should_stop: Callable[[], str | None]) -> Outcome:
    """Make the file that the environment names, then wait to be ended."""
    Path(os.environ[MARK]).touch()
    time.sleep(60)
    return Outcome("finished", steps=1)
