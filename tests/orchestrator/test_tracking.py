"""The MLflow sink over a real SQLite store: one run per trial, all points, right statuses, no secrets."""

import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from orchestrator import tracking, tracking_store
from orchestrator.ledger import Ledger
from orchestrator.tracking import Sink, default_tracking_uri, prepare_store
from orchestrator.tracking_records import (
    check_tracking_uri,
    entity_name,
    filter_key,
    params,
    redact,
    status_tags,
    ui_command,
)
from orchestrator.tracking_store import Store, Unavailable

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's own use of SQLAlchemy


@dataclass
class FakeConfig:
    values: dict[str, Any]

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        assert mode == "json"
        return self.values


@dataclass
class FakeTrial:
    trial_id: str
    name: str = "deit3 nano reg4 seed0"
    cell: dict[str, Any] = field(default_factory=lambda: {"model.num_registers": 4})
    seed: int = 0
    config: FakeConfig = field(
        default_factory=lambda: FakeConfig({"method": "deit3", "model": {"num_registers": 4, "factory": None}})
    )
    role: Literal["cell", "search"] = "cell"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's schema, which takes seconds to make."""
    state = tmp_path_factory.mktemp("template")
    prepare_store(default_tracking_uri(state), state)
    return state / "mlflow.db"


@pytest.fixture
def state(tmp_path: Path, template: Path) -> Path:
    shutil.copy(template, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def ledger(state: Path) -> Iterator[Ledger]:
    with Ledger.open(state / "sweep" / "ledger.db") as opened:
        opened.plan([FakeTrial("aaaa"), FakeTrial("bbbb", name="deit3 nano reg0 seed0")])
        yield opened


@pytest.fixture
def client(state: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=default_tracking_uri(state))


SinkMaker = Callable[..., Sink]


@pytest.fixture
def make_sink(ledger: Ledger, state: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SinkMaker]:
    made: list[Sink] = []
    monkeypatch.setattr(tracking, "_BACK_OFF_S", (0.02, 0.1))
    monkeypatch.setattr(tracking, "_LEAST_PAUSE_S", 0.02)

    def make(uri: str | None = None, **settings: Any) -> Sink:
        sink = Sink(
            ledger, uri or default_tracking_uri(state), "sweep", "s3://me:pw@host/runs", state=state, **settings
        )
        made.append(sink)
        sink.start()
        return sink

    yield make
    for sink in made:
        sink.close(10)


def _runs(client: Any, role: str = "trial") -> list[Any]:
    experiment = client.get_experiment_by_name("sweep")
    found = client.search_runs([experiment.experiment_id], f"tags.role = '{role}'", max_results=1000)
    return sorted(found, key=lambda run: run.data.tags.get("trial_id", ""))


def _points(client: Any, run: Any, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))


def _attempt(ledger: Ledger, trial_id: str, number: int, steps: range) -> None:
    ledger.start_attempt(trial_id, number, "host", 1)
    ledger.record_many(trial_id, number, [(step, {"train/loss": 1 / (step + 1)}) for step in steps])


RESULT = {
    "git_commit": "f" * 40,
    "versions": {"torch": "2.14"},
    "device": "cpu",
    "threads": 1,
    "seconds": 2.5,
    "environment": {"AWS_SECRET_ACCESS_KEY": "hush"},
}


