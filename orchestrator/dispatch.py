"""Between plan and executor: which trial is given out next, as which job, and what its end leads to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from orchestrator.attempt import Job
from orchestrator.growth import Growth
from orchestrator.ledger import Ledger
from orchestrator.plan import PlannedTrial
from orchestrator.queue import Queue
from orchestrator.retry import MAX_LOSSES_WITHOUT_PROGRESS
from orchestrator.room import Room
from orchestrator.run_request import Request

MakeJob = Callable[[PlannedTrial], tuple[Job, Request]]


class Dispatch:
    """The source of an executor: trials that wait, and those that follow from the results of others.

    All calls come from the thread that runs the executor.
    """

    def __init__(
        self,
        ledger: Ledger,
        queue: Queue,
        growths: Sequence[Growth],
        settle: Callable[[PlannedTrial], None],
        leaving: Callable[[], bool],
        may_begin: Callable[[str], bool] = lambda _trial_id: True,
    ) -> None:
        """`settle` takes over a new trial that is finished elsewhere; once `leaving`, no trial runs again; the budget
        says which trials `may_begin`.
        """
        self._ledger, self._queue, self._growths = ledger, queue, growths
        self._settle, self._leaving, self._may_begin = settle, leaving, may_begin
        self._room = Room(ledger.path.parent)  # what goes on while an executor runs must not fail for it
        self.make_job: MakeJob | None = None
        self.grown: dict[str, PlannedTrial] = {}

    def add(self, trials: Iterable[PlannedTrial]) -> None:
        """Trials of the plan that are still to be run."""
        self._queue.add(trials)

    def grow(self) -> None:
        """Ask for trials that follow from the results so far, until there are no new ones."""
        while new := [trial for growth in self._growths for trial in growth.more(self._ledger)]:
            self._room.wait_for(partial(self._ledger.add, new))
            for trial in new:
                self.grown[trial.trial_id] = trial
                self._settle(trial)
            self._queue.add(trial for trial in new if self._ledger.row(trial.trial_id).state == "planned")

    def draw(self) -> tuple[Job, Request] | None:
        """As `Source.draw`."""
        assert self.make_job is not None, "the executor is known"
        trial = None if self._leaving() else self._queue.draw(self._may_begin)
        return None if trial is None else self.make_job(trial)

    def over(self, trial_id: str) -> None:
        """As `Source.over`: a trial that was lost runs again, unless it got no further twice or the sweep ends."""
        row = self._ledger.row(trial_id)
        lost = row.state == "planned" and row.stalled < MAX_LOSSES_WITHOUT_PROGRESS
        self._queue.over(trial_id, again=lost and not self._leaving())
        self.grow()

    def is_over(self) -> bool:
        """As `Source.is_over`."""
        return self._leaving() or self._queue.is_empty(self._may_begin)
