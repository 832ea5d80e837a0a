"""The thin Tune trial: it holds a trial's place, hands on what its ranks yield, and replaces ranks that are lost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import ray
from ray import tune

from orchestrator import remote_trial, retry
from orchestrator.attempt import Job, Outcome, process_name
from orchestrator.control import INTERRUPTED
from orchestrator.layout import TrialLayout
from orchestrator.ranks import Ended, Hung, Lost, Ranks

LOOK_SECONDS = 0.5  # between two looks at what the trial is told

Event = dict[str, Any]


class ThinTrial(tune.Trainable):
    """Holds a trial's place in the cluster, keeps its rank processes, and hands on what the first of them yields.

    Each `step` returns the events since the last one. Ranks that die or hang are replaced here, without Tune noticing,
    as long as attempts get further.
    """

    def setup(self, config: dict[str, Any], mailbox: Any) -> None:  # type: ignore[override] # tune.with_parameters
        self._mailbox = mailbox
        self._ranks: Ranks | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        job, self._reason = ray.get(self._mailbox.job.remote(config["trial"]))
        self._job = Job(**job)
        self._history = retry.History.of(self._job)
        self._running = False
        self._number = 0
        self._looked = time.monotonic()

    def step(self) -> dict[str, Any]:
        events = self._next_events() if self._running else self._start_attempt()
        over = bool(events) and events[-1]["kind"] == "ended"
        return {"trial": self._job.trial_id, "events": events, "done": over}

    def _start_attempt(self) -> list[Event]:
        folder = Path(self._job.folder)
        while (reason := self._told()) is None and not retry.has_room(folder, self._history.room):
            time.sleep(LOOK_SECONDS)
        if reason == INTERRUPTED:  # do not even begin
            return [{"kind": "ended", "attempt": 0, "outcome": Outcome(INTERRUPTED).to_json()}]
        trial = TrialLayout(folder)
        number = remote_trial.begin_attempt(
            trial, self._job.remote, self._job.attempts, lambda: self._told() is not None
        )
        if number is None:  # told to leave before the store was there
            return [{"kind": "ended", "attempt": 0, "outcome": Outcome(INTERRUPTED).to_json()}]
        self._number = number
        started = {"kind": "started", "attempt": self._number, "process": process_name()}
        if reason is not None:  # told before, of an attempt that was lost since
            outcome = Outcome(reason, steps=self._job.last_step)
            return [started, {"kind": "ended", "attempt": self._number, "outcome": outcome.to_json()}]
        if self._ranks is None:
            self._ranks = Ranks(self._job.ranks)
        self._ranks.start(self._job, self._number)
        self._running = True
        return [started]

    def _next_events(self) -> list[Event]:
        """Wait for the first rank's next events, or for what becomes of the attempt."""
        assert self._ranks is not None, "an attempt is running"
        while True:
            if (reason := self._told()) is not None:
                self._ranks.leave(reason)
            found = self._ranks.next_events(LOOK_SECONDS)
            if isinstance(found, Lost | Hung):
                return self._lost(found.reason, hung=isinstance(found, Hung))
            if isinstance(found, Ended):
                return self._ended(found)
            if found:
                self._reached(found)
                return found

    def _reached(self, events: Sequence[Event]) -> None:
        self._history.reached(max((event["step"] for event in events if event["kind"] == "report"), default=0))

    def _told(self) -> str | None:
        """Why the trial should leave, asked at most twice a second; None where nobody answers any more."""
        now = time.monotonic()
        if self._reason is None and now - self._looked >= LOOK_SECONDS:
            self._looked = now
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):  # the driver is gone or cut off
                self._reason = ray.get(self._mailbox.look.remote(self._job.trial_id), timeout=5.0)
        return cast("str | None", self._reason)

    def _ended(self, found: Ended) -> list[Event]:
        self._running = False
        self._reached(found.events)
        if found.outcome.poisoned or not found.whole:
            self._end_ranks()
        last = retry.after(found.outcome, self._history, self._number, self._job)
        self._job = self._history.next_job(self._job)
        return [*found.events, dict(last)]

    def _lost(self, reason: str, *, hung: bool) -> list[Event]:
        """A rank process is gone: replace them all and try again, unless two attempts got no further."""
        self._running = False
        self._end_ranks(hung=hung)
        charged = hung or self._history.is_charged(reason)
        if not charged or self._history.may_retry_loss():
            return [{"kind": "lost", "attempt": self._number, "reason": reason, "charged": charged}]
        what = "made no progress and was ended" if hung else "was lost"
        error = {
            "type": "Hung" if hung else "ProcessLost",
            "message": f"the training process {what}, twice without getting further",
            "traceback": reason[-4000:],
        }
        return [{"kind": "ended", "attempt": self._number, "outcome": Outcome("failed", error=error).to_json()}]

    def _end_ranks(self, *, hung: bool = False) -> None:
        if self._ranks is not None:
            self._ranks.end(hung=hung)
            self._ranks = None

    def cleanup(self) -> None:
        self._end_ranks()