def test_a_sweep_becomes_one_parent_and_one_nested_run_per_trial(
    ledger: Ledger, make_sink: SinkMaker, client: Any, state: Path
) -> None:
    sink = make_sink(description="How many registers?")
    _attempt(ledger, "aaaa", 1, range(1500))
    ledger.finish("aaaa", 1, "finished", RESULT, None)
    _attempt(ledger, "bbbb", 1, range(3))
    error = {"type": "ValueError", "message": "no such file s3://u:pw@bucket/x", "traceback": "secret trace"}
    ledger.finish("bbbb", 1, "failed", {}, error)
    assert sink.flush(20) == 0
    sink.publish_map(state / "mlflow.json")
    (state / "tables").mkdir()
    (state / "tables" / "runs.parquet").write_bytes(b"PAR1")
    (state / "report.html").write_text("<html>")
    sink.log_artifacts([state / "tables", state / "report.html", state / "missing.png"])
    assert sink.close(20) == 0

    (parent,) = _runs(client, "sweep")
    first, second = _runs(client)
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "sweep")
    assert parent.data.tags["mlflow.note.content"] == "How many registers?"
    assert json.loads(parent.data.tags["trials"])["failed"] == 1
    assert [first.info.status, second.info.status] == ["FINISHED", "FAILED"]
    assert [run.info.run_name for run in (first, second)] == ["deit3 nano reg4 seed0", "deit3 nano reg0 seed0"]
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in (first, second))
    assert first.data.params == {"method": "deit3", "model.num_registers": "4", "model.factory": "null"}
    assert _points(client, first, "train/loss") == [(step, 1 / (step + 1)) for step in range(1500)]
    assert first.data.tags["mlflow.source.git.commit"] == "f" * 40 and first.data.tags["seconds"] == "2.5"
    assert second.data.tags["error"] == "ValueError: no such file s3://bucket/x"
    assert "hush" not in str(first.data.tags) and "secret trace" not in str(second.data.tags)
    assert {"tables", "report.html"} == {f.path for f in client.list_artifacts(parent.info.run_id)}
    assert list((state / "mlartifacts").rglob("runs.parquet"))
    published = json.loads((state / "mlflow.json").read_text())
    assert published["runs"] == {"aaaa": first.info.run_id, "bbbb": second.info.run_id}
    assert published["parent_run_id"] == parent.info.run_id
    assert published["experiment_id"] == parent.info.experiment_id
    for file in (state / "mlflow.db", state / "sweep" / "ledger.db", state / "mlflow.json"):
        assert b"me:pw" not in file.read_bytes()


def test_every_state_has_its_status_and_its_tag(ledger: Ledger, make_sink: SinkMaker, client: Any) -> None:
    states = ["finished", "diverged", "pruned", "stopped", "failed", "running", "planned", "lost"]
    ledger.plan([FakeTrial(name, name=name) for name in states])
    for name in states[:6]:
        ledger.start_attempt(name, 1, "host", 1)
    for name in states[:5]:
        ledger.finish(name, 1, name, {}, None)  # type: ignore[arg-type]
    ledger.start_attempt("lost", 1, "host", 1)
    ledger.lose_attempt("lost", 1, "node lost", progressed=True)
    sink = make_sink()
    assert sink.flush(20) == 0
    assert {run.data.tags["trial_id"]: run.info.status for run in _runs(client)}["running"] == "RUNNING"
    assert sink.close(20) == 0
    assert {run.data.tags["trial_id"]: (run.info.status, run.data.tags["status"]) for run in _runs(client)} == {
        "finished": ("FINISHED", "finished"),
        "diverged": ("FAILED", "diverged"),
        "pruned": ("KILLED", "pruned"),
        "stopped": ("KILLED", "stopped"),
        "failed": ("FAILED", "failed"),
        "running": ("KILLED", "interrupted"),
        "lost": ("KILLED", "interrupted"),
    }
    assert [run.info.status for run in _runs(client, "sweep")] == ["KILLED"]


def test_an_interrupted_trial_goes_on_in_its_run_and_its_points_are_there_once(
    ledger: Ledger, make_sink: SinkMaker, client: Any
) -> None:
    _attempt(ledger, "aaaa", 1, range(6))
    assert make_sink().close(20) == 0
    (before,) = _runs(client)
    assert before.info.status == "KILLED"
    ledger.release_running()
    sink = make_sink()
    _attempt(ledger, "aaaa", 2, range(4, 10))
    assert sink.flush(20) == 0
    (during,) = _runs(client)
    assert (during.info.run_id, during.info.status) == (before.info.run_id, "RUNNING")
    ledger.finish("aaaa", 2, "finished", {}, None)
    assert sink.close(20) == 0
    (after,) = _runs(client)
    assert (after.info.run_id, after.info.status, after.data.tags["attempts"]) == (before.info.run_id, "FINISHED", "2")
    assert _points(client, after, "train/loss") == [(step, 1 / (step + 1)) for step in range(10)]
    assert len(_runs(client, "sweep")) == 1


