"""Attempts, retries, the recorder and the in-process executor, with real attempts of tiny functions; no torch."""

import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from orchestrator import local, publish, recorder, room
from orchestrator.attempt import Job, Outcome, Report, run_attempt
from orchestrator.control import Control
from orchestrator.delivery import Delivery
from orchestrator.dispatch import Dispatch
from orchestrator.layout import SweepLayout, TrialLayout
from orchestrator.ledger import Ledger
from orchestrator.plan import build_plan
from orchestrator.progress import describe
from orchestrator.queue import Queue
from orchestrator.recorder import Recorder
from orchestrator.run_request import Request
from orchestrator.spec import read_sweep
from orchestrator.sweep_run import failures
from orchestrator.watch import Watch
from tests.orchestrator.sweeps import Small

PROVENANCE = {"git_commit": "abc", "versions": {"torch": "0"}}

Stop = Callable[[], str | None]


def finishes(job: Job, layout: TrialLayout, number: int, report: Report, should_stop: Stop) -> Outcome:
    report(1, {"train/loss": 2.0})
    report(2, {"train/loss": 1.0, "test/linear/top1": 0.5})
    (layout.attempt(number) / "token_norms.parquet").write_bytes(b"rows")
    (layout.attempt(number) / "checkpoints").mkdir()
    return Outcome("finished", steps=2, data_fingerprint="f")


def raises(job: Job, layout: TrialLayout, number: int, report: Report, should_stop: Stop) -> Outcome:
    raise ValueError("a setting is wrong")


def disk_hiccups(job: Job, layout: TrialLayout, number: int, report: Report, should_stop: Stop) -> Outcome:
    report(number, {"train/loss": float(number)})
    if number < 3:
        raise OSError("the disk was away")
    return finishes(job, layout, number, report, should_stop)


def disk_is_gone(job: Job, layout: TrialLayout, number: int, report: Report, should_stop: Stop) -> Outcome:
    raise OSError("the disk is gone")


