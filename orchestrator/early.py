"""Early stopping: whether a running trial should be pruned, by Ray Tune's own rules, among the trials of its cell."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.ledger import Ledger
from orchestrator.ledger_schema import Role, TrialRow
from orchestrator.sweep import Scheduler, Sweep

log = logging.getLogger(__name__)

_STEP = "step"  # what the rules count time by


class _Rule(Protocol):
    """What is used of a scheduler of Ray Tune."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None: ...
    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str: ...
    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class _Trial:
    """What the rules read of a Tune trial."""

    trial_id: str


class _Controller:
    """What the rules read of Tune's controller: there is none that waits, so that none is paused for another's sake."""

    def get_live_trials(self) -> list[_Trial]:
        """No trials."""
        return []


@dataclass
class _Group:
    """Trials that are compared: of one cell, one role and one length."""

    rule: _Rule
    last_steps: dict[str, int] = field(default_factory=dict)


class EarlyStopping:
    """Answers for each report whether its trial should be pruned: one instance of the rule for each cell.

    With a search only suggestions are pruned, since the chosen ones are the rows of the table; without one the
    replicates of a cell are. Time is the training step; before `grace` of a run, and at its last step, none is pruned.
    Steps that a trial reports again after an attempt was lost are not counted twice, and values that are not finite
    not at all. Once a trial is to be pruned every later report of it is answered so, since the first answer may have
    been lost with the driver.
    """

    def __init__(self, scheduler: Scheduler, role: Role) -> None:
        """Args:
        role: of the trials that may be pruned.
        """
        self._scheduler = scheduler
        self._role = role
        self._groups: dict[tuple[str, int], _Group] = {}
        self._pruned: set[str] = set()

    @classmethod
    def of(cls, sweep: Sweep) -> EarlyStopping | None:
        """The early stopping of `sweep`; None where it has no scheduler."""
        if sweep.scheduler is None:
            return None
        return cls(sweep.scheduler, "search" if sweep.search is not None else "cell")

    def replay(self, ledger: Ledger, rows: Sequence[TrialRow]) -> None:
        """Take up what `rows` (all trials of the plan) have reported in earlier runs, in the order in which it came.

        What was decided then is decided again in the same way.
        """
        mine = {row.trial_id: row for row in rows if row.role == self._role}
        points = [
            (point.seq, trial_id, point.step, point.value)
            for trial_id, row in mine.items()
            if row.last_step is not None
            for point in ledger.since(trial_id, 0, -1)
            if point.name == self._scheduler.metric
        ]
        for _, trial_id, step, value in sorted(points):
            row = mine[trial_id]
            metrics = {self._scheduler.metric: value}
            self.report(trial_id, row.cell, row.role, steps_of(row.config), step, metrics)

    def report(
        self,
        trial_id: str,
        cell: Mapping[str, Any],
        role: Role,
        steps: int,
        step: int,
        metrics: Mapping[str, float],
    ) -> bool:
        """Whether the trial should be pruned, after what it reports at `step` of `steps`. Never raises.

        Args:
            cell: each axis by dotted name, as plan and ledger have it.
            steps: of its whole run (`steps_of`); one of 0 steps is never pruned.
        """
        if role != self._role or trial_id in self._pruned:
            return role == self._role
        value = metrics.get(self._scheduler.metric)
        if value is None or not math.isfinite(value) or steps < 1:
            return False
        try:
            prune = self._decide(trial_id, (json.dumps(dict(cell), sort_keys=True), steps), step, value)
        except Exception:
            log.exception("early stopping could not decide on trial %s, which goes on", trial_id)
            return False
        if prune:
            self._pruned.add(trial_id)
        return prune

    def _decide(self, trial_id: str, key: tuple[str, int], step: int, value: float) -> bool:
        steps = key[1]
        if key not in self._groups:
            self._groups[key] = _Group(_rule(self._scheduler, steps))
        group, trial = self._groups[key], _Trial(trial_id)
        if step <= group.last_steps.get(trial_id, -1):
            return False
        if trial_id not in group.last_steps:
            group.rule.on_trial_add(_Controller(), trial)
        group.last_steps[trial_id] = step
        result = {_STEP: step, self._scheduler.metric: value}
        if step >= steps:
            group.rule.on_trial_complete(_Controller(), trial, result)
            return False
        return group.rule.on_trial_result(_Controller(), trial, result) == "STOP"


def steps_of(config: Mapping[str, Any]) -> int:
    """The length of a trial with this nested configuration in steps; 0 where a program does not say, so that no part
    of its run can be meant.
    """
    return int((config.get("optim") or {}).get("steps") or 0)


def _rule(scheduler: Scheduler, steps: int) -> _Rule:
    """A new rule for runs of `steps` steps."""
    from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule

    settings: dict[str, Any] = {"time_attr": _STEP, "metric": scheduler.metric, "mode": scheduler.mode}
    settings["grace_period"] = scheduler.grace * steps
    if scheduler.name == "median":
        median: _Rule = MedianStoppingRule(**settings)
        return median
    asha: _Rule = AsyncHyperBandScheduler(
        **settings, max_t=steps, reduction_factor=scheduler.reduction, stop_last_trials=False
    )
    return asha