def test_what_a_killed_driver_left_running_is_set_right_at_the_next_start(
    ledger: Ledger, make_sink: SinkMaker, client: Any
) -> None:
    _attempt(ledger, "aaaa", 1, range(2))
    sink = make_sink()
    assert sink.flush(20) == 0
    sink._abandon.set()  # as abrupt as a kill: nothing is closed
    sink._thread.join(10)
    ledger.release_running()
    assert [run.info.status for run in _runs(client)] == ["RUNNING"]
    sink = make_sink()
    assert sink.flush(20) == 0
    assert [run.info.status for run in _runs(client)] == ["KILLED"]


def test_a_run_that_is_running_against_what_the_ledger_remembers_is_set_right(
    ledger: Ledger, make_sink: SinkMaker, client: Any
) -> None:
    _attempt(ledger, "aaaa", 1, range(2))
    ledger.finish("aaaa", 1, "pruned", {}, None)
    assert make_sink().close(20) == 0
    (run,) = _runs(client)
    client.update_run(run.info.run_id, status="RUNNING")
    assert make_sink().close(20) == 0
    (run,) = _runs(client)
    assert (run.info.status, run.data.tags["status"]) == ("KILLED", "pruned")


def test_runs_that_lost_replies_left_behind_are_reduced_to_one(
    ledger: Ledger, make_sink: SinkMaker, client: Any
) -> None:
    _attempt(ledger, "aaaa", 1, range(5))
    sink = make_sink()
    assert sink.flush(20) == 0
    (run,) = _runs(client)
    tags = {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.run")}
    for start_ms in (1, run.info.start_time + 5):  # an earlier one too: the one that has the points stays
        client.create_run(run.info.experiment_id, start_time=start_ms, tags=tags)
    ledger.mark_run("bbbb", 0, None)
    assert sink.close(20) == 0
    assert [r.info.run_id for r in _runs(client)] == [run.info.run_id]


def test_a_run_whose_creation_was_never_confirmed_is_found_again(
    ledger: Ledger, make_sink: SinkMaker, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Store.create
    calls = []

    def lose_replies(self: Store, *arguments: Any) -> str:
        run_id = create(self, *arguments)
        calls.append(run_id)
        if len(calls) % 2:
            raise Unavailable("the reply was lost")
        return run_id

    monkeypatch.setattr(Store, "create", lose_replies)
    _attempt(ledger, "aaaa", 1, range(3))
    _attempt(ledger, "bbbb", 1, range(3))
    sink = make_sink()
    assert sink.flush(20) == 0
    assert len(calls) == 3 == len(_runs(client)) + len(_runs(client, "sweep"))
    assert sorted(calls) == sorted(r.info.run_id for role in ("trial", "sweep") for r in _runs(client, role))


def test_a_deleted_run_is_made_anew_with_all_points(ledger: Ledger, make_sink: SinkMaker, client: Any) -> None:
    _attempt(ledger, "aaaa", 1, range(5))
    sink = make_sink()
    assert sink.flush(20) == 0
    (deleted,) = _runs(client)
    client.delete_run(deleted.info.run_id)
    ledger.record("aaaa", 1, 5, {"train/loss": 1 / 6})
    sink.notify()
    assert sink.flush(20) == 0
    (run,) = _runs(client)
    assert run.info.run_id != deleted.info.run_id
    assert _points(client, run, "train/loss") == [(step, 1 / (step + 1)) for step in range(6)]
    client.delete_experiment(run.info.experiment_id)
    ledger.record("aaaa", 1, 6, {"train/loss": 1 / 7})
    sink.notify()
    assert sink.flush(20) == 0
    assert len(_points(client, _runs(client)[0], "train/loss")) == 7


def test_rerun_replaces_the_run(ledger: Ledger, make_sink: SinkMaker, client: Any) -> None:
    _attempt(ledger, "aaaa", 1, range(5))
    ledger.finish("aaaa", 1, "finished", {}, None)
    sink = make_sink()
    assert sink.flush(20) == 0
    (first,) = _runs(client)
    ledger.reset("aaaa")
    _attempt(ledger, "aaaa", 2, range(2))
    sink.notify()
    assert sink.flush(20) == 0
    (second,) = _runs(client)
    assert second.info.run_id != first.info.run_id
    assert len(_points(client, second, "train/loss")) == 2


def test_another_store_gets_everything(ledger: Ledger, make_sink: SinkMaker, template: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    _attempt(ledger, "aaaa", 1, range(5))
    assert make_sink().close(20) == 0
    shutil.copy(template, tmp_path / "other.db")
    uri = f"sqlite:///{tmp_path / 'other.db'}"
    assert make_sink(uri).close(20) == 0
    client = MlflowClient(tracking_uri=uri)
    assert len(_points(client, _runs(client)[0], "train/loss")) == 5


def test_a_store_that_was_copied_with_its_ledger_keeps_its_runs(
    ledger: Ledger, make_sink: SinkMaker, client: Any, state: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ledger.start_attempt("aaaa", 1, "host", 1)
    ledger.record("aaaa", 1, 1, {"train/loss": 1.0})
    assert make_sink().close(20) == 0
    before = {run.info.run_id for role in ("trial", "sweep") for run in _runs(client, role)}
    copy = tmp_path_factory.mktemp("copy") / "state"
    shutil.copytree(state, copy)
    from mlflow import MlflowClient

    copied = MlflowClient(tracking_uri=default_tracking_uri(copy))
    with Ledger.open(copy / "sweep" / "ledger.db") as theirs:
        for storage in ("copy", "copy", "moved"):
            sink = Sink(theirs, default_tracking_uri(copy), "sweep", storage, state=copy)
            sink.start()
            assert sink.close(20) == 0
            (parent,) = _runs(copied, "sweep")
            assert parent.data.tags["storage"] == storage
            assert {run.info.run_id for run in [parent, *_runs(copied)]} == before
        assert theirs.row("aaaa").run_id in before
    assert {run.info.run_id for role in ("trial", "sweep") for run in _runs(client, role)} == before
    assert _runs(client, "sweep")[0].data.tags["storage"] == "s3://host/runs"


def test_values_that_are_not_finite_are_named_and_odd_names_do_not_block(
    ledger: Ledger, make_sink: SinkMaker, client: Any
) -> None:
    ledger.start_attempt("aaaa", 1, "host", 1)
    ledger.record("aaaa", 1, 0, {"loss": 2.0, "../odd\nname": 3.0})
    ledger.record("aaaa", 1, 1, {"loss": math.nan, "lr": math.inf})
    ledger.finish("aaaa", 1, "diverged", {}, None)
    assert make_sink().close(20) == 0
    (run,) = _runs(client)
    assert _points(client, run, "loss") == [(0, 2.0)] and _points(client, run, "lr") == []
    assert run.data.tags["nonfinite_metrics"] == "loss = nan at step 1; lr = inf at step 1"
    assert _points(client, run, entity_name("../odd\nname")) == [(0, 3.0)]


def test_files_that_are_not_uploaded_yet_are_lacking(ledger: Ledger, state: Path) -> None:
    sink = Sink(ledger, default_tracking_uri(state), "sweep", "runs", state=state)
    assert sink.flush(0.0) == 0
    sink.log_artifacts([state / "report.html"])
    assert sink.flush(0.0) == 1


@pytest.mark.slow
def test_a_store_that_cannot_be_used_costs_the_driver_nothing(
    ledger: Ledger, make_sink: SinkMaker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "orchestrator.tracking")
    sink = make_sink("http://user:hush@127.0.0.1:9", request_timeout_s=1.0)
    _attempt(ledger, "aaaa", 1, range(5))
    slowest = 0.0
    for _ in range(200):
        start = time.perf_counter()
        sink.notify()
        slowest = max(slowest, time.perf_counter() - start)
        time.sleep(0.01)
    start = time.monotonic()
    assert sink.close(0.5) == 5 + 1 + 1  # points, the trial's status, the sweep's own run
    assert time.monotonic() - start < 2
    assert slowest < 0.05
    assert len(caplog.records) == 1 and "trials go on" in caplog.text and "hush" not in caplog.text


def test_a_retried_request_is_not_a_second_run_by_mlflows_own_client() -> None:
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    with tracking_store.environment(2.5):
        assert (MLFLOW_HTTP_REQUEST_MAX_RETRIES.get(), MLFLOW_HTTP_REQUEST_TIMEOUT.get()) == (0, 3)
    assert MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == 7  # put back


def test_a_filter_takes_only_hexadecimal_keys(state: Path) -> None:
    store = Store(default_tracking_uri(state), state)
    with pytest.raises(ValueError, match="hexadecimal"):
        store.find("0", "trial_key", "' OR tags.x = '")


@pytest.mark.slow
def test_several_processes_worth_of_sinks_make_one_schema(tmp_path: Path) -> None:
    uri, failures = default_tracking_uri(tmp_path), []

    def connect() -> None:
        try:
            Store(uri, tmp_path).experiment("sweep")
        except Unavailable as error:
            failures.append(error)

    threads = [threading.Thread(target=connect) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) <= 1  # both may make the experiment; the schema is made once
    assert Store(uri, tmp_path).experiment("sweep") == "1"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("postgresql://me:p@ss:w@host:5432/db", "postgresql://host:5432/db"),
        ("see https://token@host/x and s3://a:b@c", "see https://host/x and s3://c"),
        ("https://h/x?X-Amz-Signature=abc&page=2", "https://h/x?X-Amz-Signature=***&page=2"),
        ("mysql://h/db?user=u&password=abc", "mysql://h/db?user=u&password=***"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("model.num_register_tokens=4", "model.num_register_tokens=4"),
        ("package.module:build, a@b.c", "package.module:build, a@b.c"),
    ],
)
def test_redact(text: str, clean: str) -> None:
    assert redact(text) == clean


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("test/linear/top1", "test/linear/top1"),
        ("/a//b/", "a/b"),
        ("..", "_"),
        ("../../x", "_/_/x"),
        ("loss'; DROP", "loss__ DROP"),
        ("x" * 300, "x" * 250),
    ],
)
def test_names_that_mlflow_accepts(name: str, clean: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(entity_name(name))
    assert entity_name(name) == clean


def test_long_params_are_cut_and_named() -> None:
    texts, cut = params({"a": {"long": "x" * 7000}, "b": [1, 2], "c": None, "d": True, "e": "s3://u:p@h"})
    assert {name: text for name, text in texts.items() if name != "a.long"} == {
        "b": "[1, 2]",
        "c": "null",
        "d": "true",
        "e": "s3://h",
    }
    assert (len(texts["a.long"]), cut) == (6000, ["a.long"])


def test_many_values_that_are_not_finite_are_counted(ledger: Ledger) -> None:
    tags = status_tags(ledger.row("aaaa"), "diverged", [(step, "loss", math.nan) for step in range(60)])
    assert tags["nonfinite_metrics"].endswith("loss = nan at step 49; 10 more")


def test_keys_are_hexadecimal_and_do_not_run_together() -> None:
    assert filter_key("a", "bc") != filter_key("ab", "c")
    assert len(filter_key("'; --")) == 32 and set(filter_key("'; --")) <= set("0123456789abcdef")


@pytest.mark.parametrize("uri", ["runs/mlruns", "file:///tmp/x", "databricks", "sqlite:x", "ftp://h"])
def test_tracking_uris_that_cannot_work_are_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="not supported; allowed"):
        check_tracking_uri(uri)


def test_the_ui_listens_on_loopback_and_knows_its_names() -> None:
    argv, environment = ui_command("postgresql://me:hush@host/db", 5001)
    assert argv[1:6] == ["-m", "mlflow", "server", "--host", "127.0.0.1"]
    assert argv[argv.index("--allowed-hosts") + 1] == "127.0.0.1:5001,localhost:5001"
    assert "hush" not in " ".join(argv)
    assert environment["MLFLOW_BACKEND_STORE_URI"] == "postgresql://me:hush@host/db"
    with pytest.raises(ValueError, match="browser"):
        ui_command("http://host:5000", 5001)
