"""When a trial is tried again: lost processes as long as attempts get further, transient errors a few times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.attempt import Outcome

MAX_ERRORS = 3  # transient errors of one trial
MAX_LOSSES_WITHOUT_PROGRESS = 2


@dataclass
class History:
    """What the attempts of one trial came to so far."""

    best_step: int = 0
    errors: int = 0
    _before: int = field(default=0, repr=False)
    _idle: int = field(default=0, repr=False)

    def reached(self, step: int) -> None:
        """The current attempt reported `step`."""
        self.best_step = max(self.best_step, step)

    def may_retry_loss(self) -> bool:
        """Count a lost attempt; False when it is the second in a row that got no further than those before."""
        self._idle = 0 if self.best_step > self._before else self._idle + 1
        self._before = self.best_step
        return self._idle < MAX_LOSSES_WITHOUT_PROGRESS

    def may_retry_error(self) -> bool:
        """Count a transient error; False after three."""
        self.errors += 1
        return self.errors <= MAX_ERRORS


def after(outcome: Outcome, history: History, number: int) -> Mapping[str, Any]:
    """The event with which attempt `number` ends: `lost` where the same settings may do better, else `ended`."""
    if outcome.status == "failed" and outcome.retryable and history.may_retry_error():
        return {"kind": "lost", "attempt": number, "reason": str((outcome.error or {}).get("message"))}
    return {"kind": "ended", "attempt": number, "outcome": outcome.to_json()}
