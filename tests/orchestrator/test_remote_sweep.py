"""A sweep's copy in remote storage: snapshots, a new machine's start, one driver at a time, results of other sweeps."""

import json
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import publish, recorder, remote_sweep, remote_trial
from orchestrator.holder import SweepHeld
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.remote import Remote
from orchestrator.remote_delivery import RemoteDelivery
from orchestrator.remote_sweep import SNAPSHOT, DrivenElsewhere, Keeper
from orchestrator.remote_trial import Mirror
from tests.orchestrator.test_ledger import FakeConfig, FakeTrial

ID = "0123456789abcdef"
TRIAL = FakeTrial(ID, config=FakeConfig({"method": "deit3", "execution": {"keep_steps": []}}))


def machine(far: Path, near: Path, sweep: str = "sweep") -> tuple[Mirror, SweepLayout]:
    layout = SweepLayout(near, near, sweep)
    layout.root.mkdir(parents=True, exist_ok=True)
    return Mirror(Remote(far.as_uri(), delays=()), near), layout


def end(ledger: Ledger, attempt: int = 1) -> None:
    """A finished trial in the ledger."""
    ledger.plan([TRIAL])
    ledger.start_attempt(ID, attempt, "host", 1)
    ledger.record(ID, attempt, 4, {"test/linear/top1": 0.5})
    ledger.finish(ID, attempt, "finished", {"trial_id": ID, "status": "finished", "data_fingerprint": None}, None)


