"""Goal 3: signals to every process of a sweep on Ray, as terminals and schedulers send them, and a second one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.orchestrator.sweeps import Small
from tests.reliability import drivers, kills, whole
from tests.reliability.paced import PAUSE, reported, wait_for

pytestmark = pytest.mark.slow

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}
PACED = "tests.reliability.paced:run"


def descendants(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(driver.pid).children(recursive=True)


def left_over(processes: list[psutil.Process]) -> list[str]:
    """Those that still run, by what they are."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
    return found


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1],
    ids=lambda number: number.name,
)
def test_a_signal_to_all_processes_on_ray_as_terminals_and_schedulers_send_it(
    number: signal.Signals, template: Small, undisturbed: Small, tmp_path: Path
) -> None:
    """Ctrl-C reaches every process of the terminal's group, Slurm's SIGTERM and SIGUSR1 every process of a step."""
    small = drivers.prepared(tmp_path, template, resources={"cpus": 1})
    driver = drivers.begin_on_ray(small, {PAUSE: "0.5"}, train=PACED)
    try:
        wait_for(lambda: reported(small.root) >= 4 or driver.poll() is not None)
        assert driver.poll() is None, drivers.output(small)
        os.killpg(driver.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(30)
        assert driver.poll() == CODES[number], drivers.output(small)
    finally:
        driver.kill()
        driver.wait()
    assert drivers.drive(small) == 0, drivers.output(small)
    whole.check(small, undisturbed)


def test_a_second_signal_on_ray_leaves_at_once_and_leaves_no_process(template: Small, tmp_path: Path) -> None:
    small = drivers.prepared(tmp_path, template, resources={"cpus": 1})
    driver = drivers.begin_on_ray(small, {}, train=kills.DEAF)
    wait_for(lambda: reported(small.root) > 0 or driver.poll() is not None)
    below = descendants(driver)
    try:
        driver.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert driver.poll() is None, drivers.output(small)
        driver.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        assert driver.wait(10) == 143
        assert time.monotonic() - sent < 2
    finally:
        driver.kill()
        driver.wait()
    agents = ("Agent", "dashboard")  # of Ray, which end by themselves a minute later
    wait_for(lambda: all(any(name in one for name in agents) for one in left_over(below)), 30)
