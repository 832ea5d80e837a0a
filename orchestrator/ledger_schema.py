"""The tables of the ledger, the rows that come out of it, and the moves that a trial's state may make."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

SCHEMA_VERSION = 4

Role = Literal["cell", "search"]  # whether a trial is a row of the table, or one by which a search chooses

State = Literal["planned", "running", "finished", "diverged", "pruned", "stopped", "failed"]
STATES: tuple[State, ...] = get_args(State)

MOVES: Mapping[State, frozenset[State]] = {
    "planned": frozenset({"running"}),
    "running": frozenset({"planned", "finished", "diverged", "pruned", "stopped", "failed"}),
    "finished": frozenset(),
    "diverged": frozenset(),
    "pruned": frozenset(),
    "stopped": frozenset(),
    "failed": frozenset(),
}
OVER: frozenset[State] = frozenset(state for state, moves in MOVES.items() if not moves)

# A column REAL holds every double exactly, infinities too; NaN becomes NULL, which means NaN.
# A later attempt supersedes what earlier ones reported after its first step: a resumed attempt reports nothing before
# the step that it resumes from, so what stays is one unbroken history.
SCHEMA: tuple[str, ...] = (
    """CREATE TABLE trials (
        trial_id TEXT PRIMARY KEY, name TEXT NOT NULL, position INTEGER NOT NULL, in_plan INTEGER NOT NULL,
        cell TEXT NOT NULL, seed INTEGER NOT NULL, config TEXT NOT NULL,
        state TEXT NOT NULL DEFAULT 'planned'
            CHECK (state IN ('planned','running','finished','diverged','pruned','stopped','failed')),
        attempts INTEGER NOT NULL DEFAULT 0,          -- number of the newest attempt; never goes back
        attempts_before INTEGER NOT NULL DEFAULT 0,   -- attempts that a --rerun has dropped
        generation INTEGER NOT NULL DEFAULT 0,        -- how often --rerun has reset the trial
        stalled INTEGER NOT NULL DEFAULT 0,           -- attempts lost in a row without progress
        last_step INTEGER, error TEXT, result TEXT, started_ms INTEGER, ended_ms INTEGER,
        run_id TEXT, delivered_seq INTEGER NOT NULL DEFAULT 0, delivered_status TEXT)""",
    """CREATE TABLE attempts (
        trial_id TEXT NOT NULL REFERENCES trials, number INTEGER NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL,
        started_ms INTEGER NOT NULL, ended_ms INTEGER, outcome TEXT, reason TEXT, first_step INTEGER,
        PRIMARY KEY (trial_id, number)) WITHOUT ROWID""",
    """CREATE TABLE metrics (
        trial_id TEXT NOT NULL REFERENCES trials, step INTEGER NOT NULL, name TEXT NOT NULL, value REAL,
        attempt INTEGER NOT NULL, seq INTEGER NOT NULL, time_ms INTEGER NOT NULL,
        PRIMARY KEY (trial_id, step, name)) WITHOUT ROWID""",
    "CREATE INDEX metrics_by_seq ON metrics (trial_id, seq)",
    """CREATE VIEW current_metrics AS SELECT m.* FROM metrics m WHERE NOT EXISTS (
        SELECT 1 FROM attempts a WHERE a.trial_id = m.trial_id AND a.number > m.attempt AND a.first_step < m.step)""",
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
)
_SINCE_2: tuple[str, ...] = (
    "ALTER TABLE trials ADD COLUMN role TEXT NOT NULL DEFAULT 'cell' CHECK (role IN ('cell','search'))",
    """CREATE TABLE study_events (
        study TEXT NOT NULL, position INTEGER NOT NULL, event TEXT NOT NULL,  -- what a search asked and was told
        PRIMARY KEY (study, position)) WITHOUT ROWID""",
)
_SINCE_3: tuple[str, ...] = (
    "ALTER TABLE attempts ADD COLUMN gpus REAL",  # of all ranks; null where nothing ran, as when a trial is adopted
)
_SINCE_4: tuple[str, ...] = (
    "ALTER TABLE trials ADD COLUMN published TEXT",  # sizes and times of the files that say what the ledger says
)
# What brings a ledger from version n to n + 1.
MIGRATIONS: tuple[tuple[str, ...], ...] = (SCHEMA, _SINCE_2, _SINCE_3, _SINCE_4)


class Config(Protocol):
    """A resolved configuration, as `trainers.config.TrialConfig`."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Nested plain values; mode "json" gives only what JSON has."""


class PlannedTrial(Protocol):
    """What the ledger reads of a planned trial."""

    @property
    def trial_id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def cell(self) -> Mapping[str, Any]: ...
    @property
    def seed(self) -> int: ...
    @property
    def config(self) -> Config: ...
    @property
    def role(self) -> Role: ...


@dataclass(frozen=True)
class TrialRow:
    """A trial as the ledger knows it.

    `attempts` is the number of the newest attempt (0 before the first), `stalled` how many were lost in a row without
    progress, `generation` how often the trial was reset by --rerun, times are milliseconds since 1970 in UTC.
    """

    trial_id: str
    name: str
    position: int
    in_plan: bool
    cell: dict[str, Any]
    seed: int
    config: dict[str, Any]
    state: State
    attempts: int
    generation: int
    stalled: int
    last_step: int | None
    error: dict[str, Any] | None
    result: dict[str, Any] | None
    started_ms: int | None
    ended_ms: int | None
    run_id: str | None
    role: Role


@dataclass(frozen=True)
class StoredConfig:
    """A configuration as a file or a row has it: plain values."""

    values: Mapping[str, Any]

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """As `Config`."""
        return dict(self.values)


@dataclass(frozen=True)
class StoredTrial:
    """A trial that files or rows describe, for the ledger to plan."""

    trial_id: str
    name: str
    cell: Mapping[str, Any]
    seed: int
    config: Config
    role: Role = "cell"


class Delivery(NamedTuple):
    """A trial of which MLflow lacks something: `pending` points after `seq`, or the status `wanted`."""

    trial_id: str
    generation: int
    run_id: str | None
    seq: int
    pending: int
    wanted: str
    delivered: str | None


class Spending(NamedTuple):
    """What all attempts of a sweep have used, over all of its runs: those that are over, and those that run."""

    gpu_seconds: float  # of attempts that are over
    running: tuple[tuple[str, int, float], ...]  # trial, number of the attempt, GPUs
    trials: int  # that were begun


class Point(NamedTuple):
    """One metric value in the order in which the ledger got it."""

    seq: int
    step: int
    name: str
    value: float
    time_ms: int


ROW_COLUMNS = ", ".join(TrialRow.__dataclass_fields__)


def trial_row(row: sqlite3.Row) -> TrialRow:
    """The dataclass of one row that has `ROW_COLUMNS`."""
    values = dict(row)
    for column in ("cell", "config", "error", "result"):
        values[column] = None if values[column] is None else json.loads(values[column])
    values["in_plan"] = bool(values["in_plan"])
    values["state"] = cast(State, values["state"])
    return TrialRow(**values)
