"""A full disk when the sweep is told to leave, publishes or writes its tables, and the one warning about MLflow."""

from __future__ import annotations

import functools
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from orchestrator import tracking
from orchestrator.ledger import Ledger
from tests.orchestrator.sweeps import Small
from tests.reliability import drivers, whole
from tests.reliability.paced import PAUSE, reported, wait_for
from tests.reliability.test_faults_of_machines import disk, fill
from tests.reliability.unreliable_server import free_port

pytestmark = pytest.mark.slow

DISK_MIB = 32  # with room for MLflow's database and the checkpoints of two trials
LEAVE_SECONDS = 30  # after a signal, as without a full disk
WAITS = "the sweep waits for space"


def full_before_the_last_trial_is_published(folder: Path) -> None:
    """The disk fills up when the ledger has both trials and the files of the second are still to come."""
    from orchestrator import publish

    _fill_before(publish, "trial", folder, call=2)


def full_before_the_analysis(folder: Path) -> None:
    """The disk fills up when all trials are over and published."""
    from analysis import run

    _fill_before(run, "analyse", folder, call=1)


def _fill_before(owner: Any, name: str, folder: Path, call: int) -> None:
    real, calls = getattr(owner, name), iter(range(1, 1_000_000))

    @functools.wraps(real)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            fill(folder / "runs")
        return real(*arguments, **named)

    setattr(owner, name, wrapped)


@contextmanager
def on_a_disk_of_its_own(
    folder: Path, template: Small, begin: Callable[[Small], BaseProcess]
) -> Iterator[tuple[Small, BaseProcess]]:
    """A sweep whose storage and state lie on a small disk, and its driver, which does not outlive the block."""
    with disk(folder / "runs", DISK_MIB):
        small = drivers.prepared(folder, template)
        driver = begin(small)
        try:
            yield small, driver
        finally:
            driver.kill()
            driver.join()


def wait_for_the_wait(small: Small, driver: BaseProcess) -> None:
    said = small.folder / "output.txt"
    wait_for(lambda: (said.is_file() and WAITS in said.read_text()) or not driver.is_alive(), 60)
    assert driver.is_alive(), drivers.output(small)


def check_that_it_leaves_and_is_resumable(small: Small, driver: BaseProcess, undisturbed: Small) -> None:
    """SIGTERM is followed although the disk stays full; with space the same command makes everything whole."""
    assert driver.pid is not None
    os.kill(driver.pid, signal.SIGTERM)
    driver.join(LEAVE_SECONDS)
    assert driver.exitcode == 143, drivers.output(small)
    (small.storage / "filler").unlink()
    assert drivers.drive(small) == 0, drivers.output(small)
    whole.check(small, undisturbed)
    assert [path for path in small.root.rglob(".*") if path.name.endswith(".partial")] == []


def test_a_signal_is_followed_while_an_event_waits_for_space(
    template: Small, undisturbed: Small, tmp_path: Path
) -> None:
    def begin(small: Small) -> BaseProcess:
        return drivers.begin(small, environment={PAUSE: "0.15"}, train="tests.reliability.paced:run")

    with on_a_disk_of_its_own(tmp_path / "sweep", template, begin) as (small, driver):
        wait_for(lambda: reported(small.root) >= 3 or not driver.is_alive())
        fill(small.storage)
        wait_for_the_wait(small, driver)
        check_that_it_leaves_and_is_resumable(small, driver, undisturbed)


def test_a_signal_is_followed_while_the_last_trial_waits_to_be_published(
    template: Small, undisturbed: Small, tmp_path: Path
) -> None:
    """By then no event comes any more, so that whoever publishes has to say it."""

    def begin(small: Small) -> BaseProcess:
        return drivers.begin(small, setup=f"{__name__}:full_before_the_last_trial_is_published")

    with on_a_disk_of_its_own(tmp_path / "sweep", template, begin) as (small, driver):
        wait_for_the_wait(small, driver)
        check_that_it_leaves_and_is_resumable(small, driver, undisturbed)


def test_the_tables_wait_for_space(template: Small, undisturbed: Small, tmp_path: Path) -> None:
    def begin(small: Small) -> BaseProcess:
        return drivers.begin(small, setup=f"{__name__}:full_before_the_analysis")

    with on_a_disk_of_its_own(tmp_path / "sweep", template, begin) as (small, driver):
        wait_for_the_wait(small, driver)
        assert not (small.root / "tables" / "ablation.parquet").exists()
        (small.storage / "filler").unlink()
        driver.join(60)
        assert driver.exitcode == 0, drivers.output(small)
        whole.check(small, undisturbed)


def test_a_server_that_is_away_is_warned_of_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However often it is tried: one warning, and the next when the minute is over."""
    tried: list[float] = []
    real = tracking.Sink._back_off

    def counted(sink: tracking.Sink, pause: float, error: Exception) -> float:
        tried.append(time.monotonic())
        return real(sink, pause, error)

    monkeypatch.setattr(tracking.Sink, "_back_off", counted)
    monkeypatch.setattr(tracking, "_BACK_OFF_S", (0.02, 0.05))
    uri = f"http://somebody:secret@127.0.0.1:{free_port()}"
    with Ledger.open(tmp_path / "ledger.db") as ledger, caplog.at_level(logging.WARNING, tracking.__name__):
        sink = tracking.Sink(ledger, uri, "small", str(tmp_path), state=tmp_path)
        sink.start()
        try:
            wait_for(lambda: len(tried) >= 5, 30)
            assert len(caplog.messages) == 1
            assert "trials go on, delivery is tried again" in caplog.messages[0]
            assert "secret" not in caplog.messages[0]
            monkeypatch.setattr(tracking, "_WARN_EVERY_S", 0.0)  # the minute is over
            wait_for(lambda: len(caplog.messages) >= 2, 30)
        finally:
            sink.close(5)
