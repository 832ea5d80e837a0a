"""The thin trial and its ranks without a cluster: what becomes of an attempt, and who is told what."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.attempt import Job, Outcome, Report
from orchestrator.layout import TrialLayout
from orchestrator.mailbox import Mailbox
from orchestrator.rank import Rank
from orchestrator.run_request import Request

# Ray keeps what it finds here when it is imported, and tests that start a cluster in this process need the token's.
with pytest.MonkeyPatch.context() as _patch:
    _patch.setenv("RAY_AUTH_MODE", "token")
    import ray

    from orchestrator import trial
    from orchestrator.ranks import Ended, Hung, Lost, Ranks
    from orchestrator.tune_callback import Draws, Events

PLACE = {"rank": 0, "ranks": 1}
NODE = "rank 0: The actor died because its node has died."


def waits_for_a_word(
    job: Job, layout: TrialLayout, number: int, report: Report, should_stop: Callable[[], str | None]
) -> Outcome:
    """Ends at once as whatever it was told."""
    return Outcome(should_stop() or "finished")


def job(folder: Path, **how: Any) -> Job:
    return Job("a", "a", {"execution": {}}, str(folder), str(folder), 1, **{"ranks": 1, **how})


class TestRank:
    def run(self, rank: Rank, job: Job, number: int) -> str:
        TrialLayout(Path(job.folder)).attempt(number).mkdir(parents=True)
        ((event,),) = rank.run(asdict(job), number, PLACE, beat_seconds=5.0)
        return str(event["outcome"]["status"])

    def test_a_word_that_comes_before_its_attempt_is_not_lost_and_meant_for_no_other(self, tmp_path: Path) -> None:
        rank, told = Rank(), job(tmp_path, train=f"{__name__}:waits_for_a_word")
        rank.leave("a", 1, "stopped")  # by the actor's other thread
        assert self.run(rank, told, 1) == "stopped"
        assert self.run(rank, told, 2) == "finished"
        rank.leave("another", 3, "stopped")
        assert self.run(rank, told, 3) == "finished"

    def test_steps_without_a_report_are_heard_of(self, tmp_path: Path) -> None:
        going = threading.Event()
        STEPS[str(tmp_path)] = going
        TrialLayout(tmp_path).attempt(1).mkdir(parents=True)
        events = Rank().run(asdict(job(tmp_path, train=f"{__name__}:steps")), 1, PLACE, beat_seconds=0.02)
        assert next(events) == [{"kind": "alive"}]
        going.set()
        assert [event["kind"] for batch in events for event in batch if event["kind"] != "alive"] == ["ended"]


STEPS: dict[str, threading.Event] = {}


def steps(job: Job, layout: TrialLayout, number: int, report: Report, should_stop: Callable[[], str | None]) -> Outcome:
    """Makes steps until it is told that this is enough."""
    while not STEPS[job.folder].wait(0.005):
        should_stop()
    return Outcome("finished")


def ranks_of(*outcomes: Outcome | Lost) -> Ranks:
    """The ranks of a trial, of which the first has just ended, the others as given."""
    made = Ranks.__new__(Ranks)
    made._actors, made._streams = [None] * len(outcomes), dict.fromkeys(range(len(outcomes)))
    rest = list(outcomes[1:])

    def others(_seconds: float) -> Sequence[tuple[int, Outcome | Lost]]:
        made._streams.clear()
        return list(enumerate(rest, 1))

    made._rest = others  # type: ignore[assignment, method-assign]
    return made


def ended(ranks: Ranks, outcome: Outcome) -> Any:
    report = {"kind": "report", "attempt": 1, "step": 3, "metrics": {}}
    return ranks._one_ended(0, [report, {"kind": "ended", "attempt": 1, "outcome": outcome.to_json()}])


def failed(message: str) -> Outcome:
    return Outcome("failed", error={"type": "E", "message": message, "traceback": ""})


class TestRanks:
    def test_the_first_ranks_word_counts_with_its_last_reports(self) -> None:
        found = ended(ranks_of(Outcome("finished"), Outcome("finished")), Outcome("finished"))
        assert (found.outcome.status, found.whole, [event["step"] for event in found.events]) == ("finished", True, [3])

    def test_ranks_that_are_silent_for_too_long_hang(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ranks = ranks_of(Outcome("finished"))
        ranks._heard, ranks._limit = time.monotonic(), 60.0
        monkeypatch.setattr(ray, "wait", lambda *_, **__: ([], []))
        assert ranks.next_events(0.0) == []
        ranks._heard -= 61.0
        assert isinstance(ranks.next_events(0.0), Hung)

    def test_ranks_of_which_one_is_gone_are_not_used_again(self) -> None:
        found = ended(ranks_of(Outcome("finished"), Lost("killed")), Outcome("finished"))
        assert (found.outcome.status, found.whole) == ("finished", False)

    def test_the_word_of_the_rank_that_failed_of_itself_is_what_users_read(self) -> None:
        blames = failed("Connection closed by peer")
        found = ended(ranks_of(blames, failed("no such file")), blames)
        assert (found.outcome.error["message"], found.rank) == ("no such file", 1)
        assert isinstance(ended(ranks_of(blames, blames), blames), Lost)
        assert ended(ranks_of(blames, Lost("killed")), blames) == Lost("killed")


class FakeRanks:
    """Ranks that say what a test has written down for their attempts."""

    def __init__(self, says: list[Any]) -> None:
        self.says, self.told, self.made, self.ended = says, list[str](), 0, list[bool]()

    def __call__(self, count: int) -> "FakeRanks":
        self.made += 1
        return self

    def devices(self, rank: int | None = None) -> list[str]:
        return ["GPU 0", "GPU 1"] if rank is None else [f"GPU {rank}"]

    def start(self, job: Job, number: int) -> None:
        if isinstance(self.says[0], Exception):
            raise self.says.pop(0)

    def leave(self, reason: str) -> None:
        self.told.append(reason)

    def next_events(self, seconds: float) -> Any:
        return self.says.pop(0)

    def end(self, *, hung: bool = False) -> None:
        self.ended.append(hung)


class Thin:
    """A thin trial over fake ranks, stepped until it is over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, *says: Any, told: str | None = None) -> None:
        self.ranks, self.mailbox = FakeRanks(list(says)), Mailbox()
        self.mailbox.put("a", asdict(job(folder)))
        if told is not None:
            self.mailbox.ask("a", told)
        monkeypatch.setattr(trial, "Ranks", self.ranks)
        monkeypatch.setattr(trial, "LOOK_SECONDS", 0.0)
        monkeypatch.setattr(ray, "get", lambda answer, timeout=None: answer)
        self._thin = trial.ThinTrial.__new__(trial.ThinTrial)
        names = ("job", "look", "device_failed", "device_works", "is_left_out")
        asked = SimpleNamespace(**{name: _remote(getattr(self.mailbox, name)) for name in names})
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 3.0})
        monkeypatch.setattr(trial, "_GUARD_SECONDS", 0.0)
        self._thin.setup({"trial": "a"}, mailbox=asked)

    def step(self) -> list[dict[str, Any]]:
        result = self._thin.step()
        assert result["trial"] == "a"
        assert result["done"] == (result["events"][-1]["kind"] == "ended")
        return list(result["events"])

    def kinds(self) -> list[tuple[str, int]]:
        """What it hands on until the trial is over: kind and attempt."""
        events: list[dict[str, Any]] = []
        while not events or events[-1]["kind"] != "ended":
            events += self.step()
        self.last = events[-1].get("outcome", {})
        return [(event["kind"], event["attempt"]) for event in events]


