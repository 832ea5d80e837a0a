"""The bridge to training: memory of a share of a GPU, and the device of a trial that asked for none; no training."""

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import training
from orchestrator.attempt import Job
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
