"""The ledger: the truth about a sweep's trials, their states, attempts and metrics, in one SQLite file."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.holder import SweepHeld
from orchestrator.ledger_file import LedgerError, LedgerFile
from orchestrator.ledger_schema import (
    MOVES,
    OVER,
    ROW_COLUMNS,
    STATES,
    Delivery,
    PlannedTrial,
    Point,
    Role,
    Spending,
    State,
    TrialRow,
    trial_row,
)

__all__ = ["IllegalMove", "Ledger", "LedgerError", "State", "SweepHeld", "TrialRow"]

# The status that MLflow should show: nothing before the first attempt, `interrupted` for a lost one.
_WANTED = """CASE WHEN state = 'planned' AND attempts = attempts_before THEN NULL
    WHEN state = 'planned' OR (state = 'running' AND :leaving) THEN 'interrupted' ELSE state END"""


class IllegalMove(RuntimeError):
    """A change of state that the state machine does not have."""


class Ledger(LedgerFile):
    """One sweep's ledger. One process writes (from any of its threads), any number may read.

    Every change is one transaction, on the disk as `LedgerFile` says. Calls that name an attempt are fenced: once a
    newer attempt has begun or the trial is over, they change nothing and return False.
    """

    # The plan

    def plan(self, trials: Sequence[PlannedTrial]) -> None:
        """Make `trials`, in this order, the current plan. Known trials keep state, attempts and metrics; those that
        are no longer planned are kept, marked as not in the plan.

        Raises:
            ValueError: two planned trials have the same id.
        """
        if len({trial.trial_id for trial in trials}) != len(trials):
            raise ValueError("two planned trials have the same id")
        with self._change() as db:
            db.execute("UPDATE trials SET in_plan = 0")
            _insert(db, trials, first=0)

    def add(self, trials: Sequence[PlannedTrial]) -> None:
        """Put `trials` behind those of the current plan; of one that is planned already nothing but the role changes,
        since a trial by which a search chooses may turn out to be a row of the table too.
        """
        with self._change() as db:
            planned = {row[0] for row in self._read("SELECT trial_id FROM trials WHERE in_plan")}
            cells = [(t.trial_id,) for t in trials if t.trial_id in planned and t.role == "cell"]
            db.executemany("UPDATE trials SET role = 'cell' WHERE trial_id = ?", cells)
            last = self._read("SELECT coalesce(max(position), -1) FROM trials WHERE in_plan")[0][0]
            _insert(db, [t for t in trials if t.trial_id not in planned], first=last + 1)

    def rows(self, in_plan_only: bool = True) -> list[TrialRow]:
        """All trials in the order of the plan; with `in_plan_only=False` those of earlier plans follow."""
        where = "WHERE in_plan" if in_plan_only else ""
        found = self._read(f"SELECT {ROW_COLUMNS} FROM trials {where} ORDER BY in_plan DESC, position, trial_id")
        return [trial_row(row) for row in found]

    def newest_finished(self, limit: int) -> list[TrialRow]:
        """The `limit` trials that finished last, the newest first, whether they are still planned or not."""
        sql = f"SELECT {ROW_COLUMNS} FROM trials WHERE state = 'finished' ORDER BY ended_ms DESC LIMIT ?"
        return [trial_row(row) for row in self._read(sql, (limit,))]

    def row(self, trial_id: str) -> TrialRow:
        """One trial.

        Raises:
            KeyError: the ledger does not know it.
        """
        found = self._read(f"SELECT {ROW_COLUMNS} FROM trials WHERE trial_id = ?", (trial_id,))
        if not found:
            raise KeyError(trial_id)
        return trial_row(found[0])

    def counts(self, in_plan_only: bool = True) -> dict[State, int]:
        """How many trials are in each state, zeros included."""
        where = "WHERE in_plan" if in_plan_only else ""
        found = {row[0]: row[1] for row in self._read(f"SELECT state, count(*) FROM trials {where} GROUP BY state")}
        return {state: found.get(state, 0) for state in STATES}

    # Attempts

    def start_attempt(self, trial_id: str, number: int, host: str, pid: int, gpus: float | None = None) -> None:
        """planned → running. Numbers rise, also over --rerun: the number is what late writers are known by.

        `gpus` are those of all ranks together, 0 where the trial has none; None where nothing is computed, as when a
        trial is adopted: such attempts count in no budget.

        Raises:
            IllegalMove: the trial is not planned, or `number` is not above that of every earlier attempt.
        """
        now = self._clock()
        with self._change(durable=False) as db:
            row = self.row(trial_id)
            _check_move(row, "running")
            if number <= row.attempts:
                raise IllegalMove(f"{trial_id}: attempt {number} cannot follow attempt {row.attempts}")
            db.execute(
                "INSERT INTO attempts (trial_id, number, host, pid, started_ms, gpus) VALUES (?,?,?,?,?,?)",
                (trial_id, number, host, pid, now, gpus),
            )
            db.execute(
                """UPDATE trials SET state = 'running', attempts = ?, started_ms = coalesce(started_ms, ?),
                ended_ms = NULL WHERE trial_id = ?""",
                (number, now, trial_id),
            )

    def record(self, trial_id: str, attempt: int, step: int, metrics: Mapping[str, float]) -> bool:
        """Keep what an attempt reports at a step; the same step and name again replaces the value. False: stale."""
        return self.record_many(trial_id, attempt, [(step, metrics)])

    def record_many(self, trial_id: str, attempt: int, reports: Sequence[tuple[int, Mapping[str, float]]]) -> bool:
        """`record` for several (step, metrics) in one commit."""
        points = [(int(step), name, float(value)) for step, metrics in reports for name, value in metrics.items()]
        now = self._clock()
        with self._change(durable=False) as db:
            if not self._is_current(trial_id, attempt):
                return False
            if not points:
                return True
            seq = self._last_seq(db)
            rows = [
                (trial_id, step, name, value, attempt, seq + i, now) for i, (step, name, value) in enumerate(points, 1)
            ]
            # The time stays where the value does: MLflow drops an equal point with an equal time when it comes again.
            db.executemany(
                """INSERT INTO metrics (trial_id, step, name, value, attempt, seq, time_ms) VALUES (?,?,?,?,?,?,?)
                ON CONFLICT (trial_id, step, name) DO UPDATE SET attempt = excluded.attempt, seq = excluded.seq,
                    time_ms = CASE WHEN value IS excluded.value THEN time_ms ELSE excluded.time_ms END,
                    value = excluded.value""",
                rows,
            )
            self._note_steps(db, trial_id, attempt, [step for step, _, _ in points])
            db.execute("INSERT OR REPLACE INTO meta VALUES ('seq', ?)", (json.dumps(seq + len(points)),))
        return True

    def _note_steps(self, db: sqlite3.Connection, trial_id: str, attempt: int, steps: Sequence[int]) -> None:
        """Keep the first step of the attempt, and the last one of the trial, which a new attempt may set back."""
        of_attempt = "SELECT first_step FROM attempts WHERE trial_id = ? AND number = ?"
        first = db.execute(of_attempt, (trial_id, attempt)).fetchone()[0]
        last = (
            None if first is None else self._read("SELECT last_step FROM trials WHERE trial_id = ?", (trial_id,))[0][0]
        )
        first = min(steps) if first is None else min(first, *steps)
        last = max(steps) if last is None else max(last, *steps)
        db.execute("UPDATE attempts SET first_step = ? WHERE trial_id = ? AND number = ?", (first, trial_id, attempt))
        db.execute("UPDATE trials SET last_step = ? WHERE trial_id = ?", (last, trial_id))

    def lose_attempt(self, trial_id: str, number: int, reason: str, progressed: bool | None) -> bool:
        """running → planned. `TrialRow.stalled` counts the losses in a row without progress; None leaves it as it is,
        where the loss is no fault of the trial. False: stale.
        """
        with self._change() as db:
            if not self._is_current(trial_id, number):
                return False
            before = self.row(trial_id).stalled
            stalled = before if progressed is None else 0 if progressed else before + 1
            db.execute("UPDATE trials SET state = 'planned', stalled = ? WHERE trial_id = ?", (stalled, trial_id))
            self._end_attempt(db, trial_id, number, "lost", reason)
        return True

    def finish(
        self, trial_id: str, attempt: int, state: State, result: Mapping[str, Any], error: Mapping[str, Any] | None
    ) -> bool:
        """running → a final state. False: stale.

        Raises:
            ValueError: `state` is not final.
        """
        if state not in OVER:
            raise ValueError(f"{state!r} is not a final state; allowed: {', '.join(sorted(OVER))}")
        values = (state, json.dumps(dict(result)), None if error is None else json.dumps(dict(error)), trial_id)
        with self._change() as db:
            if not self._is_current(trial_id, attempt):
                return False
            db.execute("UPDATE trials SET state = ?, result = ?, error = ? WHERE trial_id = ?", values)
            self._end_attempt(db, trial_id, attempt, state, None)
        return True

    def reset(self, trial_id: str) -> None:
        """Back to planned for --rerun: metrics, result and error are dropped, the count of attempts goes on.

        Raises:
            IllegalMove: the trial is running.
        """
        with self._change() as db:
            if self.row(trial_id).state == "running":
                raise IllegalMove(f"{trial_id} is running and cannot be reset")
            db.execute("DELETE FROM metrics WHERE trial_id = ?", (trial_id,))
            db.execute(
                """UPDATE trials SET state = 'planned', attempts_before = attempts, generation = generation + 1,
                stalled = 0, last_step = NULL, error = NULL, result = NULL, started_ms = NULL, ended_ms = NULL,
                run_id = NULL, delivered_seq = 0, delivered_status = NULL, published = NULL WHERE trial_id = ?""",
                (trial_id,),
            )

    def release_running(self) -> list[str]:
        """Put what a dead driver left running back to planned, uncharged; the ids. Call it before any attempt.

        Such an attempt ends with its last report: how long it went on after that nobody has seen, and the time until
        this call was nobody's work.
        """
        last = "SELECT max(time_ms) FROM metrics WHERE trial_id = ? AND attempt = ?"
        begun = "SELECT started_ms FROM attempts WHERE trial_id = ? AND number = ?"
        with self._change() as db:
            running = self._read("SELECT trial_id, attempts FROM trials WHERE state = 'running' ORDER BY position")
            left = [(row[0], row[1]) for row in running]
            for key in left:
                ended = max(self._read(begun, key)[0][0], self._read(last, key)[0][0] or 0)
                db.execute("UPDATE trials SET state = 'planned' WHERE trial_id = ?", key[:1])
                self._end_attempt(db, *key, "lost", "the driver ended", ended)
        return [trial_id for trial_id, _ in left]

    def _is_current(self, trial_id: str, attempt: int) -> bool:
        found = self._read("SELECT state, attempts FROM trials WHERE trial_id = ?", (trial_id,))
        if not found:
            raise KeyError(trial_id)
        return tuple(found[0]) == ("running", attempt)

    def _end_attempt(
        self,
        db: sqlite3.Connection,
        trial_id: str,
        number: int,
        outcome: str,
        reason: str | None,
        ended_ms: int | None = None,
    ) -> None:
        now = self._clock() if ended_ms is None else ended_ms
        db.execute(
            "UPDATE attempts SET ended_ms = ?, outcome = ?, reason = ? WHERE trial_id = ? AND number = ?",
            (now, outcome, reason, trial_id, number),
        )
        db.execute("UPDATE trials SET ended_ms = ? WHERE trial_id = ?", (now, trial_id))

    def seconds_before(self, trial_id: str, number: int) -> float:
        """Seconds that attempts before `number` took, those that a --rerun dropped left out."""
        sql = """SELECT coalesce(sum(a.ended_ms - a.started_ms), 0) / 1000.0 FROM attempts a JOIN trials t
            USING (trial_id) WHERE a.trial_id = ? AND a.number < ? AND a.number > t.attempts_before"""
        return max(0.0, float(self._read(sql, (trial_id, number))[0][0]))

    def spending(self) -> Spending:
        """What all attempts have used so far, those of trials that are no longer planned or were dropped included."""
        seconds = "SELECT coalesce(sum(max(ended_ms - started_ms, 0) * gpus), 0) / 1000.0 FROM attempts"
        running = "SELECT trial_id, number, gpus FROM attempts WHERE ended_ms IS NULL AND gpus IS NOT NULL"
        trials = "SELECT count(DISTINCT trial_id) FROM attempts WHERE gpus IS NOT NULL"
        live = tuple((row[0], row[1], row[2]) for row in self._read(running))
        return Spending(float(self._read(seconds)[0][0]), live, int(self._read(trials)[0][0]))

    def begun(self) -> set[str]:
        """Ids of all trials of which an attempt was ever begun here."""
        return {row[0] for row in self._read("SELECT DISTINCT trial_id FROM attempts WHERE gpus IS NOT NULL")}

    def states(self, role: Role | None = None) -> dict[str, State]:
        """The states of the plan's trials, of one role or all, by id in the order of the plan; quicker than `rows`."""
        sql = "SELECT trial_id, state FROM trials WHERE in_plan AND role = coalesce(?, role) ORDER BY position"
        return {row[0]: row[1] for row in self._read(sql, (role,))}

    def published(self) -> dict[str, Any]:
        """What `mark_published` was told of each trial of the plan that is over, by id; None where it was not."""
        sql = "SELECT trial_id, published FROM trials WHERE in_plan AND result IS NOT NULL ORDER BY position"
        return {row[0]: None if row[1] is None else json.loads(row[1]) for row in self._read(sql)}

    def mark_published(self, trial_id: str, stamps: Any) -> None:
        """Remember by which `stamps` (a JSON value) the files of a trial that is over are known to be whole."""
        with self._change(durable=False) as db:
            db.execute("UPDATE trials SET published = ? WHERE trial_id = ?", (json.dumps(stamps), trial_id))

    # What searches asked and were told

    def append_event(self, study: str, event: Mapping[str, Any]) -> None:
        """Keep a JSON event of a search behind those that `study` has."""
        with self._change() as db:
            db.execute(
                """INSERT INTO study_events (study, position, event)
                SELECT ?, coalesce(max(position), -1) + 1, ? FROM study_events WHERE study = ?""",
                (study, json.dumps(dict(event)), study),
            )

    def events(self, study: str) -> list[dict[str, Any]]:
        """All events of `study` in the order in which they came."""
        found = self._read("SELECT event FROM study_events WHERE study = ? ORDER BY position", (study,))
        return [json.loads(row[0]) for row in found]

    # Metrics and what MLflow has of them

    def metrics(self, trial_id: str) -> list[tuple[int, str, float]]:
        """(step, name, value) sorted by step and name: one unbroken history, whatever attempts it took."""
        sql = "SELECT step, name, value FROM current_metrics WHERE trial_id = ? ORDER BY step, name"
        return [(row[0], row[1], _value(row[2])) for row in self._read(sql, (trial_id,))]

    def furthest(self, trial_id: str) -> int:
        """The last step that any attempt of a trial has reported, also where a later one was set back; 0 for none."""
        return int(self._read("SELECT coalesce(max(step), 0) FROM metrics WHERE trial_id = ?", (trial_id,))[0][0])

    def reported(self, name: str) -> set[str]:
        """Ids of the trials that have a value of the metric `name`."""
        return {row[0] for row in self._read("SELECT DISTINCT trial_id FROM metrics WHERE name = ?", (name,))}

    def since(self, trial_id: str, seq: int, limit: int) -> list[Point]:
        """The first `limit` points of a trial that came after `seq`, in the order in which they came."""
        sql = """SELECT seq, step, name, value, time_ms FROM current_metrics WHERE trial_id = ? AND seq > ?
            ORDER BY seq LIMIT ?"""
        return [Point(r[0], r[1], r[2], _value(r[3]), r[4]) for r in self._read(sql, (trial_id, seq, limit))]

    def undelivered(self, *, leaving: bool = False) -> list[Delivery]:
        """Trials of which MLflow lacks points or the status; with `leaving`, running ones want `interrupted`."""
        sql = f"""SELECT * FROM (
            SELECT trial_id, generation, run_id, delivered_seq, (SELECT count(*) FROM current_metrics m
                WHERE m.trial_id = t.trial_id AND m.seq > t.delivered_seq) AS pending,
                {_WANTED} AS wanted, delivered_status FROM trials t ORDER BY position, trial_id)
            WHERE wanted IS NOT NULL AND (pending > 0 OR wanted IS NOT delivered_status)"""
        return [Delivery(*row) for row in self._read(sql, {"leaving": leaving})]

    def mark_run(self, trial_id: str, generation: int, run_id: str | None) -> None:
        """Remember the MLflow run of a trial. Another run than before, or None, means that nothing is delivered."""
        with self._change(durable=False) as db:
            db.execute(
                """UPDATE trials SET run_id = ?, delivered_seq = 0, delivered_status = NULL
                WHERE trial_id = ? AND generation = ? AND run_id IS NOT ?""",
                (run_id, trial_id, generation, run_id),
            )

    def forget_runs(self) -> None:
        """Nothing of this ledger is in MLflow: it is fed to another store from now on."""
        with self._change() as db:
            db.execute("UPDATE trials SET run_id = NULL, delivered_seq = 0, delivered_status = NULL")

    def mark_delivered(self, trial_id: str, run_id: str, *, seq: int | None = None, status: str | None = None) -> None:
        """Remember what `run_id` has; nothing happens where it is no longer the trial's run."""
        with self._change(durable=False) as db:
            db.execute(
                """UPDATE trials SET delivered_seq = max(delivered_seq, coalesce(?, 0)),
                delivered_status = coalesce(?, delivered_status) WHERE trial_id = ? AND run_id = ?""",
                (seq, status, trial_id, run_id),
            )

    def _last_seq(self, db: sqlite3.Connection) -> int:
        row = db.execute("SELECT value FROM meta WHERE key = 'seq'").fetchone()
        return 0 if row is None else int(json.loads(row[0]))


def _value(stored: float | None) -> float:
    return float("nan") if stored is None else stored


def _check_move(row: TrialRow, to: State) -> None:
    if to not in MOVES[row.state]:
        raise IllegalMove(f"{row.trial_id} cannot go from {row.state} to {to}")


def _insert(db: sqlite3.Connection, trials: Sequence[PlannedTrial], first: int) -> None:
    """Put `trials` into the plan from position `first` on; known ones keep state, attempts and metrics."""
    rows = [
        (t.trial_id, t.name, i, json.dumps(dict(t.cell)), t.seed, json.dumps(t.config.model_dump(mode="json")), t.role)
        for i, t in enumerate(trials, first)
    ]
    db.executemany(
        """INSERT INTO trials (trial_id, name, position, cell, seed, config, role, in_plan) VALUES (?,?,?,?,?,?,?,1)
        ON CONFLICT (trial_id) DO UPDATE SET name = excluded.name, position = excluded.position, in_plan = 1,
            cell = excluded.cell, seed = excluded.seed, role = excluded.role,
            config = CASE WHEN state = 'planned' THEN excluded.config ELSE config END""",
        rows,
    )
