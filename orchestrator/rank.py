"""What runs inside a rank actor: attempts one after another in a warm process, with reports as they come.

Imports neither Ray nor torch: a fresh process is ready sooner, and torch comes with the first attempt.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.attempt import Job, run_attempt

Event = dict[str, Any]


class Rank:
    """A warm process (a Ray actor) that runs attempts one after another."""

    def run(self, job: Mapping[str, Any], number: int) -> Iterator[list[Event]]:
        """Events of one attempt as they come, in lists; the last event is `ended`."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        thread = threading.Thread(target=_attempt, args=(Job(**job), number, events), name="attempt", daemon=True)
        thread.start()
        over = False
        while not over:
            batch = [events.get()]
            while not events.empty():
                batch.append(events.get())
            over = batch[-1]["kind"] == "ended"
            yield batch
        thread.join()


def _attempt(job: Job, number: int, events: queue.SimpleQueue[Event]) -> None:
    def report(step: int, metrics: Mapping[str, float]) -> None:
        events.put({"kind": "report", "attempt": number, "step": step, "metrics": dict(metrics)})

    outcome = run_attempt(job, number, report)  # never raises, so that `ended` always comes
    events.put({"kind": "ended", "attempt": number, "outcome": outcome.to_json()})
