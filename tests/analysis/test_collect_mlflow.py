"""A sweep collected from MLflow alone is the one that its folder holds: statuses, settings, every finite metric."""

from __future__ import annotations

import http.server
import json
import math
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from analysis import mlflow_store
from analysis.collect import Frames, collect
from analysis.collect_mlflow import collect_mlflow, metrics_table
from analysis.frames import redact
from analysis.mlflow_store import HISTORIES
from analysis.results import evaluate
from orchestrator import publish
from orchestrator.attempt import Outcome
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.tracking import Sink, default_tracking_uri
from orchestrator.tracking_records import ui_command
from trainers.config import TrialConfig, resolve

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's own use of SQLAlchemy

REGISTERS = "model.num_registers"
PROVENANCE = {"git_commit": "f" * 40, "versions": {"torch": "2.14.1", "timm": "1.0.31"}}
OUTCOMES: dict[str, Outcome] = {
    "finished": Outcome(
        "finished",
        seconds=12.5,
        steps=30,
        images_per_second=512.25,
        device="cpu",
        threads=2,
        data_fingerprint="0123456789012345",  # digits alone, but text
    ),
    "failed": Outcome("failed", seconds=1.0, error={"type": "OSError", "message": "no disk", "traceback": "…"}),
    "diverged": Outcome("diverged", seconds=2.0, steps=10),
    "pruned": Outcome("pruned", seconds=3.0, steps=20),
}


@dataclass
class Planned:
    """What the ledger wants to know of a trial."""

    trial_id: str
    cell: dict[str, Any]
    seed: int
    config: TrialConfig
    role: Literal["cell", "search"] = "cell"
    name: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class Sweep:
    """A sweep in a folder and in MLflow."""

    state: Path
    name: str = "small"

    @property
    def folder(self) -> Path:
        return self.state / self.name

    @property
    def uri(self) -> str:
        return default_tracking_uri(self.state)


def planned() -> list[Planned]:
    ends = ("finished", "finished", "failed", "diverged", "pruned", "running", "planned")
    counts = (0, 0, 4, 4, 4, 0, 4)
    return [
        Planned(
            f"{number}{end}",
            {REGISTERS: count},
            number,
            resolve(
                {
                    "method": "deit3",
                    "preset": "short",
                    "seed": number,
                    "model": {"size": "nano", "num_registers": count},
                }
            ),
            name=f"deit3 nano reg{count} seed{number}",
        )
        for number, (end, count) in enumerate(zip(ends, counts, strict=True))
    ]


def run(ledger: Ledger, layout: SweepLayout, trial: Planned, sink: Sink) -> None:
    """A trial from its first attempt, which is lost, to its end."""
    end = trial.trial_id[1:]
    if end == "planned":
        return
    ledger.start_attempt(trial.trial_id, 1, "host", 1)
    ledger.record_many(trial.trial_id, 1, [(step, {"train/loss": 9.0, "lr": 0.1}) for step in (10, 20)])
    assert sink.flush(60) == 0  # so that MLflow has points that are replaced later
    ledger.lose_attempt(trial.trial_id, 1, "node lost", progressed=True)
    ledger.start_attempt(trial.trial_id, 2, "host", 2)
    rng = np.random.default_rng(trial.seed)
    for step in (10, 20, 30):
        values = {"train/loss": math.nan if end == "diverged" and step == 20 else rng.random(), "lr": 0.1}
        ledger.record_many(trial.trial_id, 2, [(step, values)])
    ledger.record_many(trial.trial_id, 2, [(30, {"test/linear/top1": rng.random(), "other": math.inf})])
    if end == "running":
        return
    row, outcome = ledger.row(trial.trial_id), OUTCOMES[end]
    result = publish.result(row, 2, outcome, PROVENANCE, 0.5, 0.0)
    ledger.finish(trial.trial_id, 2, outcome.status, result, outcome.error)
    publish.trial(ledger, layout.trial(trial.trial_id), trial.trial_id)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    state = tmp_path_factory.mktemp("state")
    made = Sweep(state)
    layout = SweepLayout(state, state, made.name)
    trials = planned()
    content = {
        "sweep": made.name,
        "question": "How many?",
        "axes": {REGISTERS: [0, 4]},
        "seeds": list(range(7)),
        "baseline": {REGISTERS: 0},
        "primary": ["test/linear/top1"],
        "scheduler": None,
        "trials": [{"trial_id": t.trial_id, "name": t.name, "cell": t.cell, "seed": t.seed} for t in trials],
    }
    with Ledger.open(layout.ledger) as ledger:
        ledger.plan(trials)
        layout.plan.write_text(json.dumps(content))
        sink = Sink(ledger, made.uri, made.name, str(state), state=state)
        sink.start()
        for trial in trials:
            run(ledger, layout, trial, sink)
        sink.log_artifacts([layout.plan])
        sink.publish_map(layout.mlflow_map)
        assert sink.close(60) == 0
    return made


