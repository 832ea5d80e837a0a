"""What the driver does with a trial's events: the ledger first, then the published files, then who is watching."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from orchestrator import publish
from orchestrator.attempt import Outcome
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger, State
from orchestrator.retry import DISK_FULL, MAX_LOSSES_WITHOUT_PROGRESS, MAX_NODES_WITHOUT_PROGRESS
from orchestrator.room import Room

log = logging.getLogger(__name__)


@dataclass
class Live:
    """What the screen shows of one running trial."""

    name: str
    steps: int | None  # null where a program was not given them
    batch_size: int | None
    step: int = 0
    known: int = 0  # the last step that earlier attempts reported, which this one may report again
    first_step: int | None = None
    since: float = field(default_factory=time.monotonic)

    def reached(self, step: int) -> None:
        """The attempt reported `step`."""
        self.step = step
        if step > self.known and self.first_step is None:
            self.first_step, self.since = step, time.monotonic()

    def images_per_second(self, now: float) -> float:
        """Speed since the first new report of this attempt, evaluation included; 0 before there is a second one."""
        done = 0 if self.first_step is None else self.step - self.first_step
        return done * (self.batch_size or 0) / max(now - self.since, 1e-9)


class Recorder:
    """Takes (trial id, event) from an executor and never raises. Events of superseded attempts change nothing.

    An attempt of which an event could not be recorded (a full disk, say) is not accepted when it ends: its trial stays
    to be run, and the next attempt reports everything again.
    """

    def __init__(
        self,
        ledger: Ledger,
        layout: SweepLayout,
        provenance: Mapping[str, Any],
        gpus: Callable[[str], float],
        over: Callable[[str], None],
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`gpus` of a trial by its id; `over` is called with the id of a trial that has come to its end, `changed`
        after every event.
        """
        self._ledger = ledger
        self._layout = layout
        self._provenance = provenance
        self._gpus = gpus
        self._over = over
        self._changed = changed
        self.live: dict[str, Live] = {}
        self._nodes: dict[str, int] = {}  # how many nodes were lost with each trial since it last got further
        self.broken: set[str] = set()
        self._room = Room(layout.root)

    def handle(self, trial_id: str, event: Mapping[str, Any]) -> None:
        """Record one event: started, report, lost, process_lost or ended. While the disk is full it waits."""
        if event["kind"] == "started":
            self.broken.discard(trial_id)  # a new attempt reports everything again
        if event["kind"] == "ended" and trial_id in self.broken:
            event = {"kind": "lost", "attempt": event["attempt"], "reason": "an event could not be recorded"}
        try:
            self._room.wait_for(lambda: self._record(trial_id, event))
        except Exception:
            self.broken.add(trial_id)
            log.exception("an event of trial %s could not be recorded: %s", trial_id, event.get("kind"))
        self._changed()

    def _record(self, trial_id: str, event: Mapping[str, Any]) -> None:
        kind = event["kind"]
        if kind == "started":
            self._started(trial_id, event)
        elif kind == "report":
            self._ledger.record(trial_id, event["attempt"], event["step"], event["metrics"])
            if trial_id in self.live:
                self.live[trial_id].reached(event["step"])
        elif kind == "lost":
            self._lost(trial_id, event["attempt"], event["reason"], charged=event.get("charged", True))
        elif kind == "process_lost":
            self._process_lost(trial_id, str(event["reason"]), node=bool(event.get("node")))
        else:
            self._ended(trial_id, event["attempt"], Outcome(**event["outcome"]))

    def _started(self, trial_id: str, event: Mapping[str, Any]) -> None:
        row = self._ledger.row(trial_id)
        if row.state == "running":  # its process died without a word and Tune has begun another
            self._lost(trial_id, row.attempts, "the trial's process ended")
        host, _, pid = event["process"].rpartition(":")
        self._ledger.start_attempt(trial_id, event["attempt"], host, int(pid), self._gpus(trial_id))
        optim = row.config.get("optim", {})  # of a program only what was given
        known = self._ledger.furthest(trial_id)
        self.live[trial_id] = Live(row.name, optim.get("steps"), optim.get("batch_size"), known=known)

    def _lost(self, trial_id: str, attempt: int, reason: str, *, charged: bool = True) -> None:
        live = self.live.pop(trial_id, None)
        progressed = live is not None and live.first_step is not None
        if reason.startswith(DISK_FULL):
            self._room.say_full()
        self._ledger.lose_attempt(trial_id, attempt, reason[-2000:], progressed if charged else None)

    def _process_lost(self, trial_id: str, reason: str, *, node: bool) -> None:
        """The trial's own process is gone; it fails where it got no further for the second time.

        With its `node` it is no fault of the trial, unless it takes one node after another.
        """
        row = self._ledger.row(trial_id)
        if row.state == "planned":  # it never came to begin an attempt
            number = self._layout.trial(trial_id).begin_attempt(row.attempts)
            self._ledger.start_attempt(trial_id, number, os.uname().nodename, os.getpid())
            row = self._ledger.row(trial_id)
        if row.state != "running":  # what it had to say was heard before it went
            return
        live = self.live.get(trial_id)
        progressed = live is not None and live.first_step is not None
        self._nodes[trial_id] = 0 if progressed else self._nodes.get(trial_id, 0) + node
        charged = not node or self._nodes[trial_id] > MAX_NODES_WITHOUT_PROGRESS
        if not charged or progressed or row.stalled + 1 < MAX_LOSSES_WITHOUT_PROGRESS:
            self._lost(trial_id, row.attempts, reason, charged=charged)
            return
        message = "the trial's process was lost twice without getting further"
        error = {"type": "ProcessLost", "message": message, "traceback": reason[-4000:]}
        self._ended(trial_id, row.attempts, Outcome("failed", error=error))

    def _ended(self, trial_id: str, attempt: int, outcome: Outcome) -> None:
        if outcome.status == "interrupted":
            if attempt:  # 0: it had not begun
                self._lost(trial_id, attempt, "interrupted", charged=False)
            return
        self.live.pop(trial_id, None)
        row = self._ledger.row(trial_id)
        if (row.state, row.attempts) != ("running", attempt):
            log.warning("what attempt %d of %s left behind is not accepted", attempt, row.name)
            return
        before = self._ledger.seconds_before(trial_id, attempt)
        result = publish.result(row, attempt, outcome, self._provenance, self._gpus(trial_id), before)
        if self._ledger.finish(trial_id, attempt, cast(State, outcome.status), result, outcome.error):
            self._over(trial_id)


def adopt(ledger: Ledger, layout: SweepLayout, trial_id: str, fingerprint: str | None) -> Path | None:
    """Take over a planned trial that has finished under the same storage; the folder it came from.

    It is another sweep's, or this one's own if the ledger was lost. A trial of other data content than `fingerprint`
    (None: not known here) is not taken.
    """
    row = ledger.row(trial_id)
    for other in layout.published(trial_id):
        published = publish.read_finished(other)
        if published is None or fingerprint not in (None, published.result.get("data_fingerprint")):
            continue
        own = layout.trial(trial_id)
        number = own.begin_attempt(row.attempts)
        ledger.start_attempt(trial_id, number, os.uname().nodename, os.getpid())
        ledger.record_many(trial_id, number, published.metrics)
        if other != own:
            publish.copy_records(other, own)
        ledger.finish(trial_id, number, "finished", {**published.result, "attempts": number}, None)
        publish.trial(ledger, own, trial_id)
        return other.root
    return None
