"""Whole sweeps as a user runs them: to the table, again, extended, in this process and through Ray Tune."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests import photo_folder
from tests.orchestrator.sweeps import ORCHESTRATE, Small, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A small sweep that ran in one process."""
    small = Small(tmp_path_factory.mktemp("in_process"))
    small.write()
    done = small.run("--in-process")
    assert done.returncode == 0, done.stdout + done.stderr
    return small


def test_it_ends_with_a_table_and_says_where_everything_lies(finished: Small) -> None:
    again = finished.run()
    assert again.returncode == 0, again.stderr
    assert "num_registers" in again.stdout
    for place in ("tables/*.parquet", "report.html", "orchestrate ui"):
        assert place in again.stdout
    assert set(finished.attempts().values()) == {1}, "running again must train nothing"


def test_every_table_has_the_rows_that_the_sweep_asks_for(finished: Small) -> None:
    ablation = pq.read_table(finished.root / "tables" / "ablation.parquet").to_pylist()
    primary = [row for row in ablation if row["metric"] == "test/linear/top1"]
    assert [(row["model.num_registers"], row["n"]) for row in primary] == [(0, 2), (2, 2)]
    runs = pq.read_table(finished.root / "tables" / "runs.parquet").to_pylist()
    assert [row["status"] for row in runs] == ["finished"] * 4
    assert {row["mlflow_run_id"] is not None for row in runs} == {True}
    assert all(row["steps"] == 12 and row["seconds"] > 0 and row["data_fingerprint"] for row in runs)


def test_mlflow_has_one_finished_run_for_each_trial_under_one_parent(finished: Small) -> None:
    runs = finished.mlflow_runs()
    assert len(runs) == 5
    assert {status for _, status in runs} == {"FINISHED"}
    assert ("deit3 nano reg2 seed1", "FINISHED") in runs


def test_every_trial_folder_describes_itself(finished: Small) -> None:
    for folder in (finished.root / "trials").iterdir():
        names = {path.name for path in folder.iterdir()}
        files = {"config.json", "result.json", "metrics.parquet", "token_norms.parquet", "per_image.parquet"}
        assert files | {"checkpoints", "attempts", "norm_map.npz", "probes.parquet"} <= names
        assert json.loads((folder / "result.json").read_text())["status"] == "finished"


def test_status_logs_and_report_know_the_sweep(finished: Small) -> None:
    place = ["--storage", str(finished.storage)]
    status = run([*ORCHESTRATE, "status", "small", *place])
    assert status.stdout.count("finished  attempts") == 4, status.stderr
    trial = next(line.split()[0] for line in status.stdout.splitlines() if "attempts" in line)
    logs = run([*ORCHESTRATE, "logs", trial, *place])
    assert "attempt 1" in logs.stdout
    report = run([*ORCHESTRATE, "report", "small", *place])
    assert report.returncode == 0, report.stderr
    assert (finished.root / "report.html").stat().st_size > 10_000
    unknown = run([*ORCHESTRATE, "report", "smal", *place])
    assert (unknown.returncode, "Traceback" in unknown.stderr) == (2, False)
    assert "small" in unknown.stderr


def test_through_ray_tune_it_gives_the_same_tables_and_extending_runs_only_what_is_new(
    finished: Small, tmp_path: Path
) -> None:
    small = Small(tmp_path)
    small.write()
    done = small.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert small.tables() == finished.tables()
    before = set(small.attempts())
    small.write(axes={"model.num_registers": [0, 2, 3]})
    extended = small.run()
    assert extended.returncode == 0, extended.stderr
    attempts = small.attempts()
    assert len(set(attempts) - before) == 2
    assert set(attempts.values()) == {1}


def test_a_data_set_that_is_not_there_is_one_line_and_exit_2(tmp_path: Path) -> None:
    small = Small(tmp_path)
    small.write()
    folder = tmp_path / "nothing"
    missing = ["--set", "data.train=image_folder", "--set", "data.name=mine", "--set", f"execution.data_root={folder}"]
    done = small.run(*missing)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert str(folder) in done.stderr


def test_a_trial_that_fails_is_a_row_with_its_traceback(tmp_path: Path) -> None:
    small = Small(tmp_path)
    small.write(axes={"model.num_registers": [0]}, seeds=[0])
    done = small.run("--in-process", "--set", "model.factory=os:getcwd", "--name", "small")
    assert done.returncode == 1, done.stderr
    failures = run([*ORCHESTRATE, "status", "small", "--failures", "--storage", str(small.storage)])
    assert "TypeError" in failures.stdout
    ablation = pq.read_table(small.root / "tables" / "ablation.parquet").to_pylist()
    assert [(row["n_failed"], row["mean"]) for row in ablation if row["metric"] == "test/linear/top1"] == [(1, None)]
    assert ("deit3 nano reg0 seed0", "FAILED") in small.mlflow_runs()


def test_rerun_trains_from_the_first_step_and_gives_the_same_tables(tmp_path: Path) -> None:
    small = Small(tmp_path)
    small.write(axes={"model.num_registers": [0]}, seeds=[0])
    assert small.run("--in-process").returncode == 0
    before = small.tables()
    done = small.run("--in-process", "--rerun")
    assert done.returncode == 0, done.stderr
    assert set(small.attempts().values()) == {2}
    (trial,) = (small.root / "trials").iterdir()
    assert "resumed" not in (trial / "attempts" / "2" / "log.txt").read_text()
    assert small.tables() == before
    assert [name for name, _ in small.mlflow_runs()].count("deit3 nano reg0 seed0") == 1


def test_smoke_runs_one_step_of_every_cell(tmp_path: Path) -> None:
    small = Small(tmp_path)
    small.write()
    done = small.run("--in-process", "--smoke")
    assert done.returncode == 0, done.stderr
    (smoke,) = (folder for folder in small.storage.iterdir() if folder.name.startswith("small@"))
    runs = pq.read_table(smoke / "tables" / "runs.parquet").to_pylist()
    assert [(run["status"], run["steps"]) for run in runs] == [("finished", 1)] * 2


def test_changed_data_under_a_name_is_refused_until_it_is_accepted(tmp_path: Path) -> None:
    photo_folder.write(tmp_path / "photos", crops=5)
    small = Small(tmp_path)
    small.write(axes={"model.num_registers": [0]}, seeds=[0])
    images = ["--set", "data.train=image_folder", "--set", "data.name=photos", "--name", "small", "--in-process"]
    images += ["--set", f"execution.data_root={tmp_path / 'photos'}"]
    assert small.run(*images).returncode == 0
    for path in (tmp_path / "photos" / "train" / "moon").iterdir():
        path.unlink()
        break
    small.write(axes={"model.num_registers": [0, 2]}, seeds=[0])
    refused = small.run(*images)
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)
    assert "content has changed" in refused.stderr
    assert small.run(*images, "--accept-data-change").returncode == 0
