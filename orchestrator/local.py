"""The in-process twin of the Ray executor: the same jobs and events, one after another in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from orchestrator import remote_trial, retry
from orchestrator.attempt import Job, process_name, run_attempt
from orchestrator.control import Control
from orchestrator.layout import TrialLayout
from orchestrator.queue import Handler, Source

_PAUSE_SECONDS = 0.1  # between two looks at a source that has nothing now


def run(source: Source, handle: Handler, control: Control, should_stop: Callable[[], bool]) -> None:
    """Run all jobs of `source` here and hand every event to `handle`; no new one begins once `should_stop` is true."""
    while not should_stop() and not source.is_over():
        drawn = source.draw()
        if drawn is None:
            time.sleep(_PAUSE_SECONDS)
            continue
        job, _ = drawn
        history = retry.History.of(job)
        while not should_stop() and _attempt(job, handle, control, history):
            job = history.next_job(job)
        source.over(job.trial_id)


def _attempt(job: Job, handle: Handler, control: Control, history: retry.History) -> bool:
    """One attempt; whether another one should follow."""
    while control.look(job.trial_id) is None and not retry.has_room(Path(job.folder), history.room):
        time.sleep(_PAUSE_SECONDS)
    trial = TrialLayout(Path(job.folder))
    number = remote_trial.begin_attempt(trial, job.remote, job.attempts, lambda: control.look(job.trial_id) is not None)
    if number is None:  # told to leave before the store was there
        return False
    handle(job.trial_id, {"kind": "started", "attempt": number, "process": process_name()})

    def report(step: int, metrics: Mapping[str, float]) -> None:
        history.reached(step)
        handle(job.trial_id, {"kind": "report", "attempt": number, "step": step, "metrics": dict(metrics)})

    outcome = run_attempt(job, number, report, lambda: control.look(job.trial_id))
    event = retry.after(outcome, history, number, job)
    handle(job.trial_id, event)
    return bool(event["kind"] == "lost")
