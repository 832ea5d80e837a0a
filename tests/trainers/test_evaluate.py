"""What an evaluation publishes of a backbone: the map of norms, and what it tells measurements about the trial."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.trainers.planted import by_number
from tests.trainers.runs import run
from trainers import train
from trainers.config import resolve
from trainers.data import DataSet, Split
from trainers.evaluate import Evaluation
from trainers.measurement import Metric, Subject
from trainers.streams import Streams


def evaluation(patch_size: int) -> Evaluation:
    settings = {"model.size": "nano", "model.image_size": 32, "data.decode_size": 32, "model.patch_size": patch_size}
    config = resolve({**settings, "tokens.probe_images": 10})
    pixels = np.zeros((10, 32, 32, 3), np.uint8)
    split = Split(pixels, {"classes": np.zeros(10, np.int64)})
    data = DataSet("zeros", ("one",), ("classes",), split, split, split, "0" * 16)
    return Evaluation(config, data, Streams(0), torch.device("cpu"))


def backbone() -> nn.Module:
    return by_number(np.arange(16.0) + 1 + np.zeros((3, 10, 1)))  # 4 × 4 patches of 32 px


def test_norms_of_the_last_layer_are_published_on_the_grid(tmp_path: Path) -> None:
    own = evaluation(8)
    own.write_norm_map(own.subject(backbone(), 0), tmp_path)
    with np.load(tmp_path / "norm_map.npz") as arrays:
        assert arrays["norms"].shape == (8, 4, 4) and arrays["images"].shape == (8, 32, 32, 3)
        assert arrays["norms"][0].tolist() == (np.arange(16.0) + 1).reshape(4, 4).tolist()
        assert arrays["layer"] == 2


def test_patches_that_do_not_fill_the_grid_are_said(tmp_path: Path) -> None:
    own = evaluation(4)
    with pytest.raises(
        ValueError, match="the backbone gives 16 patches an image, not the 8 × 8 of its image and patch"
    ):
        own.write_norm_map(own.subject(backbone(), 0), tmp_path)
    assert not list(tmp_path.iterdir())


def looking(subject: Subject, _settings: None) -> list[Metric]:
    """A measurement of a user's own, which notes what it is told of the trial."""
    assert subject.at_end and subject.fitted is not None and subject.scores is not None
    return [Metric(f"told/{name}", value) for name, value in subject.scores.items()]


def test_measurements_are_told_the_end_and_the_scores_of_the_untouched(
    tiny: dict[str, Any], tmp_path: Path, data_cache: Path
) -> None:
    _, reports = run({**tiny, "tokens.measurements": [f"{__name__}:looking"]}, tmp_path, data_cache)
    told = {name.removeprefix("told/"): value for name, value in reports[12].items() if name.startswith("told/")}
    assert {"val/linear/top1", "val/knn/top1", "test/linear/top1", "test/knn/top1"} <= set(told)
    assert told == {name: value for name, value in reports[12].items() if name.startswith(("val/", "test/"))}


def test_before_the_end_measurements_know_of_none(
    tiny: dict[str, Any], tmp_path: Path, data_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool, bool, bool]] = []
    measure = Evaluation.measure

    def noted(self: Evaluation, subject: Subject, *rest: Any, **named: Any) -> Any:
        seen.append((subject.step, subject.at_end, subject.fitted is not None, subject.scores is not None))
        return measure(self, subject, *rest, **named)

    monkeypatch.setattr(train.Evaluation, "measure", noted)
    run({**tiny, "tokens.measurements": []}, tmp_path, data_cache)
    assert seen == [(4, *[False] * 3), (8, *[False] * 3), (12, *[True] * 3)]


def taken(subject: Subject, _settings: None) -> Iterator[Metric]:
    """A user's own measurement that gives a name which the probes have."""
    yield Metric("test/linear/top1", 5.0)


def choosing(subject: Subject, _settings: None) -> Iterator[Metric]:
    """One that would say at which step the trial is scored."""
    yield Metric("score/step", 4.0)


def undefined(subject: Subject, _settings: None) -> Iterator[Metric]:
    """One that does not leave out what is undefined."""
    yield Metric("mine/ratio", float("nan"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("taken", "gives the metric test/linear/top1, a name that is taken"),
        ("choosing", "gives the metric score/step, a name that is taken"),
        ("undefined", "gives mine/ratio = nan"),
    ],
)
def test_a_measurement_of_ones_own_spoils_no_other_metric(
    name: str, message: str, tiny: dict[str, Any], tmp_path: Path, data_cache: Path
) -> None:
    with pytest.raises(ValueError, match=f"{name} {message}"):
        run({**tiny, "optim.steps": 0, "tokens.measurements": [f"{__name__}:{name}"]}, tmp_path, data_cache)