def _remote(function: Callable[..., Any]) -> Any:
    return SimpleNamespace(remote=function)


def report(step: int, attempt: int) -> list[dict[str, Any]]:
    return [{"kind": "report", "attempt": attempt, "step": step, "metrics": {}}]


class Source:
    """Jobs that a test has written down, None for none now, and who is over."""

    def __init__(self, *jobs: Job | None) -> None:
        self.jobs, self.ended = list(jobs), list[str]()

    def draw(self) -> tuple[Job, Request] | None:
        drawn = self.jobs.pop(0)
        return None if drawn is None else (drawn, Request(2, 0))

    def over(self, trial_id: str) -> None:
        self.ended.append(trial_id)

    def is_over(self) -> bool:
        return not self.jobs


class TestTune:
    def test_it_is_given_the_jobs_of_a_source_one_by_one(self, tmp_path: Path) -> None:
        source, box = Source(job(tmp_path), None, None), Mailbox()
        leaving: list[bool] = []
        mailbox = SimpleNamespace(put=_remote(box.put), take_back=_remote(box.take_back))
        draws = Draws(source, mailbox, lambda: bool(leaving))
        assert draws.suggest("of tune") == {"trial": "a", "request": {"cpus": 2, "gpus": 0, "ranks": 1}}
        assert box.job("a")[0] == asdict(job(tmp_path))
        assert draws.suggest("of tune") is None, "nothing now"
        assert draws.suggest("of tune") == Draws.FINISHED
        draws.over("a")
        assert source.ended == ["a"]
        source.jobs.append(job(tmp_path))
        leaving.append(True)
        assert draws.suggest("of tune") == Draws.FINISHED

    def test_every_event_is_handed_on_and_then_that_the_trial_is_over(self, tmp_path: Path) -> None:
        said: list[Any] = []
        events = Events(lambda trial_id, event: said.append((trial_id, event["kind"])), said.append)
        of_tune = SimpleNamespace(trial_id="t1", config={"trial": "a"}, error_file=None)
        result = {"trial": "a", "events": [{"kind": "report"}, {"kind": "ended"}]}
        events.on_trial_result(1, [], of_tune, result)
        events.on_trial_complete(1, [], of_tune)
        assert said == [("a", "report"), ("a", "ended"), "a"]
        said.clear()
        events.on_trial_error(1, [], of_tune)
        assert said == [("a", "process_lost"), "a"]

    @pytest.mark.parametrize("end", ["on_trial_complete", "on_trial_error"])
    def test_a_trial_that_holds_a_left_out_device_is_over_once_and_is_no_loss(self, end: str) -> None:
        said: list[Any] = []
        events = Events(lambda trial_id, event: said.append((trial_id, event["kind"])), said.append)
        of_tune = SimpleNamespace(trial_id="t1", config={"trial": "a"}, error_file=None)
        result = {"trial": "a", "events": [{"kind": "lost"}, {"kind": "left_out", "device": "GPU 1"}]}
        events.on_trial_result(1, [], of_tune, result)
        assert said == [("a", "lost"), "a"] and events.has_guards()
        getattr(events, end)(1, [], of_tune)
        assert said == [("a", "lost"), "a"] and not events.has_guards()

    def test_what_took_a_process_is_read_from_tunes_file(self, tmp_path: Path) -> None:
        said: list[Any] = []
        (tmp_path / "error.txt").write_text(NODE)
        of_tune = SimpleNamespace(trial_id="t1", config={"trial": "a"}, error_file=str(tmp_path / "error.txt"))
        Events(lambda _trial_id, event: said.append(event)).on_trial_error(1, [], of_tune)
        assert said == [{"kind": "process_lost", "reason": NODE, "node": True}]


