"""What a ledger says of attempts: which processes ran them, when, and what was last heard of them; read only."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

_BUSY_S = 10.0


class AttemptRow(NamedTuple):
    """One attempt; times are milliseconds since 1970. What it reported leaves out what it only repeated of earlier
    attempts, and is None before there is any.
    """

    trial_id: str
    number: int
    host: str
    pid: int
    started_ms: int
    ended_ms: int | None
    first_step: int | None
    first_ms: int | None
    last_step: int | None
    last_ms: int | None

    @property
    def steps_per_second(self) -> float | None:
        """Speed between its first and its last report, evaluation included; None before there are two."""
        if None in (self.first_ms, self.last_ms) or self.first_ms == self.last_ms:
            return None
        assert self.first_step is not None and self.last_step is not None, "a report has a step"
        assert self.first_ms is not None and self.last_ms is not None, "a report has a time"
        return 1000 * (self.last_step - self.first_step) / (self.last_ms - self.first_ms) or None


# A point that is reported again with the same value keeps the time at which it first came.
_ATTEMPTS = """SELECT a.trial_id, a.number, a.host, a.pid, a.started_ms, a.ended_ms,
    min(m.step), min(m.time_ms), max(m.step), max(m.time_ms)
    FROM attempts a LEFT JOIN metrics m
        ON m.trial_id = a.trial_id AND m.attempt = a.number AND m.time_ms >= a.started_ms
    WHERE {} GROUP BY a.trial_id, a.number ORDER BY a.number"""


def on_host(ledger: Path, host: str) -> list[AttemptRow]:
    """All attempts that ran on a machine."""
    return _rows(ledger, "a.host = ?", (host,))


def running(ledger: Path) -> dict[str, AttemptRow]:
    """The attempts that are not over, by trial."""
    return {row.trial_id: row for row in _rows(ledger, "a.ended_ms IS NULL")}


def spent_seconds(ledger: Path, now_ms: int) -> float:
    """Seconds that all attempts of a sweep took, those that run until `now_ms` included."""
    sql = "SELECT coalesce(sum(max(coalesce(ended_ms, ?) - started_ms, 0)), 0) / 1000.0 FROM attempts"
    return float(_query(ledger, sql, (now_ms,))[0][0])


def _rows(ledger: Path, where: str, values: tuple[str, ...] = ()) -> list[AttemptRow]:
    return [AttemptRow(*row) for row in _query(ledger, _ATTEMPTS.format(where), values)]


def _query(ledger: Path, sql: str, values: Sequence[str | int]) -> list[tuple[Any, ...]]:
    uri = f"{ledger.absolute().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_S)) as db:
        return db.execute(sql, values).fetchall()
