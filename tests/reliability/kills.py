"""What kills of drivers and ranks have in common: training that can be struck, what was lost, and the two waits."""

from __future__ import annotations

import itertools
import os
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from multiprocessing.process import BaseProcess
from typing import Any

from orchestrator import training
from orchestrator.attempt import Job, Outcome, Report
from orchestrator.control import Ask
from orchestrator.layout import TrialLayout
from tests.orchestrator.sweeps import Small
from tests.reliability import drivers

STEP_SECONDS = 0.15  # at least, of each step of `slowly`
SLOWLY, DEAF, DIES = (f"{__name__}:{name}" for name in ("slowly", "deaf", "dies_with_registers"))

_RESUMED = re.compile(r"^(\S+ \S+) INFO trainers\.train: resumed at step (\d+)$", re.MULTILINE)


def slowly(job: Job, layout: TrialLayout, number: int, report: Report, asked: Ask) -> Outcome:
    """Real training with a pause at each step, which changes no number."""

    def pause() -> str | None:
        time.sleep(STEP_SECONDS)
        return asked()

    return training.run(job, layout, number, report, pause)


def deaf(job: Job, layout: TrialLayout, number: int, report: Report, asked: Ask) -> Outcome:
    """Real training that hears nothing for two minutes after its first step."""
    calls = itertools.count()

    def sleep() -> None:
        if next(calls) == 1:
            time.sleep(120)

    return training.run(job, layout, number, report, sleep)


def dies_with_registers(job: Job, layout: TrialLayout, number: int, report: Report, asked: Ask) -> Outcome:
    """A process that the system kills before its first step where the model has registers; else real training."""
    if job.config["model"]["num_registers"]:
        drivers.die()
    return training.run(job, layout, number, report, asked)


@dataclass(frozen=True)
class Struck:
    """What the ledger knew of a trial that was running when its driver was killed."""

    trial_id: str
    attempt: int
    step: int  # the last that was ever reported


def kill(small: Small, driver: BaseProcess | subprocess.Popen[str]) -> list[Struck]:
    """SIGKILL a driver; the trials that were running in it."""
    driver.kill()
    if isinstance(driver, BaseProcess):
        driver.join()
    else:
        driver.communicate(timeout=60)
    sql = """SELECT trial_id, attempts, (SELECT max(step) FROM metrics m WHERE m.trial_id = t.trial_id)
        FROM trials t WHERE state = 'running'"""
    return [Struck(trial, attempt, step or 0) for trial, attempt, step in _read(small, sql)]


def lost_steps(small: Small, struck: Sequence[Struck]) -> list[int]:
    """How many reported steps each of the struck trials had to train again, in the next attempt that came so far."""
    return [strike.step - _resumed_after(small, strike)[0] for strike in struck]


def resumed_at(small: Small, struck: Struck) -> datetime:
    """When (local time) the trial went on."""
    moment = _resumed_after(small, struck)[1]
    assert moment is not None, f"{struck} began anew"
    return moment


def _resumed_after(small: Small, struck: Struck) -> tuple[int, datetime | None]:
    """Where and when an attempt after the killed one went on; step 0 where the trial was trained from the first."""
    layout = TrialLayout(small.root / "trials" / struck.trial_id)
    for number in layout.attempts():
        log = layout.log(number).read_text() if layout.log(number).is_file() else ""
        if number > struck.attempt and (found := _RESUMED.search(log)) is not None:
            return int(found[2]), datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f")
    return 0, None


def attempts(small: Small) -> Mapping[str, list[str | None]]:
    """The outcomes of all attempts by trial name, in order; None of one that has none yet."""
    sql = "SELECT t.name, a.outcome FROM attempts a JOIN trials t USING (trial_id) ORDER BY t.position, a.number"
    found: dict[str, list[str | None]] = {}
    for name, outcome in _read(small, sql):
        found.setdefault(name, []).append(outcome)
    return found


def points(small: Small) -> int:
    """How many metrics the ledger holds."""
    found = _read(small, "SELECT count(*) FROM metrics")
    return int(found[0][0]) if found else 0


def steps(small: Small) -> int:
    """How many different steps all trials together have reported."""
    found = _read(small, "SELECT count(*) FROM (SELECT DISTINCT trial_id, step FROM metrics)")
    return int(found[0][0]) if found else 0


def wait_for(
    condition: Callable[[], bool], driver: BaseProcess | subprocess.Popen[str], seconds: float = 120.0
) -> bool:
    """Wait until the condition holds; False where the driver has ended before."""
    deadline = time.monotonic() + seconds
    while not condition():
        if exit_code(driver) is not None:
            return False
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return True


def wait_for_points(small: Small, driver: BaseProcess | subprocess.Popen[str], number: int) -> bool:
    """Wait until the ledger holds so many metrics; False where the driver has ended before."""
    return wait_for(lambda: points(small) >= number, driver)


def wait_for_steps(small: Small, driver: BaseProcess | subprocess.Popen[str], number: int) -> bool:
    """Wait until so many steps have been reported; False where the driver has ended before."""
    return wait_for(lambda: steps(small) >= number, driver)


def exit_code(driver: BaseProcess | subprocess.Popen[str]) -> int | None:
    """The exit code, None while the driver runs."""
    return driver.exitcode if isinstance(driver, BaseProcess) else driver.poll()


def send(driver: BaseProcess, number: signal.Signals) -> None:
    """Send a driver a signal."""
    assert driver.pid is not None
    os.kill(driver.pid, number)


def _read(small: Small, sql: str) -> list[tuple[Any, ...]]:
    path = small.root / "ledger.db"
    if not path.is_file():
        return []
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as database:
        try:
            return database.execute(sql).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):  # they are being made
                return []
            raise
