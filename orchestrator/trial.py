"""The thin Tune trial: it holds a trial's place, hands on what its rank yields, and replaces ranks that are lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator import retry
from orchestrator.attempt import Job, Outcome, process_name
from orchestrator.layout import TrialLayout
from orchestrator.rank import Event, Rank

HEAD_CPUS = 0.01  # what the thin trial itself takes of the trial's CPUs


class ThinTrial(tune.Trainable):
    """Holds a trial's place in the cluster, keeps its rank process, and hands on what that yields.

    Each `step` returns the events since the last one. A rank that dies is replaced here, without Tune noticing, as
    long as attempts get further.
    """

    def setup(self, config: dict[str, Any], jobs: Mapping[str, Job]) -> None:  # type: ignore[override] # tune.with_parameters
        self._jobs = jobs
        self._rank: Any = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._job = self._jobs[config["trial"]]
        self._history = retry.History()
        self._stream: Any = None
        self._number = 0

    def step(self) -> dict[str, Any]:
        events: list[Event] = []
        if self._stream is None:
            events.append(self._start_attempt())
        else:
            events.extend(self._next_events())
        over = bool(events) and events[-1]["kind"] == "ended"
        return {"trial": self._job.trial_id, "events": events, "done": over}

    def _start_attempt(self) -> Event:
        if Path(self._job.stop_file).exists():  # the driver is leaving: do not even begin
            return {"kind": "ended", "attempt": 0, "outcome": Outcome("interrupted").to_json()}
        self._number = TrialLayout(Path(self._job.folder)).begin_attempt(self._job.attempts)
        if self._rank is None:
            self._rank = self._new_rank()
        run = self._rank.run.options(num_returns="streaming")
        self._stream = run.remote(asdict(self._job), self._number)
        return {"kind": "started", "attempt": self._number, "process": process_name()}

    def _next_events(self) -> list[Event]:
        try:
            events: list[Event] = ray.get(next(self._stream))
        except StopIteration as error:
            return self._lost(f"the rank ended without a result: {error}")
        except ray.exceptions.RayError as error:  # whatever took the rank: itself, its node, memory, the network
            return self._lost(str(error))
        self._history.reached(max((event["step"] for event in events if event["kind"] == "report"), default=0))
        if events[-1]["kind"] == "ended":
            self._stream = None
            outcome = Outcome(**events[-1]["outcome"])
            if outcome.poisoned:
                self._end_rank()
            events[-1] = dict(retry.after(outcome, self._history, self._number))
        return events

    def _lost(self, reason: str) -> list[Event]:
        """The rank process is gone: replace it and try again, unless two attempts got no further."""
        number, self._stream = self._number, None
        self._end_rank()
        if self._history.may_retry_loss():
            return [{"kind": "lost", "attempt": number, "reason": reason}]
        message = "the training process was lost twice without getting further"
        error = {"type": "ProcessLost", "message": message, "traceback": reason[-4000:]}
        return [{"kind": "ended", "attempt": number, "outcome": Outcome("failed", error=error).to_json()}]

    def _new_rank(self) -> Any:
        group: PlacementGroup | None = ray.util.get_current_placement_group()
        assert group is not None, "a trial runs inside its placement group"
        bundle = group.bundle_specs[1]
        place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=1)
        return (
            ray.remote(Rank)
            .options(num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0), scheduling_strategy=place)
            .remote()
        )

    def _end_rank(self) -> None:
        """End the rank process, which may be alive although its node or the network was taken for lost."""
        if self._rank is not None:
            ray.kill(self._rank)
            self._rank = None

    def cleanup(self) -> None:
        self._end_rank()
