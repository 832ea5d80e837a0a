"""Goal 3: a signal ends a sweep in order, in time and resumable, whenever it comes; a second one ends it at once."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.orchestrator.sweeps import Small, environment
from tests.reliability import drivers, kills, whole

pytestmark = pytest.mark.slow

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}
LEAVE_SECONDS = 30.0
AT_ONCE_SECONDS = 2.0
MOMENTS = 2  # of each signal, besides those before the first step


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_signals_at_random_moments_leave_a_sweep_that_goes_on(
    number: signal.Signals, template: Small, undisturbed: Small, tmp_path: Path
) -> None:
    small = drivers.prepared(tmp_path, template)
    generator = random.Random(number)
    for start in range(1 + MOMENTS):
        known = kills.points(small)
        driver = drivers.begin(small, train=kills.SLOWLY)
        if start == 0:  # as soon as the driver can be interrupted in order
            assert kills.wait_for((small.root / "ledger.db").is_file, driver), drivers.output(small)
        else:
            assert kills.wait_for_points(small, driver, known + 1), drivers.output(small)
            driver.join(generator.uniform(0, 4 * kills.STEP_SECONDS))
        kills.send(driver, number)
        driver.join(LEAVE_SECONDS)
        assert driver.exitcode == CODES[number], (start, drivers.output(small))
        assert {status for _, status in small.mlflow_runs()} <= {"KILLED", "FINISHED"}
    assert drivers.drive(small, train=kills.SLOWLY) == 0, drivers.output(small)
    whole.check(small, undisturbed)


def test_a_second_signal_ends_the_driver_at_once(template: Small, tmp_path: Path) -> None:
    small = drivers.prepared(tmp_path, template)
    driver = drivers.begin(small, train=kills.DEAF)
    assert kills.wait_for_points(small, driver, 1), drivers.output(small)
    kills.send(driver, signal.SIGTERM)
    driver.join(1)
    assert driver.exitcode is None, "a trial that hears nothing cannot have left"
    sent = time.monotonic()
    kills.send(driver, signal.SIGINT)
    driver.join(LEAVE_SECONDS)
    assert driver.exitcode == CODES[signal.SIGINT]
    assert time.monotonic() - sent < AT_ONCE_SECONDS


def test_trials_that_hear_nothing_are_not_waited_for_too_long(
    template: Small, undisturbed: Small, tmp_path: Path
) -> None:
    small = drivers.prepared(tmp_path, template)
    driver = drivers.begin(small, train=kills.DEAF, in_process=False)
    assert kills.wait_for_points(small, driver, 1), drivers.output(small)
    kills.send(driver, signal.SIGUSR1)
    driver.join(LEAVE_SECONDS)
    assert driver.exitcode == CODES[signal.SIGUSR1], drivers.output(small)
    assert drivers.drive(small) == 0, drivers.output(small)
    whole.check(small, undisturbed)


def test_the_command_line_leaves_on_the_warning_of_a_cluster(
    template: Small, undisturbed: Small, tmp_path: Path
) -> None:
    """SIGUSR1 is what Slurm sends a job before its time is over; SIGTERM and SIGINT are tested with other faults."""
    small = drivers.prepared(tmp_path, template)
    driver = subprocess.Popen(
        small.command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )
    assert kills.wait_for_points(small, driver, 1), driver.communicate()
    sent = time.monotonic()
    driver.send_signal(signal.SIGUSR1)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == CODES[signal.SIGUSR1], output
    assert time.monotonic() - sent < LEAVE_SECONDS
    assert "goes on from the checkpoints" in output
    assert drivers.drive(small) == 0, drivers.output(small)
    whole.check(small, undisturbed)
