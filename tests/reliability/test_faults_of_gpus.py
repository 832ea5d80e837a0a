"""A GPU on which nothing works: it is left out after two failures, its trials go on elsewhere, and the sweep ends."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import simulated
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.run_request import Request
from tests.orchestrator.sweeps import RAY_IN_THIS_PROCESS

pytestmark = [pytest.mark.slow, *RAY_IN_THIS_PROCESS]

TRAIN = "tests.reliability.broken:one_gpu_is_broken"


@pytest.fixture(autouse=True)
def _nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RAY_AUTH_MODE", "token"), ("PYTHONPATH", str(Path(__file__).resolve().parents[2]))):
        monkeypatch.setenv(name, value)


def attempts(folder: Path, name: str) -> Counter[str]:
    """How many attempts each GPU had."""
    return Counter(path.read_text() for path in (folder / "runs" / name).glob("trials/*/attempts/*/gpu"))


def test_a_gpu_that_fails_twice_gets_no_more_trials(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    planned = simulated.plan(tmp_path, "broken", trials=12)
    with caplog.at_level(logging.WARNING), simulated.cluster(nodes=1, cpus=4, gpus=3) as ray:
        simulated.sweep(ray, tmp_path, "broken", planned, TRAIN, Request(1, 1), lambda _id, _event: None)
    found = attempts(tmp_path, "broken")
    assert found["1"] == 2 and found["0"] + found["2"] == 12, "each trial needed one attempt on a GPU that works"
    assert [record for record in caplog.messages if "GPU 1 of" in record and "leaves it out" in record]
    with Ledger.open(SweepLayout(tmp_path / "runs", tmp_path / "runs", "broken").ledger, writer=False) as ledger:
        assert {row.stalled for row in ledger.rows()} <= {0, 1}
    assert min(found["0"], found["2"]) > 2


def test_trials_that_fail_on_every_gpu_fail_and_take_none_away(tmp_path: Path) -> None:
    planned = simulated.plan(tmp_path, "buggy", trials=3)
    train = "tests.orchestrator.test_executors:loses_its_device"
    with simulated.cluster(nodes=1, cpus=4, gpus=2) as ray, pytest.raises(RuntimeError, match="'failed': 3"):
        simulated.sweep(ray, tmp_path, "buggy", planned, train, Request(1, 1), lambda _id, _event: None)
    with Ledger.open(SweepLayout(tmp_path / "runs", tmp_path / "runs", "buggy").ledger, writer=False) as ledger:
        rows = ledger.rows()
    assert {row.state for row in rows} == {"failed"}
    assert all(4 <= row.attempts <= 8 for row in rows), "four on one GPU, and few on those that others made suspect"
