"""The ledger: states, fencing, histories over attempts, the hold, and what survives a kill."""

import math
import os
import sqlite3
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator import ledger_file
from orchestrator.holder import Hold
from orchestrator.ledger import IllegalMove, Ledger, LedgerError
from orchestrator.ledger_schema import MOVES, OVER, SCHEMA, STATES, Role


@dataclass
class FakeConfig:
    values: dict[str, Any] = field(default_factory=lambda: {"model": {"num_registers": 4}})

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        assert mode == "json"
        return self.values


@dataclass
class FakeTrial:
    trial_id: str
    name: str = "deit3 nano reg4 seed0"
    cell: dict[str, Any] = field(default_factory=lambda: {"model.num_registers": 4})
    seed: int = 0
    config: FakeConfig = field(default_factory=FakeConfig)
    role: Role = "cell"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "num registers?#%" / "ledger.db"  # characters that mean something in a URI


@pytest.fixture
def ledger(path: Path):
    ticks = iter(range(1_000, 10_000_000))
    with Ledger.open(path, clock=lambda: next(ticks)) as opened:
        opened.plan([FakeTrial("a"), FakeTrial("b", name="second", seed=1)])
        yield opened


def test_a_planned_trial_comes_back_as_it_was_planned(ledger: Ledger) -> None:
    row = ledger.rows()[1]
    assert (row.trial_id, row.name, row.position, row.seed, row.state) == ("b", "second", 1, 1, "planned")
    assert (row.cell, row.config) == ({"model.num_registers": 4}, {"model": {"num_registers": 4}})
    assert (row.attempts, row.error, row.result, row.last_step, row.in_plan) == (0, None, None, None, True)


def test_a_new_plan_keeps_what_is_done_and_marks_what_is_gone(ledger: Ledger) -> None:
    ledger.start_attempt("a", 1, "host", 1)
    ledger.record("a", 1, 0, {"train/loss": 1.0})
    ledger.finish("a", 1, "finished", {"steps": 1}, None)
    ledger.plan([FakeTrial("c"), FakeTrial("a", name="renamed", config=FakeConfig({"new": 1}))])
    assert [(r.trial_id, r.position, r.state) for r in ledger.rows()] == [("c", 0, "planned"), ("a", 1, "finished")]
    assert [r.trial_id for r in ledger.rows(in_plan_only=False)] == ["c", "a", "b"]
    finished = ledger.row("a")
    assert (finished.name, finished.result, finished.config) == (
        "renamed",
        {"steps": 1},
        {"model": {"num_registers": 4}},
    )
    assert ledger.metrics("a") == [(0, "train/loss", 1.0)]
    assert ledger.counts()["planned"] == 1 and ledger.counts(in_plan_only=False)["planned"] == 2


def test_two_trials_with_one_id_are_refused_and_change_nothing(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="same id"):
        ledger.plan([FakeTrial("x"), FakeTrial("x")])
    assert [row.trial_id for row in ledger.rows()] == ["a", "b"]


