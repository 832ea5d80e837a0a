"""Real kills: the driver, a rank, signals; nothing is lost, nothing is done twice."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.orchestrator.sweeps import Small, environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Small:
    small = Small(tmp_path_factory.mktemp("undisturbed"), steps=60)
    small.write()
    done = small.run()
    assert done.returncode == 0, done.stderr
    return small


def begin(small: Small, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        small.command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def reported(small: Small) -> int:
    """How many metrics the ledger holds."""
    path = small.root / "ledger.db"
    if not path.is_file():
        return 0
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)
    try:
        return int(database.execute("SELECT count(*) FROM metrics").fetchone()[0])
    except sqlite3.OperationalError:  # its tables are being made
        return 0
    finally:
        database.close()


def check_whole(small: Small, undisturbed: Small) -> None:
    assert small.tables() == undisturbed.tables()
    runs = small.mlflow_runs()
    assert len(runs) == 5, runs
    assert {status for _, status in runs} == {"FINISHED"}


@pytest.mark.parametrize("metrics", [1, 60, 160])
def test_a_killed_driver_goes_on_to_the_same_tables(metrics: int, undisturbed: Small, tmp_path: Path) -> None:
    small = Small(tmp_path, steps=60)
    small.write()
    driver = begin(small)
    wait_for(lambda: reported(small) >= metrics or driver.poll() is not None)
    assert driver.poll() is None, driver.communicate()
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=60)
    done = small.run()
    assert done.returncode == 0, done.stdout + done.stderr
    check_whole(small, undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_in_order_and_resumable(
    number: signal.Signals, code: int, undisturbed: Small, tmp_path: Path
) -> None:
    small = Small(tmp_path, steps=60)
    small.write()
    driver = begin(small)
    wait_for(lambda: reported(small) >= 20)
    sent = time.monotonic()
    driver.send_signal(number)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == code, output
    assert time.monotonic() - sent < 30
    assert {status for _, status in small.mlflow_runs()} <= {"KILLED", "FINISHED"}
    done = small.run()
    assert done.returncode == 0, done.stdout + done.stderr
    check_whole(small, undisturbed)


def ranks(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """Rank processes of this driver's cluster; Ray names actors' processes after their class."""
    children = psutil.Process(driver.pid).children(recursive=True)
    return [child for child in children if "ray::Rank" in " ".join(child.cmdline())]


def test_a_killed_rank_is_replaced_and_changes_nothing(undisturbed: Small, tmp_path: Path) -> None:
    small = Small(tmp_path, steps=60)
    small.write()
    driver = begin(small)
    for metrics in (20, 100):
        wait_for(lambda metrics=metrics: reported(small) >= metrics and bool(ranks(driver)))
        os.kill(ranks(driver)[0].pid, signal.SIGKILL)
    output, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0, output
    check_whole(small, undisturbed)
    assert max(small.attempts().values()) >= 2


def test_a_second_driver_is_refused_at_once_naming_the_first(tmp_path: Path) -> None:
    small = Small(tmp_path, steps=60)
    small.write()
    driver = begin(small)
    wait_for(lambda: reported(small) >= 1)
    started = time.monotonic()
    second = small.run()
    assert second.returncode == 2
    assert str(driver.pid) in second.stderr
    assert time.monotonic() - started < 5
    driver.send_signal(signal.SIGTERM)
    driver.communicate(timeout=60)


def test_the_same_command_runs_on_a_cluster_that_is_already_there(undisturbed: Small, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    start += ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={tempfile.mkdtemp(prefix='ray-')}"]
    head = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    try:
        assert head.stdout is not None
        for line in head.stdout:
            if "block until terminated" in line or "will now block" in line:
                break
        small = Small(tmp_path, steps=60)
        small.write()
        done = small.run("--address", f"127.0.0.1:{port}")
        assert done.returncode == 0, done.stdout + done.stderr
        check_whole(small, undisturbed)
    finally:
        head.terminate()
        head.communicate(timeout=60)
