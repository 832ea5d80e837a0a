"""What status and logs say of a sweep, running or not; ledgers are written here as a driver writes them."""

import dataclasses
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import inspect
from orchestrator import status as command
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.plan import PlannedTrial, build_plan
from orchestrator.spec import read_sweep
from orchestrator.status import Asked, describe
from tests.orchestrator.sweeps import Small


class Clock:
    """Milliseconds since 1970 that a test sets."""

    now = 1_000_000_000_000

    def __call__(self) -> int:
        return self.now


class Sweep:
    """A sweep of four trials whose ledger is open, as while it runs."""

    def __init__(self, folder: Path) -> None:
        self.small, self.clock = Small(folder), Clock()
        self.trials: tuple[PlannedTrial, ...] = build_plan(read_sweep(self.small.write())).trials
        self.layout = SweepLayout(self.small.storage, self.small.storage, "small")
        self.layout.root.mkdir(parents=True)
        self.layout.plan.write_text("{}")
        self.ledger = Ledger.open(self.layout.ledger, clock=self.clock)
        self.ledger.plan(self.trials)

    def begin(self, index: int, number: int = 1) -> str:
        key = self.trials[index].trial_id
        self.layout.trial(key).attempt(number).mkdir(parents=True, exist_ok=True)
        self.ledger.start_attempt(key, number, socket.gethostname(), 1, 0.0)
        return key

    def asked(self, **changes: bool) -> Asked:
        return Asked("small", self.small.storage, self.small.storage, **changes)


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Sweep]:
    made = Sweep(tmp_path)
    yield made
    made.ledger.close()


def test_a_running_sweep_is_described(sweep: Sweep) -> None:
    key = sweep.begin(0)
    sweep.clock.now += 2_000
    sweep.ledger.record(key, 1, 2, {"train/loss": 1.0})
    sweep.clock.now += 4_000
    sweep.ledger.record(key, 1, 6, {"train/loss": 0.5})
    described = describe(sweep.layout, sweep.clock.now + 3_000)
    trial = described["trials"][0]
    assert described["run_by"]["host"] == socket.gethostname()
    assert described["counts"] == {"planned": 3, "running": 1}
    assert described["spent_seconds"] == 9.0
    assert (trial["step"], trial["steps"], trial["seconds_since_report"]) == (6, 12, 3.0)
    assert trial["images_per_second"] == 16.0, "4 steps of 16 images in 4 s"
    assert trial["seconds_left"] == 6.0, "6 steps at one a second"
    assert described["seconds_left"] == 6.0 + 3 * 12.0
    assert described["trials"][1]["seconds_since_report"] is None


def test_what_an_attempt_repeats_of_earlier_ones_is_no_speed(sweep: Sweep) -> None:
    key = sweep.begin(0)
    sweep.clock.now += 1_000
    sweep.ledger.record(key, 1, 6, {"train/loss": 1.0})
    sweep.ledger.lose_attempt(key, 1, "lost", progressed=True)
    sweep.clock.now += 1
    sweep.begin(0, 2)
    sweep.clock.now += 5_000
    sweep.ledger.record(key, 2, 6, {"train/loss": 1.0})
    trial = describe(sweep.layout, sweep.clock.now)["trials"][0]
    assert (trial["images_per_second"], trial["seconds_left"]) == (None, None)
    assert trial["seconds_since_report"] == 5.0, "since it began"
    for step in (8, 9):
        sweep.clock.now += 1_000
        sweep.ledger.record(key, 2, step, {"train/loss": 0.5})
    assert describe(sweep.layout, sweep.clock.now)["trials"][0]["images_per_second"] == 16.0, "a step of 16 a second"


