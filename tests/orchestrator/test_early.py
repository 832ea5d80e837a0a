"""Early stopping against rungs and medians that are worked out by hand, and that a restart decides the same."""

import logging
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from orchestrator.early import EarlyStopping, steps_of
from orchestrator.ledger import Ledger
from orchestrator.plan import PlannedTrial, build_plan
from orchestrator.sweep import Scheduler, Search, Sweep

METRIC = "val/knn/top1"
CELL = {"model.num_registers": 4}
OTHER = {"model.num_registers": 0}
STEPS = 64


def stopping(**parts: Any) -> EarlyStopping:
    return EarlyStopping(Scheduler.model_validate({"name": "asha", "metric": METRIC, **parts}), "cell")


def told(early: EarlyStopping, trial: str, step: int, value: float, cell: dict[str, Any] = CELL) -> bool:
    return early.report(trial, cell, "cell", STEPS, step, {METRIC: value, "train/loss": 1.0})


RUNGS: dict[str, Any] = {"grace": 4 / 64, "reduction": 2}


class TestAsha:
    """Rungs at 4, 8, 16 and 32 of 64 steps; one in two goes on: the cutoff is the median of what came before."""

    def test_rungs_by_hand(self) -> None:
        early = stopping(**RUNGS)
        assert not told(early, "a", 2, 0.1)  # before grace
        assert not told(early, "a", 4, 0.4)  # the first at its rung
        assert not told(early, "b", 4, 0.6)  # above 0.4
        assert told(early, "c", 4, 0.45)  # below the median of 0.4, 0.6
        assert not told(early, "d", 4, 0.5)  # above the median of 0.4, 0.45, 0.6
        assert not told(early, "a", 8, 0.7)  # the first at the next rung
        assert told(early, "b", 8, 0.65)
        assert not told(early, "a", 16, 0.1)  # alone there

    def test_one_in_four_goes_on_with_the_default(self) -> None:
        early = stopping(grace=0.25)
        for name, value in {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}.items():
            assert not told(early, name, 16, value), name  # each the best so far
        assert told(early, "e", 16, 0.32)  # the cutoff is 0.325: three quarters from 0.1 to 0.4
        assert not told(early, "f", 16, 0.39)  # now 0.32, three quarters among five

    def test_less_is_better_with_mode_min(self) -> None:
        early = stopping(mode="min", **RUNGS)
        assert not told(early, "a", 4, 0.4)
        assert told(early, "b", 4, 0.6)

    def test_none_is_pruned_at_its_last_step(self) -> None:
        early = stopping(grace=0.25)  # with 4 a rung is at 64, the last step
        assert not told(early, "a", 64, 0.9)
        assert not told(early, "b", 64, 0.1)
        assert not told(early, "b", 64, 0.1)

    def test_a_whole_run_of_grace_prunes_none(self) -> None:
        early = stopping(grace=1)
        assert not any(told(early, name, step, -ord(name)) for step in (1, 32, 63, 64) for name in "abcdef")


class TestMedian:
    """A trial is pruned whose best value is below the median of the running means of at least three others."""

    def test_running_means_by_hand(self) -> None:
        early = stopping(name="median", grace=10 / 64)
        for name, values in {"a": (0.1, 0.3), "b": (0.4, 0.6), "c": (0.6, 0.8)}.items():
            assert not told(early, name, 10, values[0])
            assert not told(early, name, 20, values[1])
        # At 10 the means are 0.1, 0.4, 0.6, at 20 they are 0.2, 0.5, 0.7.
        assert not told(early, "d", 5, 0.0)  # before grace
        assert told(early, "d", 10, 0.3)
        assert not told(early, "e", 10, 0.45)
        assert told(early, "e", 20, 0.42)  # its best is 0.45, below 0.5
        assert not told(early, "f", 20, 0.55)

    def test_trials_that_have_finished_count(self) -> None:
        early = stopping(name="median", grace=10 / 64)
        for name, value in {"a": 0.4, "b": 0.5, "c": 0.6}.items():
            assert not told(early, name, 64, value)
        assert told(early, "d", 20, 0.1) is False  # none of them was known at 20 steps
        assert told(early, "d", 64, 0.1) is False  # its last step


