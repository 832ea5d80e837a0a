"""A rank that hangs is ended by the watchdog and its trial goes on; one that hangs again and again fails."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.orchestrator.sweeps import Small
from tests.orchestrator.test_faults import begin, ranks, reported, wait_for

pytestmark = pytest.mark.slow


def test_a_stopped_rank_is_ended_and_its_trial_goes_on(tmp_path: Path) -> None:
    small = Small(tmp_path, steps=60, registers=(0,))
    small.write(seeds=[0])
    driver = begin(small, "--set", "execution.no_progress_seconds=8")
    wait_for(lambda: reported(small) >= 20 and bool(ranks(driver)))
    hung = ranks(driver)[0]
    os.kill(hung.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    output, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0, output
    assert not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE, "the stopped process is left behind"
    assert time.monotonic() - stopped > 8
    assert list(small.attempts().values()) == [2]


def test_a_trial_that_hangs_twice_without_a_step_fails_and_says_so(tmp_path: Path) -> None:
    small = Small(tmp_path, registers=(0,))
    program = {"command": ["sh", "-c", "sleep 600"], "execution": {"no_progress_seconds": 2}}
    small.write(trial=program, axes={"program.lr": [0.1]}, baseline=None, primary=["val/top1"], seeds=[0])
    done = small.run("--in-process")
    assert done.returncode == 1
    assert "neither reported nor printed anything for 2 s" in done.stdout
    assert list(small.attempts().values()) == [2]
