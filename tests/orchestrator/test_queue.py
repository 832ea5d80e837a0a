"""Which trial begins next, what its end leads to, what running trials are told, and what a trial asks for; no Ray."""

import json
import signal
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import room, run_options
from orchestrator.attempt import Job, Outcome, Place, free_address
from orchestrator.control import Control
from orchestrator.dispatch import Dispatch
from orchestrator.jobs import job_of
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.mailbox import Mailbox
from orchestrator.plan import PlannedTrial, build_plan
from orchestrator.queue import Queue
from orchestrator.retry import History, after, has_room
from orchestrator.run_options import Interrupted, Stop, signals
from orchestrator.run_request import Request, clip
from orchestrator.spec import read_sweep
from orchestrator.watch import Watch
from tests.orchestrator.sweeps import Small


@pytest.fixture
def trials(tmp_path: Path) -> tuple[PlannedTrial, ...]:
    return build_plan(read_sweep(Small(tmp_path, registers=(0,)).write(seeds=[0, 1, 2, 3]))).trials


def ids(trials: Sequence[PlannedTrial]) -> list[str]:
    return [trial.trial_id for trial in trials]


class TestQueue:
    def test_trials_begin_in_their_order_and_a_lost_one_goes_first(self, trials: tuple[PlannedTrial, ...]) -> None:
        queue = Queue()
        queue.add(trials[:3])
        queue.add(trials)  # known ones are left out
        first, second = queue.draw(), queue.draw()
        assert (first, second) == trials[:2]
        queue.over(trials[0].trial_id, again=True)
        assert [queue.draw() for _ in range(4)] == [trials[0], trials[2], trials[3], None]
        assert set(queue.flying) == set(ids(trials))

    def test_a_limit_holds_and_can_change(self, trials: tuple[PlannedTrial, ...]) -> None:
        queue = Queue(limit=1)
        queue.add(trials)
        assert queue.draw() is not None
        assert queue.draw() is None
        queue.limit = 2
        assert queue.draw() is not None
        queue.limit = 0
        queue.over(trials[0].trial_id, again=False)
        assert queue.draw() is None and not queue.is_empty()

    def test_a_closed_queue_is_over_once_nothing_runs(self, trials: tuple[PlannedTrial, ...]) -> None:
        queue = Queue()
        queue.add(trials)
        drawn = queue.draw()
        queue.closed = "the budget is used up"
        assert drawn is not None and queue.draw() is None and not queue.is_empty()
        queue.over(drawn.trial_id, again=True)
        assert queue.is_empty()

    def test_only_those_that_may_begin_are_drawn(self, trials: tuple[PlannedTrial, ...]) -> None:
        queue = Queue()
        queue.add(trials)
        last = trials[3].trial_id
        assert queue.draw(lambda trial_id: trial_id == last) == trials[3]
        queue.over(last, again=False)
        assert queue.is_empty(lambda _trial_id: False) and not queue.is_empty()


class Follows:
    """A growth: the second trial follows when the first has finished."""

    def __init__(self, first: PlannedTrial, second: PlannedTrial) -> None:
        self.first, self.second, self.named = first, second, False

    def more(self, ledger: Ledger) -> list[PlannedTrial]:
        if self.named or ledger.row(self.first.trial_id).state != "finished":
            return []
        self.named = True
        return [self.second]

    def is_over(self, ledger: Ledger) -> bool:
        return self.named


