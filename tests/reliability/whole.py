"""Whether a sweep came out whole: nothing lost, nothing doubled, the ledger, the files and MLflow of one mind."""

from __future__ import annotations

import json
import math
import sqlite3
from contextlib import closing

from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from tests.orchestrator.sweeps import Small


def check(small: Small, undisturbed: Small) -> None:
    """Every trial is there once, and every number is that of `undisturbed`."""
    tables, expected = small.tables(), undisturbed.tables()
    assert [name for name in expected if tables[name] != expected[name]] == []
    layout = SweepLayout(small.storage, small.storage, "small")
    with Ledger.open(layout.ledger, writer=False) as ledger:
        rows = ledger.rows(in_plan_only=False)
        assert len(rows) == len(small.registers) * _num_seeds(undisturbed)
        assert {row.state for row in rows} == {"finished"}
        for row in rows:
            assert json.loads(layout.trial(row.trial_id).result.read_text()) == row.result
        points = {row.name: {(s, n): v for s, n, v in ledger.metrics(row.trial_id)} for row in rows}
    assert {status for _, status in small.mlflow_runs()} == {"FINISHED"}
    assert [name for name, _ in small.mlflow_runs()] == sorted([*points, "small"])
    assert mlflow_points(small) == points


def _num_seeds(undisturbed: Small) -> int:
    return (len(undisturbed.mlflow_runs()) - 1) // len(undisturbed.registers)


def mlflow_points(small: Small) -> dict[str, dict[tuple[int, str], float]]:
    """All points of MLflow's runs of trials by name of the run; each may be there once.

    Infinite values and NaN, which it is not sent, are not expected here.
    """
    sql = """SELECT r.name, m.step, m.key, m.value FROM metrics m JOIN runs r USING (run_uuid)
        WHERE r.lifecycle_stage = 'active'"""
    found: dict[str, dict[tuple[int, str], float]] = {}
    with closing(sqlite3.connect(small.storage / "mlflow.db")) as database:
        for run, step, name, value in database.execute(sql):
            points = found.setdefault(run, {})
            assert (step, name) not in points, f"{run} has {name} at step {step} twice"
            assert math.isfinite(value)
            points[step, name] = value
    return found
