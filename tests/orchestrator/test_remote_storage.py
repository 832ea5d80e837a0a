"""Whole sweeps on a real S3-compatible server: machines are lost, the store is, and the tables come out the same."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.ledger import Ledger
from orchestrator.remote import Remote
from tests.orchestrator.object_store import Store, running_store
from tests.orchestrator.sweeps import ORCHESTRATE, Small, environment, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with running_store() as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """The same sweep with a folder as storage."""
    small = Small(tmp_path_factory.mktemp("undisturbed"), steps=24)
    small.write()
    done = small.run("--in-process")
    assert done.returncode == 0, done.stderr
    return small


def command(small: Small, uri: str, *arguments: str) -> list[str]:
    """The sweep with remote storage; `small.storage` is this machine's state folder."""
    file = str(small.folder / "small.yaml")
    return [*ORCHESTRATE, "sweep", file, "--storage", uri, "--state", str(small.storage), *arguments]


def attempts(small: Small) -> dict[str, int]:
    with Ledger.open(small.root / "ledger.db", writer=False) as ledger:
        return {row.trial_id: row.attempts for row in ledger.rows()}


def begun(remote: Remote) -> int:
    """How many attempts were ever begun, on all machines."""
    return sum("/begun-" in key for key in remote.sizes("small/trials"))


def test_a_lost_machine_costs_nothing_that_was_finished(store: Store, undisturbed: Small, tmp_path: Path) -> None:
    uri = store.uri("lost")
    small = Small(tmp_path / "one", steps=24)
    small.write()
    done = run(command(small, uri, "--in-process"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert small.tables() == undisturbed.tables()
    remote = Remote(uri)
    keys = set(remote.sizes("small"))
    assert {"small/ledger-snapshot.db", "small/report.html", "small/tables/ablation.parquet", "small/plan.json"} < keys
    assert not any(key.startswith("small/drivers/") for key in keys)
    trained = begun(remote)
    assert trained == 4

    shutil.rmtree(small.storage)
    again = run(command(small, uri, "--in-process"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert begun(remote) == trained
    assert small.tables() == undisturbed.tables()

    shutil.rmtree(small.storage)  # and now without the snapshot: results in the trials' folders are enough
    remote.remove("small/ledger-snapshot.db")
    third = run(command(small, uri, "--in-process"))
    assert third.returncode == 0, third.stdout + third.stderr
    assert begun(remote) == trained
    assert small.tables() == undisturbed.tables()

    shutil.rmtree(small.storage)
    report = run([*ORCHESTRATE, "report", "small", "--storage", uri, "--state", str(small.storage)])
    assert report.returncode == 0, report.stderr
    assert small.tables() == undisturbed.tables()


def test_another_machine_goes_on_from_the_checkpoints_of_a_killed_one(
    store: Store, undisturbed: Small, tmp_path: Path
) -> None:
    uri = store.uri("killed")
    small = Small(tmp_path / "one", steps=24)
    small.write()
    first = subprocess.Popen(command(small, uri, "--in-process"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    remote = Remote(uri)
    deadline = time.monotonic() + 120
    while not any(key.endswith(".pt") for key in remote.sizes("small")):
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    shutil.rmtree(small.storage)
    for key in remote.sizes("small/drivers"):  # what a minute of silence comes to
        remote.remove(key)
    done = run(command(small, uri, "--in-process"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert small.tables() == undisturbed.tables()


def test_ray_trials_train_while_the_store_is_away_and_deliver_when_it_is_back(
    undisturbed: Small, tmp_path: Path
) -> None:
    with running_store() as store:
        uri = store.uri("away")
        small = Small(tmp_path / "one", steps=24)
        small.write()
        driver = subprocess.Popen(
            command(small, uri), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
        )
        deadline = time.monotonic() + 120
        while not any(key.endswith(".pt") for key in Remote(uri).sizes("small")):
            assert time.monotonic() < deadline and driver.poll() is None, driver.communicate()
            time.sleep(0.05)
        store.stop()
        time.sleep(10.0)
        store.start()
        output, _ = driver.communicate(timeout=240)
        assert driver.returncode == 0, output
        assert small.tables() == undisturbed.tables()
        results = [key for key in Remote(uri).sizes("small/trials") if key.endswith("/result.json")]
        assert len(results) == 4
        assert {json.loads(Remote(uri).read(key))["status"] for key in results} == {"finished"}


def test_results_of_another_sweep_in_the_store_are_adopted(store: Store, tmp_path: Path) -> None:
    uri = store.uri("adopted")
    small = Small(tmp_path / "one")
    small.write()
    assert run(command(small, uri, "--in-process")).returncode == 0
    other = Small(tmp_path / "two")
    other.write(name="other")
    done = run(command(other, uri, "--in-process"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("adopted") == 4


def test_nobody_is_let_in_without_a_bucket(store: Store, tmp_path: Path) -> None:
    small = Small(tmp_path / "one")
    small.write()
    done = run(command(small, store.uri("x").replace("s3://trials", "s3://nobodys"), "--in-process"))
    assert done.returncode == 2
    assert "NO_SUCH_BUCKET" in done.stderr and "Traceback" not in done.stderr
    assert sys.executable not in done.stderr
