"""Searches whose driver is killed three times: none is lost or doubled, and one trial at a time gives the same."""

import json
import sqlite3
import subprocess
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from orchestrator.ledger import Ledger, TrialRow
from tests.orchestrator.sweeps import Small, environment
from tests.reliability import drivers, kills, whole

pytestmark = pytest.mark.slow

METRIC = "val/knn/top1"
KILLS = 3
SEARCH: dict[str, Any] = {
    "name": "tpe",
    "samples": 6,
    "startup": 2,  # so that most suggestions follow from results
    "metric": METRIC,
    "space": {"optim.lr": {"low": 1.0e-4, "high": 1.0e-2, "log": True}},
}


def prepared(folder: Path, template: Small, search: dict[str, Any], **changes: Any) -> Small:
    small = Small(folder, template.steps, registers=(2,))
    axes = {"baseline": None, "search": search, **changes}
    drivers.prepared(folder, template, axes={"model.num_registers": [2]}, **axes)
    return small


def killed_at(small: Small, points: list[int], *arguments: str) -> None:
    """Run the command, and kill it whenever the ledger has so many metrics; then run it to its end."""
    for number in points:
        driver = subprocess.Popen(
            small.command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        assert kills.wait_for_points(small, driver, number), driver.communicate()
        kills.kill(small, driver)
    done = small.run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def rows(small: Small) -> list[TrialRow]:
    with Ledger.open(small.root / "ledger.db", writer=False) as ledger:
        return ledger.rows(in_plan_only=False)


def events(small: Small) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(small.root / "ledger.db")) as database:
        found = database.execute("SELECT event FROM study_events ORDER BY study, position").fetchall()
    return [json.loads(event) for (event,) in found]


def check_none_lost_or_doubled(small: Small, samples: int) -> None:
    found = rows(small)
    assert {row.state for row in found} <= {"finished", "pruned"}
    assert all(row.in_plan for row in found)
    assert [row.role for row in found].count("search") == samples
    assert [(row.state, row.seed) for row in found if row.role == "cell"] == [("finished", 0)]
    numbers = Counter((event["kind"], event["number"]) for event in events(small))
    assert numbers == {(kind, number): 1 for kind in ("ask", "tell") for number in range(samples)}
    assert {folder.name for folder in (small.root / "trials").iterdir()} == {row.trial_id for row in found}
    runs = small.mlflow_runs()
    assert [name for name, _ in runs] == sorted([*(row.name for row in found), "small"])
    assert {status for _, status in runs} <= {"FINISHED", "KILLED"}
    table = pq.read_table(small.root / "tables" / "ablation.parquet").to_pylist()
    assert [row["n"] for row in table if row["metric"] == "test/linear/top1"] == [1]
    whole.mlflow_points(small)  # each once


def test_a_tpe_search_one_trial_at_a_time_comes_out_the_same(template: Small, tmp_path: Path) -> None:
    undisturbed = prepared(tmp_path / "undisturbed", template, SEARCH)
    done = undisturbed.run("--in-process")
    assert done.returncode == 0, done.stdout + done.stderr
    total = kills.points(undisturbed)
    small = prepared(tmp_path / "killed", template, SEARCH)
    killed_at(small, [total * (1 + kill) // (KILLS + 1) for kill in range(KILLS)], "--in-process")
    check_none_lost_or_doubled(small, SEARCH["samples"])
    assert events(small) == events(undisturbed)
    expected = [(row.trial_id, row.role, row.name, row.config) for row in rows(undisturbed)]
    assert [(row.trial_id, row.role, row.name, row.config) for row in rows(small)] == expected
    assert small.tables() == undisturbed.tables()
    assert max(map(len, kills.attempts(small).values())) >= 2, "no kill has struck a trial"


def test_a_search_with_asha_and_several_trials_at_a_time_stays_whole(template: Small, tmp_path: Path) -> None:
    """Timing decides what is pruned, and thus what is suggested: only that nothing is lost or doubled can be asked."""
    search = {**SEARCH, "parallel": 2}
    scheduler = {"name": "asha", "metric": METRIC, "grace": 0.25, "reduction": 2.0}
    small = prepared(tmp_path, template, search, scheduler=scheduler)
    killed_at(small, [40, 90, 140])
    check_none_lost_or_doubled(small, search["samples"])