def test_a_sweep_whose_driver_was_killed_is_run_by_nobody(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    key = sweep.begin(0)
    sweep.ledger.close()
    command.status(sweep.asked())
    said = capsys.readouterr().out.splitlines()
    assert "run by nobody: its driver is gone" in said[0]
    assert said[1].startswith(f"{key} running   attempts 1")
    assert describe(sweep.layout, sweep.clock.now)["run_by"] is None


def test_failures_show_traceback_and_the_end_of_the_log(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    key = sweep.begin(1)
    sweep.layout.trial(key).log(1).write_text("".join(f"line {n}\n" for n in range(30)))
    error = {"type": "ValueError", "message": "it broke", "traceback": "Traceback (most recent call last):\n  deep"}
    sweep.ledger.finish(key, 1, "failed", {}, error)
    command.status(sweep.asked(failures=True))
    said = capsys.readouterr().out
    assert "  deep\n--- end of the log, 20 lines\nline 10\n" in said and "line 29" in said and "line 9\n" not in said
    assert "— it broke" in said
    command.status(sweep.asked(failures=True, as_json=True))
    assert json.loads(capsys.readouterr().out)["trials"][1]["log"][0] == "line 10"
    command.status(sweep.asked())
    assert "line 10" not in capsys.readouterr().out


def test_all_sweeps_are_a_line_each_and_a_damaged_ledger_hides_none(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, torn = (sweep.small.storage / name / "ledger.db" for name in ("broken", "torn"))
    for path in (broken, torn):
        path.parent.mkdir()
    broken.write_text("no database")
    with Ledger.open(torn) as ledger:
        ledger.plan(sweep.trials)
    size = torn.stat().st_size
    torn.write_bytes(torn.read_bytes()[:4096] + b"\x5a" * (size - 4096))  # it opens
    command.status(Asked(None, sweep.small.storage, sweep.small.storage))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and said[0].startswith("broken: ") and "cannot be read" in said[0]
    assert said[1].startswith("small: 4 planned, 0:00 spent, run by process ")
    assert said[2].startswith("torn: ") and "orchestrate doctor" in said[2]


def test_a_trial_is_meant_by_the_beginning_of_its_id_or_by_its_name_which_may_have_slashes(sweep: Sweep) -> None:
    key, storage = sweep.trials[0].trial_id, sweep.small.storage
    named = dataclasses.replace(sweep.trials[0], name="deit3 image_folder/mine seed0")
    sweep.ledger.plan([named, *sweep.trials[1:]])
    for said in (key, key[:6], f"small/{key[:6]}", named.name, f"small/{named.name}"):
        assert inspect.find(said, storage, storage)[1].trial_id == key
    for said in (f"other/{key}", "small/", "", "image_folder/mine seed0"):
        with pytest.raises(ValueError, match="there is no trial"):
            inspect.find(said, storage, storage)


def test_a_running_trial_can_be_stopped_that_has_no_folder_on_this_machine(sweep: Sweep) -> None:
    key, storage = sweep.trials[0].trial_id, sweep.small.storage
    with pytest.raises(ValueError, match="is planned; only a running trial can be stopped"):
        inspect.stop(key, storage, storage)
    sweep.ledger.start_attempt(key, 1, "elsewhere", 1)
    inspect.stop(key, storage, storage)
    assert sweep.layout.trial(key).stop_request.exists()


def test_watching_goes_on_until_ctrl_c(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    command.status(sweep.asked(watch=True), sleep)
    assert slept == [2.0] * 3
    assert capsys.readouterr().out.count("small: 4 planned") == 3


def test_logs_of_attempts_and_ranks(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    key, storage = sweep.begin(0), sweep.small.storage
    folder = sweep.layout.trial(key)
    folder.log(1).write_text("first\n")
    folder.log(1, 1).write_text("of the second rank\n")
    folder.attempt(2).mkdir()
    folder.log(2).write_text("again\n")
    inspect.logs(key[:6], storage, storage)
    name = sweep.trials[0].name
    first = f"=== {name}, attempt 1 ===\nfirst\n=== {name}, attempt 1, rank 1 ===\nof the second rank\n"
    assert capsys.readouterr().out == f"{first}=== {name}, attempt 2 ===\nagain\n"
    inspect.logs(key, storage, storage, attempt=1)
    assert capsys.readouterr().out == first
    with pytest.raises(ValueError, match="has no attempt 3; attempts: 1, 2"):
        inspect.logs(key, storage, storage, attempt=3)


def test_following_goes_on_while_the_trial_runs(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    key, storage = sweep.begin(0), sweep.small.storage
    log = sweep.layout.trial(key).log(1)
    log.write_text("first\n")

    def more() -> None:
        with log.open("a") as file:
            file.write("second\n")
        sweep.ledger.finish(key, 1, "finished", {}, None)

    timer = threading.Timer(0.7, more)
    timer.start()
    inspect.logs(key, storage, storage, follow=True)
    timer.join()
    assert capsys.readouterr().out.endswith(" ===\nfirst\nsecond\n")
