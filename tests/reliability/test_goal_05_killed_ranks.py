"""Goal 5: rank processes that are killed over and over change no number; one that gets no further fails its trial."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from orchestrator.ledger import Ledger
from tests.orchestrator.sweeps import Small
from tests.reliability import drivers, kills, whole

pytestmark = pytest.mark.slow

ALL = "RELIABILITY_LONG"  # an environment variable: whatever it says, the long forms run too


def ranks(driver: BaseProcess) -> list[psutil.Process]:
    """Rank processes of this driver's cluster; Ray names actors' processes after their class."""
    children = psutil.Process(driver.pid).children(recursive=True)
    return [child for child in children if "ray::Rank" in _command(child)]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def strike(small: Small, driver: BaseProcess, steps: int) -> Iterator[int]:
    """Kill the rank process whenever its trial has got `steps` further; yields the metrics known at each kill."""
    while True:
        known = kills.points(small)
        if not kills.wait_for(lambda known=known: kills.points(small) >= known + steps, driver):
            return
        for rank in ranks(driver)[:1]:
            rank.kill()
            yield kills.points(small)