@pytest.mark.parametrize("name", ["asha", "median"])
class TestBoth:
    def test_only_trials_of_a_cell_are_compared(self, name: str) -> None:
        early = stopping(name=name, grace=4 / 64, reduction=2)
        for trial, value in {"a": 0.9, "b": 0.8, "c": 0.7}.items():
            told(early, trial, 4, value)
        assert not told(early, "x", 4, 0.1, OTHER)
        assert not early.report("y", CELL, "cell", STEPS * 2, 8, {METRIC: 0.1})  # of another length
        assert told(early, "z", 4, 0.1)

    def test_only_trials_of_the_role_are_pruned(self, name: str) -> None:
        early = stopping(name=name, grace=4 / 64, reduction=2)
        for trial, value in {"a": 0.9, "b": 0.8, "c": 0.7}.items():
            told(early, trial, 4, value)
        assert not early.report("d", CELL, "search", STEPS, 4, {METRIC: 0.1})

    def test_what_is_pruned_stays_so(self, name: str) -> None:
        early = stopping(name=name, grace=4 / 64, reduction=2)
        for trial, value in {"a": 0.9, "b": 0.8, "c": 0.7}.items():
            told(early, trial, 4, value)
        assert told(early, "z", 4, 0.1)
        assert told(early, "z", 5, 1.0)
        assert early.report("z", CELL, "cell", STEPS, 6, {"train/loss": 0.0})

    def test_what_says_nothing_about_the_metric_changes_nothing(self, name: str) -> None:
        early = stopping(name=name, grace=4 / 64, reduction=2)
        for trial in "abcd":
            assert not told(early, trial, 4, math.nan)
            assert not told(early, trial, 5, math.inf)
            assert not early.report(trial, CELL, "cell", STEPS, 6, {"train/loss": 0.0})
        assert not early.report("e", CELL, "cell", steps_of({"program": {}}), 5, {METRIC: 0.1})

    def test_steps_that_come_again_count_once(self, name: str) -> None:
        one, other = (stopping(name=name, grace=4 / 64, reduction=2) for _ in range(2))
        for early, repeats in ((one, 1), (other, 3)):
            for trial, value in {"a": 0.5, "b": 0.6, "c": 0.7}.items():
                for _ in range(repeats):
                    told(early, trial, 4, value)
                told(early, trial, 8, value + 0.1)
        for early in (one, other):  # 0.64 is below the median of the means 0.55, 0.65 and 0.75
            assert not told(early, "d", 4, 0.64)
            assert told(early, "d", 8, 0.6)

    def test_it_never_raises(self, name: str, caplog: pytest.LogCaptureFixture) -> None:
        early = stopping(name=name)
        with caplog.at_level(logging.ERROR):
            assert not early.report("a", {"axis": object()}, "cell", STEPS, 20, {METRIC: 0.5})
        assert "could not decide" in caplog.text


@pytest.mark.parametrize("name", ["asha", "median"])
@pytest.mark.parametrize("role", ["cell", "search"])
def test_a_restart_goes_on_with_the_same_decisions(name: str, role: Literal["cell", "search"], tmp_path: Path) -> None:
    scheduler = Scheduler.model_validate({"name": name, "metric": METRIC, "grace": 0.1, "reduction": 2})
    trials = planned(role)
    draw = random.Random(3)
    reports = [(trial, step, draw.random()) for step in range(5, 64, 5) for trial in draw.sample(trials, len(trials))]
    whole = EarlyStopping(scheduler, role)
    expected = [answer(whole, *report) for report in reports]
    assert 5 < sum(expected) < len(reports)
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        ledger.plan(trials)
        for trial in trials:
            ledger.start_attempt(trial.trial_id, 1, "host", 1)
        for cut in range(0, len(reports), 7):
            restarted = EarlyStopping(scheduler, role)
            restarted.replay(ledger, ledger.rows())
            assert [answer(restarted, *report) for report in reports[cut:]] == expected[cut:]
            for trial, step, value in reports[cut : cut + 7]:
                ledger.record(trial.trial_id, 1, step, {METRIC: value, "train/loss": 0.0})


def answer(early: EarlyStopping, trial: PlannedTrial, step: int, value: float) -> bool:
    steps = steps_of(trial.config.model_dump(mode="json"))
    return early.report(trial.trial_id, trial.cell, trial.role, steps, step, {METRIC: value})


def planned(role: Literal["cell", "search"]) -> list[PlannedTrial]:
    tiny = {"preset": "short", "model.size": "nano", "model.patch_size": 8, "optim.steps": STEPS}
    sweep = Sweep(name="example", trial=tiny, axes={"model.num_registers": (0, 4)}, seeds=tuple(range(8)))
    return [replace(trial, role=role) for trial in build_plan(sweep).trials]


def test_a_sweep_prunes_its_suggestions_or_else_its_replicates() -> None:
    scheduler = Scheduler(name="asha", metric=METRIC, grace=4 / 64, reduction=2)
    search = Search.model_validate(
        {"name": "random", "samples": 4, "metric": METRIC, "space": {"optim.lr": {"choices": [0.1, 0.2]}}}
    )
    plain = Sweep(name="example", axes={"model.num_registers": (0, 4)}, scheduler=scheduler)
    for sweep, role in ((plain, "cell"), (plain.model_copy(update={"search": search}), "search")):
        early = EarlyStopping.of(sweep)
        assert early is not None
        assert not early.report("a", CELL, role, STEPS, 4, {METRIC: 0.9})  # type: ignore[arg-type]
        assert early.report("b", CELL, role, STEPS, 4, {METRIC: 0.1})  # type: ignore[arg-type]
    assert EarlyStopping.of(plain.model_copy(update={"scheduler": None})) is None
