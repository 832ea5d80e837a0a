"""The budget of a sweep: what all of its runs have spent, and whether that is enough to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from orchestrator import sweep
from orchestrator.ledger import Ledger
from orchestrator.room import Room

HOURS = "hours"  # of wall-clock time of all runs so far, among the ledger's values of the whole sweep
_KEEP_SECONDS = 30.0  # after so long the hours are written down again, which is what a killed driver loses at most


@dataclass(frozen=True)
class Spent:
    """What all runs of a sweep have used together.

    GPU-hours are those that attempts held, whole or shares, lost attempts included; hours are of the wall clock while
    a driver ran; trials are those that were begun, of which adopted ones are none.
    """

    gpu_hours: float
    hours: float
    trials: int


class Budget:
    """Follows what a sweep spends while one of its runs lasts. Any thread may call; no call is slower than one query.

    Use it as a context manager around the run: the wall clock counts from construction on, and is kept at the end and
    now and then.
    """

    def __init__(
        self, limits: sweep.Budget | None, ledger: Ledger, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`limits` None: nothing is ever exhausted, but what is spent is kept all the same. `clock` gives seconds."""
        self._limits = limits or sweep.Budget()
        self._ledger = ledger
        self._clock = clock
        self._before = float(ledger.meta(HOURS) or 0.0)
        self._since = self._kept = clock()
        self._running: dict[tuple[str, int], float] = {}  # trial and attempt: when it was first seen here
        self._begun = ledger.begun()

    def __enter__(self) -> Budget:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        Room(self._ledger.path.parent).wait_for(lambda: self._keep(self._clock()))

    def spent(self) -> Spent:
        """What is used up to now. Running attempts count from when a call first saw them, by the monotonic clock."""
        now = self._clock()
        spending = self._ledger.spending()
        running = {(trial_id, number): gpus for trial_id, number, gpus in spending.running}
        self._running = {key: self._running.get(key, now) for key in running}
        live = sum(gpus * (now - self._running[key]) for key, gpus in running.items())
        if now - self._kept >= _KEEP_SECONDS:
            self._keep(now)
        return Spent((spending.gpu_seconds + live) / 3600, self._hours(now), spending.trials)

    def exhausted(self) -> str | None:
        """Why running trials should leave and no other begin, as a sentence; None while there is something left.

        A full number of trials is no such reason: those that were begun go on to their end. See `may_begin`.
        """
        spent = self.spent()
        for name, unit in (("gpu_hours", "GPU-hours"), ("hours", "hours")):
            limit, used = getattr(self._limits, name), getattr(spent, name)
            if limit is not None and used >= limit:
                return f"the budget of {limit:g} {unit} is used up; a larger budget.{name} lets the sweep go on"
        return None

    def may_begin(self, trial_id: str) -> bool:
        """Whether the number of trials allows this one to run: it was begun already, or fewer than all were."""
        limit = self._limits.trials
        return limit is None or trial_id in self._begun or len(self._begun) < limit

    def begin(self, trial_id: str) -> None:
        """The trial is given out; it counts from now on."""
        self._begun.add(trial_id)

    def left_out(self, planned: int) -> str | None:
        """What the number of trials leaves undone, as a sentence, where `planned` trials still wait; else None."""
        limit = self._limits.trials
        if limit is None or planned == 0 or len(self._begun) < limit:
            return None
        return (
            f"the budget of {limit} trials is used up; {planned} more are planned, and a larger budget.trials runs them"
        )

    def _hours(self, now: float) -> float:
        return self._before + (now - self._since) / 3600

    def _keep(self, now: float) -> None:
        self._kept = now
        self._ledger.set_meta(HOURS, self._hours(now))
