"""The command doctor on a real sweep with real damage: what it finds, and that what it mends is as it was."""

import json
import os
import shutil
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import doctor, import_results, rebuild
from orchestrator.holder import Hold
from orchestrator.layout import SweepLayout, TrialLayout
from orchestrator.ledger import Ledger, TrialRow
from orchestrator.remote_sweep import DrivenElsewhere
from tests.orchestrator.sweeps import ORCHESTRATE, Small, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A sweep that has finished, with a copy of its storage aside."""
    small = Small(tmp_path_factory.mktemp("doctor"))
    small.write()
    done = small.run("--in-process", "--quiet")
    assert done.returncode == 0, done.stderr
    shutil.copytree(small.storage, small.folder / "pristine")
    return small


@pytest.fixture
def small(finished: Small) -> Iterator[Small]:
    """The sweep as it was when it had finished."""
    yield finished
    restore(finished)


def restore(small: Small) -> None:
    """Bring back what a test has damaged; MLflow's database stays the same file, which this process has open."""
    pristine, database, aside = small.folder / "pristine", small.storage / "mlflow.db", small.folder / "mlflow.db"
    (aside if aside.exists() else database).replace(small.folder / "kept.db")
    shutil.rmtree(small.storage)
    shutil.copytree(pristine, small.storage, ignore=shutil.ignore_patterns("mlflow.db"))
    (small.folder / "kept.db").replace(database)
    source, target = sqlite3.connect(pristine / "mlflow.db"), sqlite3.connect(database)
    source.backup(target)
    source.close()
    target.close()
    aside.unlink(missing_ok=True)


def layout_of(small: Small) -> SweepLayout:
    return SweepLayout(small.storage.resolve(), small.storage.resolve(), "small")


def rows_of(small: Small) -> list[TrialRow]:
    with Ledger.open(layout_of(small).ledger, writer=False) as ledger:
        return ledger.rows()


def trial_of(small: Small, index: int = 0) -> TrialLayout:
    return layout_of(small).trial(rows_of(small)[index].trial_id)


def found(small: Small, capsys: pytest.CaptureFixture[str], *, fix: bool = False) -> list[tuple[str, bool]]:
    """(check, whether mended) of everything that doctor finds of the sweep."""
    options = doctor.Options("small", small.storage, small.storage, fix=fix, as_json=True)
    code = doctor.doctor(options)
    listed = [entry for entry in json.loads(capsys.readouterr().out) if entry["sweep"] == "small"]
    of_sweep = [(entry["check"], entry["mended"]) for entry in listed]
    if not all(mended for _, mended in of_sweep):
        assert code == doctor.FINDINGS_LEFT
    return of_sweep


def assert_found_and_mended(small: Small, capsys: pytest.CaptureFixture[str], *checks: str) -> None:
    """Doctor finds just these, mends them when asked to, and then finds nothing."""
    assert found(small, capsys) == [(check, False) for check in checks]
    assert found(small, capsys, fix=True) == [(check, True) for check in checks]
    assert found(small, capsys) == []


def assert_nothing_runs(small: Small) -> None:
    """The same command trains nothing, the tables keep their bytes, and MLflow has one run for each trial."""
    tables, attempts, runs = small.tables(), small.attempts(), small.mlflow_runs()
    done = small.run("--in-process", "--quiet")
    assert done.returncode == 0, done.stderr
    assert small.attempts() == attempts
    assert small.tables() == tables
    assert small.mlflow_runs() == runs


def points_of(small: Small) -> int:
    """How many points all runs in MLflow have that are not deleted."""
    with sqlite3.connect(small.storage / "mlflow.db") as database:
        sql = "SELECT count(*) FROM metrics JOIN runs USING (run_uuid) WHERE lifecycle_stage = 'active'"
        count = int(database.execute(sql).fetchone()[0])
    database.close()
    return count


