"""One token per image: planted class codes are read where they are, and nowhere else; coverage, draws, the protocol."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.trainers.coded import Coded, coded_subject, images
from tests.trainers.planted import metrics
from trainers.measurement import Subject
from trainers.probes import logistic_regression, single_token
from trainers.probes.single_token import _Drawn
from trainers.token_settings import SingleTokenConfig

TRAIN, TEST, PATCHES, CLASSES, WIDTH = 240, 160, 16, 4, 24
ALL = TRAIN + TEST
LABELS = np.random.Generator(np.random.PCG64(1)).integers(0, CLASSES, ALL)
CODES = 12.0 * torch.eye(WIDTH)[LABELS]  # of each image's class

# Every other training image and every fourth test image has two outliers.
OUTLIERS = torch.zeros(ALL, PATCHES, dtype=torch.bool)
OUTLIERS[:TRAIN:2, [3, 9]] = OUTLIERS[TRAIN::4, [0, 15]] = True

FEW = {"num_c": 8, "draws": 2}


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return images(ALL, 32, np.random.Generator(np.random.PCG64(2)))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(ALL, *shape, WIDTH, generator=torch.Generator().manual_seed(seed))


def given(backbone: Coded, pixels: NDArray[np.uint8], labels: NDArray[np.int64] = LABELS, **settings: Any) -> Subject:
    return coded_subject(backbone, pixels, labels, TEST, model__num_registers=backbone.num_registers, **settings)


def found(subject: Subject, **settings: Any) -> dict[str, float]:
    values = metrics(list(single_token.measure(subject, SingleTokenConfig(**{**FEW, **settings}))))
    return {name.removeprefix("single_token/"): value for name, value in values.items()}


def assert_chance(top1: float, count: int) -> None:
    """Within four standard deviations of one in four."""
    assert abs(top1 - 1 / CLASSES) < 4 * np.sqrt((1 / CLASSES) * (1 - 1 / CLASSES) / count)


def test_a_class_that_only_the_class_token_knows_is_read_there_alone(pixels: NDArray[np.uint8]) -> None:
    backbone = Coded(noise(PATCHES), OUTLIERS, noise(seed=1) + CODES, noise(2, seed=2))
    values = found(given(backbone, pixels))
    assert values["cls/top1"] == 1.0
    for kind in ("normal", "register_0", "register_1"):
        assert_chance(values[f"{kind}/top1"], TEST)
    for kind in ("outlier", "normal_where_outlier"):
        assert_chance(values[f"{kind}/top1"], TEST // 4)
    assert "register_2/top1" not in values and "cls/top1_std" not in values


def test_a_class_that_one_register_knows_is_read_there_alone(pixels: NDArray[np.uint8]) -> None:
    registers = noise(2, seed=2)
    registers[:, 1] += CODES
    values = found(given(Coded(noise(PATCHES), OUTLIERS, noise(seed=1), registers), pixels))
    assert values["register_1/top1"] == 1.0
    for kind in ("cls", "normal", "register_0"):
        assert_chance(values[f"{kind}/top1"], TEST)


def test_a_class_that_outliers_know_is_read_there_alone_and_coverage_is_exact(pixels: NDArray[np.uint8]) -> None:
    patches = noise(PATCHES) + OUTLIERS[..., None] * CODES[:, None]
    values = found(given(Coded(patches, OUTLIERS), pixels))
    assert values["outlier/top1"] == 1.0 and values["outlier/top1_std"] == 0.0
    assert_chance(values["normal/top1"], TEST)
    assert_chance(values["normal_where_outlier/top1"], TEST // 4)
    assert values["outlier/coverage_train"] == 0.5
    assert values["outlier/coverage_test"] == 0.25
    assert "cls/top1" not in values  # this backbone has none


def test_a_class_that_normal_patches_know_is_not_read_from_outliers(pixels: NDArray[np.uint8]) -> None:
    patches = noise(PATCHES) + ~OUTLIERS[..., None] * CODES[:, None]
    values = found(given(Coded(patches, OUTLIERS), pixels))
    assert values["normal/top1"] == values["normal_where_outlier/top1"] == 1.0
    assert_chance(values["outlier/top1"], TEST // 4)


def test_padding_stands_for_no_image(pixels: NDArray[np.uint8]) -> None:
    content = np.tile(np.array([0, 0, 16, 32], np.float32), (ALL, 1))  # px: columns 0 and 1 of 4
    is_content = (torch.arange(PATCHES) % 4 < 2).expand(ALL, -1)
    patches = noise(PATCHES) + is_content[..., None] * CODES[:, None]
    outliers = OUTLIERS & False
    outliers[:, 2] = True
    subject = coded_subject(Coded(patches, outliers), pixels, LABELS, TEST, content)
    values = found(subject)
    assert values["normal/top1"] == 1.0
    assert values["outlier/coverage_train"] == values["outlier/coverage_test"] == 0.0


def test_mean_and_deviation_are_over_the_draws(pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    subject = given(Coded(noise(PATCHES), OUTLIERS & False), pixels)
    scores = iter([0.2, 0.6, 0.4, *[None] * 6])
    monkeypatch.setattr(single_token, "_top1", lambda *_: next(scores))
    values = found(subject, draws=3)
    # √((0.2² + 0.2² + 0²) / 2) = 0.2
    assert values["normal/top1"] == pytest.approx(0.4) and values["normal/top1_std"] == pytest.approx(0.2)
    monkeypatch.undo()
    assert "normal/top1_std" not in found(subject, draws=1)


def test_where_patches_differ_draws_do_too_and_they_repeat(pixels: NDArray[np.uint8]) -> None:
    knows = torch.rand(ALL, PATCHES, generator=torch.Generator().manual_seed(5)) < 0.5
    subject = given(Coded(noise(PATCHES) + knows[..., None] * CODES[:, None], OUTLIERS), pixels)
    before = subject.streams.state_dict()
    values = found(subject, num_c=4)
    assert 0.5 < values["normal/top1"] < 0.8 and values["normal/top1_std"] > 0
    assert found(subject, num_c=4) == values
    assert subject.streams.state_dict() == before


def test_every_allowed_patch_is_drawn_equally_often_and_no_other() -> None:
    random = np.random.Generator(np.random.PCG64(6))
    allowed = torch.tensor([[True, False, True, True], [False, False, False, False]])
    number = torch.arange(4.0)[None, :, None].expand(2, -1, 1)
    drawn = _Drawn(6_000)
    drawn.add(number, allowed, torch.from_numpy(random.random((2, 6_000, 4), np.float32)))
    rows = drawn.rows()
    assert rows[0].has_n.tolist() == [True, False]
    counts = torch.bincount(torch.stack([row.tokens_nD[0, 0] for row in rows]).long(), minlength=4)
    assert counts[1] == 0
    assert all(abs(int(counts[i]) - 2_000) < 4 * np.sqrt(6_000 * 2 / 9) for i in (0, 2, 3))


@pytest.mark.parametrize("with_outlier", [9, 10])
def test_an_outlier_row_needs_ten_training_images_and_coverage_stays(
    with_outlier: int, pixels: NDArray[np.uint8]
) -> None:
    outliers = OUTLIERS.clone()
    outliers[:TRAIN] = False
    outliers[:with_outlier, 0] = True
    patches = noise(PATCHES) + OUTLIERS[..., None] * CODES[:, None]
    values = found(given(Coded(patches, outliers), pixels))
    assert ("outlier/top1" in values) is (with_outlier == 10)
    assert ("normal_where_outlier/top1" in values) is (with_outlier == 10)
    assert values["outlier/coverage_train"] == with_outlier / TRAIN


def test_outliers_of_one_class_or_in_no_test_image_leave_the_row_out(pixels: NDArray[np.uint8]) -> None:
    of_one_class = OUTLIERS & torch.from_numpy(LABELS == 2)[:, None]
    values = found(given(Coded(noise(PATCHES), of_one_class), pixels))
    assert "outlier/top1" not in values and values["outlier/coverage_train"] > 0
    in_training = OUTLIERS.clone()
    in_training[TRAIN:] = False
    values = found(given(Coded(noise(PATCHES), in_training), pixels))
    assert "outlier/top1" not in values and values["outlier/coverage_test"] == 0.0
    assert "normal/top1" in values


def test_the_protocol_is_dinov2s(pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Tensor, Tensor, list[float], Tensor]] = []
    fit_best = logistic_regression.fit_best

    def spy(features: Tensor, labels: Tensor, cs: list[float], held_out: Tensor) -> Any:
        asked.append((features, labels, cs, held_out))
        return fit_best(features, labels, cs[:2], held_out)

    monkeypatch.setattr(logistic_regression, "fit_best", spy)
    cls_nD = noise(seed=1) * 3
    list(single_token.measure(given(Coded(noise(PATCHES), OUTLIERS, cls_nD), pixels), SingleTokenConfig(draws=1)))
    features, labels, cs, held_out = asked[0]
    np.testing.assert_allclose(cs, 10.0 ** np.linspace(-6, 5, 45))
    assert torch.equal(features, cls_nD[:TRAIN])  # as they come: neither scaled nor centred
    assert labels.tolist() == LABELS[:TRAIN].tolist()
    assert int(held_out.sum()) == TRAIN // 10 and len(held_out) == TRAIN
    assert len(asked[2][0]) == TRAIN // 2  # of the outlier's row the images that have one


def test_no_more_images_than_asked_are_used(pixels: NDArray[np.uint8]) -> None:
    outliers = torch.ones(ALL, PATCHES, dtype=torch.bool)
    outliers[:, 0] = False
    subject = given(Coded(noise(PATCHES), outliers), pixels)
    rows = single_token._read(subject, "train", 50, 2), single_token._read(subject, "test", 30, 2)
    assert [len(row.classes_n) for row in rows] == [50, 30]
    assert [len(row.outlier[1].tokens_nD) for row in rows] == [50, 30]
