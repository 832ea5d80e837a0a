"""A ledger made anew, or brought up to date, from what a sweep's folders say of its trials."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from orchestrator import spec
from orchestrator.holder import Hold
from orchestrator.layout import SweepLayout, TrialLayout
from orchestrator.ledger import Ledger, State
from orchestrator.ledger_schema import OVER, PlannedTrial, StoredConfig, StoredTrial, TrialRow
from orchestrator.plan import Plan, build_plan, canonical
from orchestrator.remote_sweep import SNAPSHOT
from orchestrator.search import SearchGrowth
from orchestrator.search_cell import CellSearch
from orchestrator.search_history import History, Sample, asked

log = logging.getLogger(__name__)

_DAMAGED = ".damaged"  # of a ledger that was set aside


@dataclass(frozen=True)
class Ended:
    """What a trial's folder says of one that is over."""

    state: State
    config: dict[str, Any]
    result: dict[str, Any]
    reports: list[tuple[int, dict[str, float]]]
    started_ms: int
    ended_ms: int

    @property
    def attempts(self) -> int:
        """Number of the attempt that was accepted."""
        return max(1, int(self.result.get("attempts") or 1))

    @property
    def gpus(self) -> float | None:
        """GPUs of all ranks; None where that was not recorded."""
        seconds, of_gpus = self.result.get("seconds"), self.result.get("gpu_seconds")
        return None if of_gpus is None or not seconds else float(of_gpus) / float(seconds)


class Clock:
    """Milliseconds since 1970: those of the past that is being written down, else the present."""

    def __init__(self) -> None:
        self.past: int | None = None

    def __call__(self) -> int:
        return time.time_ns() // 1_000_000 if self.past is None else self.past


def rebuild(layout: SweepLayout) -> str:
    """Make the sweep's ledger from its snapshot in storage, where that is whole, and the trials' folders.

    A ledger that is there already is set aside as damaged. Until the new one is complete the sweep has none.

    Returns:
        What it was made from.

    Raises:
        SweepHeld: a process runs the sweep.
        ValueError: there is nothing to make it from.
        OSError, sqlite3.Error: files cannot be written.
    """
    if not any(path.is_file() for path in (layout.sweep_file, layout.plan, layout.root / SNAPSHOT)):
        raise ValueError(f"{layout.root} has neither plan nor snapshot to make the ledger from; is --storage right?")
    layout.ledger.parent.mkdir(parents=True, exist_ok=True)
    fresh = layout.ledger.with_name(".rebuilt-ledger.db")
    hold = Hold(layout.lock)
    try:
        _remove(fresh)
        has_snapshot = _take_snapshot(layout, fresh)
        clock = Clock()
        with Ledger.open(fresh, clock=clock) as ledger:
            count = update(ledger, clock, layout)
        if layout.ledger.exists():
            _set_aside(layout.ledger)
        fresh.replace(layout.ledger)
        fresh.with_suffix(".lock").unlink(missing_ok=True)
    finally:
        hold.release()
    return f"{'its snapshot and ' if has_snapshot else ''}{count} trial folders"


def update(ledger: Ledger, clock: Clock, layout: SweepLayout) -> int:
    """Bring into `ledger` what only the sweep's files know; the number of trial folders that were looked at.

    Trials that are over take state, metrics and result from their folders. Others that were begun are planned, and
    their attempts' numbers go on from the newest folder: they report again, from their checkpoints, what they had
    reported. `clock` is the ledger's. Nobody may run the sweep.
    """
    found = {key: read_ended(layout.trial(key)) for key in trial_folders(layout)}
    rows = {row.trial_id: row for row in ledger.rows(in_plan_only=False)}
    news = {key: ended for key, ended in found.items() if ended is not None and is_behind(rows.get(key), ended)}
    for key in news:
        if key in rows and rows[key].state in OVER:
            ledger.reset(key)
    described = _Described.of(layout)
    current = [_told(trial, news.get(trial.trial_id)) for trial in described.trials(rows, news)]
    named = {trial.trial_id for trial in current} | rows.keys()
    strangers = [_stranger(key, ended) for key, ended in news.items() if key not in named]
    ledger.plan([*current, *strangers])
    ledger.plan(current)  # the strangers are kept, as trials that are no longer planned
    described.ask_again(ledger)
    for key, ended in news.items():
        _take(ledger, clock, ledger.row(key), ended)
    ledger.release_running()
    for row in ledger.rows(in_plan_only=False):
        _go_on(ledger, row, layout.trial(row.trial_id).attempts())
    return len(found)