def test_of_a_finished_sweep_nothing_is_wrong(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    assert found(small, capsys) == []
    assert found(small, capsys, fix=True) == []


def test_a_lost_ledger_is_rebuilt_from_the_folders(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    before = rows_of(small)
    with Ledger.open(layout_of(small).ledger, writer=False) as ledger:
        metrics = {row.trial_id: ledger.metrics(row.trial_id) for row in before}
    layout_of(small).ledger.unlink()
    assert found(small, capsys) == [("ledger", False)]
    assert found(small, capsys, fix=True) == [("ledger", True), ("MLflow", True)]
    for row, old in zip(rows_of(small), before, strict=True):
        same = ("trial_id", "name", "cell", "seed", "config", "state", "attempts", "result", "error", "last_step")
        assert [getattr(row, name) for name in same] == [getattr(old, name) for name in same]
        assert row.run_id == old.run_id, "its run is found again"
        assert old.started_ms is not None and row.started_ms == old.started_ms // 1000 * 1000
    with Ledger.open(layout_of(small).ledger, writer=False) as ledger:
        assert {row.trial_id: ledger.metrics(row.trial_id) for row in before} == metrics
    assert found(small, capsys) == []
    assert_nothing_runs(small)


def test_points_are_not_fed_twice_after_the_ledger_was_lost(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    before = points_of(small)
    layout_of(small).ledger.unlink()
    found(small, capsys, fix=True)
    assert points_of(small) == before


def test_a_lost_state_folder_is_rebuilt_with_a_new_tracking_store(small: Small) -> None:
    runs = small.mlflow_runs()
    (small.storage / "mlflow.db").replace(small.folder / "mlflow.db")
    for name in ("small/ledger.db", "small/ledger.lock"):
        (small.storage / name).unlink()
    shutil.rmtree(small.storage / "cache")
    done = run([*ORCHESTRATE, "doctor", "small", "--fix", "--storage", str(small.storage)])
    assert "small ledger: " in done.stdout and "small MLflow: " in done.stdout, done.stderr
    assert done.stdout.count("mended: ") == 2
    assert small.mlflow_runs() == runs
    assert_nothing_runs(small)


@pytest.mark.parametrize("damage", ["page", "header", "empty", "text"])
def test_a_damaged_ledger_is_set_aside_and_rebuilt(
    small: Small, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    path, states = layout_of(small).ledger, {row.trial_id: row.state for row in rows_of(small)}
    content = bytearray(path.read_bytes())
    if damage == "page":
        content[4096 * 3 : 4096 * 5] = b"\x5a" * 8192
    elif damage == "header":
        content[:100] = bytes(100)
    path.write_bytes({"empty": b"", "text": b"not a database"}.get(damage, bytes(content)))
    assert found(small, capsys) == [("ledger", False)]
    assert found(small, capsys, fix=True)[0] == ("ledger", True)
    assert path.with_name("ledger.db.damaged").is_file()
    assert {row.trial_id: row.state for row in rows_of(small)} == states
    assert found(small, capsys) == []


def test_unfinished_trials_go_on_from_their_checkpoints_with_higher_numbers(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    tables, trial = small.tables(), trial_of(small)
    runs, points = small.mlflow_runs(), points_of(small)
    for path in (trial.result, trial.metrics, layout_of(small).ledger):
        path.unlink()
    found(small, capsys, fix=True)
    row = rows_of(small)[0]
    assert (row.state, row.attempts, row.stalled) == ("planned", 1, 0)
    assert small.run("--in-process", "--quiet").returncode == 0
    assert trial.attempts() == [1, 2]
    assert "resumed at step 12" in trial.log_file.read_text()
    assert small.tables() == tables
    assert (small.mlflow_runs(), points_of(small)) == (runs, points), "what it reports again is there once"


def test_failed_and_diverged_trials_are_known_again(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    trial, error = trial_of(small), {"type": "ValueError", "message": "no", "traceback": "Traceback: no"}
    result = json.loads(trial.result.read_bytes())
    trial.result.write_text(json.dumps({**result, "status": "failed", "error": error}))
    layout_of(small).ledger.unlink()
    found(small, capsys, fix=True)
    assert (rows_of(small)[0].state, rows_of(small)[0].error) == ("failed", error)


def test_a_snapshot_in_storage_comes_first_and_folders_bring_it_up_to_date(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    layout, key = layout_of(small), rows_of(small)[1].trial_id
    with Ledger.open(layout.ledger) as ledger:
        ledger.set_meta("mark", "of the snapshot")
        ledger.reset(key)  # it was taken before this trial finished
        ledger.start_attempt(key, 2, "elsewhere", 1)
    layout.ledger.replace(layout.root / "ledger-snapshot.db")
    assert found(small, capsys, fix=True)[0] == ("ledger", True)
    with Ledger.open(layout.ledger, writer=False) as ledger:
        assert ledger.meta("mark") == "of the snapshot"
        assert ledger.row(key).state == "finished"
        assert ledger.metrics(key)
    assert found(small, capsys) == []


def test_trials_of_a_dead_driver_and_its_lock_are_released(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    layout, key = layout_of(small), rows_of(small)[0].trial_id
    with Ledger.open(layout.ledger) as ledger:
        ledger.reset(key)
        ledger.start_attempt(key, 2, socket.gethostname(), 1)
    layout.trial(key).result.unlink()
    who = {"pid": 2**22 + 1, "host": socket.gethostname(), "started": "2026-01-01T00:00:00+00:00"}
    layout.lock.write_text(json.dumps(who))
    assert [check for check, _ in found(small, capsys)] == ["lock", "states", "MLflow"]
    assert all(mended for _, mended in found(small, capsys, fix=True))
    assert rows_of(small)[0].state == "planned"
    assert found(small, capsys) == []


def test_of_a_running_sweep_nothing_is_mended(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = next(trial_of(small).checkpoints.glob("*.pt"))
    checkpoint.write_bytes(b"damaged")
    trial_of(small, 1).result.unlink()
    hold = Hold(layout_of(small).lock)
    try:
        assert found(small, capsys, fix=True) == [("checkpoints", False)]
    finally:
        hold.release()
    assert checkpoint.is_file()


def test_published_files_and_records_that_differ_are_made_anew(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in trial_of(small).root.glob("*.*") if path.suffix != ".pt"}
    stat = trial_of(small).metrics.stat()
    content = bytearray(trial_of(small).metrics.read_bytes())
    content[20] ^= 1
    trial_of(small).metrics.write_bytes(bytes(content))
    os.utime(trial_of(small).metrics, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # size and time as before
    assert_found_and_mended(small, capsys, "published")
    (trial_of(small).root / "token_norms.parquet").write_bytes(b"PAR1")
    assert_found_and_mended(small, capsys, "records")
    trial_of(small, 1).config.unlink()
    assert_found_and_mended(small, capsys, "published")
    assert {path: path.read_bytes() for path in before} == before


def test_records_that_are_gone_stay_a_finding(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(trial_of(small).root)
    assert found(small, capsys) == [("published", False), ("records", False)]
    assert found(small, capsys, fix=True) == [("published", True), ("records", False)]
    assert found(small, capsys) == [("records", False)]
    doctor.doctor(doctor.Options("small", small.storage, small.storage))
    said = capsys.readouterr().out
    assert "token_norms.parquet and token_statistics.parquet of a finished trial are gone" in said
    assert "orchestrate sweep FILE --rerun makes it anew" in said


def test_damaged_checkpoints_are_set_aside(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (next(trial_of(small, index).checkpoints.glob("*.pt")) for index in (0, 1))
    content = bytearray(one.read_bytes())
    content[len(content) // 2] ^= 1
    one.write_bytes(bytes(content))
    other.with_name(other.name + ".sha256").unlink()
    assert_found_and_mended(small, capsys, "checkpoints", "checkpoints")
    assert [path.with_name(path.name + ".damaged").is_file() for path in (one, other)] == [True, True]


def test_what_a_killed_driver_left_is_removed(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    left = [small.root / ".plan.json.4711.partial", trial_of(small).root / ".result.json.12.partial"]
    left += [trial_of(small).checkpoints / ".upload-x" / "step_000000012.pt", trial_of(small).stop_request]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert_found_and_mended(small, capsys, *["leftovers"] * 4)
    assert not any(path.exists() for path in left)


def test_folders_that_the_ledger_does_not_know_are_named(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    layout_of(small).trial("0123456789abcdef").attempt(1).mkdir(parents=True)
    assert found(small, capsys, fix=True) == [("folders", False)]


def test_runs_of_mlflow_are_brought_in_line(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    runs = small.mlflow_runs()
    with sqlite3.connect(small.storage / "mlflow.db") as database:
        one, other = (row.run_id for row in rows_of(small)[:2])
        database.execute("UPDATE runs SET status = 'RUNNING' WHERE run_uuid = ?", (one,))
        database.execute("UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?", (other,))
    database.close()
    assert_found_and_mended(small, capsys, "MLflow", "MLflow")
    assert small.mlflow_runs() == runs


def test_a_copied_storage_keeps_its_runs(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    runs = small.mlflow_runs()
    copy = Small(small.folder / "copied")
    shutil.copytree(small.storage, copy.storage)
    assert found(copy, capsys) == []
    layout_of(copy).ledger.unlink()  # which knew its runs
    assert all(mended for _, mended in found(copy, capsys, fix=True))
    assert found(copy, capsys) == []
    copy.write()
    assert_nothing_runs(copy)
    assert copy.mlflow_runs() == runs == small.mlflow_runs()


def test_results_that_are_imported_later_reach_mlflow_with_the_next_run(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    table = small.folder / "more.csv"
    table.write_text("model.num_registers,seed,test/linear/top1,tokens/last/outlier_fraction\n0,7,0.5,0\n2,7,0.25,0\n")
    asked = import_results.Request(file=table, storage=small.storage, state=small.storage, sweep="small")
    import_results.import_results(asked)
    capsys.readouterr()
    assert found(small, capsys) == []
    done = small.run("--in-process", "--quiet")
    assert done.returncode == 0, done.stderr
    assert len(small.mlflow_runs()) == 7
    with Ledger.open(layout_of(small).ledger) as ledger:
        imported = next(row for row in ledger.rows() if row.seed == 7)
        ledger.mark_run(imported.trial_id, imported.generation, "of a run that has nothing")
    assert_found_and_mended(small, capsys, "MLflow", "MLflow")


def test_a_sweep_that_another_machine_runs_is_said_and_hides_no_other(
    small: Small, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger.open(small.storage / "another" / "ledger.db"):
        pass
    checked: list[str] = []

    def driven(layout: SweepLayout, *_: object) -> None:
        checked.append(layout.name)
        raise DrivenElsewhere("it is being run by process 1 on far")

    monkeypatch.setattr(doctor, "_sweep", driven)
    assert doctor.doctor(doctor.Options(None, small.storage, small.storage)) == doctor.FINDINGS_LEFT
    assert checked == ["another", "small"]
    assert capsys.readouterr().out.count("run by process 1 on far") == 2


def test_a_sweep_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no sweep 'nothing'"):
        doctor.doctor(doctor.Options("nothing", tmp_path, tmp_path))
    with pytest.raises(ValueError, match="there is no sweep"):
        doctor.doctor(doctor.Options("../x", tmp_path / "runs", tmp_path / "runs"))


def test_a_ledger_is_never_half_rebuilt(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(small)
    layout.ledger.unlink()

    def killed(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rebuild, "update", killed)
        rebuild.rebuild(layout)
    assert not layout.ledger.exists()
    rebuild.rebuild(layout)
    assert [row.state for row in rows_of(small)] == ["finished"] * 4


SEARCH = {
    "name": "tpe",
    "samples": 3,
    "startup": 1,
    "metric": "val/knn/top1",
    "space": {"optim.lr": {"low": 1.0e-4, "high": 1.0e-2, "log": True}},
}


def test_the_suggestions_of_a_search_survive_the_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = Small(tmp_path, steps=2)
    small.write(axes={"model.num_registers": [2]}, seeds=[0], baseline=None, search=SEARCH)
    done = small.run("--in-process", "--quiet")
    assert done.returncode == 0, done.stderr
    before = {row.trial_id: (row.name, row.cell, row.state, row.role, row.in_plan) for row in rows_of(small)}
    assert len(before) == 4
    layout_of(small).ledger.unlink()
    assert all(mended for _, mended in found(small, capsys, fix=True))
    assert {row.trial_id: (row.name, row.cell, row.state, row.role, row.in_plan) for row in rows_of(small)} == before
    assert_nothing_runs(small)


def test_imported_results_survive_the_ledger_and_lack_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "small.csv"
    table.write_text("width,seed,test/top1\n64,0,0.5\n64,1,0.25\n128,0,0.75\n128,1,0.5\n")
    small = Small(tmp_path)
    import_results.import_results(import_results.Request(file=table, storage=small.storage, state=small.storage))
    before = [(row.trial_id, row.name, row.cell, row.config, row.state, row.result) for row in rows_of(small)]
    capsys.readouterr()
    assert found(small, capsys) == []
    layout_of(small).ledger.unlink()
    assert found(small, capsys, fix=True) == [("ledger", True)]
    assert [(row.trial_id, row.name, row.cell, row.config, row.state, row.result) for row in rows_of(small)] == before
    assert found(small, capsys) == []


def test_a_folder_in_the_place_of_a_ledger_is_said(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    layout_of(small).ledger.unlink()
    layout_of(small).ledger.mkdir()
    assert found(small, capsys, fix=True)[0] == ("ledger", True)
    assert found(small, capsys) == []
    lone = small.storage / "lone" / "ledger.db"
    lone.mkdir(parents=True)
    for fix in (False, True):
        assert doctor.doctor(doctor.Options("lone", small.storage, small.storage, fix=fix)) == doctor.FINDINGS_LEFT
        assert "a folder is where the ledger should be" in capsys.readouterr().out
    assert lone.is_dir()


def test_without_storage_nothing_is_rebuilt_and_a_damaged_ledger_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = tmp_path / "small" / "ledger.db"
    ledger.parent.mkdir()
    ledger.write_text("damaged")
    options = doctor.Options("small", tmp_path / "elsewhere", tmp_path, fix=True)
    assert doctor.doctor(options) == doctor.FINDINGS_LEFT
    assert "has neither plan nor snapshot" in capsys.readouterr().out
    assert ledger.read_text() == "damaged"
