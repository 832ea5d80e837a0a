"""Real trials that take their time, and what the tests look at while they run."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from orchestrator import training
from orchestrator.attempt import Job, Outcome, Report
from orchestrator.layout import TrialLayout

PAUSE = "RELIABILITY_PAUSE_SECONDS"  # of a trial, after each report


def run(job: Job, layout: TrialLayout, number: int, report: Report, asked: Callable[[], str | None]) -> Outcome:
    """Train as always, with a pause after each report that does no work."""
    pause = float(os.environ[PAUSE])

    def slowly(step: int, metrics: Mapping[str, float]) -> None:
        report(step, metrics)
        time.sleep(pause)

    return training.run(job, layout, number, slowly, asked)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Look fifty times a second until `condition` holds.

    Raises:
        AssertionError: it does not within so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def query(path: Path, sql: str) -> list[tuple[int | float | str | None, ...]]:
    """Rows of the SQLite file at `path`, or of the ledger in that folder; none while there is none."""
    path = path / "ledger.db" if path.is_dir() else path
    if not path.is_file():
        return []
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as database:
        try:
            return database.execute(sql).fetchall()
        except sqlite3.OperationalError:  # its tables are being made
            return []


def reported(folder: Path) -> int:
    """How many points the ledger of the sweep in `folder` holds."""
    rows = query(folder, "SELECT count(*) FROM metrics")
    return int(rows[0][0] or 0) if rows else 0