def _bring_to(ledger: Ledger, state: str) -> None:
    if state != "planned":
        ledger.start_attempt("a", 1, "host", 1)
    if state in OVER:
        assert ledger.finish("a", 1, state, {}, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("before", STATES)
@pytest.mark.parametrize("after", STATES)
def test_every_move_is_allowed_or_refused_as_the_table_says(ledger: Ledger, before: str, after: str) -> None:
    _bring_to(ledger, before)
    allowed = (before, after) in {
        ("planned", "running"),
        ("running", "planned"),
        *(("running", over) for over in ("finished", "diverged", "pruned", "stopped", "failed")),
    }
    if after == "running":
        if allowed:
            ledger.start_attempt("a", 2, "host", 1)
        else:
            with pytest.raises(IllegalMove, match=f"from {before} to running"):
                ledger.start_attempt("a", 2, "host", 1)
    elif after == "planned":
        assert ledger.lose_attempt("a", 1, "lost", progressed=True) is allowed
    else:
        assert ledger.finish("a", 1, after, {}, None) is allowed  # type: ignore[arg-type]
    assert ledger.row("a").state == (after if allowed else before)


def test_the_table_of_moves_is_the_one_of_the_design() -> None:
    assert set(STATES) == {"planned", "running", *OVER}
    assert MOVES["planned"] == {"running"} and MOVES["running"] == {"planned", *OVER}


def test_a_state_that_is_not_final_cannot_be_finished_with(ledger: Ledger) -> None:
    ledger.start_attempt("a", 1, "host", 1)
    with pytest.raises(ValueError, match="not a final state"):
        ledger.finish("a", 1, "planned", {}, None)


def test_a_stale_attempt_changes_nothing(ledger: Ledger) -> None:
    ledger.start_attempt("a", 1, "host", 1)
    assert ledger.lose_attempt("a", 1, "node lost", progressed=False)
    assert not ledger.record("a", 1, 5, {"x": 1.0})  # between two attempts
    ledger.start_attempt("a", 2, "host", 2)
    assert not ledger.record("a", 1, 5, {"x": 1.0})
    assert not ledger.record_many("a", 1, [(5, {"x": 1.0})])
    assert not ledger.lose_attempt("a", 1, "again", progressed=False)
    assert not ledger.finish("a", 1, "finished", {}, None)
    assert ledger.record("a", 2, 5, {"x": 2.0})
    assert ledger.finish("a", 2, "failed", {}, {"type": "ValueError"})
    assert not ledger.record("a", 2, 6, {"x": 3.0})
    assert not ledger.finish("a", 2, "finished", {}, None)
    assert ledger.metrics("a") == [(5, "x", 2.0)]
    assert (ledger.row("a").state, ledger.row("a").error) == ("failed", {"type": "ValueError"})


def test_numbers_of_attempts_only_rise(ledger: Ledger) -> None:
    ledger.start_attempt("a", 3, "host", 1)
    ledger.lose_attempt("a", 3, "lost", progressed=True)
    with pytest.raises(IllegalMove, match="attempt 3 cannot follow attempt 3"):
        ledger.start_attempt("a", 3, "host", 1)
    assert ledger.row("a").state == "planned"


def test_an_unknown_trial_is_a_key_error(ledger: Ledger) -> None:
    with pytest.raises(KeyError):
        ledger.record("nobody", 1, 0, {"x": 1.0})


def test_losses_in_a_row_without_progress_are_counted(ledger: Ledger) -> None:
    for number, progressed in enumerate([False, False, True, False], 1):
        ledger.start_attempt("a", number, "host", 1)
        ledger.lose_attempt("a", number, "lost", progressed=progressed)
    assert ledger.row("a").stalled == 1
    ledger.start_attempt("a", 5, "host", 1)
    assert ledger.release_running() == ["a"]  # the driver's own end is not charged
    assert (ledger.row("a").stalled, ledger.row("a").state) == (1, "planned")


def test_what_a_dead_driver_left_running_is_released_also_where_it_is_planned_no_more(ledger: Ledger) -> None:
    ledger.start_attempt("b", 1, "host", 1)
    ledger.plan([FakeTrial("a")])
    assert ledger.release_running() == ["b"]
    assert ledger.row("b").state == "planned"


def test_what_a_trial_has_come_to_is_on_the_disk_and_a_report_goes_there_with_it(ledger: Ledger) -> None:
    said: list[str] = []
    ledger._connection.set_trace_callback(said.append)

    def levels() -> list[str]:
        found = [line.rpartition(" ")[2] for line in said if line.startswith("PRAGMA synchronous")]
        said.clear()
        return found

    ledger.start_attempt("a", 1, "host", 1)
    ledger.record("a", 1, 1, {"x": 1.0})
    assert levels() == ["NORMAL", "NORMAL"]
    ledger.lose_attempt("a", 1, "lost", progressed=True)
    ledger.start_attempt("a", 2, "host", 1)
    ledger.finish("a", 2, "finished", {}, None)
    assert levels() == ["FULL", "NORMAL", "FULL"]


def test_seconds_of_a_trial_that_is_run_anew_do_not_count_those_before(path: Path) -> None:
    now = [0]
    with Ledger.open(path, clock=lambda: now[0]) as ledger:
        ledger.plan([FakeTrial("a")])
        for number, seconds in ((1, 5), (2, 7)):
            ledger.start_attempt("a", number, "host", 1)
            now[0] += 1000 * seconds
            ledger.lose_attempt("a", number, "lost", progressed=True)
            now[0] += 60_000
        assert [ledger.seconds_before("a", number) for number in (1, 2, 3)] == [0.0, 5.0, 12.0]
        ledger.reset("a")
        assert ledger.seconds_before("a", 3) == 0.0


def test_nan_and_infinities_survive(ledger: Ledger) -> None:
    ledger.start_attempt("a", 1, "host", 1)
    ledger.record("a", 1, 0, {"nan": math.nan, "inf": math.inf, "minus": -math.inf, "tiny": 5e-324, "third": 1 / 3})
    values = {name: value for _, name, value in ledger.metrics("a")}
    assert math.isnan(values.pop("nan"))
    assert values == {"inf": math.inf, "minus": -math.inf, "tiny": 5e-324, "third": 1 / 3}
    assert math.isnan(next(p.value for p in ledger.since("a", 0, 10) if p.name == "nan"))


def _loss(step: int) -> dict[str, float]:
    return {"train/loss": math.nan if step == 7 else 1 / (step + 3), "train/lr": 0.1 * step}


def test_metrics_are_the_same_in_one_go_and_over_overlapping_attempts(ledger: Ledger) -> None:
    ledger.start_attempt("a", 1, "host", 1)
    ledger.record_many("a", 1, [(step, _loss(step)) for step in range(10)])
    for number, steps in enumerate([range(6), range(4, 9), range(4, 5), range(2), range(2, 10)], 1):
        ledger.start_attempt("b", number, "host", 1)
        for step in steps:
            ledger.record("b", number, step, _loss(step))
        if number < 5:
            ledger.lose_attempt("b", number, "lost", progressed=True)
    ledger.finish("b", 5, "finished", {}, None)
    assert repr(ledger.metrics("a")) == repr(ledger.metrics("b")) and len(ledger.metrics("a")) == 20


def test_what_a_lost_attempt_reported_past_the_end_of_the_accepted_one_is_gone(ledger: Ledger) -> None:
    ledger.start_attempt("a", 1, "host", 1)
    ledger.record_many("a", 1, [(10, {"x": 1.0}), (20, {"x": 2.0, "at the checkpoint": 5.0}), (30, {"x": 3.0})])
    ledger.lose_attempt("a", 1, "lost", progressed=True)
    ledger.start_attempt("a", 2, "host", 1)
    ledger.record("a", 2, 20, {"x": 2.5})  # pruned at step 20, before step 30
    ledger.finish("a", 2, "pruned", {}, None)
    assert ledger.metrics("a") == [(10, "x", 1.0), (20, "at the checkpoint", 5.0), (20, "x", 2.5)]
    assert ledger.row("a").last_step == 20


def test_the_order_of_reports_at_a_step_does_not_matter(ledger: Ledger) -> None:
    ledger.start_attempt("a", 1, "host", 1)
    ledger.record("a", 1, 3, {"z": 1.0})
    ledger.record("a", 1, 3, {"b": 2.0})
    ledger.record("a", 1, 1, {"z": 3.0})
    assert ledger.metrics("a") == [(1, "z", 3.0), (3, "b", 2.0), (3, "z", 1.0)]
    assert ledger.row("a").last_step == 3


def test_reset_drops_everything_but_the_number_of_the_attempt(ledger: Ledger) -> None:
    ledger.start_attempt("a", 1, "host", 1)
    with pytest.raises(IllegalMove, match="running"):
        ledger.reset("a")
    ledger.record("a", 1, 3, {"x": 1.0})
    ledger.finish("a", 1, "diverged", {"steps": 3}, None)
    ledger.mark_run("a", 0, "run0")
    ledger.mark_delivered("a", "run0", seq=1, status="diverged")
    ledger.reset("a")
    row = ledger.row("a")
    assert (row.state, row.result, row.last_step, row.attempts, row.generation, row.run_id) == (
        "planned",
        None,
        None,
        1,
        1,
        None,
    )
    assert ledger.metrics("a") == [] and ledger.undelivered() == []
    with pytest.raises(IllegalMove):
        ledger.start_attempt("a", 1, "host", 1)
    ledger.start_attempt("a", 2, "host", 1)
    assert not ledger.record("a", 1, 4, {"x": 1.0})
    ledger.mark_run("a", 0, "run0")  # a sink that has not heard of the reset
    assert ledger.row("a").run_id is None


def test_what_mlflow_lacks_is_known_point_by_point(ledger: Ledger) -> None:
    ledger.start_attempt("a", 1, "host", 1)
    ledger.record_many("a", 1, [(1, {"x": 1.0}), (2, {"x": 2.0}), (3, {"x": 3.0})])
    (lacking,) = ledger.undelivered()
    assert (lacking.trial_id, lacking.pending, lacking.wanted, lacking.delivered) == ("a", 3, "running", None)
    assert [(p.step, p.value) for p in ledger.since("a", 0, 2)] == [(1, 1.0), (2, 2.0)]
    ledger.mark_run("a", 0, "run")
    ledger.mark_delivered("a", "run", seq=ledger.since("a", 0, 2)[-1].seq, status="running")
    assert [d.pending for d in ledger.undelivered()] == [1]
    ledger.mark_delivered("a", "run", seq=3)
    assert ledger.undelivered() == []
    assert [d.wanted for d in ledger.undelivered(leaving=True)] == ["interrupted"]
    ledger.lose_attempt("a", 1, "lost", progressed=True)
    assert [d.wanted for d in ledger.undelivered()] == ["interrupted"]
    ledger.mark_run("a", 0, "another run")
    assert [(d.pending, d.delivered) for d in ledger.undelivered()] == [(3, None)]


def test_a_point_hidden_by_a_later_attempt_is_still_delivered_when_it_comes_again(ledger: Ledger) -> None:
    ledger.start_attempt("a", 1, "host", 1)
    ledger.record_many("a", 1, [(1, {"x": 1.0}), (2, {"x": 2.0}), (3, {"x": 3.0})])
    before = {p.step: p.time_ms for p in ledger.since("a", 0, 10)}
    ledger.lose_attempt("a", 1, "lost", progressed=True)
    ledger.start_attempt("a", 2, "host", 1)
    ledger.record("a", 2, 2, {"x": 2.0})
    ledger.mark_run("a", 0, "run")
    ledger.mark_delivered("a", "run", seq=max(p.seq for p in ledger.since("a", 0, 10)))
    ledger.record("a", 2, 3, {"x": 3.0})
    (again,) = ledger.since("a", 4, 10)
    assert (again.step, again.value, again.time_ms) == (3, 3.0, before[3])  # an equal point keeps its time


def test_values_of_the_sweep(ledger: Ledger, path: Path) -> None:
    assert ledger.meta("fingerprint") is None
    ledger.set_meta("fingerprint", {"scenes": "00ff"})
    with Ledger.open(path, writer=False) as reader:
        assert reader.meta("fingerprint") == {"scenes": "00ff"}


def test_a_reader_needs_no_hold_and_cannot_write(ledger: Ledger, path: Path) -> None:
    with Ledger.open(path, writer=False) as reader:
        ledger.start_attempt("a", 1, "host", 1)
        assert reader.counts()["running"] == 1
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.set_meta("x", 1)


def test_a_ledger_that_nobody_has_open_can_be_read(ledger: Ledger, path: Path) -> None:
    ledger.close()
    with Ledger.open(path, writer=False) as reader:
        assert len(reader.rows()) == 2


def test_a_missing_ledger_a_newer_one_and_a_damaged_one_are_refused(ledger: Ledger, path: Path) -> None:
    ledger.close()
    with pytest.raises(LedgerError, match="no ledger at"):
        Ledger.open(path.with_name("other.db"), writer=False)
    assert not path.with_name("other.db").exists()
    with sqlite3.connect(path) as raw:
        raw.execute("PRAGMA user_version = 99")
    raw.close()
    for writer in (True, False):
        with pytest.raises(LedgerError, match=r"newer version .*99"):
            Ledger.open(path, writer=writer)
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(LedgerError, match=r"orchestrate doctor .* --fix makes it anew"):
        Ledger.open(path)


def test_an_empty_ledger_is_just_being_started_only_where_somebody_runs_the_sweep(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    with pytest.raises(LedgerError, match=r"nobody runs the sweep; orchestrate doctor .+ --fix makes it anew"):
        Ledger.open(path, writer=False)
    hold = Hold(path.with_suffix(".lock"))
    try:
        with pytest.raises(LedgerError, match=f"only just being started by process {os.getpid()}"):
            Ledger.open(path, writer=False)
    finally:
        hold.release()


def test_a_whole_ledger_that_cannot_be_used_now_is_not_to_be_moved_away(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_file, "_BUSY_S", 0.05)
    ledger.close()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    for writer in (True, False):
        with pytest.raises(LedgerError, match=r"cannot be used now \(database is locked\)$"):
            Ledger.open(path, writer=writer)
    other.close()
    Ledger.open(path).close()  # the hold was let go of
    path.with_name("folder.db").mkdir()
    with pytest.raises(LedgerError, match=r"folder.db cannot be opened"):
        Ledger.open(path.with_name("folder.db"))


def test_several_threads_write_without_loss(ledger: Ledger) -> None:
    ledger.start_attempt("a", 1, "host", 1)
    threads = [
        threading.Thread(target=lambda k=k: [ledger.record("a", 1, i, {f"m{k}": float(i)}) for i in range(20)])
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ledger.metrics("a")) == 80
    assert sorted(p.seq for p in ledger.since("a", 0, 100)) == list(range(1, 81))


def test_a_change_that_fails_half_way_leaves_nothing(ledger: Ledger) -> None:
    ledger.start_attempt("a", 1, "host", 1)
    with pytest.raises(sqlite3.IntegrityError):
        ledger.record_many("a", 1, [(1, {"x": 1.0}), (2, {None: 1.0})])  # type: ignore[dict-item]
    assert ledger.metrics("a") == [] and ledger.record("a", 1, 1, {"x": 1.0})


def test_a_ledger_of_the_first_version_is_brought_up_to_date_with_its_trials(path: Path) -> None:
    path.parent.mkdir(parents=True)
    old = sqlite3.connect(path)
    for statement in SCHEMA:
        old.execute(statement)
    old.execute("PRAGMA user_version = 1")
    old.execute(
        "INSERT INTO trials (trial_id, name, position, in_plan, cell, seed, config, state) VALUES "
        "('a', 'deit3', 0, 1, '{}', 0, '{}', 'finished')"
    )
    old.commit()
    old.close()
    with pytest.raises(LedgerError, match="older version"):
        Ledger.open(path, writer=False)
    with Ledger.open(path) as ledger:
        assert [(row.trial_id, row.state, row.role) for row in ledger.rows()] == [("a", "finished", "cell")]
        ledger.append_event("study", {"ask": 0})
        assert ledger.events("study") == [{"ask": 0}]


def test_added_trials_follow_those_of_the_plan_and_leave_known_ones_alone(ledger: Ledger) -> None:
    ledger.plan([FakeTrial("a"), FakeTrial("b")])
    ledger.start_attempt("b", 1, "host", 1)
    ledger.add([FakeTrial("c", role="search"), FakeTrial("b")])
    ledger.add([FakeTrial("d")])
    assert [(row.trial_id, row.state, row.role) for row in ledger.rows()] == [
        ("a", "planned", "cell"),
        ("b", "running", "cell"),
        ("c", "planned", "search"),
        ("d", "planned", "cell"),
    ]
    ledger.add([FakeTrial("c")])  # chosen: its search trial is a row of the table as well
    assert ledger.row("c").role == "cell"
    ledger.plan([FakeTrial("a")])
    assert [row.trial_id for row in ledger.rows()] == ["a"]


def test_events_of_studies_are_kept_in_their_order_and_apart(ledger: Ledger) -> None:
    ledger.append_event("one", {"ask": 0})
    ledger.append_event("two", {"ask": 0})
    ledger.append_event("one", {"tell": 0, "value": 0.5})
    assert ledger.events("one") == [{"ask": 0}, {"tell": 0, "value": 0.5}]
    assert ledger.events("two") == [{"ask": 0}]
    assert ledger.events("three") == []