@dataclass(frozen=True)
class _Described:
    """What the files of a sweep as a whole say: its plan where sweep.yaml can be read, and plan.json."""

    plan: Plan | None
    raw: dict[str, Any]

    @classmethod
    def of(cls, layout: SweepLayout) -> _Described:
        try:
            plan = build_plan(spec.read_sweep(layout.sweep_file)) if layout.sweep_file.is_file() else None
        except spec.SpecError as error:  # of another version of this program: plan.json and the folders have to do
            log.warning("%s cannot be read, so trials that have not begun are unknown: %s", layout.sweep_file, error)
            plan = None
        return cls(plan, _read_json(layout.plan) or {})

    def trials(self, rows: Mapping[str, TrialRow], news: Mapping[str, Ended]) -> list[PlannedTrial]:
        """The current plan: that of the file, what a search or more seeds added, and what a snapshot has."""
        trials: dict[str, PlannedTrial] = {}
        if self.plan is not None:
            trials = {trial.trial_id: trial for trial in self.plan.trials}
        for trial in (trial for cell, samples in self._searches() for s in samples for trial in _possible(cell, s)):
            trials.setdefault(trial.trial_id, trial)
        for entry in self.raw.get("trials", []):
            key = entry["trial_id"]
            config = news[key].config if key in news else rows[key].config if key in rows else None
            if config is not None and (key not in trials or trials[key].role == "search"):
                trials[key] = StoredTrial(key, entry["name"], entry["cell"], entry["seed"], StoredConfig(config))
        for key, row in rows.items():
            if row.in_plan:
                trials.setdefault(
                    key, StoredTrial(key, row.name, row.cell, row.seed, StoredConfig(row.config), row.role)
                )
        return list(trials.values())

    def ask_again(self, ledger: Ledger) -> None:
        """Let the ledger know what each search had suggested; what became of that follows from the trials."""
        for cell, samples in self._searches():
            known = len(History.of(ledger.events(cell.study)).samples)
            for sample in samples[known:]:
                ledger.append_event(cell.study, asked(sample.number, sample.params))

    def _searches(self) -> Iterator[tuple[CellSearch, list[Sample]]]:
        if self.plan is None or self.plan.sweep.search is None:
            return
        for cell in SearchGrowth(self.plan, Path()).cells:
            own = [entry for entry in self.raw.get("search", []) if canonical(entry["cell"]) == canonical(cell.cell)]
            yield cell, [Sample(entry["number"], entry["params"]) for entry in own]


def _possible(cell: CellSearch, sample: Sample) -> list[PlannedTrial]:
    """The trials of a suggestion; none where its settings are impossible together."""
    return list(cell.trials(sample)) if cell.ids(sample) else []


def _told(trial: PlannedTrial, ended: Ended | None) -> PlannedTrial:
    """`trial` with the configuration that its folder has, which is what it ran with."""
    if ended is None:
        return trial
    return StoredTrial(trial.trial_id, trial.name, trial.cell, trial.seed, StoredConfig(ended.config), trial.role)


def _stranger(key: str, ended: Ended) -> StoredTrial:
    """A trial of an earlier plan, or of a search: its name and cell are known when it is planned again."""
    return StoredTrial(key, key, {}, int(ended.config.get("seed") or 0), StoredConfig(ended.config))


