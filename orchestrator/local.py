"""The in-process twin of the Ray executor: the same jobs and events, one after another in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator import retry
from orchestrator.attempt import Job, process_name, run_attempt
from orchestrator.layout import TrialLayout

Handler = Callable[[str, Mapping[str, Any]], None]


def run(jobs: Sequence[Job], handle: Handler, should_stop: Callable[[], bool]) -> None:
    """Run all jobs here and hand every event to `handle`; no new one begins once `should_stop` is true."""
    for job in jobs:
        history = retry.History()
        while not should_stop() and _attempt(job, handle, history):
            pass


def _attempt(job: Job, handle: Handler, history: retry.History) -> bool:
    """One attempt; whether another one should follow."""
    number = TrialLayout(Path(job.folder)).begin_attempt(job.attempts)
    handle(job.trial_id, {"kind": "started", "attempt": number, "process": process_name()})

    def report(step: int, metrics: Mapping[str, float]) -> None:
        history.reached(step)
        handle(job.trial_id, {"kind": "report", "attempt": number, "step": step, "metrics": dict(metrics)})

    event = retry.after(run_attempt(job, number, report), history, number)
    handle(job.trial_id, event)
    return bool(event["kind"] == "lost")
