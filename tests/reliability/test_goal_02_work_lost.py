"""Goal 2: a kill costs at most the work of one checkpoint interval, and a sweep at most a fifth more time."""

import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.orchestrator.sweeps import Small
from tests.reliability import drivers, kills, whole

pytestmark = pytest.mark.slow

STEPS = 48  # each is reported, as up to 50 are
INTERVAL_SECONDS = 0.3
INTERVAL = 1 + int(INTERVAL_SECONDS / kills.STEP_SECONDS)  # steps, the one after which the interval is over included
OPTIONS: dict[str, Any] = {
    "train": kills.SLOWLY,
    "overrides": [f"execution.checkpoint_seconds={INTERVAL_SECONDS}"],
    "name": "small",
}


def prepared(folder: Path, template: Small) -> Small:
    return drivers.prepared(folder, replace(template, steps=STEPS, registers=(0,)))


def seconds_of_driver(small: Small) -> float:
    begun = time.monotonic()
    assert drivers.drive(small, **OPTIONS) == 0, drivers.output(small)
    return time.monotonic() - begun


def test_a_killed_trial_trains_at_most_one_checkpoint_interval_again(template: Small, tmp_path: Path) -> None:
    undisturbed = prepared(tmp_path / "undisturbed", template)
    expected = seconds_of_driver(undisturbed)
    small = prepared(tmp_path / "killed", template)
    spent, struck, begun = 0.0, list[kills.Struck](), list[datetime]()
    for step in (11, 24, 37):
        begun.append(datetime.now())
        started = time.monotonic()
        driver = drivers.begin(small, **OPTIONS)
        assert kills.wait_for_steps(small, driver, step), drivers.output(small)
        struck += kills.kill(small, driver)
        spent += time.monotonic() - started
    begun.append(datetime.now())
    spent += seconds_of_driver(small)
    whole.check(small, undisturbed)
    lost = kills.lost_steps(small, struck)
    assert len(lost) == 3
    assert max(lost) <= INTERVAL, lost
    resumed = [kills.resumed_at(small, strike) for strike in struck]
    restarts = sum((late - early).total_seconds() for early, late in zip(begun[1:], resumed, strict=True))
    assert spent - restarts <= 1.2 * expected, (spent, restarts, expected)
