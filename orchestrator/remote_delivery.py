"""Delivery of trials where storage is remote: records come from the store, and published files go there."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator import remote_trial
from orchestrator.delivery import Delivery
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.remote_trial import Mirror

_THREADS = 4  # which mostly wait for the store


class RemoteDelivery(Delivery):
    """Publishes what trials have come to both here and in the store."""

    def __init__(
        self, mirror: Mirror, layout: SweepLayout, ledger: Ledger, leaving: Callable[[], bool] = lambda: False
    ) -> None:
        super().__init__(layout, ledger, _THREADS, leaving)
        self._mirror = mirror

    def complete(self) -> None:
        """As `Delivery.complete`, also for trials whose result is not in the store.

        Raises:
            OSError: files cannot be written, or the store does not answer.
        """
        super().complete()
        keys = self._mirror.remote.sizes(f"{self._layout.name}/trials")
        for row in self._ledger.rows():
            if row.result is not None and self._mirror.key(self._layout.trial(row.trial_id).result) not in keys:
                self._deliver(row.trial_id)

    def renew(self, trial_id: str, *, from_first_step: bool) -> None:
        """A trial is to run again: what the store has of its result goes, and all of it where it starts anew.

        Raises:
            OSError: the store does not answer.
        """
        trial = self._layout.trial(trial_id)
        if from_first_step:
            remote_trial.forget(self._mirror, trial)
        else:
            self._mirror.remote.remove(self._mirror.key(trial.result))

    def _deliver(self, trial_id: str) -> None:
        row, trial = self._ledger.row(trial_id), self._layout.trial(trial_id)
        remote_trial.pull_attempts(self._mirror, trial, row.attempts)
        super()._deliver(trial_id)
        remote_trial.push_published(self._mirror, trial)
        remote_trial.settle(self._mirror, trial, row.config["execution"].get("keep_steps", ()))
