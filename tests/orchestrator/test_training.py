"""The bridge to training: memory of a share of a GPU, and the device of a trial that asked for none; no training."""

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import training
from orchestrator.attempt import Job, Outcome, run_attempt
from orchestrator.layout import TrialLayout
from trainers.config import TrialConfig, resolve
from trainers.train import Result


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the process was told of its share of a device's memory, on a machine that has one."""
    told: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", told.append)
    return told


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrialConfig]:
    """The configurations that training was called with."""
    configs: list[TrialConfig] = []

    def train(config: TrialConfig, *_: Any, **__: Any) -> Result:
        configs.append(config)
        return Result(status="finished", steps=1, images_per_second=None, device="cuda:0", data_fingerprint="0")

    monkeypatch.setattr("trainers.train.train", train)
    return configs


def thinks_in_doubles(job: Job, layout: TrialLayout, number: int, report: Any, should_stop: Any) -> Outcome:
    torch.set_default_dtype(torch.float64)
    return Outcome("finished")


def test_what_a_trial_sets_for_its_process_is_gone_before_the_next(tmp_path: Path) -> None:
    TrialLayout(tmp_path).begin_attempt()
    job = Job("a", "a", {}, str(tmp_path), str(tmp_path), 1, train=f"{__name__}:thinks_in_doubles")
    assert run_attempt(job, 1, lambda _step, _metrics: None, lambda: None).status == "finished"
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(("gpus", "told"), [(0.25, [0.25]), (0.5, [0.5]), (1.0, []), (0.0, [])])
def test_a_share_of_a_gpu_is_that_share_of_its_memory(
    gpus: float, told: list[float], fractions: list[float], trained: list[TrialConfig], tmp_path: Path
) -> None:
    job = Job(
        "a", "a", resolve({"preset": "short"}).model_dump(mode="json"), str(tmp_path), str(tmp_path), 1, gpus=gpus
    )
    outcome = training.run(job, TrialLayout(tmp_path), 1, lambda _step, _metrics: None, lambda: None)
    assert outcome.status == "finished"
    assert fractions == told
    (config,) = trained
    assert config.execution.device == ("auto" if gpus else "cpu")
