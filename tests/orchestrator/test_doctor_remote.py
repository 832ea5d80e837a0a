"""The command doctor where storage is an object store: a lost machine is replaced by any other."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.ledger import Ledger
from orchestrator.remote import Remote
from tests.orchestrator.object_store import Store, running_store
from tests.orchestrator.sweeps import ORCHESTRATE, Small, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with running_store() as started:
        yield started


def test_a_machine_that_has_only_the_store_gets_all_of_a_sweep(store: Store, tmp_path: Path) -> None:
    uri, small = store.uri("doctor"), Small(tmp_path, steps=2, registers=(0,))
    file = str(small.write())
    places = ["--storage", uri, "--state", str(small.storage)]
    done = run([*ORCHESTRATE, "sweep", file, "--in-process", "--quiet", *places])
    assert done.returncode == 0, done.stderr
    begun = sorted(key for key in Remote(uri).sizes("small/trials") if "/begun-" in key)
    tables, runs = small.tables(), small.mlflow_runs()
    shutil.rmtree(small.storage)
    done = run([*ORCHESTRATE, "doctor", "small", *places])
    assert done.returncode == 1 and "the ledger is missing" in done.stdout, done.stdout + done.stderr
    done = run([*ORCHESTRATE, "doctor", "small", "--fix", *places])
    assert done.returncode == 0, done.stdout + done.stderr
    with Ledger.open(small.root / "ledger.db", writer=False) as ledger:
        assert [row.state for row in ledger.rows()] == ["finished"] * 2
    assert small.mlflow_runs() == runs
    assert run([*ORCHESTRATE, "doctor", "small", *places]).returncode == 0
    done = run([*ORCHESTRATE, "sweep", file, "--in-process", "--quiet", *places])
    assert done.returncode == 0, done.stderr
    assert sorted(key for key in Remote(uri).sizes("small/trials") if "/begun-" in key) == begun
    assert small.tables() == tables
