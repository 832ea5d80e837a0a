"""When a trial is tried again: lost processes as long as attempts get further, transient errors a few times."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.attempt import TRAIN, Job, Outcome

MAX_ERRORS = 3  # transient errors of one trial
MAX_LOSSES_WITHOUT_PROGRESS = 2
MAX_NODES_WITHOUT_PROGRESS = 3  # that a trial may lose, before it is its fault
DISK_FULL = "the disk is full"  # with which the reason of such a loss begins
_ROOM_BYTES, _ROOM_SHARE = 64 * 2**20, 0.02  # the smaller of both must be free before anything goes on

# What Ray says where a node, or the way to it, is gone, and we where it was the last one with room.
_OF_NODE = re.compile(
    r"node has died|NodeDied|node .* (dead|terminated|preempted)|is unavailable|Socket closed|could not be placed"
)


def is_of_node(reason: str) -> bool:
    """Whether a process was lost with its node, or with the way to it, which is no fault of its trial."""
    return _OF_NODE.search(reason) is not None


@dataclass
class History:
    """What the attempts of one trial came to so far."""

    best_step: int = 0
    errors: int = 0
    save_memory: bool = False
    room: int = 0  # bytes that must be free before the next attempt, after one for which there were too few
    _before: int = field(default=0, repr=False)
    _idle: int = field(default=0, repr=False)
    _nodes: int = field(default=0, repr=False)

    @classmethod
    def of(cls, job: Job) -> History:
        """What the ledger knows of the attempts before this job."""
        return cls(best_step=job.last_step, _before=job.last_step, _idle=job.stalled)

    def reached(self, step: int) -> None:
        """The current attempt reported `step`."""
        self.best_step = max(self.best_step, step)

    def may_retry_loss(self) -> bool:
        """Count a lost attempt; False when it is the second in a row that got no further than those before."""
        self._idle = 0 if self.best_step > self._before else self._idle + 1
        self._before = self.best_step
        return self._idle < MAX_LOSSES_WITHOUT_PROGRESS

    def is_charged(self, reason: str) -> bool:
        """Whether a lost attempt counts: not where its node took it before it got further, up to three times."""
        progressed = self.best_step > self._before
        self._nodes = 0 if progressed else self._nodes + is_of_node(reason)
        return progressed or not is_of_node(reason) or self._nodes > MAX_NODES_WITHOUT_PROGRESS

    def may_retry_error(self) -> bool:
        """Count a transient error; False after three."""
        self.errors += 1
        return self.errors <= MAX_ERRORS

    def next_job(self, job: Job) -> Job:
        """The job of the next attempt."""
        return replace(job, save_memory=job.save_memory or self.save_memory)


def after(outcome: Outcome, history: History, number: int, job: Job) -> Mapping[str, Any]:
    """The event with which attempt `number` ends: `lost` where another attempt may do better, else `ended`.

    A loss that is no fault of the trial is not `charged`.
    """
    if outcome.status == "failed":
        message = str((outcome.error or {}).get("message"))
        if outcome.disk_full:
            history.room = _usage(Path(job.folder))[1] + _ROOM_BYTES // 64
            return {"kind": "lost", "attempt": number, "reason": f"{DISK_FULL}: {message}", "charged": False}
        if outcome.storage_away:
            return {"kind": "lost", "attempt": number, "reason": message, "charged": False}
        if outcome.out_of_memory and job.train == TRAIN and not (job.save_memory or history.save_memory):
            history.save_memory = True
            reason = f"{message}; tried again with activation checkpointing, which computes the same"
            return {"kind": "lost", "attempt": number, "reason": reason, "charged": False}
        may_retry = history.may_retry_loss if outcome.lost else history.may_retry_error
        if outcome.retryable and may_retry():
            return {"kind": "lost", "attempt": number, "reason": message}
    return {"kind": "ended", "attempt": number, "outcome": outcome.to_json()}


def has_room(folder: Path, at_least: int = 0) -> bool:
    """Whether the disk of `folder` has space to go on: 64 MiB, or 2 % of a small one, and `at_least` so many bytes."""
    total, free = _usage(folder)
    return free >= max(at_least, min(_ROOM_BYTES, _ROOM_SHARE * total))


def _usage(folder: Path) -> tuple[int, int]:
    """Bytes of the disk of `folder`, and how many of them are free."""
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return usage.total, usage.free