def assert_equal(tracked: Frames, published: Frames) -> None:
    """All that MLflow can hold is the same."""
    assert tracked.plan == published.plan
    assert tracked.runs.column_names == published.runs.column_names
    for name in published.runs.column_names:
        if name != "mlflow_run_id":  # the folder's list has runs of trials that are not over, too
            assert tracked.runs[name].equals(published.runs[name]), name
    finite = published.metrics.filter(pc.is_finite(published.metrics["value"]))
    assert tracked.metrics.equals(finite)
    assert finite.num_rows > 0


def test_a_store_has_what_the_folder_has(sweep: Sweep) -> None:
    published, tracked = collect(sweep.folder), collect_mlflow(sweep.uri, sweep.name)
    assert tracked.problems == ()
    assert_equal(tracked, published)
    assert tracked.runs["status"].to_pylist() == [
        *("finished", "finished", "failed", "diverged", "pruned"),
        *("missing", "missing"),
    ]
    assert published.mlflow is not None and tracked.mlflow is not None
    assert tracked.mlflow.runs == published.mlflow.runs
    assert (tracked.mlflow.tracking_uri, tracked.mlflow.experiment_id) == (sweep.uri, published.mlflow.experiment_id)
    finished = published.runs.slice(0, 5)["mlflow_run_id"]
    assert tracked.runs.slice(0, 5)["mlflow_run_id"].equals(finished)
    assert (tracked.token_norms.num_rows, tracked.token_statistics.num_rows) == (0, 0)


def test_of_a_point_that_came_twice_the_later_counts(sweep: Sweep) -> None:
    tracked = collect_mlflow(sweep.uri, sweep.name)
    with closing(sqlite3.connect(sweep.state / "mlflow.db")) as database:
        (points,) = database.execute("SELECT count(*) FROM metrics WHERE key = 'train/loss' AND value = 9").fetchone()
    assert points == 12  # two steps of six trials
    assert 9.0 not in tracked.metrics["value"].to_pylist()


def test_what_others_logged_that_is_not_finite_is_left_out(sweep: Sweep, tmp_path: Path) -> None:
    of = "FROM tags WHERE key = 'trial_id' AND value = '0finished'"
    rows = [("'lr'", 0, 1), ("'nan'", 0, 1), ("'inf'", "9e999", 0)]  # MLflow stores NaN as 0 and a mark
    columns = "(key, value, timestamp, step, is_nan, run_uuid)"
    uri = copied(
        sweep,
        tmp_path,
        *(f"INSERT INTO metrics {columns} SELECT {n}, {v}, 1, 99, {nan}, run_uuid {of}" for n, v, nan in rows),
    )
    assert collect_mlflow(uri, sweep.name).metrics.equals(collect_mlflow(sweep.uri, sweep.name).metrics)


def test_the_ablation_is_the_same(sweep: Sweep) -> None:
    published, tracked = (evaluate(f).ablation for f in (collect(sweep.folder), collect_mlflow(sweep.uri, sweep.name)))
    shared = [name for name in published.column_names if name != "flags"]  # which name values that are not finite
    rows = pc.is_in(published["metric"], pa.array(["lr", "test/linear/top1", "train/loss"]))
    mine = pc.is_in(tracked["metric"], pa.array(["lr", "test/linear/top1", "train/loss"]))
    assert published.filter(rows).select(shared).equals(tracked.filter(mine).select(shared))


def test_without_the_plan_the_trials_runs_have_to_do(sweep: Sweep, tmp_path: Path) -> None:
    uri = copied(sweep, tmp_path, "UPDATE runs SET artifact_uri = 'nowhere'")
    tracked = collect_mlflow(uri, sweep.name)
    assert [problem[:42] for problem in tracked.problems] == ["plan.json cannot be had from MLflow, so tha"[:42]]
    assert tracked.plan.axes == {REGISTERS: (0, 4)}
    assert (tracked.plan.baseline, tracked.plan.primary) == (None, ())
    assert [trial.trial_id for trial in tracked.plan.trials] == [t.trial_id for t in planned()[:6]]
    assert tracked.plan.trials[2].name == "deit3 nano reg4 seed2"
    published = collect(sweep.folder)
    assert tracked.metrics.equals(collect_mlflow(sweep.uri, sweep.name).metrics)
    assert tracked.runs["status"].to_pylist() == published.runs["status"].to_pylist()[:6]


