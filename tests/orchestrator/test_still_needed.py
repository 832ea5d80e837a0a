"""What trials that are not over still need of others, by their configurations and states."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator import still_needed
from orchestrator.ledger import Ledger, State
from orchestrator.ledger_file import LedgerError
from orchestrator.ledger_schema import OVER, StoredConfig, StoredTrial

SOURCE = "0123456789abcdef"


def sweep(folder: Path, config: dict[str, Any], state: State = "planned", name: str = "other") -> None:
    """A sweep of one trial in that state."""
    trial = StoredTrial("f" * 16, "follower", {}, 0, StoredConfig(config))
    with Ledger.open(folder / name / "ledger.db") as ledger:
        ledger.plan([trial])
        if state != "planned":
            ledger.start_attempt(trial.trial_id, 1, "host", 1)
        if state in OVER:
            ledger.finish(trial.trial_id, 1, state, {}, None)


@pytest.mark.parametrize("state", ["planned", "running", "failed", "finished", "diverged", "pruned", "stopped"])
def test_checkpoints_are_needed_until_the_trial_that_starts_from_them_is_over(tmp_path: Path, state: State) -> None:
    sweep(tmp_path, {"model": {"init_from": {"trial": SOURCE}}}, state)
    needed = still_needed.checkpoints(tmp_path, tmp_path)
    assert needed == ({SOURCE} if state in ("planned", "running", "failed") else set()), "a failed one is tried again"


def test_what_is_measured_is_needed_and_other_starts_name_no_trial(tmp_path: Path) -> None:
    sweep(tmp_path, {"model": {"weights": SOURCE}}, name="measured")
    sweep(tmp_path, {"model": {"init_from": {"file": "/w.pth"}}}, name="from a file")
    sweep(tmp_path, {"program": {"lr": 0.1}}, name="a program")
    assert still_needed.checkpoints(tmp_path, tmp_path) == {SOURCE}


def test_a_ledger_that_cannot_be_read_leaves_nothing_unneeded(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "ledger.db").write_text("no database")
    with pytest.raises(LedgerError):
        still_needed.checkpoints(tmp_path, tmp_path)


def test_caches_of_data_that_is_still_named_are_used(tmp_path: Path) -> None:
    for name in (
        "cifar10-0123456789abcdef",
        "scenes-0123456789abcdef",
        "voc2012-0123456789abcdef",
        ".scenes-x.partial",
    ):
        (tmp_path / "cache" / name).mkdir(parents=True)
    sweep(tmp_path, {"data": {"train": "scenes"}, "evaluation": {"object_discovery": {"data": ["voc2012"]}}})
    sweep(tmp_path, {"data": {"train": "cifar10"}}, "finished", name="over")
    assert [path.name for path in still_needed.unused_caches(tmp_path, tmp_path)] == ["cifar10-0123456789abcdef"]
