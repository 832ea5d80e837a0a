"""Position and pixel probes: planted codes are read, their absence gives chance, by kind of patch; no padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.trainers.coded import Coded, coded_subject, images
from tests.trainers.planted import metrics
from tests.trainers.runs import run
from trainers.measurement import Subject
from trainers.probes import locality, logistic_regression
from trainers.probes.locality import LeastSquares, pixels_of
from trainers.token_settings import LocalityConfig

TRAIN, TEST, PATCHES = 80, 40, 16  # images; patches of 4 px on a grid of 4 × 4
WIDTH = 64
VALUES = 48  # of a patch: 4 · 4 · 3
CODE = 3.0

OUTLIERS = torch.zeros(TRAIN + TEST, PATCHES, dtype=torch.bool)
OUTLIERS[::2, 5] = OUTLIERS[1::4, 10] = True


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return images(TRAIN + TEST, 16, np.random.Generator(np.random.PCG64(1)))


def noise() -> Tensor:
    return torch.randn(TRAIN + TEST, PATCHES, WIDTH, generator=torch.Generator().manual_seed(2))


def with_positions(where: Tensor) -> Tensor:
    """Noise, and of the patches at `where` [n, N] a code of their own number besides."""
    code_ND = CODE * torch.eye(WIDTH)[:PATCHES] * WIDTH**0.5
    return noise() + where[..., None] * code_ND


def given(backbone: Coded, pixels: NDArray[np.uint8], **settings: Any) -> Subject:
    classes = np.zeros(TRAIN + TEST, np.int64)
    return coded_subject(backbone, pixels, classes, TEST, model__patch_size=4, **settings)


def found(subject: Subject, **settings: Any) -> dict[str, float]:
    return metrics(list(locality.measure(subject, LocalityConfig(**settings))))


def test_planted_positions_are_found_in_every_group_and_outliers_are_counted(pixels: NDArray[np.uint8]) -> None:
    values = found(given(Coded(with_positions(torch.ones_like(OUTLIERS)), OUTLIERS), pixels))
    for group in ("normal", "outlier", "all"):
        assert values[f"locality/position/{group}/top1"] == 1.0
        assert values[f"locality/position/{group}/distance"] == 0.0
    assert values["locality/outlier_fraction"] == float(OUTLIERS[TRAIN:].double().mean()) == 30 / 640
    assert set(values) == {
        "locality/outlier_fraction",
        *(
            f"locality/position/{group}/{kind}"
            for group in ("normal", "outlier", "all")
            for kind in ("top1", "distance")
        ),
        *(f"locality/pixels/{group}/l2" for group in ("normal", "outlier", "all")),
    }


def test_outliers_that_lost_their_position_are_at_chance_and_normal_patches_are_not(pixels: NDArray[np.uint8]) -> None:
    outliers = torch.rand(OUTLIERS.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    values = found(given(Coded(with_positions(~outliers), outliers), pixels))
    assert values["locality/position/normal/top1"] == 1.0
    assert values["locality/position/normal/distance"] == 0.0
    assert_chance(values["locality/position/outlier/top1"], int(outliers[TRAIN:].sum()))
    assert values["locality/position/outlier/distance"] > 1.0
    assert 0.5 < values["locality/position/all/top1"] < 1.0


def assert_chance(top1: float, count: int) -> None:
    """Within four standard deviations of one in sixteen."""
    assert abs(top1 - 1 / PATCHES) < 4 * np.sqrt((1 / PATCHES) * (1 - 1 / PATCHES) / count)


def test_without_a_code_the_position_is_at_chance(pixels: NDArray[np.uint8]) -> None:
    values = found(given(Coded(noise(), OUTLIERS), pixels))
    assert_chance(values["locality/position/all/top1"], TEST * PATCHES)
    # Two independent places on the grid are 1.83 cells apart in the mean.
    assert values["locality/position/all/distance"] == pytest.approx(1.83, abs=0.2)


def test_the_distance_is_counted_in_cells(pixels: NDArray[np.uint8]) -> None:
    column_code_ND = CODE * torch.eye(WIDTH)[torch.arange(PATCHES) % 4]
    values = found(given(Coded(column_code_ND.expand(TRAIN + TEST, -1, -1), OUTLIERS & False), pixels))
    # The column is certain and the row is not: one row is named for each column, 0 … 3 or 2 … 0 … 1 rows away.
    assert values["locality/position/all/top1"] == 0.25
    assert values["locality/position/all/distance"] in {1.0, 1.125, 1.25, 1.375, 1.5}
    assert not any("outlier/" in name for name in values)
    assert values["locality/outlier_fraction"] == 0.0


def patches_of(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Values in [0, 1] of every patch, [n, N, P]."""
    return (pixels / 255).reshape(-1, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(-1, PATCHES, VALUES)


def test_pixels_are_those_of_the_view_in_units_of_one(pixels: NDArray[np.uint8]) -> None:
    subject = given(Coded(noise(), OUTLIERS), pixels)
    values = pixels_of(subject.view(pixels[:3]), 4, (4, 4))
    assert values.shape == (3, PATCHES, VALUES)
    wanted = pixels[2, 4:8, 12:16] / 255  # row 1, column 3
    np.testing.assert_allclose(values[2, 7].view(4, 4, 3).numpy(), wanted, atol=1e-6)


def test_pixels_that_tokens_encode_linearly_are_recovered_and_those_of_other_tokens_are_not(
    pixels: NDArray[np.uint8],
) -> None:
    values_nNP = torch.from_numpy(patches_of(pixels))
    mixing = torch.randn(VALUES, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    encoded = values_nNP @ mixing + 5.0
    assert found(given(Coded(encoded, OUTLIERS & False), pixels))["locality/pixels/normal/l2"] < 1e-4
    apart = torch.where(OUTLIERS[..., None], noise() * 0.0, encoded)
    values = found(given(Coded(apart, OUTLIERS), pixels))
    assert values["locality/pixels/normal/l2"] < 0.5 < 1.5 < values["locality/pixels/outlier/l2"]


def test_tokens_that_say_nothing_leave_the_spread_of_the_pixels(pixels: NDArray[np.uint8]) -> None:
    values = found(given(Coded(torch.ones(TRAIN + TEST, PATCHES, WIDTH), OUTLIERS), pixels))
    split = patches_of(pixels)
    mean = split[:TRAIN].mean(axis=(0, 1))
    lengths = np.linalg.norm(split[TRAIN:] - mean, axis=2)
    outliers = OUTLIERS[TRAIN:].numpy()
    assert values["locality/pixels/all/l2"] == pytest.approx(lengths.mean(), rel=1e-5)
    assert values["locality/pixels/outlier/l2"] == pytest.approx(lengths[outliers].mean(), rel=1e-5)
    assert values["locality/pixels/normal/l2"] == pytest.approx(lengths[~outliers].mean(), rel=1e-5)


def test_least_squares_are_numpys_however_samples_arrive() -> None:
    random = np.random.Generator(np.random.PCG64(5))
    inputs, targets = random.normal(size=(60, 5)) * [1, 10, 0.1, 1, 1] + 3, random.normal(size=(60, 2)) + 7
    fitting = LeastSquares(5, 2, torch.device("cpu"))
    for part in (slice(0, 7), slice(7, 60)):
        fitting.add(torch.from_numpy(inputs[part]), torch.from_numpy(targets[part]))
    wanted, *_ = np.linalg.lstsq(np.column_stack([inputs, np.ones(60)]), targets)
    solved = fitting.solve()
    np.testing.assert_allclose(solved.weight_DP, wanted[:-1], rtol=1e-5)
    np.testing.assert_allclose(solved.bias_P, wanted[-1], rtol=1e-5)
    doubled = LeastSquares(10, 2, torch.device("cpu"))
    doubled.add(torch.from_numpy(np.tile(inputs, 2)), torch.from_numpy(targets))
    np.testing.assert_allclose(
        doubled.solve()(torch.from_numpy(np.tile(inputs, 2))), solved(torch.from_numpy(inputs)), rtol=1e-6
    )
    zeros = LeastSquares(2, 1, torch.device("cpu"))
    zeros.add(torch.zeros(3, 2), torch.tensor([[1.0], [2.0], [6.0]]))
    assert zeros.solve()(torch.zeros(1, 2)).item() == pytest.approx(3.0)


RIGHT = np.tile(np.array([8, 0, 16, 16], np.float32), (TRAIN + TEST, 1))  # px: columns 2 and 3 of 4 are no padding
IS_CONTENT = torch.arange(PATCHES) % 4 >= 2


def padded(backbone: Coded, pixels: NDArray[np.uint8]) -> Subject:
    return coded_subject(backbone, pixels, np.zeros(TRAIN + TEST, np.int64), TEST, RIGHT, model__patch_size=4)


def test_the_position_of_padding_is_neither_learned_nor_scored(pixels: NDArray[np.uint8]) -> None:
    tokens = with_positions(IS_CONTENT.expand(TRAIN + TEST, -1))
    tokens[:, ~IS_CONTENT] = tokens[:, IS_CONTENT]  # which pass for cells of lower numbers, if they are learned
    outliers = OUTLIERS.clone()
    outliers[:, 4] = True  # padding
    values = found(padded(Coded(tokens, outliers), pixels))
    assert values["locality/position/all/top1"] == 1.0
    assert values["locality/outlier_fraction"] == float(OUTLIERS[TRAIN:, IS_CONTENT].double().mean()) == 10 / 320


def test_the_pixels_of_padding_are_neither_learned_nor_scored(pixels: NDArray[np.uint8]) -> None:
    black = pixels.copy()
    black[:, 1:, :8] = 0  # but for the row that holds the image's number
    values = found(padded(Coded(torch.ones(TRAIN + TEST, PATCHES, WIDTH), OUTLIERS), black))
    split = patches_of(black)[:, IS_CONTENT.numpy()]
    lengths = np.linalg.norm(split[TRAIN:] - split[:TRAIN].mean(axis=(0, 1)), axis=2)
    assert values["locality/pixels/all/l2"] == pytest.approx(lengths.mean(), rel=1e-5)


def test_no_more_tokens_and_images_than_asked_are_used(
    pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[tuple[int, int]] = []
    fit_best = logistic_regression.fit_best

    def spy(tokens: Tensor, places: Tensor, cs: Any, held_out: Tensor, **rest: Any) -> Any:
        learned.append((len(tokens), int(held_out.sum())))
        return fit_best(tokens, places, cs, held_out, **rest)

    monkeypatch.setattr(logistic_regression, "fit_best", spy)
    subject = given(Coded(with_positions(torch.ones_like(OUTLIERS)), OUTLIERS), pixels)
    found(subject)
    values = found(subject, train_tokens=256, test_images=10)
    assert learned[0] == (TRAIN * PATCHES, TRAIN // 10 * PATCHES)  # all, and a tenth of the images
    assert learned[1][0] == pytest.approx(256, abs=60)
    assert values["locality/position/all/top1"] == 1.0
    found(subject, train_images=20)
    assert learned[2] == (20 * PATCHES, 2 * PATCHES)


def test_draws_repeat_and_leave_the_trials_streams_alone(pixels: NDArray[np.uint8]) -> None:
    subject = given(Coded(noise(), OUTLIERS), pixels)
    before = subject.streams.state_dict()
    assert found(subject, train_tokens=300) == found(subject, train_tokens=300)
    assert subject.streams.state_dict() == before


def test_what_cannot_be_measured_is_said(pixels: NDArray[np.uint8]) -> None:
    with pytest.raises(
        ValueError, match=r"gives 16 patch tokens where 16 px hold 2 × 2 patches of 8 px; leave locality"
    ):
        classes = np.zeros(TRAIN + TEST, np.int64)
        found(
            coded_subject(Coded(noise(), OUTLIERS), pixels, classes, TEST, model__patch_size=8, tokens__probe_images=1)
        )
    with pytest.raises(ValueError, match="at least two training images; there is one"):
        classes = np.zeros(TRAIN + TEST, np.int64)
        found(coded_subject(Coded(noise(), OUTLIERS), pixels, classes, TRAIN + TEST - 1, model__patch_size=4))


def test_one_patch_has_no_position(pixels: NDArray[np.uint8]) -> None:
    classes = np.zeros(TRAIN + TEST, np.int64)
    backbone = Coded(noise()[:, :1], OUTLIERS[:, :1])
    values = found(coded_subject(backbone, pixels, classes, TEST, model__patch_size=16))
    assert set(values) == {"locality/pixels/normal/l2", "locality/pixels/all/l2", "locality/outlier_fraction"}


def test_a_trial_reports_both_probes_at_its_end(tiny: dict[str, Any], tmp_path: Path, data_cache: Path) -> None:
    tiny |= {
        "method": "deit3",
        "model.num_registers": 1,
        "tokens.measurements": ["locality", "single_token"],
        "tokens.locality.train_images": 64,
        "tokens.single_token.draws": 2,
        "tokens.single_token.num_c": 5,
    }
    result, reports = run(tiny, tmp_path / "trial", data_cache)
    assert result.status == "finished"
    assert {step for step, values in reports.items() if "locality/pixels/all/l2" in values} == {12}
    last = reports[12]
    assert 0 <= last["locality/position/normal/top1"] <= 1 and last["locality/pixels/normal/l2"] > 0
    kinds = ("cls", "register_0", "normal")
    assert all(0 <= last[f"single_token/{kind}/top1"] <= 1 for kind in kinds)
    assert last["single_token/normal/top1_std"] >= 0 and "single_token/outlier/coverage_test" in last