def finish(layout: SweepLayout, ledger: Ledger) -> None:
    """A finished trial in ledger and folder."""
    end(ledger)
    layout.trial(ID).root.mkdir(parents=True)
    (layout.trial(ID).root / "probes.parquet").write_bytes(b"rows")
    publish.trial(ledger, layout.trial(ID), ID)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_a_snapshot_is_whole_while_the_ledger_is_written(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        ledger.plan([TRIAL])
        ledger.start_attempt(ID, 1, "host", 1)
        for step in range(50):
            ledger.record(ID, 1, step, {"a": step, "b": step})
            if step % 10 == 0:
                remote_sweep.snapshot(ledger.path, tmp_path / f"{step}.db")
    for step in range(0, 50, 10):
        with Ledger.open(tmp_path / f"{step}.db", writer=False) as copy:
            assert len(copy.metrics(ID)) == 2 * (step + 1)


def test_a_new_machine_has_ledger_and_results_of_the_lost_one(tmp_path: Path) -> None:
    mirror, layout = machine(tmp_path / "far", tmp_path / "one")
    with Ledger.open(layout.ledger) as ledger:
        finish(layout, ledger)
        layout.plan.write_text("{}")
        layout.tables.mkdir()
        (layout.tables / "ablation.parquet").write_bytes(b"table")
        with Keeper(mirror, layout) as keeper:
            keeper.push()
            RemoteDelivery(mirror, layout, ledger).complete()
    assert {f"sweep/{SNAPSHOT}", "sweep/plan.json", "sweep/tables/ablation.parquet"} < set(mirror.remote.sizes())
    there, fresh = machine(tmp_path / "far", tmp_path / "two")
    assert remote_sweep.restore(there, fresh)
    with Ledger.open(fresh.ledger) as ledger:
        assert ledger.row(ID).state == "finished"
        assert publish.missing(ledger, fresh.trial) == []
        assert (fresh.trial(ID).root / "probes.parquet").read_bytes() == b"rows"


def test_a_trial_that_finished_after_the_last_snapshot_is_adopted(tmp_path: Path) -> None:
    mirror, layout = machine(tmp_path / "far", tmp_path / "one")
    with Ledger.open(layout.ledger) as ledger:
        ledger.plan([TRIAL])
        with Keeper(mirror, layout) as keeper:
            keeper.push()
            shutil.rmtree(layout.trial(ID).root, ignore_errors=True)
            finish(layout, ledger)
            RemoteDelivery(mirror, layout, ledger).complete()
    there, fresh = machine(tmp_path / "far", tmp_path / "two")
    remote_sweep.restore(there, fresh)
    with Ledger.open(fresh.ledger) as ledger:
        assert ledger.row(ID).state == "planned"
        assert recorder.adopt(ledger, fresh, ID, None) == fresh.trial(ID).root
        assert ledger.metrics(ID) == [(4, "test/linear/top1", 0.5)]


def test_the_ledger_of_the_machine_that_ran_last_is_kept(tmp_path: Path) -> None:
    mirror, layout = machine(tmp_path / "far", tmp_path / "one")
    with Ledger.open(layout.ledger) as ledger:
        with Keeper(mirror, layout) as keeper:
            keeper.push()
        ledger.plan([TRIAL])  # and then the process is killed, before the next snapshot
    assert not remote_sweep.restore(mirror, layout)
    with Ledger.open(layout.ledger) as ledger:
        assert [row.trial_id for row in ledger.rows()] == [ID]


def test_a_ledger_gives_way_to_that_of_a_machine_that_ran_since(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mirror, layout = machine(tmp_path / "far", tmp_path / "one")
    there, other = machine(tmp_path / "far", tmp_path / "two")
    with Ledger.open(layout.ledger), Keeper(mirror, layout) as keeper:
        keeper.push()
    assert remote_sweep.restore(there, other)
    with Ledger.open(other.ledger) as ledger, Keeper(there, other) as keeper:
        end(ledger)
        keeper.push()
    (layout.root / "ledger.db-wal").write_bytes(b"of a driver that was killed")
    assert remote_sweep.restore(mirror, layout)
    assert (layout.root / "superseded-ledger.db-wal").is_file(), "it is of the ledger that gave way"
    with Ledger.open(layout.ledger) as ledger:
        assert ledger.row(ID).state == "finished"
    assert (layout.root / "superseded-ledger.db").is_file() and "another machine" in caplog.text
    assert not remote_sweep.restore(mirror, layout)  # it is this machine's now


def test_a_sweep_that_runs_here_is_not_restored(tmp_path: Path) -> None:
    mirror, layout = machine(tmp_path / "far", tmp_path / "one")
    with Ledger.open(layout.ledger), Keeper(mirror, layout) as keeper:
        keeper.push()
        with pytest.raises(SweepHeld):
            remote_sweep.restore(mirror, layout)


def test_results_of_other_sweeps_in_the_storage_are_adopted(tmp_path: Path) -> None:
    mirror, other = machine(tmp_path / "far", tmp_path / "one", "other")
    with Ledger.open(other.ledger) as ledger:
        finish(other, ledger)
        RemoteDelivery(mirror, other, ledger).complete()
    there, layout = machine(tmp_path / "far", tmp_path / "two")
    with Ledger.open(layout.ledger) as ledger:
        ledger.plan([TRIAL])
        remote_sweep.pull_finished(there, layout, ["f" * 16, ID])
        assert recorder.adopt(ledger, layout, ID, None) == tmp_path / "two" / "other" / "trials" / ID
        assert ledger.row(ID).state == "finished"


def test_copies_follow_while_the_sweep_runs_and_only_what_changed(tmp_path: Path) -> None:
    mirror, layout = machine(tmp_path / "far", tmp_path / "one")
    far = tmp_path / "far" / "sweep" / SNAPSHOT

    def trials() -> int:
        if not far.exists():
            return -1
        with sqlite3.connect(f"file:{far}?mode=ro&immutable=1", uri=True) as database:
            found = database.execute("SELECT count(*) FROM trials").fetchone()[0]
        database.close()
        return int(found)

    with Ledger.open(layout.ledger) as ledger, Keeper(mirror, layout, every=0.05) as keeper:
        wait_for(lambda: trials() == 0)
        ledger.plan([TRIAL])
        wait_for(lambda: trials() == 1)
        keeper.push()
        written = far.stat().st_mtime_ns
        keeper.push()
        assert far.stat().st_mtime_ns == written


def test_a_second_machine_is_refused_naming_the_first(tmp_path: Path) -> None:
    mirror, layout = machine(tmp_path / "far", tmp_path / "one")
    there, fresh = machine(tmp_path / "far", tmp_path / "two")
    with Ledger.open(layout.ledger), Ledger.open(fresh.ledger), Keeper(mirror, layout):
        who = json.loads(next((tmp_path / "far" / "sweep" / "drivers").iterdir()).read_text())
        with pytest.raises(DrivenElsewhere, match=f"process {who['pid']} on {who['host']}"), Keeper(there, fresh):
            pass
        assert len(list((tmp_path / "far" / "sweep" / "drivers").iterdir())) == 1  # the refused one leaves nothing
    with Ledger.open(fresh.ledger), Keeper(there, fresh):  # the first has ended in order
        pass


def test_a_driver_that_fell_silent_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror, layout = machine(tmp_path / "far", tmp_path / "one")
    there, fresh = machine(tmp_path / "far", tmp_path / "two")
    with Ledger.open(layout.ledger):
        Keeper(mirror, layout)._renew()  # and then its machine is gone
    monkeypatch.setattr(remote_sweep, "SILENT_SECONDS", 0.2)
    time.sleep(0.3)
    with Ledger.open(fresh.ledger), Keeper(there, fresh):
        assert len(list((tmp_path / "far" / "sweep" / "drivers").iterdir())) == 1


def test_a_killed_driver_of_this_machine_does_not_stand_in_its_own_way(tmp_path: Path) -> None:
    mirror, layout = machine(tmp_path / "far", tmp_path / "one")
    with Ledger.open(layout.ledger):
        Keeper(mirror, layout)._renew()
        with Keeper(mirror, layout):
            pass


def test_a_driver_that_was_taken_over_notices_and_leaves_the_others_files(tmp_path: Path) -> None:
    mirror, layout = machine(tmp_path / "far", tmp_path / "one")
    there, fresh = machine(tmp_path / "far", tmp_path / "two")
    told = threading.Event()
    with Ledger.open(layout.ledger) as ledger, Keeper(mirror, layout, every=0.05, taken_over=told.set) as keeper:
        keeper.push()
        mirror.remote.remove(keeper._key)  # as another machine does, once this one fell silent
        assert told.wait(20)
        with Ledger.open(fresh.ledger), Keeper(there, fresh) as other:
            other.push()
            theirs = mirror.remote.read(f"sweep/{SNAPSHOT}.sha256")
            end(ledger)
            with pytest.raises(DrivenElsewhere, match="taken over by another machine"):
                keeper.push()
            assert mirror.remote.read(f"sweep/{SNAPSHOT}.sha256") == theirs
            assert len(mirror.remote.sizes("sweep/drivers")) == 1


def attempt_elsewhere(far: Path, near: Path, number: int) -> None:
    """An attempt on a machine that is not the driver's, with records, a log and a checkpoint."""
    mirror, layout = machine(far, near)
    trial = layout.trial(ID)
    with remote_trial.attempt(mirror, trial, number):
        (trial.attempt(number) / "probes.parquet").write_bytes(b"rows of %d" % number)
        trial.log(number).write_text(f"attempt {number}\n")


def published(far: Path) -> dict[str, bytes]:
    """What the store has right in the trial's folder."""
    folder = far / "sweep" / "trials" / ID
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_records_of_the_accepted_attempt_alone_are_published(tmp_path: Path) -> None:
    far = tmp_path / "far"
    mirror, layout = machine(far, tmp_path / "driver")
    for number in (1, 2, 3):
        attempt_elsewhere(far, tmp_path / f"node {number}", number)
    with Ledger.open(layout.ledger) as ledger, RemoteDelivery(mirror, layout, ledger) as delivery:
        end(ledger, attempt=2)  # 3 is an orphan's
        delivery.begin(ID)
        delivery.complete()
        assert publish.missing(ledger, layout.trial) == []
    there = published(far)
    assert there["probes.parquet"] == b"rows of 2" == (layout.trial(ID).root / "probes.parquet").read_bytes()
    assert there["log.txt"] == b"attempt 1\nattempt 2\nattempt 3\n"
    assert json.loads(there["result.json"])["status"] == "finished"


def test_a_driver_that_died_before_the_delivery_is_made_good_by_the_next(tmp_path: Path) -> None:
    far = tmp_path / "far"
    mirror, layout = machine(far, tmp_path / "driver")
    attempt_elsewhere(far, tmp_path / "node", 1)
    with Ledger.open(layout.ledger) as ledger:
        end(ledger)
    with Ledger.open(layout.ledger) as ledger, RemoteDelivery(mirror, layout, ledger) as delivery:
        delivery.complete()
    assert published(far)["probes.parquet"] == b"rows of 1"


def test_a_store_that_is_away_delays_the_delivery_and_is_said_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    far = tmp_path / "far"
    mirror, layout = machine(far, tmp_path / "driver")
    far.mkdir()
    (far / "sweep").write_text("a file where a folder should be")
    with Ledger.open(layout.ledger) as ledger, RemoteDelivery(mirror, layout, ledger) as delivery:
        end(ledger)
        delivery.begin(ID)
        with pytest.raises(OSError, match="storage"):
            delivery.complete()
        assert "tried again at the end" in caplog.text
        (far / "sweep").unlink()
        delivery.complete()
    assert "result.json" in published(far)


@pytest.mark.parametrize("anew", [False, True])
def test_a_trial_that_runs_again_has_no_result_in_the_store_meanwhile(anew: bool, tmp_path: Path) -> None:
    far = tmp_path / "far"
    mirror, layout = machine(far, tmp_path / "driver")
    attempt_elsewhere(far, tmp_path / "node", 1)
    with Ledger.open(layout.ledger) as ledger, RemoteDelivery(mirror, layout, ledger) as delivery:
        end(ledger)
        delivery.complete()
        delivery.renew(ID, from_first_step=anew)
        assert "result.json" not in published(far)
        assert ("generation" in published(far)) == anew != ("metrics.parquet" in published(far))