class TestDispatch:
    @pytest.fixture
    def ledger(self, tmp_path: Path, trials: tuple[PlannedTrial, ...]) -> Any:
        with Ledger.open(tmp_path / "ledger.db") as ledger:
            ledger.plan(trials[:1])
            yield ledger

    def dispatch(self, ledger: Ledger, trials: Sequence[PlannedTrial], leaving: list[bool]) -> Dispatch:
        queue = Queue()
        growth = Follows(trials[0], trials[1])
        made = Dispatch(ledger, queue, [growth], lambda _trial: None, lambda: bool(leaving))
        made.add(trials[:1])
        made.grow()
        made.make_job = lambda trial: (Job(trial.trial_id, trial.name, {}, "", "", 1), Request(1, 0))
        return made

    def drawn(self, dispatch: Dispatch) -> str | None:
        found = dispatch.draw()
        return None if found is None else found[0].trial_id

    def test_a_finished_trial_leads_to_the_one_that_follows(
        self, ledger: Ledger, trials: tuple[PlannedTrial, ...]
    ) -> None:
        dispatch = self.dispatch(ledger, trials, leaving=[])
        first, second = ids(trials[:2])
        assert self.drawn(dispatch) == first and self.drawn(dispatch) is None and not dispatch.is_over()
        ledger.start_attempt(first, 1, "host", 1)
        ledger.finish(first, 1, "finished", {}, None)
        dispatch.over(first)
        assert ledger.row(second).state == "planned"
        assert self.drawn(dispatch) == second

    def test_a_lost_trial_is_given_out_again_until_it_got_no_further_twice(
        self, ledger: Ledger, trials: tuple[PlannedTrial, ...]
    ) -> None:
        dispatch = self.dispatch(ledger, trials, leaving=[])
        first = trials[0].trial_id
        for number, progressed in enumerate([True, False, True, None, False], 1):
            assert self.drawn(dispatch) == first
            ledger.start_attempt(first, number, "host", 1)
            ledger.lose_attempt(first, number, "killed", progressed)
            dispatch.over(first)
        assert self.drawn(dispatch) == first
        ledger.start_attempt(first, 6, "host", 1)
        ledger.lose_attempt(first, 6, "killed", progressed=False)
        dispatch.over(first)
        assert self.drawn(dispatch) is None and dispatch.is_over()

    def test_who_leaves_gives_nothing_out(self, ledger: Ledger, trials: tuple[PlannedTrial, ...]) -> None:
        leaving: list[bool] = []
        dispatch = self.dispatch(ledger, trials, leaving)
        first = self.drawn(dispatch)
        assert first is not None
        leaving.append(True)
        ledger.start_attempt(first, 1, "host", 1)
        ledger.lose_attempt(first, 1, "interrupted", progressed=None)
        dispatch.over(first)
        assert self.drawn(dispatch) is None and dispatch.is_over()

    def test_what_follows_waits_for_space_on_a_full_disk(
        self, ledger: Ledger, trials: tuple[PlannedTrial, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(room, "_TRY_SECONDS", 0.0)
        dispatch = self.dispatch(ledger, trials, leaving=[])
        first, second = ids(trials[:2])
        assert self.drawn(dispatch) == first
        ledger.start_attempt(first, 1, "host", 1)
        ledger.finish(first, 1, "finished", {}, None)
        add, full = ledger.add, [True, True]

        def add_when_there_is_room(new: Sequence[PlannedTrial]) -> None:
            if full:
                full.pop()
                raise sqlite3.OperationalError("database or disk is full")
            add(new)

        monkeypatch.setattr(ledger, "add", add_when_there_is_room)
        dispatch.over(first)
        assert self.drawn(dispatch) == second


class TestControl:
    def test_the_first_reason_holds_and_a_trials_own_goes_before_that_of_all(self) -> None:
        control, heard = Control(), list[tuple[str | None, str]]()
        control.ask("a", "pruned")
        with control.heard_by(lambda trial_id, reason: heard.append((trial_id, reason))):
            control.ask("a", "stopped")
            control.ask(None, "interrupted")
            control.ask(None, "interrupted")
        control.ask("b", "stopped")  # nobody listens any more
        assert heard == [("a", "pruned"), (None, "interrupted")]
        assert [control.look(name) for name in "abc"] == ["pruned", "stopped", "interrupted"]

    def test_a_mailbox_keeps_what_a_trial_was_told_for_its_next_beginning(self) -> None:
        mailbox, job = Mailbox(), {"name": "x", "gpus": 0.0, "ranks": 1}
        mailbox.put("a", job)
        assert mailbox.job("a") == (job, None, {})
        mailbox.ask("a", "stopped")
        mailbox.take_back("a")
        mailbox.put("a", job)
        assert mailbox.job("a") == (job, "stopped", {})

    def test_a_mailbox_leaves_no_device_out_that_a_trial_needs(self) -> None:
        mailbox = Mailbox()
        for _ in range(2):
            found = mailbox.device_failed("GPU 0", "a", 1.0, 4.0)
        assert found == {"GPU 0": True} and mailbox.is_left_out("GPU 0")
        mailbox.put("b", {"gpus": 1.0, "ranks": 4})
        assert not mailbox.is_left_out("GPU 0")

    def test_a_watch_hears_stop_requests_settings_and_a_spent_budget(
        self, tmp_path: Path, trials: tuple[PlannedTrial, ...]
    ) -> None:
        layout = SweepLayout(tmp_path, tmp_path, "small")
        queue, control, said = Queue(), Control(), list[str]()
        queue.add(trials)
        drawn = queue.draw()
        assert drawn is not None
        spent: list[str] = []
        with Watch(layout, queue, control, lambda: False, lambda: spent[0] if spent else None, said.append):
            folder = layout.trial(drawn.trial_id)
            folder.root.mkdir(parents=True)
            folder.stop_request.touch()
            layout.settings.write_text(json.dumps({"max_concurrent": 3}))
            _wait(lambda: control.look(drawn.trial_id) == "stopped" and queue.limit == 3)
            spent.append("the budget of 1 hours is used up")
            _wait(lambda: queue.closed is not None and control.look("another") == "interrupted")
        assert said == ["from now on 3 trials at a time", spent[0]]

    def test_settings_that_cannot_be_read_hide_no_spent_budget(
        self, tmp_path: Path, trials: tuple[PlannedTrial, ...], caplog: pytest.LogCaptureFixture
    ) -> None:
        layout = SweepLayout(tmp_path, tmp_path, "small")
        queue, control, spent = Queue(), Control(), list[str]()
        layout.settings.parent.mkdir(parents=True)
        with Watch(layout, queue, control, lambda: False, lambda: spent[0] if spent else None, lambda _text: None):
            layout.settings.write_text("{")
            spent.append("used up")
            _wait(lambda: queue.closed == "used up" and control.look("any") == "interrupted")

    def test_what_was_set_for_an_earlier_run_holds_no_more(self, tmp_path: Path) -> None:
        layout, queue = SweepLayout(tmp_path, tmp_path, "small"), Queue(limit=2)
        layout.settings.parent.mkdir(parents=True)
        layout.settings.write_text(json.dumps({"max_concurrent": 0}))
        with Watch(layout, queue, Control(), lambda: False, lambda: None, print):
            assert queue.limit == 2

    def test_who_leaves_tells_all_trials(self, tmp_path: Path) -> None:
        control = Control()
        with Watch(SweepLayout(tmp_path, tmp_path, "small"), Queue(), control, lambda: True, lambda: None, print):
            assert control.look("any") == "interrupted", "before the first trial begins"


class TestSignals:
    def test_the_first_asks_to_leave_the_second_ends_at_once_and_handlers_come_back(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        exits, timers = list[int](), list[tuple[float, Any]]()
        monkeypatch.setattr("os._exit", exits.append)
        timer = lambda seconds, _function, arguments: SimpleNamespace(  # noqa: E731
            start=lambda: timers.append((seconds, arguments))
        )
        monkeypatch.setattr(run_options.threading, "Timer", timer)
        before, stop = signal.getsignal(signal.SIGUSR1), Stop()
        with signals(stop):
            stop.check()
            signal.raise_signal(signal.SIGUSR1)
            assert stop() and stop.signal == signal.SIGUSR1 and exits == []
            assert timers == [(run_options.LAST_SECONDS, (128 + signal.SIGUSR1,))]
            with pytest.raises(Interrupted) as left:
                stop.check()
            assert left.value.number == signal.SIGUSR1
            signal.raise_signal(signal.SIGTERM)
            assert exits == [143]
        assert signal.getsignal(signal.SIGUSR1) is before


def _wait(condition: Any) -> None:
    import time

    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class TestRequests:
    def test_each_rank_has_its_bundle_beside_a_sliver_for_the_thin_trial(self) -> None:
        assert Request(2, 0).bundles() == [{"CPU": 0.01}, {"CPU": 1.99}]
        assert Request(2, 0, 2).bundles() == [{"CPU": 0.01}, {"CPU": 0.99}, {"CPU": 0.99}]
        assert Request(4, 2, 2).bundles() == [{"CPU": 0.01}, {"CPU": 1.99, "GPU": 1.0}, {"CPU": 1.99, "GPU": 1.0}]
        assert Request(1, 0.25).bundles() == [{"CPU": 0.01}, {"CPU": 0.99, "GPU": 0.25}]

    def test_ranks_are_cut_to_the_devices_that_there_are(self) -> None:
        nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}]
        assert clip(Request(16, 4, 4), nodes) == Request(16, 4, 4)
        assert clip(Request(32, 8, 8), nodes) == Request(16, 4, 4)
        assert clip(Request(4, 0, 2), [{"CPU": 1.0}, {"CPU": 1.0}]) == Request(2, 0, 2)
        assert clip(Request(4, 0, 2), [{"CPU": 1.0}]) == Request(1, 0, 1)

    def test_ranks_get_fewer_cpus_where_they_would_not_all_fit_at_once(self) -> None:
        assert clip(Request(16, 4, 4), [{"CPU": 4.0, "GPU": 4.0}]) == Request(4, 4, 4)
        assert clip(Request(8, 0, 2), [{"CPU": 4.0}]) == Request(4, 0, 2)
        assert clip(Request(9, 0, 3), [{"CPU": 4.0}, {"CPU": 3.0}]) == Request(6, 0, 3)  # two of 2 CPUs and one
        uneven = [{"CPU": 2.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}]
        assert clip(Request(16, 4, 4), uneven) == Request(4, 4, 4)

    def test_a_job_has_what_the_ledger_knows_and_each_ranks_share_of_the_request(
        self, tmp_path: Path, trials: tuple[PlannedTrial, ...]
    ) -> None:
        with Ledger.open(tmp_path / "ledger.db") as ledger:
            ledger.plan(trials)
            name = trials[0].trial_id
            ledger.start_attempt(name, 3, "host", 1)
            ledger.record(name, 3, 7, {"x": 1.0})
            ledger.lose_attempt(name, 3, "killed", progressed=False)
            job = job_of(trials[0], ledger.row(name), SweepLayout(tmp_path, tmp_path, "small"), Request(8, 2, 2))
        assert (job.attempts, job.last_step, job.stalled) == (3, 7, 1)
        assert (job.threads, job.gpus, job.ranks) == (4, 1.0, 2)

    def test_a_rank_finds_the_first_one_on_the_network_that_was_named(self) -> None:
        assert Place().environment() == {}
        assert Place(1, 2, "10.0.0.1", 29500, "eth0").environment() == {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "10.0.0.1",
            "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": "eth0",
            "NCCL_SOCKET_IFNAME": "eth0",
            "TP_SOCKET_IFNAME": "eth0",
        }
        address, port = free_address("lo")
        assert address == "127.0.0.1" and 0 < port < 65536
        with pytest.raises(ValueError, match=r"network_interface nosuch0 cannot be used .*allowed: .*lo"):
            free_address("nosuch0")


class TestRetry:
    JOB = Job("a", "a", {}, "", "", 1)

    def failed(self, **how: Any) -> Outcome:
        return Outcome("failed", error={"type": "E", "message": "no", "traceback": ""}, **how)

    def test_a_full_disk_is_no_fault_of_the_trial(self) -> None:
        history = History()
        for _ in range(10):
            event = after(self.failed(disk_full=True, retryable=True), history, 1, self.JOB)
            assert (event["kind"], event["charged"]) == ("lost", False)
        assert history.errors == 0

    def test_after_a_full_disk_there_must_be_more_room_than_there_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        free = [10 * 2**30]
        monkeypatch.setattr("shutil.disk_usage", lambda _folder: SimpleNamespace(total=100 * 2**30, free=free[0]))
        history, job = History(), replace(self.JOB, folder=str(tmp_path / "not there yet"))
        assert has_room(Path(job.folder), history.room)
        after(self.failed(disk_full=True), history, 1, job)
        assert not has_room(Path(job.folder), history.room)
        free[0] += 2**20
        assert has_room(Path(job.folder), history.room)
        free[0] = 2**20
        assert not has_room(tmp_path)

    def test_a_store_that_is_away_is_no_fault_of_the_trial(self) -> None:
        history = History()
        for _ in range(10):
            event = after(self.failed(storage_away=True, retryable=True), history, 1, self.JOB)
            assert (event["kind"], event["charged"]) == ("lost", False)

    def test_activation_checkpointing_is_tried_once_where_memory_lacks(self) -> None:
        history = History()
        first = after(self.failed(out_of_memory=True), history, 1, self.JOB)
        assert (first["kind"], first["charged"]) == ("lost", False)
        again = history.next_job(self.JOB)
        assert again.save_memory
        assert after(self.failed(out_of_memory=True), History.of(again), 2, again)["kind"] == "ended"
        program = Job("a", "a", {}, "", "", 1, train="orchestrator.program:run")
        assert after(self.failed(out_of_memory=True), History(), 1, program)["kind"] == "ended"

    def test_an_attempt_lost_with_its_node_counts_only_where_it_takes_one_after_another(self) -> None:
        history, node = History(), "rank 1: The actor died because its node has died. Node Id: 8d2a"
        assert history.is_charged("rank 1: Worker unexpectedly exits with a connection error code 2. End of file")
        assert [history.is_charged(node) for _ in range(4)] == [False, False, False, True]
        history.reached(1)
        assert history.is_charged(node) and history.may_retry_loss(), "what got further counts from anew"
        assert [history.is_charged(node) for _ in range(4)] == [False, False, False, True]

    def test_what_the_ledger_knows_of_earlier_attempts_counts(self) -> None:
        assert not History.of(Job("a", "a", {}, "", "", 1, last_step=10, stalled=1)).may_retry_loss()
        history = History.of(Job("a", "a", {}, "", "", 1, last_step=10, stalled=1))
        history.reached(11)
        assert history.may_retry_loss()