def trial_folders(layout: SweepLayout) -> list[str]:
    """Ids of all trials of which there is a folder."""
    folder = layout.trial("x").root.parent
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def read_ended(trial: TrialLayout) -> Ended | None:
    """What a trial's folder says of its end; None where it is not over, or its files are not whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        result, config = _read_json(trial.result), _read_json(trial.config)
        points = pq.read_table(trial.metrics).to_pylist()
        modified = trial.result.stat().st_mtime_ns // 1_000_000
    except (OSError, pa.ArrowException):
        return None
    if config is None or result is None or result.get("status") not in OVER:
        return None
    reports: dict[int, dict[str, float]] = {}
    for point in points:
        reports.setdefault(point["step"], {})[point["name"]] = point["value"]
    seconds = float(result.get("seconds") or 0.0)
    started = result.get("started")
    begun = modified if started is None else round(datetime.datetime.fromisoformat(started).timestamp() * 1000)
    ended = modified if started is None else begun + round(seconds * 1000)
    return Ended(cast(State, result["status"]), config, result, list(reports.items()), begun, ended)


def is_behind(row: TrialRow | None, ended: Ended) -> bool:
    """Whether the ledger does not know yet what a trial's folder says."""
    return row is None or row.state not in OVER or row.attempts < ended.attempts


def _take(ledger: Ledger, clock: Clock, row: TrialRow, ended: Ended) -> None:
    """Write down the attempt with which a trial came to its end, at the time when it did."""
    number = row.attempts if row.state == "running" else max(ended.attempts, row.attempts + 1)
    try:
        clock.past = ended.started_ms
        if row.state != "running":
            ledger.start_attempt(row.trial_id, number, os.uname().nodename, os.getpid(), ended.gpus)
        clock.past = ended.ended_ms
        ledger.record_many(row.trial_id, number, ended.reports)
        ledger.finish(row.trial_id, number, ended.state, ended.result, ended.result.get("error"))
    finally:
        clock.past = None


def _go_on(ledger: Ledger, row: TrialRow, numbers: Sequence[int]) -> None:
    """Let the numbers of attempts go on where the folders show that newer ones were begun."""
    if row.state == "planned" and numbers and numbers[-1] > row.attempts:
        ledger.start_attempt(row.trial_id, numbers[-1], os.uname().nodename, os.getpid())
        ledger.lose_attempt(row.trial_id, numbers[-1], "the ledger was lost", progressed=None)


def _take_snapshot(layout: SweepLayout, target: Path) -> bool:
    """Copy the ledger's snapshot in storage to `target`; False where there is none that is whole."""
    source = layout.root / SNAPSHOT
    if not source.is_file() or problem_of(source) is not None:
        return False
    shutil.copyfile(source, target)
    return True


def problem_of(ledger: Path) -> str | None:
    """What SQLite finds wrong with a ledger's file, which may be written meanwhile; None where nothing is.

    Its pages and indices are checked, and that it has trials.
    """
    try:
        with contextlib.closing(sqlite3.connect(f"{ledger.absolute().as_uri()}?mode=ro", uri=True, timeout=10.0)) as db:
            said = [str(row[0]) for row in db.execute("PRAGMA integrity_check(3)")]
            db.execute("SELECT count(*) FROM trials").fetchone()
    except sqlite3.DatabaseError as error:
        return str(error)
    return None if said == ["ok"] else "; ".join(said)


def _set_aside(ledger: Path) -> None:
    """Rename a ledger with the files that belong to it; one that was set aside before is replaced."""
    for end in ("-wal", "-shm", ""):
        path = ledger.with_name(ledger.name + end)
        if path.exists():
            path.replace(ledger.with_name(f"{ledger.name}{_DAMAGED}{end}"))


def _remove(ledger: Path) -> None:
    for end in ("", "-wal", "-shm"):
        ledger.with_name(ledger.name + end).unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
