"""Goals 1 and 2: drivers killed at 20 random moments lose no trial, double none, and repeat at most one step each."""

import random
import time
from pathlib import Path

import pytest

from tests.orchestrator.sweeps import Small
from tests.reliability import drivers, kills, whole

pytestmark = pytest.mark.slow

KILLS_IN_PROCESS = 3  # of each of five sweeps
KILLS_THROUGH_RAY = (3, 2)
INTERVAL = 1  # the sweeps have a checkpoint after each step


@pytest.fixture(scope="module")
def seconds(template: Small, tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long the sweep takes where nothing disturbs it, its steps slowed."""
    small = drivers.prepared(tmp_path_factory.mktemp("timed"), template)
    begun = time.monotonic()
    assert drivers.drive(small, train=kills.SLOWLY) == 0, drivers.output(small)
    return time.monotonic() - begun


def finish(small: Small, undisturbed: Small, struck: list[kills.Struck], *, in_process: bool) -> None:
    code = drivers.drive(small, train=kills.SLOWLY, in_process=in_process)
    assert code == 0, drivers.output(small)
    whole.check(small, undisturbed)
    lost = kills.lost_steps(small, struck)
    assert max(lost, default=0) <= INTERVAL, list(zip(struck, lost, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_a_driver_killed_at_random_moments(
    seed: int, seconds: float, template: Small, undisturbed: Small, tmp_path: Path
) -> None:
    generator, num_kills = random.Random(seed), 0
    while num_kills < KILLS_IN_PROCESS:  # once, unless this machine is quicker than when the sweep was timed
        small, struck = drivers.prepared(tmp_path / f"after{num_kills}", template), []
        cuts = sorted(generator.uniform(0, seconds) for _ in range(KILLS_IN_PROCESS - num_kills))
        for wait in (late - early for early, late in zip([0.0, *cuts[:-1]], cuts, strict=True)):
            driver = drivers.begin(small, train=kills.SLOWLY)
            driver.join(wait)
            if driver.exitcode is not None:
                break
            struck += kills.kill(small, driver)
            num_kills += 1
        finish(small, undisturbed, struck, in_process=True)


@pytest.mark.parametrize("num_kills", KILLS_THROUGH_RAY)
def test_a_driver_killed_at_random_moments_while_ray_runs_its_trials(
    num_kills: int, template: Small, undisturbed: Small, tmp_path: Path
) -> None:
    """After a random wait from the first report of each driver on; the last one while Ray starts."""
    small = drivers.prepared(tmp_path, template)
    generator = random.Random(num_kills)
    struck = []
    for number in range(num_kills):
        known = kills.points(small)
        driver = drivers.begin(small, train=kills.SLOWLY, in_process=False)
        if number < num_kills - 1:
            assert kills.wait_for_points(small, driver, known + 1), drivers.output(small)
            driver.join(generator.uniform(0, 3 * kills.STEP_SECONDS))
        else:
            driver.join(generator.uniform(1, 4))
        assert driver.exitcode is None, drivers.output(small)
        struck += kills.kill(small, driver)
    finish(small, undisturbed, struck, in_process=False)
