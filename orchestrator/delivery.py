"""Trials that are over get their files published beside the loop that runs others, by a thread."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from orchestrator import publish
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.room import Room

log = logging.getLogger(__name__)


class Delivery:
    """Publishes what trials have come to. The ledger has a trial's end before it is delivered, so that a driver that
    died in between is made good by `complete`, which the next one calls.
    """

    def __init__(
        self, layout: SweepLayout, ledger: Ledger, threads: int = 1, leaving: Callable[[], bool] = lambda: False
    ) -> None:
        """Once `leaving` is true nothing waits for space on a full disk."""
        self._layout, self._ledger = layout, ledger
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="delivery")
        self._running: list[Future[None]] = []
        self._leaving = False
        self._room = Room(layout.root, lambda: self._leaving or leaving())

    def __enter__(self) -> Delivery:
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving = True
        self._threads.shutdown(cancel_futures=True)

    def begin(self, trial_id: str) -> None:
        """Deliver a trial that is over in the ledger; returns at once."""
        self._running = [future for future in self._running if not future.done()]
        self._running.append(self._threads.submit(self._try, trial_id))

    def complete(self) -> None:
        """Wait for what was begun, then deliver every trial that is over and not published as the ledger has it.

        Raises:
            OSError: files cannot be written.
        """
        for future in self._running:
            future.result()
        self._running = []
        for trial_id in publish.missing(self._ledger, self._layout.trial):
            self._deliver(trial_id)

    def _try(self, trial_id: str) -> None:
        """Deliver; while the disk is full wait for space; what else fails is tried again at the end."""
        try:
            self._room.wait_for(lambda: self._deliver(trial_id))
        except (OSError, sqlite3.Error) as error:
            log.warning("trial %s could not be published and is tried again at the end: %s", trial_id, error)

    def _deliver(self, trial_id: str) -> None:
        publish.trial(self._ledger, self._layout.trial(trial_id), trial_id)