def copied(sweep: Sweep, folder: Path, *statements: str) -> str:
    """A copy of the store in which something has been changed."""
    with (
        closing(sqlite3.connect(sweep.state / "mlflow.db")) as source,
        closing(sqlite3.connect(folder / "copy.db")) as copy,
    ):
        source.backup(copy)
        for statement in statements:
            copy.execute(statement)
        copy.commit()
    return f"sqlite:///{folder / 'copy.db'}"


def test_sweeps_of_one_name_from_several_storages_are_told_apart(sweep: Sweep, tmp_path: Path) -> None:
    other = "e" * 32
    run = "SELECT run_uuid FROM tags WHERE key = 'role' AND value = 'sweep'"
    columns = "name, user_id, source_type, status, start_time, end_time, lifecycle_stage, artifact_uri, experiment_id"
    uri = copied(
        sweep,
        tmp_path,
        f"INSERT INTO runs (run_uuid, {columns}) SELECT '{other}', {columns} FROM runs WHERE run_uuid IN ({run})",
        f"""INSERT INTO tags (key, value, run_uuid) SELECT key, CASE key WHEN 'sweep_key' THEN '{other}'
            WHEN 'storage' THEN 's3://bucket/runs' ELSE value END, '{other}' FROM tags WHERE run_uuid IN ({run})""",
    )
    with pytest.raises(ValueError, match=r"of storages '.*', 's3://bucket/runs': say which"):
        collect_mlflow(uri, sweep.name)
    with pytest.raises(ValueError, match="has no sweep 'small' of storage 'elsewhere'"):
        collect_mlflow(uri, sweep.name, "elsewhere")
    mine, theirs = (collect_mlflow(uri, sweep.name, storage) for storage in (str(sweep.state), "s3://bucket/runs"))
    assert mine.metrics.num_rows > 0
    assert theirs.metrics.num_rows == 0
    assert set(theirs.runs["status"].to_pylist()) == {"missing"}


def test_a_trial_that_was_made_anew_is_its_newest_run(sweep: Sweep, tmp_path: Path) -> None:
    old, new = "a" * 32, "b" * 32
    columns = "name, user_id, source_type, status, start_time, end_time, lifecycle_stage, artifact_uri, experiment_id"
    run = "(SELECT run_uuid FROM tags WHERE key = 'trial_id' AND value = '0finished')"
    statements = []
    for number, name in ((7, new), (3, old)):
        statements += [
            f"INSERT INTO runs (run_uuid, {columns}) SELECT '{name}', {columns} FROM runs WHERE run_uuid = {run}",
            f"""INSERT INTO tags (key, value, run_uuid) SELECT key, CASE key WHEN 'generation' THEN '{number}'
                WHEN 'trial_id' THEN '0finished' ELSE value END, '{name}' FROM tags WHERE run_uuid = {run}""",
        ]
    uri = copied(sweep, tmp_path, *statements)
    assert collect_mlflow(uri, sweep.name).runs["mlflow_run_id"].to_pylist()[0] == new


def test_values_that_cannot_be_read_are_problems(sweep: Sweep, tmp_path: Path) -> None:
    of = "run_uuid = (SELECT run_uuid FROM tags WHERE key = 'trial_id' AND value = '0finished')"
    uri = copied(
        sweep,
        tmp_path,
        f"UPDATE tags SET value = '{{broken' WHERE key = 'versions' AND {of}",
        f"UPDATE tags SET value = 'many' WHERE key = 'threads' AND {of}",
        f"INSERT INTO tags SELECT 'cut_params', 'method, optim.lr', run_uuid FROM runs WHERE {of}",
    )
    tracked = collect_mlflow(uri, sweep.name)
    row = tracked.runs.slice(0, 1).to_pylist()[0]
    assert (row["versions"], row["threads"], row["method"], row["optim.lr"]) == (None, None, None, None)
    assert row["seconds"] == 12.5
    assert sorted(problem.split(": ")[1][:21] for problem in tracked.problems) == [
        *("setting method is too", "setting optim.lr is t", "tag threads is unread", "tag versions is unrea")
    ]


