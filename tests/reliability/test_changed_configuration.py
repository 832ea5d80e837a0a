"""A sweep file that is changed under its name: new cells run, removed ones are kept but left out of the tables."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.orchestrator.sweeps import ORCHESTRATE, Small, run
from tests.reliability import drivers, whole
from tests.reliability.paced import query

pytestmark = pytest.mark.slow


def cells(small: Small) -> set[int]:
    """The numbers of registers in the table."""
    rows = pq.read_table(small.root / "tables" / "ablation.parquet").to_pylist()
    return {row["model.num_registers"] for row in rows}


def attempts(small: Small) -> int:
    return int(query(small.root, "SELECT count(*) FROM attempts")[0][0] or 0)


def said_of_the_plan(small: Small) -> str:
    command = [*ORCHESTRATE, "plan", str(small.folder / "small.yaml"), "--storage", str(small.storage), "--diff"]
    done = run(command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_new_runs_what_is_gone_is_kept_and_comes_back(
    template: Small, undisturbed: Small, tmp_path: Path
) -> None:
    small = drivers.prepared(tmp_path, template)
    assert drivers.drive(small) == 0, drivers.output(small)
    assert (cells(small), attempts(small)) == ({0, 2}, 2)
    before = {path.name for path in (small.root / "trials").iterdir()}

    small.write(seeds=[0], axes={"model.num_registers": [0, 4]})
    plan = said_of_the_plan(small)
    assert "new: 1" in plan
    assert "removed" in plan or "no longer" in plan, plan
    assert drivers.drive(small) == 0, drivers.output(small)
    assert (cells(small), attempts(small)) == ({0, 4}, 3)
    assert before < {path.name for path in (small.root / "trials").iterdir()}
    assert query(small.root, "SELECT state, in_plan FROM trials ORDER BY in_plan") == [
        ("finished", 0),
        ("finished", 1),
        ("finished", 1),
    ]

    small.write(seeds=[0])
    assert drivers.drive(small) == 0, drivers.output(small)
    assert (cells(small), attempts(small)) == ({0, 2}, 3), "nothing had to run"
    assert small.tables() == undisturbed.tables()

    small.write(seeds=[0, 1], axes={"model.num_registers": [0, 2]})
    assert drivers.drive(small) == 0, drivers.output(small)
    assert attempts(small) == 5, "a new seed runs in each cell"
    assert len(whole.mlflow_points(small)) == 5
