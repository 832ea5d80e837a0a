"""What MLflow's user interface shows of runs beside metrics: data sets, the sweep's note and its files."""

import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import tracking
from orchestrator.ledger import Ledger
from orchestrator.tracking import Sink, default_tracking_uri, prepare_store
from orchestrator.tracking_records import DataInput, data_inputs
from orchestrator.tracking_store import Store, Unavailable
from tests.orchestrator.test_ledger import FakeConfig, FakeTrial

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's own use of SQLAlchemy

SCENES = {
    "name": "scenes",
    "fingerprint": "00d150fb0c4852bb",
    "use": "training",
    "images": {"train": 100, "validation": 20, "test": 30},
}
COCO = {
    "name": "coco",
    "fingerprint": "f" * 16,
    "use": "evaluation",
    "images": {"train": 1, "validation": 2, "test": 3},
}
RESULT = {"data_fingerprint": "cccc", "data_sets": [SCENES, COCO]}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's schema, which takes seconds to make."""
    state = tmp_path_factory.mktemp("template")
    prepare_store(default_tracking_uri(state), state)
    return state / "mlflow.db"


@pytest.fixture
def state(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tracking, "_BACK_OFF_S", (0.02, 0.1))
    monkeypatch.setattr(tracking, "_LEAST_PAUSE_S", 0.02)
    shutil.copy(template, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def ledger(state: Path) -> Iterator[Ledger]:
    config = FakeConfig({"method": "deit3", "data": {"train": "image_folder", "name": "birds"}})
    with Ledger.open(state / "sweep" / "ledger.db") as opened:
        opened.plan([FakeTrial("aaaa", config=config), FakeTrial("bbbb", config=config)])
        yield opened


@pytest.fixture
def client(state: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=default_tracking_uri(state))


@pytest.fixture
def sink(ledger: Ledger, state: Path) -> Iterator[Sink]:
    made = Sink(ledger, default_tracking_uri(state), "sweep", "storage", state=state, description="How many?")
    yield made
    made.close(20)


def _run(ledger: Ledger, trial_id: str, result: dict[str, Any], status: str = "finished") -> None:
    ledger.start_attempt(trial_id, 1, "host", 1)
    ledger.record_many(trial_id, 1, [(1, {"train/loss": 0.5})])
    ledger.finish(trial_id, 1, status, result, None)  # type: ignore[arg-type]


def _of(client: Any, role: str) -> list[Any]:
    experiment = client.get_experiment_by_name("sweep").experiment_id
    return list(client.search_runs([experiment], f"tags.role = '{role}'", order_by=["tags.trial_id"]))


def test_a_run_has_the_data_sets_of_its_trial_under_their_names_and_fingerprints(
    ledger: Ledger, sink: Sink, client: Any
) -> None:
    _run(ledger, "aaaa", RESULT)
    _run(ledger, "bbbb", {"data_fingerprint": "dddd"}, "diverged")
    sink.start()
    assert sink.close(30) == 0
    first, second = _of(client, "trial")
    inputs = sorted(first.inputs.dataset_inputs, key=lambda one: str(one.dataset.name))
    coco, scenes = inputs
    assert (scenes.dataset.name, scenes.dataset.digest) == ("scenes", "00d150fb0c4852bb")
    assert [(tag.key, tag.value) for tag in scenes.tags] == [("mlflow.data.context", "training")]
    assert json.loads(scenes.dataset.profile) == {"num_rows": 150, "train": 100, "validation": 20, "test": 30}
    assert (scenes.dataset.source_type, json.loads(scenes.dataset.source)) == ("local", {"uri": "scenes"})
    assert (coco.dataset.name, coco.tags[0].value) == ("coco", "evaluation")
    (only,) = second.inputs.dataset_inputs  # of a result that lists none
    assert (only.dataset.name, only.dataset.digest, only.dataset.profile) == ("birds", "dddd", None)


def test_data_sets_that_are_sent_twice_are_there_once(
    ledger: Ledger, sink: Sink, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    real, status = Store.log_inputs, Store.set_status

    def failing(self: Store, run_id: str, *rest: Any) -> None:
        if len(sent) == 1 and rest[0] == "FINISHED":
            raise Unavailable("the answer was lost")
        status(self, run_id, *rest)

    def counted(self: Store, run_id: str, inputs: Any) -> None:
        sent.append(run_id)
        real(self, run_id, inputs)

    monkeypatch.setattr(Store, "log_inputs", counted)
    monkeypatch.setattr(Store, "set_status", failing)
    _run(ledger, "aaaa", RESULT)
    sink.start()
    assert sink.close(30) == 0
    (run,) = _of(client, "trial")
    assert sent == [run.info.run_id] * 2
    assert len(run.inputs.dataset_inputs) == 2 and run.info.status == "FINISHED"


def test_data_sets_that_mlflow_refuses_do_not_hold_back_the_status(
    ledger: Ledger, sink: Sink, client: Any, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(default_tracking_uri(state), state)
    _run(ledger, "aaaa", {"data_sets": [{**SCENES, "use": "x" * 600}]})  # an input's tag has 500 characters at most
    sink.start()
    assert sink.close(30) == 0
    (run,) = _of(client, "trial")
    assert (run.info.status, run.inputs.dataset_inputs) == ("FINISHED", [])
    assert "refuses the data sets" in caplog.text
    store.log_inputs(run.info.run_id, [])  # none is no call


def test_what_is_no_data_set_is_left_out_and_what_is_long_is_cut(ledger: Ledger) -> None:
    _run(ledger, "aaaa", {"data_fingerprint": None})
    assert data_inputs(ledger.row("aaaa")) == []  # as of a program, of whose data only it knows
    assert data_inputs(ledger.row("bbbb")) == []
    listed = [{"name": "n" * 600, "fingerprint": "f" * 64, "use": "training"}, {"name": "", "fingerprint": "f"}]
    ledger.start_attempt("bbbb", 1, "host", 1)
    ledger.finish("bbbb", 1, "finished", {"data_sets": listed}, None)
    assert data_inputs(ledger.row("bbbb")) == [DataInput("n" * 500, "f" * 36, "training", {})]


def test_the_newest_note_stands_with_the_sweeps_run(ledger: Ledger, sink: Sink, client: Any) -> None:
    sink.start()
    ledger.start_attempt("aaaa", 1, "host", 1)
    assert sink.flush(20) == 0
    assert _of(client, "sweep")[0].data.tags["mlflow.note.content"] == "How many?"
    sink.describe("first")
    sink.describe("**Answer.** s3://me:hush@host/x " + "x" * 6_000)
    assert sink.close(20) == 0
    note = _of(client, "sweep")[0].data.tags["mlflow.note.content"]
    assert note.startswith("**Answer.** s3://host/x xxx") and len(note) == 5_000


def test_folders_are_uploaded_without_what_is_hidden_and_files_are_replaced(
    ledger: Ledger, sink: Sink, client: Any, state: Path, tmp_path: Path
) -> None:
    tables = state / "tables"
    (tables / "pivots").mkdir(parents=True)
    (tables / ".cache").mkdir()
    (tables / ".cache" / "shard").write_text("x")
    (tables / "pivots" / "top1.csv").write_text("a")
    (tables / "runs.parquet").write_text("first")
    sink.start()
    sink.log_artifacts([tables])
    assert sink.flush(20) == 0
    (tables / "runs.parquet").write_text("second")
    sink.log_artifacts([tables])
    assert sink.close(20) == 0
    run_id = _of(client, "sweep")[0].info.run_id
    assert {one.path for one in client.list_artifacts(run_id, "tables")} == {"tables/pivots", "tables/runs.parquet"}
    assert [one.path for one in client.list_artifacts(run_id, "tables/pivots")] == ["tables/pivots/top1.csv"]
    fetched = Path(client.download_artifacts(run_id, "tables/runs.parquet", str(tmp_path)))
    assert fetched.read_text() == "second"


def test_files_that_cannot_be_uploaded_hold_no_points_up_and_are_missed_at_the_end(
    ledger: Ledger, sink: Sink, client: Any, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[float] = []

    def refused(self: Store, run_id: str, path: Path) -> None:
        tries.append(time.monotonic())
        raise Unavailable("PermissionError: /mlartifacts")

    monkeypatch.setattr(Store, "log_artifacts", refused)
    monkeypatch.setattr(tracking, "_BACK_OFF_S", (0.02, 60.0))
    (state / "plan.json").write_text("{}")
    sink.log_artifacts([state / "plan.json"])
    sink.start()
    ledger.start_attempt("aaaa", 1, "host", 1)
    for step in range(5):
        ledger.record_many("aaaa", 1, [(step, {"train/loss": 0.5})])
        sink.notify()
        _wait(lambda: not any(one.pending for one in ledger.undelivered(leaving=False)))
    assert sink.flush(20) == 0 and len(tries) == 1  # the next one would come a minute later; nobody waits for it
    ledger.finish("aaaa", 1, "finished", RESULT, None)
    assert sink.close(2) == 2  # the file, and the sweep's own run, which has not ended
    assert len(tries) > 1 and _of(client, "trial")[0].info.status == "FINISHED"


def _wait(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_experiment_says_that_it_is_of_training_also_one_of_before(ledger: Ledger, state: Path, client: Any) -> None:
    client.create_experiment("old")
    client.create_experiment("chosen", tags={"mlflow.experimentKind": "finetuning"})
    store = Store(default_tracking_uri(state), state)
    kinds = {}
    for name in ("new", "old", "chosen"):
        store.experiment(name)
        kinds[name] = client.get_experiment_by_name(name).tags["mlflow.experimentKind"]
    assert kinds == {
        "new": "custom_model_development",
        "old": "custom_model_development",
        "chosen": "finetuning",
    }


def test_sweeps_of_one_name_are_found_the_newest_first_and_none_is_made(state: Path, ledger: Ledger) -> None:
    store = Store(default_tracking_uri(state), state)
    assert store.sweeps("nowhere") == []
    experiment = store.experiment("sweep")
    ids = [store.create(experiment, "sweep", {"role": "sweep"}, start) for start in (1, 3, 2)]
    store.create(experiment, "trial", {"role": "trial"}, 4)
    assert store.sweeps("sweep") == [(experiment, ids[1]), (experiment, ids[2]), (experiment, ids[0])]
    with sqlite3.connect(state / "mlflow.db") as database:
        names = [row[0] for row in database.execute("SELECT name FROM experiments")]
    database.close()
    assert "nowhere" not in names
