"""Which trial begins next: those of the plan in order, those that a search or more seeds add, and lost ones again."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from orchestrator.attempt import Job
from orchestrator.plan import PlannedTrial
from orchestrator.run_request import Request

Handler = Callable[[str, Mapping[str, Any]], None]  # whom an executor tells: trial id, event


class Source(Protocol):
    """Where an executor gets its jobs from; all calls come from one thread."""

    def draw(self) -> tuple[Job, Request] | None:
        """The next trial that should begin now, or None where none should, for the time being or for ever."""
        ...

    def over(self, trial_id: str) -> None:
        """A trial that was drawn runs no more, however it ended; it may be drawn again."""
        ...

    def is_over(self) -> bool:
        """Whether nothing will be drawn any more."""
        ...


class Queue:
    """The order of trials, and how many run at a time. Any thread may call."""

    def __init__(self, limit: int | None = None) -> None:
        """`limit` trials run at a time at most; None leaves it to the cluster."""
        self._lock = threading.Lock()
        self._waiting: deque[PlannedTrial] = deque()
        self._flying: dict[str, PlannedTrial] = {}
        self.limit = limit
        self.closed: str | None = None  # why nothing more begins

    def add(self, trials: Iterable[PlannedTrial]) -> None:
        """Put trials behind those that wait; known ones are left out."""
        with self._lock:
            known = {trial.trial_id for trial in self._waiting} | self._flying.keys()
            for trial in trials:
                if trial.trial_id not in known:
                    known.add(trial.trial_id)
                    self._waiting.append(trial)

    def draw(self, may_begin: Callable[[str], bool] = lambda _trial_id: True) -> PlannedTrial | None:
        """The first of the waiting trials that may begin, if there is one and room for it."""
        with self._lock:
            full = self.limit is not None and len(self._flying) >= self.limit
            if self.closed is not None or full:
                return None
            trial = next((trial for trial in self._waiting if may_begin(trial.trial_id)), None)
            if trial is not None:
                self._waiting.remove(trial)
                self._flying[trial.trial_id] = trial
            return trial

    def over(self, trial_id: str, *, again: bool) -> None:
        """A drawn trial runs no more; `again` puts it in front of those that wait."""
        with self._lock:
            trial = self._flying.pop(trial_id)
            if again:
                self._waiting.appendleft(trial)

    @property
    def flying(self) -> tuple[str, ...]:
        """Ids of trials that were drawn and are not over."""
        with self._lock:
            return tuple(self._flying)

    def is_empty(self, may_begin: Callable[[str], bool] = lambda _trial_id: True) -> bool:
        """Whether nothing runs and nothing that may begin waits."""
        with self._lock:
            if self._flying:
                return False
            return self.closed is not None or not any(may_begin(trial.trial_id) for trial in self._waiting)