def test_metrics_are_sorted_and_the_latest_of_each_step_counts() -> None:
    rows = [
        ("r1", "b", 1, 5, 0.1),
        ("r0", "b", 2, 1, 0.2),
        ("r0", "a", 2, 9, 0.3),
        ("r0", "a", 2, 8, 0.4),
        ("r0", "a", 10, 1, 0.5),
        ("r0", "a", 10, 1, 0.6),
    ]
    table = pa.Table.from_pylist([dict(zip(HISTORIES.names, row, strict=True)) for row in rows], schema=HISTORIES)
    expected = [("t0", 1, "b", 0.1), ("t9", 2, "a", 0.3), ("t9", 2, "b", 0.2), ("t9", 10, "a", 0.6)]
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 5, 2, 1, 4]):
        found = metrics_table(table.take(order), {"r0": "t9", "r1": "t0"})
        assert [tuple(row.values()) for row in found.to_pylist()] == expected


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("sqlite:////nowhere/me.db", "there is no MLflow store at /nowhere/me.db"),
        ("ftp://me:secret@host/x", "tracking URI 'ftp://host/x' is not supported"),
        ("runs", "tracking URI 'runs' is not supported"),
        ("postgresql://me:secret@127.0.0.1:1/mlflow", "MLflow at postgresql://127.0.0.1:1/mlflow does not answer"),
        ("http://me:secret@127.0.0.1:1", "MLflow at http://127.0.0.1:1 does not answer"),
    ],
)
def test_a_store_that_is_not_there_is_said_without_secrets(uri: str, message: str) -> None:
    if uri.startswith("postgresql"):
        pytest.importorskip("psycopg2")
    with pytest.raises(ValueError) as caught:
        collect_mlflow(uri, "small")
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_store_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database, but long enough to have a header of one, or so")
    with pytest.raises(ValueError, match="not readable as a database"):
        collect_mlflow(f"sqlite:///{tmp_path / 'text.db'}", "small")
    with closing(sqlite3.connect(tmp_path / "other.db")) as database:
        database.execute("CREATE TABLE mine (x)")
    with pytest.raises(ValueError, match="a database, but not MLflow's"):
        collect_mlflow(f"sqlite:///{tmp_path / 'other.db'}", "small")
    with closing(sqlite3.connect(tmp_path / "other.db")) as database:
        assert database.execute("SELECT name FROM sqlite_master").fetchall() == [("mine",)]


def test_a_sweep_that_is_not_there(sweep: Sweep) -> None:
    with pytest.raises(ValueError, match="has no sweep 'large'"):
        collect_mlflow(sweep.uri, "large")


def test_secrets_are_taken_out_of_texts() -> None:
    assert redact("at postgres://a:b@c@host/x?password=p&sslmode=on") == "at postgres://host/x?password=***&sslmode=***"


class _Answer(http.server.BaseHTTPRequestHandler):
    status, body = 401, b"You are not authenticated"

    def _answer(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_POST = _answer

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, b"You are not authenticated"),
        (200, b"<html>somebody else</html>"),
        (403, b'{"error_code": "PERMISSION_DENIED"}'),
    ],
)
def test_a_server_that_answers_badly_is_one_clear_error(status: int, body: bytes) -> None:
    handler = type("Handler", (_Answer,), {"status": status, "body": body})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(ValueError, match="does not answer as it should") as caught:
                collect_mlflow(f"http://me:secret@127.0.0.1:{server.server_port}", "small")
        finally:
            server.shutdown()
            thread.join()
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@contextmanager
def serving(sweep: Sweep) -> Iterator[str]:
    """MLflow's own server on the store."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    argv, extra = ui_command(sweep.uri, port)
    with (sweep.state / "server.log").open("w") as log:
        process = subprocess.Popen(argv, env={**os.environ, **extra}, cwd=sweep.state, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 90
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert time.monotonic() < deadline and process.poll() is None, (sweep.state / "server.log").read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # sockets of MLflow's session
def test_a_server_has_what_the_folder_has_whatever_its_limits(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    published = collect(sweep.folder)
    with serving(sweep) as uri:
        assert_equal(collect_mlflow(uri, sweep.name), published)
        for limit in (1, 4, 7):  # an answer holds no more points than this, and every history has three
            monkeypatch.setattr(mlflow_store, "_MOST_POINTS", limit)
            assert_equal(collect_mlflow(uri, sweep.name), published)
        monkeypatch.setattr(mlflow_store, "_BULK", "/ajax-api/2.0/mlflow/metrics/not-there")
        monkeypatch.setattr(mlflow_store, "_PAGE", 2)
        assert_equal(collect_mlflow(uri, sweep.name), published)


def test_mlflow_is_not_needed_to_read_a_folder() -> None:
    code = "import sys, analysis.collect, analysis.collect_mlflow; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
