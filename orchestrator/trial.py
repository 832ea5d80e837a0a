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
from orchestrator.attempt import Job, Outcome, failure, process_name
from orchestrator.control import INTERRUPTED
from orchestrator.layout import TrialLayout
from orchestrator.ranks import Ended, Hung, Lost, Ranks

LOOK_SECONDS = 0.5  # between two looks at what the trial is told
_GUARD_SECONDS = 2.0  # between two looks at whether a device is still left out

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
        job, self._reason, self._suspects = ray.get(self._mailbox.job.remote(config["trial"]))
        self._job = Job(**job)
        self._history = retry.History.of(self._job)
        self._running = False
        self._guarded: str | None = None  # a device that is left out, whose place is held so that nothing runs there
        self._number = 0
        self._looked = time.monotonic()

    def step(self) -> dict[str, Any]:
        if self._guarded is not None:
            time.sleep(_GUARD_SECONDS)
            works_again = not ray.get(self._mailbox.is_left_out.remote(self._guarded))
            return {"trial": self._job.trial_id, "events": [], "done": works_again}
        events = self._next_events() if self._running else self._start_attempt()
        over = bool(events) and events[-1]["kind"] == "ended"
        return {"trial": self._job.trial_id, "events": events, "done": over}

    def _start_attempt(self) -> list[Event]:
        folder = Path(self._job.folder)
        while (reason := self._told()) is None and not retry.has_room(folder, self._history.room):
            time.sleep(LOOK_SECONDS)
        if reason == INTERRUPTED:  # do not even begin
            return [_end(0, Outcome(INTERRUPTED))]
        if reason is None and (device := self._left_out()) is not None:
            return [self._guard(device)]
        trial = TrialLayout(folder)
        number = remote_trial.begin_attempt(
            trial, self._job.remote, self._job.attempts, lambda: self._told() is not None
        )
        if number is None:  # told to leave before the store was there
            return [_end(0, Outcome(INTERRUPTED))]
        self._number = number
        started = {"kind": "started", "attempt": self._number, "process": process_name()}
        if reason is not None:  # told before, of an attempt that was lost since
            return [started, _end(number, Outcome(reason, steps=self._job.last_step))]
        assert self._ranks is not None, "the trial has its processes"
        try:
            self._ranks.start(self._job, self._number)
        except ray.exceptions.RayTaskError as error:
            return [started, _end(number, failure(error.cause))]
        except ray.exceptions.RayError as error:  # it died while it was idle
            return [started, *self._lost(f"rank 0: {error}", hung=False)]
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
        failed = self._judged(found)
        if found.outcome.poisoned or not found.whole:
            self._end_ranks()
        last = dict(retry.after(found.outcome, self._history, self._number, self._job))
        self._job = self._history.next_job(self._job)
        if failed is None:
            return [*found.events, last]
        if last["kind"] == "lost":  # the trial goes on elsewhere
            last["charged"] = False
        return [*found.events, last, self._guard(failed)]

    def _judged(self, found: Ended) -> str | None:
        """Tell the mailbox what the end of an attempt says of its devices; the one that is left out from now on."""
        assert self._ranks is not None, "an attempt has ended"
        if found.outcome.status == "finished":
            for device in self._suspects.keys() & set(self._ranks.devices()):
                self._mailbox.device_works.remote(device)
        failed = self._ranks.devices(found.rank) if found.outcome.poisoned else []
        for device in failed:
            held, total = self._job.gpus * self._job.ranks, cast(Any, ray).cluster_resources().get("GPU", 0.0)
            asked = self._mailbox.device_failed.remote(device, self._job.trial_id, held, total)
            self._suspects = ray.get(asked)
        return next((device for device in failed if self._suspects.get(device)), None)

    def _left_out(self) -> str | None:
        """One of the trial's devices, of which it learns with its processes, that is left out."""
        if self._ranks is None:
            self._ranks = Ranks(self._job.ranks)
        return next((device for device in self._ranks.devices() if self._suspects.get(device)), None)

    def _guard(self, device: str) -> Event:
        """Give the trial back, but not its place, as long as the device is left out."""
        self._end_ranks()
        self._guarded = device
        return {"kind": "left_out", "device": device}

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
        return [_end(self._number, Outcome("failed", error=error))]

    def _end_ranks(self, *, hung: bool = False) -> None:
        if self._ranks is not None:
            self._ranks.end(hung=hung)
            self._ranks = None

    def cleanup(self) -> None:
        self._end_ranks()


def _end(number: int, outcome: Outcome) -> Event:
    """The event with which attempt `number` (0: it was never begun) ends."""
    return {"kind": "ended", "attempt": number, "outcome": outcome.to_json()}
