"""Faults of devices and numbers: out of memory, a device that fails for ever, and losses that are not numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger, TrialRow
from tests.orchestrator.sweeps import Small
from tests.reliability import drivers, whole
from tests.reliability.paced import query

pytestmark = pytest.mark.slow

FAULTS = "tests.reliability.broken"


def rows(small: Small) -> dict[int, TrialRow]:
    """The ledger's trials by their number of registers."""
    with Ledger.open(small.root / "ledger.db", writer=False) as ledger:
        return {row.cell["model.num_registers"]: row for row in ledger.rows()}


def table(small: Small, name: str) -> list[dict[str, Any]]:
    return list(pq.read_table(small.root / "tables" / f"{name}.parquet").to_pylist())


def test_out_of_memory_is_tried_again_with_activation_checkpointing_and_gives_the_same_numbers(
    template: Small, undisturbed: Small, tmp_path: Path
) -> None:
    small = drivers.prepared(tmp_path, template)
    assert drivers.drive(small, setup=f"{FAULTS}:little_memory") == 0, drivers.output(small)
    whole.check(small, undisturbed)
    attempts = query(small.root, "SELECT number, outcome, reason FROM attempts ORDER BY trial_id, number")
    assert [one[:2] for one in attempts] == [(1, "lost"), (2, "finished")] * 2
    assert "tried again with activation checkpointing, which computes the same" in str(attempts[0][2])
    assert {row.stalled for row in rows(small).values()} == {0}


def test_out_of_memory_in_spite_of_it_fails_with_advice_and_leaves_the_others_alone(
    template: Small, undisturbed: Small, tmp_path: Path
) -> None:
    small = drivers.prepared(tmp_path, template)
    assert drivers.drive(small, setup=f"{FAULTS}:too_little_memory", quiet=False) == 1
    found = rows(small)
    assert (found[0].state, found[2].state, found[2].attempts) == ("finished", "failed", 2)
    error = found[2].error or {}
    assert error["type"] == "OutOfMemoryError"
    assert "use a smaller optim.micro_batch_size" in error["message"]
    assert "Traceback" in error["traceback"]
    assert "CUDA out of memory" in drivers.output(small)
    assert {row["n_failed"] for row in table(small, "ablation") if row["model.num_registers"] == 2} == {1}
    assert drivers.drive(small) == 0, "with more memory the same command makes it whole"
    whole.check(small, undisturbed)


def test_a_loss_that_is_not_a_number_is_a_result_that_is_kept(template: Small, tmp_path: Path) -> None:
    small = drivers.prepared(tmp_path, template)
    assert drivers.drive(small, setup=f"{FAULTS}:not_a_number") == 1, drivers.output(small)
    for _ in range(2):  # and not run again
        found = rows(small)
        assert (found[0].state, found[2].state, found[2].attempts) == ("finished", "diverged", 1)
        assert found[2].result is not None and found[2].result["steps"] == 4, "the last good step"
        assert "nan between steps 4 and 5" in (found[2].error or {})["message"]
        in_tables = [row for row in table(small, "ablation") if row["model.num_registers"] == 2]
        assert {(row["n"], row["n_diverged"], row["mean"]) for row in in_tables} == {(0, 1, None)}
        kept = {row["step"] for row in table(small, "metrics") if row["trial_id"] == found[2].trial_id}
        assert kept == {1, 2, 3, 4}
        assert ("deit3 nano reg2 seed0", "FAILED") in small.mlflow_runs()
        assert drivers.drive(small) == 1
    status = query(small.storage / "mlflow.db", "SELECT count(*) FROM tags WHERE key = 'status' AND value = 'diverged'")
    assert status == [(1,)]


def test_a_device_that_fails_for_ever_ends_its_process_and_the_trial_goes_on_in_another(
    template: Small, undisturbed: Small, tmp_path: Path
) -> None:
    """On Ray, where processes stay warm from trial to trial: none trains in one that has seen such an error."""
    small = drivers.prepared(tmp_path, template, resources={"cpus": 1})
    code = drivers.drive(small, in_process=False, max_concurrent=1, train=f"{FAULTS}:loses_its_device")
    assert code == 0, drivers.output(small)
    whole.check(small, undisturbed)
    layout, processes = SweepLayout(small.storage, small.storage, "small"), list[str]()
    for row in rows(small).values():
        attempts = [layout.trial(row.trial_id).attempt(number) / "process" for number in (1, 2)]
        processes += [path.read_text() for path in attempts]
    assert query(small.root, "SELECT DISTINCT outcome FROM attempts WHERE number = 1") == [("lost",)]
    first, second, third, fourth = processes
    assert second != first and fourth != third
    assert third == second, "a process that is whole goes on with the next trial"
    assert json.loads(next(small.root.glob("trials/*/result.json")).read_text())["attempts"] == 2
