"""What runs inside a rank actor: attempts one after another in a warm process, with reports as they come.

Imports neither Ray nor torch: a fresh process is ready sooner, and torch comes with the first attempt.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator import devices
from orchestrator.attempt import Job, Place, free_address, run_attempt

Event = dict[str, Any]


class Rank:
    """A warm process (a Ray actor of two threads) that runs attempts one after another."""

    def __init__(self) -> None:
        self._told: tuple[str, int, str] | None = None  # trial, number of its attempt, why it should leave
        self._beat = 0.0  # when the attempt last made a step or a report

    def process(self) -> tuple[str, int, tuple[str, ...]]:
        """Host, process id and GPUs; the answer says that the process is there."""
        host, ray = socket.gethostname(), sys.modules.get("ray")
        return host, os.getpid(), () if ray is None else devices.names(ray.get_runtime_context(), host)

    def address(self, interface: str | None) -> tuple[str, int]:
        """Where the other ranks of a trial find this one: an address of this node and a port that is free now."""
        return free_address(interface)

    def leave(self, trial_id: str, number: int, reason: str) -> None:
        """Tell an attempt to leave; called from the actor's other thread, which may be ahead of the attempt's begin."""
        self._told = (trial_id, number, reason)

    def run(
        self, job: Mapping[str, Any], number: int, place: Mapping[str, Any], beat_seconds: float
    ) -> Iterator[list[Event]]:
        """Events of one attempt as they come, in lists; the last event is `ended`.

        Where nothing came for `beat_seconds` but the attempt has made steps, the list has an `alive`.
        """
        self._beat = time.monotonic()
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        arguments = (Job(**job), number, Place(**place), events)
        thread = threading.Thread(target=self._attempt, args=arguments, name="attempt", daemon=True)
        thread.start()
        over, told = False, self._beat
        while not over:
            batch = self._next(events, beat_seconds, told)
            told = self._beat
            over = batch[-1]["kind"] == "ended"
            yield batch
        thread.join()

    def _next(self, events: queue.SimpleQueue[Event], beat_seconds: float, told: float) -> list[Event]:
        while True:
            try:
                batch = [events.get(timeout=beat_seconds)]
            except queue.Empty:
                if self._beat > told:
                    return [{"kind": "alive"}]
                continue
            while not events.empty():
                batch.append(events.get())
            return batch

    def _attempt(self, job: Job, number: int, place: Place, events: queue.SimpleQueue[Event]) -> None:
        def report(step: int, metrics: Mapping[str, float]) -> None:
            self._beat = time.monotonic()
            events.put({"kind": "report", "attempt": number, "step": step, "metrics": dict(metrics)})

        def asked() -> str | None:
            self._beat = time.monotonic()
            told = self._told
            return told[2] if told is not None and told[:2] == (job.trial_id, number) else None

        outcome = run_attempt(job, number, report, asked, place)  # never raises, so that `ended` always comes
        events.put({"kind": "ended", "attempt": number, "outcome": outcome.to_json()})
