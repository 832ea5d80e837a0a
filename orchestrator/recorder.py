"""What the driver does with a trial's events: the ledger first, then the published files, then who is watching."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from orchestrator import publish
from orchestrator.attempt import Outcome
from orchestrator.layout import SweepLayout, TrialLayout
from orchestrator.ledger import Ledger, State

log = logging.getLogger(__name__)


@dataclass
class Live:
    """What the screen shows of one running trial."""

    name: str
    steps: int
    batch_size: int
    step: int = 0
    first_step: int | None = None
    since: float = field(default_factory=time.monotonic)

    def images_per_second(self, now: float) -> float:
        """Speed since the first report of this attempt, evaluation included; 0 before there is a second one."""
        done = 0 if self.first_step is None else self.step - self.first_step
        return done * self.batch_size / max(now - self.since, 1e-9)


class Recorder:
    """Takes (trial id, event) from an executor. Events of attempts that were superseded change nothing."""

    def __init__(
        self,
        ledger: Ledger,
        layout: SweepLayout,
        provenance: Mapping[str, Any],
        gpus: Mapping[str, float],
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._ledger = ledger
        self._layout = layout
        self._provenance = provenance
        self._gpus = gpus
        self._changed = changed
        self.live: dict[str, Live] = {}

    def handle(self, trial_id: str, event: Mapping[str, Any]) -> None:
        """Record one event: started, report, lost, process_lost, process_gone or ended."""
        kind = event["kind"]
        if kind == "started":
            self._started(trial_id, event)
        elif kind == "report":
            self._ledger.record(trial_id, event["attempt"], event["step"], event["metrics"])
            self._watch(trial_id, event["step"])
        elif kind == "lost":
            self._lost(trial_id, event["attempt"], event["reason"])
        elif kind == "process_lost":
            self._lost(trial_id, self._ledger.row(trial_id).attempts, event["reason"])
        elif kind == "process_gone":
            error = {"type": "ProcessLost", "message": "the trial's process was lost too often"}
            outcome = Outcome("failed", error={**error, "traceback": str(event["reason"])[-4000:]})
            self._ended(trial_id, self._ledger.row(trial_id).attempts, outcome)
        else:
            self._ended(trial_id, event["attempt"], Outcome(**event["outcome"]))
        self._changed()

    def _started(self, trial_id: str, event: Mapping[str, Any]) -> None:
        row = self._ledger.row(trial_id)
        if row.state == "running":  # its process died without a word and Tune has begun another
            self._lost(trial_id, row.attempts, "the trial's process ended")
        host, _, pid = event["process"].rpartition(":")
        self._ledger.start_attempt(trial_id, event["attempt"], host, int(pid))
        optim = row.config["optim"]
        self.live[trial_id] = Live(row.name, optim["steps"], optim["batch_size"])

    def _watch(self, trial_id: str, step: int) -> None:
        live = self.live.get(trial_id)
        if live is not None:
            if live.first_step is None:
                live.first_step, live.since = step, time.monotonic()
            live.step = step

    def _lost(self, trial_id: str, attempt: int, reason: str) -> None:
        live = self.live.pop(trial_id, None)
        progressed = live is not None and live.first_step is not None
        self._ledger.lose_attempt(trial_id, attempt, reason[-2000:], progressed)

    def _ended(self, trial_id: str, attempt: int, outcome: Outcome) -> None:
        if outcome.status == "interrupted":
            if attempt:  # 0: it had not begun
                self._lost(trial_id, attempt, "interrupted")
            return
        self.live.pop(trial_id, None)
        trial = self._layout.trial(trial_id)
        row = self._ledger.row(trial_id)
        if (row.state, row.attempts) != ("running", attempt):
            log.warning("what attempt %d of %s left behind is not accepted", attempt, row.name)
            return
        publish.records(trial, attempt)
        result = publish.result(row, attempt, outcome, self._provenance, self._gpus.get(trial_id, 0.0))
        if self._ledger.finish(trial_id, attempt, cast(State, outcome.status), result, outcome.error):
            publish.trial(self._ledger, trial, trial_id)
            _settle_checkpoints(trial, attempt)


def _settle_checkpoints(trial: TrialLayout, attempt: int) -> None:
    """Keep the accepted attempt's checkpoints under the trial and free those of the others."""
    accepted, final = trial.attempt(attempt) / "checkpoints", trial.root / "checkpoints"
    if accepted.is_dir():
        shutil.rmtree(final, ignore_errors=True)
        accepted.replace(final)
    for number in trial.attempts():
        shutil.rmtree(trial.attempt(number) / "checkpoints", ignore_errors=True)


def adopt(ledger: Ledger, layout: SweepLayout, trial_id: str) -> Path | None:
    """Take over a planned trial that another sweep under the same storage has finished; the folder it came from."""
    row = ledger.row(trial_id)
    for other in layout.other_trials(trial_id):
        published = publish.read_finished(other)
        if published is None:
            continue
        own = layout.trial(trial_id)
        number = own.begin_attempt()
        ledger.start_attempt(trial_id, number, os.uname().nodename, os.getpid())
        ledger.record_many(trial_id, number, published.metrics)
        publish.copy_records(other, own)
        ledger.finish(trial_id, number, "finished", {**published.result, "trial_id": row.trial_id}, None)
        publish.trial(ledger, own, trial_id)
        return other.root
    return None
