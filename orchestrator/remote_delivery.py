"""Delivery of trials that are over: records come from remote storage and published files go there, by threads."""

from __future__ import annotations

import logging
import sqlite3
from concurrent.futures import Future, ThreadPoolExecutor

from orchestrator import publish, remote_trial
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.remote_trial import Mirror

log = logging.getLogger(__name__)

_THREADS = 4


class Delivery:
    """Publishes trials of a sweep both here and in the store, beside the loop that runs them.

    The ledger has a trial's end before it is delivered, so that a driver that died in between is made good by
    `complete`, which the next one calls.
    """

    def __init__(self, mirror: Mirror, layout: SweepLayout, ledger: Ledger) -> None:
        self._mirror, self._layout, self._ledger = mirror, layout, ledger
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="delivery")
        self._running: list[Future[None]] = []

    def __enter__(self) -> Delivery:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def begin(self, trial_id: str) -> None:
        """Deliver a trial that is over in the ledger; returns at once."""
        self._running = [future for future in self._running if not future.done()]
        self._running.append(self._threads.submit(self._try, trial_id))

    def complete(self) -> None:
        """Wait for what was begun, then deliver every trial that is over and not in the store.

        Raises:
            OSError: the store does not answer.
        """
        for future in self._running:
            future.result()
        self._running = []
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

    def _try(self, trial_id: str) -> None:
        try:
            self._deliver(trial_id)
        except (OSError, sqlite3.Error) as error:
            log.warning("trial %s could not be delivered and is tried again at the end: %s", trial_id, error)

    def _deliver(self, trial_id: str) -> None:
        row, trial = self._ledger.row(trial_id), self._layout.trial(trial_id)
        remote_trial.pull_attempts(self._mirror, trial, row.attempts)
        publish.records(trial, row.attempts)
        publish.trial(self._ledger, trial, trial_id)
        remote_trial.push_published(self._mirror, trial)
        remote_trial.settle(self._mirror, trial, row.config["execution"].get("keep_steps", ()))
