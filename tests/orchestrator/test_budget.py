"""Budgets: what lost, running, adopted and dropped attempts cost, over several runs, and when a sweep has to stop."""

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import room
from orchestrator.budget import HOURS, Budget, Spent
from orchestrator.ledger import Ledger
from orchestrator.plan import build_plan
from orchestrator.sweep import Budget as Limits
from orchestrator.sweep import Sweep
from tests.orchestrator.sweeps import Small

NANO = {"preset": "short", "model.size": "nano", "model.patch_size": 8}
HOUR = 3600


class Clock:
    """Seconds that only pass when told."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def ms(self) -> int:
        return round(self.seconds * 1000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger.db", clock=clock.ms) as opened:
        axes: dict[str, tuple[object, ...]] = {"model.num_registers": (0, 2, 4)}
        opened.plan(build_plan(Sweep(name="x", trial=NANO, axes=axes)).trials)
        yield opened


def ids(ledger: Ledger) -> list[str]:
    return [row.trial_id for row in ledger.rows()]


def test_lost_finished_and_running_attempts_cost_their_share_of_gpus(ledger: Ledger, clock: Clock) -> None:
    a, b, c = ids(ledger)
    budget = Budget(None, ledger, clock)
    ledger.start_attempt(a, 1, "host", 1, gpus=0.5)
    clock.seconds += 2 * HOUR
    ledger.lose_attempt(a, 1, "lost", None)  # 1 GPU-hour
    ledger.start_attempt(a, 2, "host", 1, gpus=0.5)
    ledger.start_attempt(b, 1, "host", 1, gpus=4.0)
    assert budget.spent() == Spent(gpu_hours=1.0, hours=2.0, trials=2)
    clock.seconds += 0.5 * HOUR
    assert budget.spent() == Spent(gpu_hours=1.0 + 0.25 + 2.0, hours=2.5, trials=2)
    ledger.finish(a, 2, "finished", {}, None)
    ledger.start_attempt(c, 1, "host", 1, gpus=0.0)  # on CPUs
    clock.seconds += 0.5 * HOUR
    assert budget.spent() == Spent(gpu_hours=1.0 + 0.25 + 4.0, hours=3.0, trials=3)


def test_what_a_rerun_drops_was_spent_all_the_same(ledger: Ledger, clock: Clock) -> None:
    a, *_ = ids(ledger)
    ledger.start_attempt(a, 1, "host", 1, gpus=1.0)
    clock.seconds += HOUR
    ledger.finish(a, 1, "finished", {}, None)
    ledger.reset(a)
    assert Budget(None, ledger, clock).spent() == Spent(1.0, 0.0, 1)


def test_an_adopted_trial_is_free(ledger: Ledger, clock: Clock) -> None:
    a, b, _ = ids(ledger)
    ledger.start_attempt(a, 1, "host", 1)
    clock.seconds += HOUR
    ledger.finish(a, 1, "finished", {}, None)
    budget = Budget(Limits(trials=1), ledger, clock)
    assert budget.spent() == Spent(0.0, 0.0, 0)
    assert budget.may_begin(b)


def test_the_night_after_a_killed_driver_costs_nothing(ledger: Ledger, clock: Clock) -> None:
    a, b, _ = ids(ledger)
    ledger.start_attempt(a, 1, "host", 1, gpus=1.0)
    ledger.start_attempt(b, 1, "host", 1, gpus=1.0)  # never reports
    clock.seconds += HOUR
    ledger.record(a, 1, 10, {"train/loss": 1.0})
    clock.seconds += 12 * HOUR  # nobody ran
    assert ledger.release_running() == [a, b]
    assert Budget(None, ledger, clock).spent().gpu_hours == 1.0
    assert ledger.seconds_before(a, 2) == HOUR


def test_hours_add_up_over_runs_and_are_kept_while_one_lasts(ledger: Ledger, clock: Clock) -> None:
    with Budget(None, ledger, clock) as budget:
        clock.seconds += 29
        budget.spent()
        assert ledger.meta(HOURS) is None
        clock.seconds += 1
        budget.spent()
        assert ledger.meta(HOURS) == pytest.approx(30 / HOUR)
        clock.seconds += HOUR - 30
    assert ledger.meta(HOURS) == pytest.approx(1.0)
    clock.seconds += 5 * HOUR  # between two runs
    with Budget(Limits(hours=2.0), ledger, clock) as budget:
        clock.seconds += 0.75 * HOUR
        assert budget.spent().hours == pytest.approx(1.75)
        assert budget.exhausted() is None
        clock.seconds += 0.25 * HOUR
        reason = budget.exhausted()
    assert reason == "the budget of 2 hours is used up; a larger budget.hours lets the sweep go on"


def test_the_hours_wait_for_space_on_a_full_disk(ledger: Ledger, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_TRY_SECONDS", 0.0)
    keep, full = ledger.set_meta, [True, True]

    def keep_when_there_is_room(key: str, value: Any) -> None:
        if full:
            full.pop()
            raise sqlite3.OperationalError("database or disk is full")
        keep(key, value)

    with Budget(None, ledger, clock):
        clock.seconds += HOUR
        monkeypatch.setattr(ledger, "set_meta", keep_when_there_is_room)
    assert (ledger.meta(HOURS), full) == (pytest.approx(1.0), [])


def test_gpu_hours_run_out_while_a_trial_runs(ledger: Ledger, clock: Clock) -> None:
    a, *_ = ids(ledger)
    budget = Budget(Limits(gpu_hours=3.0), ledger, clock)
    ledger.start_attempt(a, 1, "host", 1, gpus=2.0)
    assert budget.exhausted() is None
    clock.seconds += 1.4 * HOUR
    assert budget.exhausted() is None
    clock.seconds += 0.1 * HOUR
    assert budget.exhausted() == "the budget of 3 GPU-hours is used up; a larger budget.gpu_hours lets the sweep go on"


def test_a_full_number_of_trials_lets_begun_ones_go_on(ledger: Ledger, clock: Clock) -> None:
    a, b, c = ids(ledger)
    ledger.start_attempt(a, 1, "host", 1, gpus=0.0)
    ledger.lose_attempt(a, 1, "lost", None)
    budget = Budget(Limits(trials=2), ledger, clock)  # as in a later run
    assert budget.may_begin(a) and budget.may_begin(b) and budget.may_begin(c)
    assert budget.left_out(2) is None
    budget.begin(b)
    assert budget.may_begin(a) and budget.may_begin(b) and not budget.may_begin(c)
    assert budget.exhausted() is None
    assert budget.left_out(0) is None
    said = "the budget of 2 trials is used up; 1 more are planned, and a larger budget.trials runs them"
    assert budget.left_out(1) == said


def test_no_limits_allow_everything(ledger: Ledger, clock: Clock) -> None:
    budget = Budget(None, ledger, clock)
    clock.seconds += 1e6 * HOUR
    assert budget.exhausted() is None
    assert budget.may_begin("any")


def test_asking_is_cheap_with_10000_trials(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        with ledger._change() as db:
            db.executemany(
                "INSERT INTO trials (trial_id, name, position, in_plan, cell, seed, config) "
                "VALUES (?,'n',?,1,'{}',0,'{}')",
                [(f"{i:016x}", i) for i in range(10_000)],
            )
            db.executemany(
                "INSERT INTO attempts VALUES (?,?,'host',1,0,3600000,'lost',NULL,NULL,1.0)",
                [(f"{i:016x}", n) for i in range(10_000) for n in (1, 2)],
            )
        budget = Budget(Limits(gpu_hours=1e9, hours=1e9, trials=10**6), ledger)
        started = time.process_time()
        for _ in range(10):
            assert budget.exhausted() is None
        assert (time.process_time() - started) / 10 < 0.1
        assert budget.spent().gpu_hours == 20_000


@pytest.mark.slow
def test_a_real_sweep_stops_at_its_budget_and_goes_on_with_a_larger_one(tmp_path: Path) -> None:
    small = Small(tmp_path, steps=6)
    small.write(budget={"trials": 3})
    done = small.run("--in-process")
    assert done.returncode == 1, done.stderr
    assert "the budget of 3 trials is used up; 1 more are planned" in done.stdout
    assert len(small.attempts()) == 3
    small.write(budget={"trials": 4, "hours": 1e-6})
    done = small.run("--in-process")
    assert done.returncode == 1, done.stdout
    assert "the budget of 1e-06 hours is used up" in done.stdout
    small.write(budget={"trials": 4})
    assert small.run("--in-process").returncode == 0
    assert sorted(small.attempts().values())[:3] == [1, 1, 1]
