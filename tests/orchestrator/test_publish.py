"""Which checkpoints of a trial's attempts are kept when it is over."""

from pathlib import Path

import torch

from orchestrator import publish
from orchestrator.layout import TrialLayout
from trainers import checkpoint


def attempt(layout: TrialLayout, number: int, steps: tuple[int, ...]) -> None:
    for step in steps:
        state = {"attempt": torch.tensor(number)}
        checkpoint.save(layout.attempt(number) / "checkpoints", step, state, keep=100)


def kept(layout: TrialLayout) -> dict[str, int]:
    """The attempt that wrote each step, of those that are whole."""
    paths = sorted(layout.checkpoints.glob("*.pt"))
    return {path.stem: int(checkpoint.read(path)["attempt"]) for path in paths}


def test_steps_that_are_to_be_kept_survive_from_every_attempt(tmp_path: Path) -> None:
    layout = TrialLayout(tmp_path)
    attempt(layout, 1, (10, 20))
    attempt(layout, 2, (20, 30, 40))
    for _ in range(2):  # repeating it changes nothing
        publish._settle_checkpoints(layout, (10, 30))
        assert kept(layout) == {
            "step_000000010": 1,
            "step_000000020": 2,
            "step_000000030": 2,
            "step_000000040": 2,
        }
    assert not list(tmp_path.glob("attempts/*/checkpoints"))


def test_without_steps_to_keep_only_the_newest_attempts_are_left(tmp_path: Path) -> None:
    layout = TrialLayout(tmp_path)
    attempt(layout, 1, (10, 20))
    attempt(layout, 2, (40,))
    publish._settle_checkpoints(layout, ())
    assert kept(layout) == {"step_000000040": 2}