def waits_to_be_stopped(job: Job, layout: TrialLayout, number: int, report: Report, should_stop: Stop) -> Outcome:
    layout.stop_request.touch()  # as `orchestrate stop` does
    deadline = time.monotonic() + 10
    while (answer := should_stop()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return Outcome(answer, steps=1)


def asks_all_to_leave(job: Job, layout: TrialLayout, number: int, report: Report, should_stop: Stop) -> Outcome:
    ASKED_BY_TRIALS[layout.root.parents[2]].ask(None, "interrupted")
    return Outcome(should_stop() or "finished")


ASKED_BY_TRIALS: dict[Path, Control] = {}  # by storage, so that a trial can play the driver that is told to leave


def exits(job: Job, layout: TrialLayout, number: int, report: Report, should_stop: Stop) -> Outcome:
    raise SystemExit(3)


class AcceleratorError(RuntimeError):
    """Named as torch's, after which a process is of no more use."""


def loses_its_device(job: Job, layout: TrialLayout, number: int, report: Report, should_stop: Stop) -> Outcome:
    raise AcceleratorError("an illegal memory access was encountered")


def resumes_after_its_last_step(
    job: Job, layout: TrialLayout, number: int, report: Report, should_stop: Stop
) -> Outcome:
    """The first attempt writes the last checkpoint and dies; the second has nothing left to write."""
    if number == 1:
        (layout.attempt(1) / "checkpoints").mkdir()
        (layout.attempt(1) / "checkpoints" / "step_000000002.pt").write_bytes(b"weights")
        raise OSError("killed here")
    return Outcome("finished", steps=2)


class Driver:
    """A ledger, a layout and a recorder, as the driver has them, for one planned trial."""

    def __init__(self, folder: Path) -> None:
        sweep = read_sweep(Small(folder).write(axes={"model.num_registers": [0]}, seeds=[0]))
        self.trial = build_plan(sweep).trials[0]
        self.layout = SweepLayout(folder / "runs", folder / "runs", "small")
        self.layout.ledger.parent.mkdir(parents=True)
        self.ledger = Ledger.open(self.layout.ledger)
        self.ledger.plan([self.trial])
        self.folder = self.layout.trial(self.trial.trial_id)
        self.recorder = Recorder(self.ledger, self.layout, PROVENANCE, lambda _trial_id: 0.5, self.publish)
        self.control = ASKED_BY_TRIALS.setdefault(folder / "runs", Control())

    def publish(self, trial_id: str) -> None:
        publish.trial(self.ledger, self.layout.trial(trial_id), trial_id)

    def job(self, function: str) -> Job:
        return Job(
            trial_id=self.trial.trial_id,
            name=self.trial.name,
            config=self.trial.config.model_dump(mode="json"),
            folder=str(self.folder.root),
            cache=str(self.layout.cache),
            threads=1,
            attempts=self.row.attempts,
            last_step=self.row.last_step or 0,
            stalled=self.row.stalled,
            train=f"{__name__}:{function}",
        )

    def run(self, function: str) -> None:
        queue = Queue()
        queue.add([self.trial])
        dispatch = Dispatch(self.ledger, queue, [], lambda _trial: None, lambda: self.control.look("") is not None)
        dispatch.make_job = lambda _trial: (self.job(function), Request(1, 0))
        with Watch(self.layout, queue, self.control, lambda: False, lambda: None, print):
            local.run(dispatch, self.recorder.handle, self.control, lambda: False)

    @property
    def row(self) -> Any:
        return self.ledger.row(self.trial.trial_id)


@pytest.fixture
def driver(tmp_path: Path) -> Any:
    made = Driver(tmp_path)
    with made.ledger:
        yield made


def test_a_finished_trial_is_published_whole(driver: Driver) -> None:
    driver.run("finishes")
    result = json.loads(driver.folder.result.read_text())
    assert (result["status"], result["attempts"], result["steps"]) == ("finished", 1, 2)
    assert result["gpu_seconds"] == pytest.approx(result["seconds"] / 2)
    metrics = pq.read_table(driver.folder.metrics).to_pylist()
    assert [(m["step"], m["name"], m["value"]) for m in metrics] == [
        (1, "train/loss", 2.0),
        (2, "test/linear/top1", 0.5),
        (2, "train/loss", 1.0),
    ]
    assert (driver.folder.root / "token_norms.parquet").read_bytes() == b"rows"
    assert (driver.folder.root / "checkpoints").is_dir()
    assert not (driver.folder.attempt(1) / "checkpoints").exists()


def test_a_wrong_setting_fails_at_once_with_its_traceback(driver: Driver) -> None:
    driver.run("raises")
    assert (driver.row.state, driver.row.attempts) == ("failed", 1)
    assert driver.row.error["type"] == "ValueError"
    assert "a setting is wrong" in driver.row.error["traceback"]
    assert "a setting is wrong" in driver.folder.log(1).read_text()


def test_transient_errors_are_tried_again(driver: Driver) -> None:
    driver.run("disk_hiccups")
    assert (driver.row.state, driver.row.attempts) == ("finished", 3)


def test_transient_errors_end_after_three_retries(driver: Driver) -> None:
    driver.run("disk_is_gone")
    assert (driver.row.state, driver.row.attempts) == ("failed", 4)


def test_a_stopped_trial_is_over(driver: Driver) -> None:
    driver.run("waits_to_be_stopped")
    assert driver.row.state == "stopped"


def test_a_driver_that_leaves_makes_a_trial_resumable(driver: Driver) -> None:
    driver.run("asks_all_to_leave")
    assert (driver.row.state, driver.row.attempts) == ("planned", 1)
    assert not driver.folder.result.exists()


def test_a_driver_that_leaves_begins_nothing(driver: Driver) -> None:
    source = SimpleNamespace(is_over=lambda: False, draw=lambda: pytest.fail("a job was drawn"))
    local.run(source, driver.recorder.handle, driver.control, lambda: True)  # type: ignore[arg-type]


def test_what_a_superseded_attempt_says_changes_nothing(driver: Driver) -> None:
    trial = driver.trial.trial_id

    def say(**event: Any) -> None:
        driver.recorder.handle(trial, event)

    for number in (1, 2):
        driver.folder.begin_attempt()
        say(kind="started", attempt=number, process="host:1")
    say(kind="report", attempt=1, step=5, metrics={"train/loss": 9.0})
    say(kind="ended", attempt=1, outcome=Outcome("finished").to_json())
    assert (driver.row.state, driver.row.attempts) == ("running", 2)
    assert driver.ledger.metrics(trial) == []


def test_a_result_that_was_not_published_is_found(driver: Driver) -> None:
    driver.run("finishes")
    driver.folder.result.unlink()
    assert publish.missing(driver.ledger, driver.layout.trial) == [driver.trial.trial_id]
    publish.trial(driver.ledger, driver.folder, driver.trial.trial_id)
    assert publish.missing(driver.ledger, driver.layout.trial) == []


def test_a_trial_that_another_sweep_finished_is_adopted(driver: Driver) -> None:
    driver.run("finishes")
    other = replace(driver.layout, name="other")
    other.ledger.parent.mkdir(parents=True)
    with Ledger.open(other.ledger) as ledger:
        ledger.plan([driver.trial])
        assert recorder.adopt(ledger, other, driver.trial.trial_id, "f") == driver.folder.root
        assert ledger.row(driver.trial.trial_id).state == "finished"
        assert ledger.metrics(driver.trial.trial_id) == driver.ledger.metrics(driver.trial.trial_id)
    adopted = other.trial(driver.trial.trial_id)
    assert (adopted.root / "token_norms.parquet").read_bytes() == b"rows"


def test_attempts_are_never_the_same_number(tmp_path: Path) -> None:
    layout = TrialLayout(tmp_path / "trial")
    assert [layout.begin_attempt() for _ in range(3)] == [1, 2, 3]
    (layout.root / "attempts" / "7").mkdir()
    assert layout.begin_attempt() == 8


def test_an_attempt_outside_a_driver_returns_what_happened(driver: Driver) -> None:
    number = driver.folder.begin_attempt()
    seen: list[tuple[int, Mapping[str, float]]] = []
    outcome = run_attempt(
        driver.job("finishes"), number, lambda step, metrics: seen.append((step, metrics)), lambda: None
    )
    assert outcome.status == "finished"
    assert [step for step, _ in seen] == [1, 2]
    assert outcome.seconds > 0


def test_the_live_line_counts_trials(driver: Driver) -> None:
    driver.run("raises")
    line = describe("small", driver.ledger, driver.recorder, elapsed=65)
    assert line.startswith("small: 1/1 trials, 0 running, 1 failed")
    assert "1:05 so far" in line


def test_a_trial_that_resumed_after_its_last_step_keeps_its_weights(driver: Driver) -> None:
    driver.run("resumes_after_its_last_step")
    assert (driver.row.state, driver.row.attempts) == ("finished", 2)
    assert (driver.folder.checkpoints / "step_000000002.pt").read_bytes() == b"weights"
    assert not (driver.folder.attempt(1) / "checkpoints").exists()
    assert json.loads(driver.folder.result.read_text())["seconds"] > 0


def test_a_failed_trial_keeps_its_checkpoints_for_the_next_try(driver: Driver) -> None:
    (driver.folder.attempt(1) / "checkpoints").mkdir(parents=True)
    (driver.folder.attempt(1) / "checkpoints" / "step_000000007.pt").write_bytes(b"weights")
    driver.run("raises")
    assert driver.row.state == "failed"
    assert [f / "step_000000007.pt" for f in driver.folder.checkpoint_folders() if f.is_dir()] == [
        driver.folder.checkpoints / "step_000000007.pt"
    ]


def test_what_is_run_anew_finds_nothing_of_before(driver: Driver) -> None:
    driver.run("finishes")
    publish.forget(driver.folder)
    left = {path.name for path in driver.folder.root.iterdir()}
    assert left == {"attempts", "config.json", "log.txt"}
    assert not any(folder.exists() for folder in driver.folder.checkpoint_folders())


def test_a_trial_that_exits_is_a_failure_and_not_the_end_of_the_process(driver: Driver) -> None:
    driver.run("exits")
    assert (driver.row.state, driver.row.error["type"]) == ("failed", "SystemExit")


def test_a_lost_device_is_retried_in_another_process(driver: Driver) -> None:
    number = driver.folder.begin_attempt()
    outcome = run_attempt(driver.job("loses_its_device"), number, lambda step, metrics: None, lambda: None)
    assert (outcome.status, outcome.retryable, outcome.poisoned) == ("failed", True, True)


def test_an_attempt_with_a_hole_is_not_accepted(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    trial = driver.trial.trial_id
    driver.folder.begin_attempt()
    driver.recorder.handle(trial, {"kind": "started", "attempt": 1, "process": "host:1"})
    driver.recorder.handle(
        trial, {"kind": "report", "attempt": 1, "step": 1, "metrics": {"train/loss": "not a number"}}
    )
    driver.recorder.handle(trial, {"kind": "ended", "attempt": 1, "outcome": Outcome("finished").to_json()})
    assert driver.row.state == "planned"
    assert "could not be recorded" in caplog.text


def test_the_attempt_after_one_with_a_hole_is_accepted(driver: Driver) -> None:
    trial, finished = driver.trial.trial_id, Outcome("finished").to_json()
    for number, value in ((1, "not a number"), (2, 1.0)):
        driver.folder.begin_attempt()
        driver.recorder.handle(trial, {"kind": "started", "attempt": number, "process": "host:1"})
        report = {"kind": "report", "attempt": number, "step": 1, "metrics": {"train/loss": value}}
        driver.recorder.handle(trial, report)
        driver.recorder.handle(trial, {"kind": "ended", "attempt": number, "outcome": finished})
    assert (driver.row.state, driver.row.attempts) == ("finished", 2)
    assert driver.recorder.live == {}, "the screen shows it no more"


def test_a_process_that_is_lost_after_its_trial_has_ended_changes_nothing(driver: Driver) -> None:
    driver.run("finishes")
    for _ in range(3):
        driver.recorder.handle(driver.trial.trial_id, {"kind": "process_lost", "reason": "killed"})
    assert (driver.row.state, driver.row.attempts) == ("finished", 1)


def test_nodes_that_are_lost_are_no_fault_of_a_trial_unless_it_takes_one_after_another(driver: Driver) -> None:
    stalled = []
    for _ in range(5):
        driver.recorder.handle(driver.trial.trial_id, {"kind": "process_lost", "reason": "its node", "node": True})
        stalled.append((driver.row.state, driver.row.stalled))
    assert stalled == [*[("planned", 0)] * 3, ("planned", 1), ("failed", 1)]


def test_an_event_waits_for_space_on_a_full_disk(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(room, "_TRY_SECONDS", 0.0)
    trial, full = driver.trial.trial_id, [True] * 3
    start = driver.ledger.start_attempt

    def start_when_there_is_room(*arguments: Any) -> None:
        if full:
            full.pop()
            raise sqlite3.OperationalError("database or disk is full")
        start(*arguments)

    monkeypatch.setattr(driver.ledger, "start_attempt", start_when_there_is_room)
    driver.recorder.handle(trial, {"kind": "started", "attempt": 1, "process": "host:1"})
    assert driver.row.state == "running"
    assert caplog.text.count("the sweep waits for space") == 1, "said once a minute"


def test_a_trial_that_could_not_be_published_is_tried_again_at_the_end(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver.recorder = Recorder(driver.ledger, driver.layout, PROVENANCE, lambda _trial_id: 0.0, lambda _trial_id: None)
    driver.run("finishes")
    whole, broken = publish.trial, [True]

    def breaks_once(*arguments: Any) -> None:
        time.sleep(0.05)  # so that `complete` has something to wait for
        if broken:
            broken.pop()
            raise OSError("the disk was away")
        whole(*arguments)

    monkeypatch.setattr(publish, "trial", breaks_once)
    with Delivery(driver.layout, driver.ledger) as delivery:
        delivery.begin(driver.trial.trial_id)
        delivery.complete()
    assert broken == [] and driver.folder.result.is_file()
    assert "is tried again at the end" in caplog.text


def test_the_result_is_published_last(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = publish.write_whole
    monkeypatch.setattr(publish, "write_whole", lambda path, data: (written.append(path.name), write(path, data)))
    driver.run("finishes")
    assert written[-1] == "result.json" and "metrics.parquet" in written[:-1]


def test_a_process_that_never_came_is_a_failure_with_its_reason(driver: Driver) -> None:
    for state in ("planned", "failed"):
        gone = {"kind": "process_lost", "reason": "No module named 'orchestrator'"}
        driver.recorder.handle(driver.trial.trial_id, gone)
        assert driver.row.state == state
    assert "No module named" in driver.row.error["traceback"]


def test_a_process_that_is_lost_leaves_its_trial_to_be_run(driver: Driver) -> None:
    driver.folder.begin_attempt()
    driver.recorder.handle(driver.trial.trial_id, {"kind": "started", "attempt": 1, "process": "host:1"})
    driver.recorder.handle(driver.trial.trial_id, {"kind": "process_lost", "reason": "killed"})
    assert driver.row.state == "planned"


def test_a_trial_that_dies_a_step_earlier_or_later_each_time_gets_no_further(driver: Driver) -> None:
    found = []
    for attempt, reached in enumerate((100, 99, 100), 1):  # from a checkpoint of step 50
        driver.folder.begin_attempt()
        events: list[dict[str, Any]] = [
            {"kind": "started", "attempt": attempt, "process": "host:1"},
            {"kind": "report", "attempt": attempt, "step": 51, "metrics": {"train/loss": 1.0}},
            {"kind": "report", "attempt": attempt, "step": reached, "metrics": {"train/loss": 1.0}},
            {"kind": "process_lost", "reason": "killed"},
        ]
        for event in events:
            driver.recorder.handle(driver.trial.trial_id, event)
        found.append((driver.row.state, driver.row.stalled))
    assert found == [("planned", 0), ("planned", 1), ("failed", 1)]


def test_a_trial_whose_folder_is_gone_can_be_run_again(driver: Driver) -> None:
    driver.run("finishes")
    shutil.rmtree(driver.folder.root)
    driver.ledger.reset(driver.trial.trial_id)
    driver.run("finishes")
    assert (driver.row.state, driver.row.attempts) == ("finished", 2)


def test_adoption_refuses_other_data(driver: Driver) -> None:
    driver.run("finishes")
    other = replace(driver.layout, name="other")
    other.ledger.parent.mkdir(parents=True)
    with Ledger.open(other.ledger) as ledger:
        ledger.plan([driver.trial])
        assert recorder.adopt(ledger, other, driver.trial.trial_id, "other content") is None


def test_a_lost_ledger_is_made_again_from_the_folders(driver: Driver) -> None:
    driver.run("finishes")
    metrics = driver.ledger.metrics(driver.trial.trial_id)
    driver.ledger.close()
    for path in driver.layout.ledger.parent.glob("ledger.db*"):
        path.unlink()
    with Ledger.open(driver.layout.ledger) as ledger:
        ledger.plan([driver.trial])
        assert recorder.adopt(ledger, driver.layout, driver.trial.trial_id, "f") == driver.folder.root
        assert ledger.metrics(driver.trial.trial_id) == metrics
    assert driver.folder.checkpoints.is_dir()


@pytest.mark.parametrize("name", ["result.json", "metrics.parquet", "config.json"])
def test_a_damaged_file_is_published_again(driver: Driver, name: str) -> None:
    driver.run("finishes")
    path = driver.folder.root / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert publish.missing(driver.ledger, driver.layout.trial) == [driver.trial.trial_id]
    publish.trial(driver.ledger, driver.folder, driver.trial.trial_id)
    assert path.read_bytes() == whole


def test_failures_are_told_by_reason(driver: Driver) -> None:
    driver.run("raises")
    rows = driver.ledger.rows()
    lines = failures(rows, "small")
    assert lines[0] == "1 of 1 trials failed: a setting is wrong"
    assert "orchestrate status small --failures" in lines[1]