FINISHED = Ended([], Outcome("finished"), whole=True)


class TestThinTrial:
    def test_ranks_stay_for_the_next_trial(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        thin = Thin(monkeypatch, tmp_path, report(1, 1), FINISHED, FINISHED)
        assert thin.kinds() == [("started", 1), ("report", 1), ("ended", 1)]
        assert thin._thin.reset_config({"trial": "a"})
        assert thin.kinds() == [("started", 2), ("ended", 2)]
        assert (thin.ranks.made, thin.ranks.ended) == (1, [])

    @pytest.mark.parametrize(
        "last", [Ended([], Outcome("finished"), whole=False), Ended([], Outcome("failed", poisoned=True), whole=True)]
    )
    def test_ranks_that_are_of_no_more_use_are_ended(
        self, last: Ended, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        thin = Thin(monkeypatch, tmp_path, last)
        assert thin.kinds() == [("started", 1), ("ended", 1)]
        assert thin.ranks.ended == [False]

    def test_a_device_that_failed_twice_is_held_and_its_trial_given_back(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        broken = Ended([], Outcome("failed", error={"message": "ECC"}, retryable=True, poisoned=True), True, rank=1)
        thin = Thin(monkeypatch, tmp_path, broken, broken)
        events = [event for _ in range(4) for event in thin.step()]
        assert [event["kind"] for event in events] == ["started", "lost", "started", "lost", "left_out"]
        assert ("charged" in events[1], events[3]["charged"], events[4]["device"]) == (False, False, "GPU 1")
        assert thin._thin.step() == {"trial": "a", "events": [], "done": False}
        thin.mailbox.device_failed("GPU 2", "a", 1.0, 3.0)  # the trial fails elsewhere too: it is to blame
        assert thin._thin.step() == {"trial": "a", "events": [], "done": True}

    def test_no_attempt_begins_on_a_device_that_is_left_out(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        thin = Thin(monkeypatch, tmp_path, FINISHED)
        for trial_id in ("b", "c"):
            thin.mailbox.device_failed("GPU 0", trial_id, 1.0, 3.0)
        assert thin._thin.reset_config({"trial": "a"})
        assert [event["kind"] for event in thin.step()] == ["left_out"]

    def test_a_device_on_which_a_trial_finishes_is_no_suspect_any_more(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        thin = Thin(monkeypatch, tmp_path, FINISHED)
        thin.mailbox.device_failed("GPU 1", "b", 1.0, 3.0)
        assert thin._thin.reset_config({"trial": "a"})
        thin.kinds()
        assert thin.mailbox.job("a")[2] == {}

    def test_a_lost_rank_is_replaced_as_long_as_attempts_get_further(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        gone = Lost("killed")
        thin = Thin(monkeypatch, tmp_path, report(1, 1), gone, report(2, 2), gone, report(3, 3), gone, FINISHED)
        assert [kind for kind, _ in thin.kinds()] == ["started", "report", "lost"] * 3 + ["started", "ended"]
        assert thin.ranks.made == 4

    @pytest.mark.parametrize(("gone", "kind"), [(Lost("killed"), "ProcessLost"), (Hung("silent"), "Hung")])
    def test_two_losses_without_getting_further_fail_the_trial(
        self, gone: Lost | Hung, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        thin = Thin(monkeypatch, tmp_path, gone, gone)
        assert thin.kinds() == [("started", 1), ("lost", 1), ("started", 2), ("ended", 2)]
        assert (thin.last["status"], thin.last["error"]["type"]) == ("failed", kind)
        assert thin.ranks.ended == [kind == "Hung"] * 2

    def test_a_loss_with_the_node_is_not_charged(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        thin = Thin(monkeypatch, tmp_path, Lost(NODE), Lost(NODE), Lost(NODE), FINISHED)
        events = [event for _ in range(7) for event in thin.step()]
        assert [event["charged"] for event in events if event["kind"] == "lost"] == [False] * 3

    def test_a_rank_that_died_while_it_was_idle_is_replaced(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        thin = Thin(monkeypatch, tmp_path, ray.exceptions.RayError("it died"), FINISHED)
        assert thin.kinds() == [("started", 1), ("lost", 1), ("started", 2), ("ended", 2)]
        assert thin.ranks.made == 2

    def test_a_network_that_is_not_there_is_a_failure_with_its_own_words(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        cause = ValueError("execution.network_interface eth9 cannot be used")
        error = ray.exceptions.RayTaskError("address", "", cause)
        thin = Thin(monkeypatch, tmp_path, error)
        assert thin.kinds() == [("started", 1), ("ended", 1)]
        assert (thin.last["status"], thin.last["error"]["type"]) == ("failed", "ValueError")

    def test_what_the_trial_is_told_is_told_to_its_ranks(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        thin = Thin(monkeypatch, tmp_path, report(1, 1), Ended([], Outcome("pruned"), whole=True))
        assert [event["kind"] for event in thin.step() + thin.step()] == ["started", "report"]
        assert thin.ranks.told == []
        thin.mailbox.ask("a", "pruned")
        assert thin.step()[-1]["outcome"]["status"] == "pruned"
        assert thin.ranks.told == ["pruned"]

    def test_who_was_told_before_it_began_begins_nothing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        left = Thin(monkeypatch, tmp_path / "left", told="interrupted")
        assert (left.kinds(), left.ranks.made) == ([("ended", 0)], 0)
        stopped = Thin(monkeypatch, tmp_path / "stopped", told="stopped")
        assert (stopped.kinds(), stopped.ranks.made) == ([("started", 1), ("ended", 1)], 0)
        assert stopped.last["status"] == "stopped"
