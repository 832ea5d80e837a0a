"""Faults of machines: a full disk, a clock that is set, and a fresh database that six processes open at once."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.orchestrator.sweeps import Small
from tests.reliability import drivers, whole
from tests.reliability.paced import PAUSE, query, reported, wait_for

pytestmark = pytest.mark.slow

MIB = 2**20


@contextlib.contextmanager
def disk(folder: Path, size_mib: int) -> Iterator[Path]:
    """A disk of its own of that size at `folder`, where this machine allows it."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here, which needs root: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave no byte free on the disk of `folder`; removing the file gives it back."""
    path = folder / "filler"
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)) == 4096:
            pass
    return path


@pytest.mark.parametrize("everything", [False, True], ids=["storage", "storage-and-state"])
def test_a_sweep_waits_while_the_disk_is_full_and_then_goes_on(
    everything: bool, template: Small, undisturbed: Small, tmp_path: Path
) -> None:
    """The disk with the trials' folders, or the one with ledger and MLflow's database as well."""
    with disk(tmp_path / "sweep" / "runs", 32) as storage:
        small = Small(tmp_path / "sweep", template.steps)
        place = small.folder if everything else tmp_path / "elsewhere"
        state = drivers.prepared(place, template).storage
        small.write(seeds=[0])
        driver = drivers.begin(
            small,
            state=state,
            environment={PAUSE: "0.15"},
            train="tests.reliability.paced:run",
        )
        ledger = state / "small"
        wait_for(lambda: reported(ledger) >= 3 or not driver.is_alive())
        filler = fill(storage)
        if everything:  # the driver itself cannot go on
            wait_for(lambda: "the sweep waits for space" in drivers.output(small) or not driver.is_alive(), 60)
        else:
            lost = "SELECT count(*) > 0 FROM attempts WHERE reason LIKE 'the disk is full%'"
            wait_for(lambda: query(ledger, lost) == [(1,)] or not driver.is_alive(), 60)
        assert driver.is_alive(), drivers.output(small)
        for _ in range(30):  # what failed writes give back
            fill(storage)
            time.sleep(0.1)
        before = query(ledger, "SELECT sum(attempts) FROM trials")
        time.sleep(2)
        assert driver.is_alive()
        assert query(ledger, "SELECT sum(attempts) FROM trials") == before, "no attempts are made while it waits"
        check_no_part_of_a_file(small)
        filler.unlink()
        driver.join(120)
        assert driver.exitcode == 0, drivers.output(small)
        assert small.tables() == undisturbed.tables()
        assert query(ledger, "SELECT DISTINCT state, stalled FROM trials") == [("finished", 0)]
        check_no_part_of_a_file(small)
        hidden = [path for path in small.root.rglob(".*") if path.name.endswith(".partial")]
        assert hidden == [], "a failed write leaves nothing, not even hidden"
        if everything:
            whole.check(small, undisturbed)


def test_a_disk_with_some_room_but_not_for_a_checkpoint_is_waited_for_too(template: Small, tmp_path: Path) -> None:
    """4 MB, of which one checkpoint takes 3: the second one of a trial never fits beside it."""
    with disk(tmp_path / "sweep" / "runs", 4):
        small = Small(tmp_path / "sweep", template.steps)
        state = drivers.prepared(tmp_path / "elsewhere", template).storage
        small.write(seeds=[0])
        driver = drivers.begin(small, state=state)
        lost = "SELECT count(*) > 0 FROM attempts WHERE reason LIKE 'the disk is full%'"
        wait_for(lambda: query(state / "small", lost) == [(1,)], 60)
        time.sleep(5)
        driver.terminate()
        driver.join(60)
        assert driver.exitcode == 143, drivers.output(small)
        assert int(query(state / "small", "SELECT count(*) FROM attempts")[0][0] or 0) < 5
        assert "the sweep waits for space" in drivers.output(small)


def check_no_part_of_a_file(small: Small) -> None:
    """What has a final name is whole."""
    from analysis.collect import read_plan
    from trainers import checkpoint

    assert len(read_plan(small.root).trials) == 2
    for trial in (small.root / "trials").iterdir():
        for folder in checkpoint.folders_of(trial):
            for path in folder.glob("step_*.pt"):
                checkpoint.read(path)
    for path in small.root.rglob("*.parquet"):
        content = path.read_bytes()
        assert content[:4] == content[-4:] == b"PAR1", path
    assert not any(path.stat().st_size == 0 for path in small.root.rglob("*.json"))


def test_a_clock_that_is_set_back_and_on_changes_no_number_and_no_duration(
    template: Small, undisturbed: Small, tmp_path: Path
) -> None:
    small = drivers.prepared(tmp_path, template)
    started = time.monotonic()
    assert drivers.drive(small, setup="tests.reliability.broken:jumping_clock") == 0, drivers.output(small)
    took = time.monotonic() - started
    whole.check(small, undisturbed)
    for seconds in seconds_of(small):
        assert 0 < seconds < took


def test_a_trial_that_is_resumed_under_such_a_clock_has_taken_as_long_as_it_has(
    template: Small, undisturbed: Small, tmp_path: Path
) -> None:
    small = drivers.prepared(tmp_path, template)
    clock = "tests.reliability.broken:jumping_clock"
    started = time.monotonic()
    killed = drivers.Point("orchestrator.ledger:Ledger.record", "after", 4)
    assert drivers.drive(small, killed, setup=clock) == -9
    assert drivers.drive(small, setup=clock) == 0, drivers.output(small)
    took = time.monotonic() - started
    whole.check(small, undisturbed)
    for seconds in seconds_of(small):
        assert 0 < seconds < took


def seconds_of(small: Small) -> list[float]:
    """What `runs` says that trials have taken."""
    import pyarrow.parquet as pq

    return [float(row["seconds"]) for row in pq.read_table(small.root / "tables" / "runs.parquet").to_pylist()]


def test_six_processes_that_open_a_fresh_database_at_once(template: Small, tmp_path: Path) -> None:
    """Six sweeps of the same two trials under one storage: each has all runs, and MLflow's tables are made once."""
    smalls = [drivers.prepared(tmp_path / str(number), template) for number in range(6)]
    state = tmp_path / "state"
    state.mkdir()
    (smalls[0].storage / "cache").rename(state / "cache")
    processes = [
        drivers.begin(small, name=f"sweep{number}", storage=state, state=state) for number, small in enumerate(smalls)
    ]
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * 6, [drivers.output(small) for small in smalls]
    runs = "SELECT e.name, r.status, count(*) FROM runs r JOIN experiments e USING (experiment_id)"
    found = query(state / "mlflow.db", f"{runs} WHERE r.lifecycle_stage = 'active' GROUP BY e.name, r.status")
    assert sorted(found) == [(f"sweep{number}", "FINISHED", 3) for number in range(6)]
    tables = {(state / f"sweep{number}" / "tables" / "token_norms.parquet").read_bytes() for number in range(6)}
    assert len(tables) == 1
