"""Trials that wait for 20 s on 16 slots of simulated nodes: how much of the slots' time is a trial running."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import noop, simulated
from benchmarks.report import Comparison, Goal, Report, Settings
from orchestrator.run_request import Request

TRIALS = 500
NODES, CPUS = 4, 4
MAX_GAP_SECONDS = 0.1


def measure(settings: Settings) -> Report:
    """Slot time in which a trial runs : all slot time, and the gap between two trials on a slot.

    A slot is a thin trial's process. Its time counts from its own first trial's beginning, and until no trial waits.
    """
    slots = Slots()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name, simulated.cluster(NODES, CPUS) as ray:
        planned = simulated.plan(Path(name), "busy", TRIALS)
        started = time.perf_counter()
        behind = simulated.sweep(
            ray, Path(name), "busy", planned, "benchmarks.noop:wait", Request(1.0, 0.0), slots.seen
        )
    busy = Comparison(
        "busy slots",
        (f"seconds in which one of {TRIALS} trials of {noop.WAIT_SECONDS:.0f} s runs", "seconds of the slots"),
        [slots.busy()],
        [slots.available()],
        "s",
        Goal(0.95, at_most=False),
    )
    gaps = slots.gaps()
    idle = Comparison(
        "idle gap between two trials on a slot",
        (f"the median of {len(gaps)} gaps", "the goal"),
        [statistics.median(gaps)],
        [MAX_GAP_SECONDS],
        "s",
        Goal(1.0),
    )
    counts = {
        "trials": TRIALS,
        "slots": len(slots.begun),
        "seconds_with_start": round(time.perf_counter() - started, 1),
        "seconds": round(slots.last - slots.first, 1),
        "share_of_all_slot_time": round(slots.total / (NODES * CPUS * (slots.last - slots.first)), 4),
        "longest_gap": round(max(gaps), 2),
        "mlflow_behind_seconds": round(behind, 1),
    }
    return Report([busy, idle], counts)


class Slots:
    """When trials began and ended on each slot, as the driver hears of it."""

    def __init__(self) -> None:
        self.begun: dict[str, list[float]] = {}  # by the thin trial's process
        self.ended: dict[str, list[float]] = {}
        self._slot: dict[str, str] = {}

    def seen(self, trial_id: str, event: Mapping[str, Any]) -> None:
        """An event of a trial."""
        now = time.perf_counter()
        if event["kind"] == "started":
            self._slot[trial_id] = event["process"]
            self.begun.setdefault(event["process"], []).append(now)
        elif event["kind"] == "ended":
            self.ended.setdefault(self._slot[trial_id], []).append(now)

    @property
    def first(self) -> float:
        return min(times[0] for times in self.begun.values())

    @property
    def last(self) -> float:
        return max(times[-1] for times in self.ended.values())

    @property
    def total(self) -> float:
        """Seconds that trials waited, all together."""
        return noop.WAIT_SECONDS * sum(len(times) for times in self.ended.values())

    def _until(self) -> float:
        """When the last trial began: from then on nothing waits."""
        return max(times[-1] for times in self.begun.values())

    def busy(self) -> float:
        """Seconds in which trials did their work, while others waited for a slot."""
        until = self._until()
        return sum(
            min(noop.WAIT_SECONDS, until - begin) for times in self.begun.values() for begin in times if begin < until
        )

    def available(self) -> float:
        """Seconds of all slots while trials waited for one."""
        until = self._until()
        return sum(until - times[0] for times in self.begun.values())

    def gaps(self) -> list[float]:
        """Seconds between a trial's end and the next one's beginning on the same slot."""
        return [
            begin - end
            for slot, begins in self.begun.items()
            for end, begin in zip(self.ended[slot], begins[1:], strict=False)
        ]
