"""Goal 5: rank processes that are killed over and over change no number; one that gets no further fails its trial."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from orchestrator.ledger import Ledger
from orchestrator.retry import MAX_ERRORS
from tests.orchestrator.sweeps import Small
from tests.reliability import drivers, kills, whole

pytestmark = pytest.mark.slow

LONG = "RELIABILITY_LONG"  # where this environment variable is set, the long form runs too
KILLS = MAX_ERRORS + 3  # more than one trial could survive if they were charged


def ranks(driver: BaseProcess) -> list[psutil.Process]:
    """Rank processes of this driver's cluster; Ray names actors' processes after their class."""
    children = psutil.Process(driver.pid).children(recursive=True)
    return [child for child in children if "ray::Rank" in _command(child)]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def strike(driver: BaseProcess, is_due: Callable[[], bool], most: int) -> int:
    """Kill the rank process each time that it is due until the driver has ended; how many kills there were."""
    num_kills = 0
    while num_kills < most and kills.wait_for(is_due, driver, 240):
        for rank in ranks(driver)[:1]:
            rank.kill()
            num_kills += 1
    driver.join(240)
    assert driver.exitcode is not None, "the driver did not end"
    return num_kills


def check(small: Small, undisturbed: Small, num_kills: int) -> None:
    whole.check(small, undisturbed)
    outcomes = kills.attempts(small)
    assert all(tried[-1] == "finished" and set(tried[:-1]) <= {"lost"} for tried in outcomes.values()), outcomes
    lost = sum(len(tried) - 1 for tried in outcomes.values())
    assert num_kills - 1 <= lost <= num_kills, outcomes  # the last one may have struck after the last event
    with Ledger.open(small.root / "ledger.db", writer=False) as ledger:
        assert {row.stalled for row in ledger.rows()} == {0}, "losses of attempts that got further are not counted"


def test_a_rank_killed_after_each_step_that_it_gets_further(
    template: Small, undisturbed: Small, tmp_path: Path
) -> None:
    small = drivers.prepared(tmp_path, template)
    driver = drivers.begin(small, train=kills.SLOWLY, in_process=False, max_concurrent=1)
    known = 0

    def got_further() -> bool:
        nonlocal known
        before, known = known, kills.steps(small)
        return known > before

    num_kills = strike(driver, got_further, KILLS)
    assert driver.exitcode == 0, drivers.output(small)
    assert num_kills == KILLS
    check(small, undisturbed, num_kills)
    assert max(map(len, kills.attempts(small).values())) > 1 + MAX_ERRORS


@pytest.mark.skipif(LONG not in os.environ, reason=f"it takes some minutes; runs where {LONG} is set")
@pytest.mark.parametrize("seconds", [20.0])
def test_a_rank_killed_every_so_many_seconds(seconds: float, template: Small, tmp_path: Path) -> None:
    long = replace(template, steps=400)  # of a minute and more
    undisturbed = drivers.prepared(tmp_path / "undisturbed", long)
    assert drivers.drive(undisturbed) == 0, drivers.output(undisturbed)
    small = drivers.prepared(tmp_path / "killed", long)
    driver = drivers.begin(small, train=kills.SLOWLY, in_process=False, max_concurrent=1)
    due = time.monotonic() + seconds

    def time_is_up() -> bool:
        nonlocal due
        is_due = time.monotonic() > due
        due += seconds * is_due
        return is_due

    num_kills = strike(driver, time_is_up, 1000)
    assert driver.exitcode == 0, drivers.output(small)
    check(small, undisturbed, num_kills)


def test_a_rank_that_dies_twice_without_getting_further_fails_its_trial_alone(template: Small, tmp_path: Path) -> None:
    small = drivers.prepared(tmp_path, template)
    assert drivers.drive(small, train=kills.DIES, in_process=False) == 1, drivers.output(small)
    outcomes = kills.attempts(small)
    assert outcomes == {"deit3 nano reg0 seed0": ["finished"], "deit3 nano reg2 seed0": ["lost", "failed"]}
    with Ledger.open(small.root / "ledger.db", writer=False) as ledger:
        (error,) = (row.error for row in ledger.rows() if row.state == "failed")
    assert error is not None
    assert error["type"] == "ProcessLost"
    assert "twice without getting further" in error["message"]
    assert ("deit3 nano reg2 seed0", "FAILED") in small.mlflow_runs()
